import peft
import pytest
import torch
from calibration import TEXT, lettered
from test_scalearn import trained
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core.tuners import Bearer
from modelwright.methods.adapt.autolora import Autolora, exchange
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.train import Train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's


@pytest.fixture
def loras(tmp_path):
    found = [trained(tmp_path / str(rank), Lora(rank=rank, where=["attn", "mlp"]), rank) for rank in (1, 2, 4)]
    return tuple(folder for folder, _ in found), [given for _, given in found]


def gates(model):
    return [layer.parts["default"].gate for layer in model.module.modules() if isinstance(layer, Bearer)]


def adapted(sources):
    return mw.apply(mw.open(tiny()), Autolora(sources=sources))


def test_closed_gates_are_the_model_and_open_ones_a_source(loras):
    model = adapted(loras[0][:1])
    for gate in gates(model):
        gate.shift.data.fill_(40)
    assert torch.allclose(outputs(model.module), loras[1][0], atol=1e-4)
    for gate in gates(model):
        gate.out.data.zero_()
    assert torch.equal(outputs(model.module), outputs(tiny()))


def test_the_order_of_sources_does_not_matter(loras):
    one, two = adapted(loras[0]), adapted(loras[0][::-1])
    random = torch.Generator().manual_seed(0)
    for first, second in zip(gates(one), gates(two), strict=True):
        for value, other in zip(first.parameters(), second.parameters(), strict=True):
            value.data.add_(0.3 * torch.randn(value.shape, generator=random))
            other.data.copy_(value.data)
    assert torch.allclose(outputs(one.module), outputs(two.module), atol=1e-4)
    assert not torch.allclose(outputs(one.module), outputs(tiny()), atol=1e-2)


def test_gates_have_five_numbers_for_each_channel_however_many_sources_there_are(loras):
    counts = {sum(value.numel() for value in adapted(loras[0][:n]).module.parameters() if value.requires_grad) for n in (1, 3)}
    assert counts == {4 * 5 * (64 + 32 + 32 + 64 + 160 + 160 + 64)}


def test_trained_gates_take_other_sources(loras, tmp_path):
    model = mw.apply(lettered(), Autolora(sources=loras[0][:2]))
    held = {name: value.clone() for name, value in model.module.state_dict().items()}
    mw.apply(model, Train(tokens=256, batch=4, length=16, learning_rate=1e-2), data=TEXT)
    moved = {name for name, value in model.module.state_dict().items() if not torch.equal(value, held[name])}
    assert moved
    assert all(".gate." in name for name in moved)
    before = outputs(model.module)
    exchange(model.module, loras[0])
    assert len(model.module.peft_config["default"].sources) == 3
    after = outputs(model.module)
    assert not torch.allclose(before, after, atol=1e-3)
    exchange(model.module, loras[0][:2])
    assert torch.equal(outputs(model.module), before)
    exchange(model.module, loras[0])
    model.save(tmp_path / "fused")
    assert torch.allclose(outputs(peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "fused")).eval()), after, atol=1e-6)
