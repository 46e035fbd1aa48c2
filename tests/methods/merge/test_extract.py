import copy
import json

import pytest
import torch
from calibration import lettered, normal
from peft import PeftModel
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core.errors import ModelError, NeedError
from modelwright.maths.low_rank import change_factors, product_factors, rounding
from modelwright.methods.merge.extract import Extract

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's, in from_pretrained
    pytest.mark.filterwarnings("ignore:.*tied:UserWarning"),  # and when it copies a tied embedding
]


def finetuned(module, rank: int = 3, only: str = "_proj", seed: int = 7):
    """A copy with random changes of a rank in the matrices whose names hold `only`."""
    made = copy.deepcopy(module)
    with torch.no_grad():
        for number, (name, value) in enumerate(made.named_parameters()):
            if only in name and value.ndim == 2:
                value += 0.05 * normal(value.shape[0], rank, seed=seed + number) @ normal(rank, value.shape[1], seed=seed - 1 - number)
    return made


def test_a_case_by_hand():
    # The change [[3, 0], [4, 0], [0, 1]] has singular values 5 and 1: 25/26 of its square has rank 1.
    change = torch.tensor([[3.0, 0], [4, 0], [0, 1]])
    up, down, energy = change_factors(change, 1)
    assert torch.allclose(up @ down, torch.tensor([[3.0, 0], [4, 0], [0, 0]]), atol=1e-6)
    assert energy == pytest.approx(25 / 26)
    assert up.norm().item() == pytest.approx(5**0.5) == down.norm().item()
    assert [len(change_factors(change, 9, keep)[1]) for keep in (0.0, 0.9, 25 / 26, 0.97, 1.0)] == [1, 1, 1, 2, 2]
    assert len(change_factors(change, 9, floor=1.5)[1]) == 1
    assert change_factors(torch.zeros(3, 2), 9)[2] == 1.0


def test_what_is_dropped_is_the_sum_of_the_squares_of_the_other_singular_values():
    change = normal(20, 30)
    values = torch.linalg.svdvals(change)
    up, down, energy = change_factors(change, 7)
    assert (change - up @ down).square().sum().item() == pytest.approx(values[7:].square().sum().item(), rel=1e-4)
    assert energy == pytest.approx((values[:7].square().sum() / values.square().sum()).item())


def test_factors_of_a_product_are_those_of_the_matrix():
    tall, wide = normal(20, 6), normal(6, 30, seed=1)
    up, down = product_factors(tall, wide, 4)
    expected = change_factors(tall @ wide, 4)
    assert torch.allclose(up @ down, expected[0] @ expected[1], atol=1e-4)
    assert product_factors(tall, wide, 50)[0].shape == (20, 6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("outside", ["whole", "factors"])
def test_plain_peft_gives_the_finetuned_model_back(kind, outside, tmp_path):
    base, donor = lettered(kind), tiny(kind, seed=4)
    expected = outputs(donor)
    base.save(tmp_path / "base")
    extracted = mw.apply(base, Extract(outside=outside), donors=[donor])
    assert torch.allclose(outputs(extracted.module), expected, atol=1e-5)
    extracted.save(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny(kind), str(tmp_path / "adapter")).merge_and_unload().eval()
    assert torch.allclose(outputs(plain), expected, atol=1e-5)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    saved, factored = ({path.rpartition(".")[2] for path in stated[key] or ()} for key in ("modules_to_save", "target_modules"))
    ends = {"wte", "wpe"} if kind == "gpt2" else {"embed_tokens", "lm_head"}
    first = ends if outside == "whole" else ends & {"wte"}  # gpt2's head is its embedding, which is always saved whole
    assert (ends & saved, ends & factored) == (first, ends - first)


@pytest.mark.parametrize("outside", ["whole", "factors"])
def test_a_head_that_is_tied_follows_the_embedding(outside, tmp_path):
    base, donor = lettered(tie_word_embeddings=True), tiny(seed=4, tie_word_embeddings=True)
    expected = outputs(donor)
    extracted = mw.apply(base, Extract(outside=outside), donors=[donor])
    assert torch.allclose(outputs(extracted.module), expected, atol=1e-5)
    extracted.save(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny(tie_word_embeddings=True), str(tmp_path / "adapter")).merge_and_unload().eval()
    assert torch.allclose(outputs(plain), expected, atol=1e-5)


def test_every_layer_has_the_rank_of_its_own_change(tmp_path):
    base = tiny()
    donor = finetuned(base, 3)
    with torch.no_grad():
        donor.model.layers[1].mlp.up_proj.weight.copy_(base.model.layers[1].mlp.up_proj.weight)
        donor.model.layers[2].mlp.up_proj.weight.copy_(base.model.layers[2].mlp.up_proj.weight + 0.01)  # rank 1
    model = mw.apply(mw.open(copy.deepcopy(base)), Extract(), donors=[donor])
    notes, details = model.history[-1]["notes"], model.history[-1]["details"]
    assert "model.layers.0.mlp.up_proj: rank 3 of 64, 100.0000% of the change's square" in details
    assert "model.layers.2.mlp.up_proj: rank 1 of 64, 100.0000% of the change's square" in details
    assert not any("layers.1.mlp.up_proj" in line for line in (*notes, *details))
    assert any("27 layers have ranks from 1 to 3, with 100.0000% to 100.0000% of the squares" in note for note in notes), notes
    model.save(tmp_path / "adapter")
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stated["r"] == stated["lora_alpha"] == 3
    assert stated["rank_pattern"] == stated["alpha_pattern"] == {"model.layers.2.mlp.up_proj": 1}
    plain = PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter"))
    assert torch.allclose(outputs(plain.merge_and_unload()), outputs(donor), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_that_was_rounded_has_the_rank_that_it_had(dtype):
    base = tiny().to(dtype)
    model = mw.open(copy.deepcopy(base))
    donor = finetuned(tiny().to(dtype).float(), 3).to(dtype)
    mw.apply(model, Extract(), donors=[donor])
    ranks = [note.split("rank ")[1].split(" of")[0] for note in model.history[-1]["details"] if "_proj: rank" in note]
    assert len(ranks) == 28
    assert set(ranks) == {"3"}


def test_what_has_no_two_sides_is_saved_whole_once():
    """The embeddings of a vision transformer hold parameters of their own and a convolution: saved whole together."""
    model, donor = mw.open(tiny("vit")), tiny("vit", seed=4)
    mw.apply(model, Extract(), donors=[donor])
    assert torch.allclose(outputs(model.module), outputs(donor), atol=1e-5)
    (said,) = [note for note in model.history[-1]["notes"] if "saved whole" in note]
    paths = said.split(": ")[2].split(", ")
    assert "vit.embeddings" in paths
    assert not any(path.startswith("vit.embeddings.") for path in paths)


def test_rounding_alone_has_no_rank():
    for dtype in (torch.float32, torch.bfloat16):
        weight, change = normal(80, 60).to(dtype), normal(80, 2, seed=1) @ normal(2, 60, seed=2)
        rounded = (weight.float() + change).to(dtype).float() - weight.float()
        assert len(change_factors(rounded, 60, floor=rounding(weight))[1]) == 2


def test_a_lower_rank_and_a_lower_share_are_kept_to():
    base, donor = tiny(), tiny(seed=4)
    for settings in (dict(rank=5), dict(keep=0.5)):
        model = mw.apply(mw.open(tiny()), Extract(**settings), donors=[donor])
        up = model.module.get_base_model().model.layers[0].mlp.up_proj
        change = donor.model.layers[0].mlp.up_proj.weight - base.model.layers[0].mlp.up_proj.weight
        values = torch.linalg.svdvals(change).square()
        rank = 5 if "rank" in settings else int((values.cumsum(0) < 0.5 * values.sum()).sum()) + 1
        assert up.r["default"] == rank
        left, right = up.lora_B["default"].weight, up.lora_A["default"].weight
        assert (change - left @ right).square().sum().item() == pytest.approx(values[rank:].sum().item(), rel=1e-3)


def test_a_model_that_does_not_differ_gives_an_adapter_that_adds_nothing(tmp_path):
    model = mw.apply(mw.open(tiny()), Extract(), donors=[tiny()])
    assert torch.equal(outputs(model.module), outputs(tiny()))
    assert "does not differ" in model.history[-1]["notes"][0]


def test_one_donor_of_the_models_shapes_is_needed():
    with pytest.raises(NeedError, match=r"merge\.extract takes 1 donor; the step gives 2"):
        mw.apply(tiny(), Extract(), donors=[tiny(), tiny()])
    with pytest.raises(ModelError, match="other shapes"):
        mw.apply(tiny(), Extract(), donors=[tiny(intermediate_size=96)])
