import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import outputs, tiny, tiny_inputs

import modelwright as mw
from modelwright.core import find, tuners
from modelwright.core.errors import ModelError, RecipeError, SettingError

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
WHERE = "attn.q"


def adapted(name, kind="llama", **settings):
    """A tiny model with an adapter that has moved away from where it began."""
    method = find.find(name)
    model = mw.apply(mw.open(tiny(kind)), method(**{**method.small, **settings}))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.module.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn(value.shape, generator=random))
    return model


def loaded(folder, kind="llama"):
    stated = json.loads((folder / "adapter_config.json").read_text())
    assert (stated["peft_type"], stated["r"]) == ("LORA", stated["lora_alpha"])
    return PeftModel.from_pretrained(tiny(kind), str(folder)).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("name", "rank"), [("adapt.svfit", 5), ("adapt.loldu", 5), ("adapt.triadapt", 1), ("adapt.lora", 3)])
def test_factors_are_exact_and_of_their_own_rank(name, rank, kind, tmp_path):
    model = adapted(name, kind, **({} if name == "adapt.triadapt" else {"rank": rank}))
    done = mw.export_adapter(model, tmp_path / "lora")
    assert set(done.ranks.values()) == {rank}
    assert set(done.errors.values()) == {0.0}
    assert (outputs(loaded(tmp_path / "lora", kind)) - outputs(model.module)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["adapt.hydra", "adapt.intrinsic", "adapt.pst"])
def test_any_change_of_weights_is_one_of_some_rank(name, tmp_path):
    model = adapted(name)
    mw.export_adapter(model, tmp_path / "lora")
    assert (outputs(loaded(tmp_path / "lora")) - outputs(model.module)).abs().max() < 1e-4


def test_the_rank_of_two_updates_on_both_sides_is_their_sum(tmp_path):
    done = mw.export_adapter(adapted("adapt.hydra", parallel=2, sequential=3), tmp_path / "lora")
    assert set(done.ranks.values()) == {5}


def test_a_lower_rank_or_a_share_leaves_out_what_is_told(tmp_path):
    model = adapted("adapt.svfit", where=WHERE)
    expected = {path: layer.get_delta_weight("default") for path, layer in model.module.get_base_model().named_modules()
                if path.endswith("q_proj")}  # fmt: skip
    for rank in (4, 0.9):
        done = mw.export_adapter(model, tmp_path / f"{rank}", rank=rank)
        borne = loaded(tmp_path / f"{rank}").get_base_model()
        for path, change in expected.items():
            left = torch.linalg.svdvals(change)
            own = done.ranks[path]
            assert own == 4 if rank == 4 else left[:own].square().sum() >= 0.9 * left.square().sum() > left[: own - 1].square().sum()
            missing = (borne.get_submodule(path).get_delta_weight("default") - change).norm() / change.norm()
            assert missing.item() == pytest.approx(done.errors[path], abs=1e-3)
            assert missing.item() == pytest.approx((left[own:].square().sum().sqrt() / left.norm()).item(), abs=1e-3)


def test_lora_ga_becomes_an_adapter_of_twice_the_rank_on_the_original(tmp_path):
    model = mw.open(tiny())
    mw.apply(model, find.find("adapt.lora_ga")(rank=3), data=[tiny_inputs(tiny(), seed) for seed in range(3)])
    with torch.no_grad():
        for name, value in model.module.named_parameters():
            if "lora_" in name:
                value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    with pytest.raises(ModelError, match=r"have changed\. Name the model that they were: base"):
        mw.export_adapter(model, tmp_path / "lora")
    done = mw.export_adapter(model, tmp_path / "lora", base=tiny())
    assert set(done.ranks.values()) == {6}
    assert (outputs(loaded(tmp_path / "lora")) - outputs(model.module)).abs().max() < 1e-4
    model.save(tmp_path / "whole")
    mw.export_adapter(tmp_path / "whole", tmp_path / "again", base=tiny())
    assert (outputs(loaded(tmp_path / "again")) - outputs(model.module)).abs().max() < 1e-4
    with pytest.raises(ModelError, match=r"embed_tokens\.weight of .* differs"):
        mw.export_adapter(model, tmp_path / "other", base=tiny(seed=1))


def test_modules_that_train_whole_go_along(tmp_path):
    method = find.find("adapt.svfit")(rank=4)
    config = tuners.config_class(type(method))(rank=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny(), config)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    mw.export_adapter(model, tmp_path / "lora")
    assert torch.allclose(outputs(loaded(tmp_path / "lora")), outputs(model.eval()), atol=1e-5)
    assert not torch.allclose(outputs(model), outputs(tiny()), atol=1e-2)


def test_what_is_no_lora_is_refused_and_writes_nothing(tmp_path):
    out = tmp_path / "lora"
    with pytest.raises(ModelError, match=r"is no change of a matrix alone.*adapt\.fold"):
        mw.export_adapter(adapted("adapt.parallel"), out)
    with pytest.raises(ModelError, match="is no change of a matrix alone"):
        mw.export_adapter(adapted("adapt.hydra", "gpt2"), out)  # it moves the bias
    with pytest.raises(ModelError, match="bears no adapter"):
        mw.export_adapter(tiny(), out)
    for rank in (0, 1.5, -1):
        with pytest.raises(SettingError, match="rank is a whole number"):
            mw.export_adapter(adapted("adapt.svfit"), out, rank=rank)
    assert not out.exists()
    out.mkdir()
    (out / "file").write_text("something")
    with pytest.raises(RecipeError):
        mw.export_adapter(adapted("adapt.svfit"), out)
