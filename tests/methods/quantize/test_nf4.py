import torch

from modelwright.maths.levels import named
from modelwright.methods.quantize.gptq import Gptq
from modelwright.methods.quantize.nf4 import Nf4
from modelwright.methods.quantize.rtn import Rtn


def test_a_case_by_hand():
    # The largest size is 4, so that -4 is level -1, 0 level 0, and 1.0 = 0.25 · 4 lies nearest to level 0.2461123.
    weight = torch.tensor([[-4.0, 0.0, 1.0, 3.9] * 16])
    found = Nf4(nested=False).tensor(weight).dense()
    assert found[0, :3].tolist() == [-4.0, 0.0, 4 * 0.24611230194568634]
    assert found[0, 3] == 4.0


def test_the_largest_of_a_group_is_exact_and_zero_stays_zero():
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(2))
    weight[:, ::7] = 0
    found = Nf4(nested=False).tensor(weight).dense()
    groups, largest = found.view(32, 4, 64), weight.view(32, 4, 64).abs().argmax(-1, keepdim=True)
    at_largest = weight.view(32, 4, 64).gather(-1, largest)
    assert torch.equal(groups.gather(-1, largest).abs().float(), at_largest.abs())
    assert (found[:, ::7] == 0).all()


def test_bits_for_each_weight_are_those_of_the_paper():
    layer = Nf4().tensor(torch.randn(256, 1024))
    bits = layer.stored_bytes() * 8 / (256 * 1024)
    assert abs(bits - 4.127) < 0.001
    assert Nf4(nested=False).tensor(torch.randn(256, 1024)).stored_bytes() * 8 / (256 * 1024) == 4.5


def test_it_is_rounding_on_that_grid_and_gptq_takes_the_same_grid():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(3))
    ours, theirs = Nf4().tensor(weight), Rtn(grid="nf4", group=64, nested=True).tensor(weight)
    assert torch.equal(ours.dense(), theirs.dense())
    from calibration import correlated, cost, gathered

    seen = gathered(correlated(400, 128))
    swept = Gptq(grid="nf4", group=64).layer(weight, seen).dense()
    table = named("nf4")
    scale = weight.view(16, 2, 64).abs().amax(-1)
    shares = swept.view(16, 2, 64) / scale[..., None]
    assert (shares[..., None] - table.values).abs().amin(-1).max() < 1e-6  # on the grid of the original weight
    assert cost(weight, swept, seen.moment) < 0.8 * cost(weight, Rtn(grid="nf4", group=64).tensor(weight).dense(), seen.moment)
