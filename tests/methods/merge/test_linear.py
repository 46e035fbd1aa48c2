import pytest
import torch
from calibration import normal
from merging import merged
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import ModelError, NeedError, SettingError
from modelwright.maths import task_vectors
from modelwright.methods.merge.linear import Linear

BASE = normal(30, 50)
DONORS = [BASE + 0.1 * normal(30, 50, seed=seed) for seed in (1, 2, 3)]


def test_a_case_by_hand():
    # Weights 1 and 3: (1·2 + 3·6)/4 = 5 and (1·(-4) + 3·0)/4 = -1; not divided, 20 and -4. The model itself has no say.
    base, donors = torch.tensor([100.0, 100.0]), [torch.tensor([2.0, -4.0]), torch.tensor([6.0, 0.0])]
    assert merged(Linear(weights=[1, 3]), base, donors).tolist() == [5.0, -1.0]
    assert merged(Linear(weights=[1, 3], normalize=False), base, donors).tolist() == [20.0, -4.0]
    assert merged(Linear(), base, donors).tolist() == [4.0, -2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_donor_is_returned_bit_for_bit(dtype):
    donor = DONORS[0].to(dtype)
    for method in (Linear(), Linear(weights=[0.7]), Linear(normalize=False)):
        assert torch.equal(merged(method, BASE.to(dtype), [donor]), donor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_donors_are_returned_bit_for_bit(dtype):
    donor = DONORS[0].to(dtype)
    assert torch.equal(merged(Linear(weights=[0.1, 0.2, 0.3, 0.7]), BASE.to(dtype), [donor] * 4), donor)


def test_weights_that_sum_to_one_are_task_arithmetic():
    weights = [0.2, 0.3, 0.5]
    for consensus in ({"consensus": False, "normalize": True}, {"consensus": False, "normalize": False}):
        arithmetic = task_vectors.merge(BASE, DONORS, weights, **consensus).whole()
        assert torch.allclose(merged(Linear(weights=weights), BASE, DONORS), arithmetic, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_the_donors_does_not_matter(dtype):
    donors = [donor.to(dtype) for donor in DONORS]
    one = merged(Linear(weights=[0.2, 0.3, 0.5]), BASE.to(dtype), donors)
    other = merged(Linear(weights=[0.5, 0.2, 0.3]), BASE.to(dtype), [donors[2], donors[0], donors[1]])
    assert torch.allclose(one, other, rtol=2**-23 if dtype == torch.float32 else 2**-7)
    assert (one != other).float().mean() < 0.01  # what lies half way between two values


def test_a_negative_weight_takes_away():
    ours = merged(Linear(weights=[1.0, -1.0, 1.0], normalize=False), BASE, DONORS)
    assert torch.allclose(ours, DONORS[0] - DONORS[1] + DONORS[2], atol=1e-6)


def test_every_float_tensor_of_a_model_is_averaged_and_the_donors_are_left():
    donors = [tiny(seed=5), tiny(seed=6)]
    before = [{name: value.clone() for name, value in donor.state_dict().items()} for donor in donors]
    model = mw.apply(tiny(seed=1), Linear(weights=[1, 3]), donors=donors)
    names = [name for name, _ in model.named_parameters()]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(names)
    for name in names:
        exact = (before[0][name].double() + 3 * before[1][name].double()) / 4
        assert torch.equal(model.get_parameter(name), exact.float()), name
    for donor, values in zip(donors, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in donor.state_dict().items())


def test_experts_and_tied_heads_are_averaged_and_stay_tied():
    config = {"tie_word_embeddings": True}
    donors = [tiny("mixtral", seed=5, **config), tiny("mixtral", seed=6, **config)]
    model = mw.apply(tiny("mixtral", **config), Linear(), donors=donors)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stacks = [donor.model.layers[1].mlp.experts.gate_up_proj for donor in donors]
    assert torch.allclose(model.model.layers[1].mlp.experts.gate_up_proj, (stacks[0] + stacks[1]) / 2, atol=1e-7)


def test_donors_of_another_shape_are_refused_with_the_difference():
    with pytest.raises(
        ModelError, match=r"12 tensors have other shapes, first .*layers\.0\.mlp\.gate_proj\.weight: \(96, 64\) against \(160, 64\)"
    ):
        mw.apply(tiny(), Linear(), donors=[tiny(intermediate_size=96)])
    with pytest.raises(ModelError, match=r"lacks 9 tensors"):
        mw.apply(tiny(), Linear(), donors=[tiny(num_hidden_layers=3)])
    with pytest.raises(NeedError, match=r"merge\.linear needs donors"):
        mw.apply(tiny(), Linear())


def test_weights_that_cannot_be_used_are_refused():
    with pytest.raises(SettingError, match="2 weights for 3 donors"):
        merged(Linear(weights=[1, 2]), BASE, DONORS)
    with pytest.raises(SettingError, match=r"merge.linear: the weights sum to 0.*normalize: false"):
        Linear(weights=[1, -1])
    assert torch.allclose(merged(Linear(weights=[1, -1], normalize=False), BASE, DONORS[:2]), DONORS[0] - DONORS[1])
