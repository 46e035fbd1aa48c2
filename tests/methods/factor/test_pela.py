import copy
import math

import pytest
import torch
from calibration import TEXT, blocks_of, lettered
from tiny import outputs, tiny, tiny_inputs
from torch.nn import functional

import modelwright as mw
from modelwright.blocks.low_rank import LowRankLinear
from modelwright.core.errors import ModelError, SettingError
from modelwright.core.given import Given
from modelwright.core.model import Model, emptied, put
from modelwright.core.plan import predict
from modelwright.maths.low_rank import factor
from modelwright.methods.factor.pela import Pela
from modelwright.methods.factor.svd import Svd

BRIEF = {"tokens": 2048, "batch": 4, "length": 32, "learning_rate": 2e-3}
WHOLE = torch.ones(2, 12, dtype=torch.bool)


@pytest.fixture
def pair():
    """A factored model, its original, and ids."""
    teacher = tiny()
    return mw.apply(tiny(), Svd(keep=0.5)), teacher, tiny_inputs(teacher)["input_ids"]


def full_rank(module):
    """The same function, with every matrix of the blocks as two factors of its full rank."""
    model = Model(name="", module=module)
    for site in model.sites():
        if site.depth is not None:
            weight = module.get_parameter(site.name).data
            put(module, site, LowRankLinear.from_factors(*factor(weight, min(weight.shape))))
    return module


def test_a_case_by_hand():
    states = [torch.tensor([[[1.0, 2.0], [9.0, 9.0]]]), torch.tensor([[[0.0, 0.0], [9.0, 9.0]]])]
    wanted = [torch.tensor([[[1.0, 4.0], [0.0, 0.0]]]), torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])]
    # (0 + 4)/2 = 2 and (1 + 1)/2 = 1 on the first token; the second does not count.
    assert Pela().apart(states, wanted, torch.tensor([[True, False]])).item() == pytest.approx(1.5)
    # One matrix of rank 1 beside W: max|BA - W| = 0.5, from which 0.1 is free: 0.4² = 0.16.
    teacher = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    teacher[0].weight.data = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    student = torch.nn.Sequential(LowRankLinear.from_factors(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]])))
    assert Pela(radius=0.1).moved(student, teacher).item() == pytest.approx(0.16)


def test_the_full_rank_is_the_same_function_and_costs_nothing():
    module, teacher = full_rank(tiny()), tiny()
    assert torch.allclose(outputs(module), outputs(teacher), atol=1e-4)
    ids = tiny_inputs(teacher)["input_ids"]
    loss, parts = Pela(text=0, features=1, logits=1, near=1, radius=0).loss(module, ids, WHOLE, teacher)
    assert parts.keys() == {"text", "features", "logits", "near"}
    assert float(loss.detach()) < 1e-8


def test_the_loss_is_the_weighted_sum_of_its_parts(pair):
    module, teacher, ids = pair
    with torch.no_grad():
        found, wanted = (each(input_ids=ids, output_hidden_states=True) for each in (module, teacher))
        pairs = list(zip(found.hidden_states[1:], wanted.hidden_states[1:], strict=True))
        expected = {
            "text": functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
            "features": sum(((one - two) ** 2).mean() for one, two in pairs) / 4,
            "logits": ((found.logits - wanted.logits) ** 2).mean(),
        }
        weights = {path: layer.dense() for path, layer in module.named_modules() if isinstance(layer, LowRankLinear)}
        far = [(weight - teacher.get_submodule(path).weight).abs().max() - 0.02 for path, weight in weights.items()]
        expected["near"] = sum(value**2 for value in far) / len(far)
        assert len(far) == 28
        loss, parts = Pela(text=0.3, features=2, logits=0.7, near=5, radius=0.02).loss(module, ids, WHOLE, teacher)
    for name, weight in {"text": 0.3, "features": 2, "logits": 0.7, "near": 5}.items():
        assert float(parts[name]) == pytest.approx(weight * float(expected[name]), rel=1e-4), name
    assert float(loss) == pytest.approx(sum(map(float, parts.values())), rel=1e-5)


def test_before_training_it_is_svd_and_its_error_the_singular_values_that_are_dropped():
    assert Pela(keep=0.4, where="mlp", skip="block 0").first() == Svd(keep=0.4, where="mlp", skip="block 0")
    weight = tiny().model.layers[0].mlp.up_proj.weight.data
    layer = Pela(keep=0.4).first().tensor(weight)
    dropped = torch.linalg.svdvals(weight.double())[layer.rank :]
    assert (weight - layer.dense()).norm().item() == pytest.approx(float(dropped.square().sum().sqrt()), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_comes_nearer_to_the_teacher_inside_and_stores_two_factors(kind):
    model, teacher = lettered(kind), lettered(kind)
    kept = copy.deepcopy(teacher.module.state_dict())
    plain = mw.apply(lettered(kind), Svd(keep=0.5))
    sizes = {name: weight.shape for name, weight in blocks_of(teacher)}
    mw.apply(model, Pela(keep=0.5, text=0, logits=1, near=1, **BRIEF), data=TEXT, teacher=teacher)
    ids = torch.tensor(model.tokenizer(TEXT[0][:60])["input_ids"])[None]

    def apart(module):
        with torch.no_grad():
            return float(Pela(text=0).loss(module, ids, torch.ones_like(ids).bool(), teacher.module)[0])

    assert apart(model.module) < 0.7 * apart(plain.module)
    assert all(torch.equal(value, kept[name]) for name, value in teacher.module.state_dict().items())
    layers = {path: layer for path, layer in model.module.named_modules() if isinstance(layer, LowRankLinear)}
    assert len(layers) == len(sizes)
    for name, shape in sizes.items():
        layer = layers[name.removesuffix(".weight")]
        assert layer.rank == int(0.5 * math.prod(shape) / sum(shape))
        assert layer.a.weight.numel() + layer.b.weight.numel() == layer.rank * sum(shape)
    assert "low-rank" in model.marks


def test_the_plan_knows_the_factors():
    module = emptied(tiny())
    predicted, _ = predict(module, Pela(keep=0.5), Given())
    expected = mw.apply(tiny(), Svd(keep=0.5))
    assert {name: value.shape for name, value in predicted.named_parameters()} == {
        name: value.shape for name, value in expected.named_parameters()
    }


def test_what_cannot_be_learnt_is_refused(pair):
    module, _, ids = pair
    with pytest.raises(SettingError, match="nothing would be learnt"):
        Pela(text=0, features=0)
    with pytest.raises(ModelError, match="other blocks or another width"):
        Pela().loss(module, ids, WHOLE, tiny(num_hidden_layers=3))
    with pytest.raises(ModelError, match=r"near needs model.layers.0.self_attn.q_proj of the teacher"):
        Pela(near=1).loss(module, ids, WHOLE, mw.apply(tiny(), Svd(keep=0.5)))
