import pytest
import torch
from calibration import normal
from merging import merged
from tiny import tiny, tiny_inputs

import modelwright as mw
from modelwright.core.errors import NeedError
from modelwright.methods.merge.passthrough import Passthrough

BASE, DONOR = normal(30, 50), normal(30, 50, seed=1)


def test_a_case_by_hand():
    assert merged(Passthrough(scale=0.5), torch.ones(2), [torch.tensor([4.0, -3.0])]).tolist() == [2.0, -1.5]
    assert merged(Passthrough(scale=-2.0), torch.ones(2), [torch.tensor([4.0, -3.0])]).tolist() == [-8.0, 6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_donor_is_returned_bit_for_bit(dtype):
    assert torch.equal(merged(Passthrough(), BASE.to(dtype), [DONOR.to(dtype)]), DONOR.to(dtype))


def test_only_the_chosen_weights_are_taken_over():
    model, donor = tiny(seed=1), tiny(seed=5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    mw.apply(model, Passthrough(where="mlp"), donors=[donor])
    for name, value in model.named_parameters():
        assert torch.equal(value, donor.get_parameter(name) if ".mlp." in name else before[name]), name


def test_blocks_whose_outputs_are_zeroed_add_nothing():
    donor = tiny(seed=5)
    model = mw.apply(tiny(seed=1), Passthrough(scale={"attn.o": 0.0, "mlp.down": 0.0, "*": 1.0}), donors=[donor])
    inputs = tiny_inputs(model)
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[-1], model.model.norm(hidden[0]))


def test_scale_may_change_over_depth():
    donor = tiny(seed=5)
    model = mw.apply(tiny(seed=1), Passthrough(scale=[1.0, 3.0], where="mlp"), donors=[donor])
    last = len(model.model.layers) - 1
    for block, scale in ((0, 1.0), (last, 3.0)):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        assert torch.allclose(model.get_parameter(name), scale * donor.get_parameter(name))


def test_two_donors_are_refused():
    with pytest.raises(NeedError, match=r"merge\.passthrough takes 1 donor; the step gives 2"):
        mw.apply(tiny(), Passthrough(), donors=[tiny(), tiny()])
