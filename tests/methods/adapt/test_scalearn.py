import peft
import pytest
import torch
from calibration import TEXT, lettered
from safetensors.torch import load_file, save_file
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core.errors import LayoutError, ModelError, SettingError
from modelwright.core.tuners import Bearer
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.adapt.parallel import Parallel
from modelwright.methods.adapt.scalearn import Scalearn
from modelwright.methods.adapt.series import Series
from modelwright.methods.train import Train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
BRIEF = Train(tokens=256, batch=4, length=16, learning_rate=1e-2)
FORMS = [{}, {"uniform": True}, {"common": True}, {"uniform": True, "common": True}]


def trained(folder, method, seed=0):
    """A folder with an adapter that is not what it began as, and the outputs of the model with it."""
    model = mw.apply(mw.open(tiny()), method)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.module.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=random))
    model.save(folder)
    return str(folder), outputs(model.module)


@pytest.fixture
def loras(tmp_path):
    where = ["attn.q", "mlp.down"]
    found = [trained(tmp_path / str(rank), Lora(rank=rank, alpha=5.0, where=where), rank) for rank in (2, 3)]
    return tuple(folder for folder, _ in found), [given for _, given in found]


def adapted(sources, **settings):
    torch.manual_seed(0)
    return mw.apply(mw.open(tiny()), Scalearn(sources=sources, **settings))


def coefficients(model):
    return [value for name, value in model.module.named_parameters() if value.requires_grad]


def test_a_case_by_hand(tmp_path):
    # One source with B A = 2 at (output 5, input 1); ω = 3 at output 5: the weight there grows by 6.
    folder, _ = trained(tmp_path / "one", Lora(rank=1, alpha=1, where="mlp.up"))
    file = tmp_path / "one" / "adapter_model.safetensors"
    held = {name: torch.zeros_like(value) for name, value in load_file(file).items()}
    for name, value in held.items():
        if "lora_A" in name:
            value[0, 1] = 1.0
        else:
            value[5, 0] = 2.0
    save_file(held, file)
    model = adapted((folder,))
    with torch.no_grad():
        for value in coefficients(model):
            value.zero_()[0, 5] = 3.0
    mw.apply(model, Fold())
    change = model.module.model.layers[2].mlp.up_proj.weight - tiny().model.layers[2].mlp.up_proj.weight
    assert change[5, 1].item() == pytest.approx(6.0, abs=1e-6)
    assert change.count_nonzero() == 1


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_coefficients_is_the_papers(loras, form):
    tasks, channels, layers = 2, 64, 8  # q and down give 64 channels each, in 4 blocks
    count = sum(value.numel() for value in coefficients(adapted(loras[0], **form)))
    assert count == tasks * (1 if "uniform" in form else channels) * (1 if "common" in form else layers)


@pytest.mark.parametrize("form", FORMS)
def test_a_single_task_with_coefficient_one_is_its_adapter(loras, form):
    model = adapted(loras[0], **form)
    for task, expected in enumerate(loras[1]):
        with torch.no_grad():
            for value in coefficients(model):
                value.zero_()[task] = 1
        assert torch.allclose(outputs(model.module), expected, atol=1e-5)
    mw.apply(model, Fold())
    assert torch.allclose(outputs(model.module), loras[1][-1], atol=1e-4)


def test_equal_coefficients_in_all_layers_are_common_ones(loras):
    one, two = adapted(loras[0], uniform=True), adapted(loras[0], uniform=True, common=True)
    with torch.no_grad():
        for value in [*coefficients(one), *coefficients(two)]:
            value.copy_(torch.tensor([[0.7], [1.9]]))
    assert torch.equal(outputs(one.module), outputs(two.module))


def test_they_begin_at_two_over_the_tasks_and_drop_while_training(loras):
    model = adapted(loras[0])
    values = torch.cat([value.flatten() for value in coefficients(model)])
    assert values.mean().item() == pytest.approx(2 / 2, abs=1e-3)
    assert values.std().item() == pytest.approx(1e-3, rel=0.2)
    gate = next(layer for layer in model.module.modules() if isinstance(layer, Bearer)).parts["default"].gate.train()
    dropped = torch.stack([gate(None, ()) for _ in range(20)])
    assert torch.equal(gate.constants(), gate.own.scales)  # what is merged is whole
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(gate.eval().constants(), gate.own.scales)


def test_only_coefficients_train(loras):
    model = mw.apply(lettered(), Scalearn(sources=loras[0]))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    mw.apply(model, BRIEF, data=TEXT)
    moved = [name for name, value in model.module.state_dict().items() if not torch.equal(value, before[name])]
    assert moved
    assert all(name.endswith("gate.own.scales") for name in moved)


@pytest.mark.parametrize("method", [Parallel(inner=4, where="mlp.down"), Series(inner=4, where="mlp.down", activation="relu", scale=2.0)])
def test_bottlenecks_are_sources_too(tmp_path, method):
    folder, expected = trained(tmp_path / "one", method)
    side = "after" if isinstance(method, Series) else "beside"
    model = adapted((folder,), activation=method.activation, side=side, uniform=True)
    with torch.no_grad():
        for value in coefficients(model):
            value.fill_(1)
    assert torch.allclose(outputs(model.module), expected, atol=1e-5)
    with pytest.raises(SettingError, match=rf"has activation {method.activation} and stands {side} layers"):
        adapted((folder,))


def test_the_folder_holds_the_sources_whose_own_may_go(tmp_path):
    folder, _ = trained(tmp_path / "one", Lora(rank=2))
    model = adapted((folder,))
    model.save(tmp_path / "mixed")
    (tmp_path / "one").rename(tmp_path / "gone")
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "mixed")).eval()
    assert torch.equal(outputs(loaded), outputs(model.module))


def test_what_cannot_be_mixed_is_refused(tmp_path, loras):
    with pytest.raises(SettingError, match=r"adapt\.scalearn: it mixes adapters that were trained before\. Name their folders"):
        adapted(())
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors\. Name the folder"):
        adapted((str(tmp_path / "none"),))
    with pytest.raises(LayoutError, match=r"none of the chosen layers is adapted in"):
        adapted(loras[0], where="mlp.up")
    with pytest.raises(SettingError, match=r"layers of 32, 64 channels cannot have common coefficients of channels\. Add uniform"):
        adapted((trained(tmp_path / "k", Lora(where=["attn.{q,k}"]))[0],), common=True)
    with pytest.raises(ModelError, match=r"was trained on another model: at model\.layers\.0\.self_attn\.q_proj it is 64 × 64"):
        mw.apply(mw.open(tiny(hidden_size=72, num_attention_heads=3, num_key_value_heads=1)), Scalearn(sources=loras[0]))
    model = mw.apply(mw.open(tiny()), Scalearn(sources=loras[0]))
    model.save(tmp_path / "mixed")
    with pytest.raises(ModelError, match=r"holds a SCALEARN adapter, and sources are LoRA, adapt\.parallel or adapt\.series"):
        adapted((str(tmp_path / "mixed"),))
