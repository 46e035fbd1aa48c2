import pytest
import torch

from modelwright.maths import companding
from modelwright.maths.companding import decode, encode


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(values):
    """Groups of 8-bit floats with a scale alone."""
    grouped = values.view(-1, companding.GROUP)
    scale = grouped.abs().amax(1, keepdim=True) / 448
    return ((grouped / scale).to(torch.float8_e4m3fn).float() * scale).flatten()


def lost(found, values):
    return float((found - values).square().mean())


def test_a_case_by_hand():
    # Sizes from 2^-8 to 2^8: c = 1, k = floor(16 · 16.61 / 16) / 16 = 1; the largest code is 448, of 2^8, and that of -1 is -1.75.
    found = encode(torch.tensor([256.0, -1.0, 2.0**-8, 0.0]))
    assert found.centre.tolist() == [1.0]
    assert found.power.tolist() == [1.0]
    assert found.scale.tolist() == pytest.approx([256 / 448])
    assert found.codes.float()[[0, 1, 3]].tolist() == [448.0, -1.75, 0.0]
    assert decode(found).tolist() == pytest.approx([256.0, -1.0, 2.0**-8, 0.0], abs=2.0**-10 * 256 / 448 * 1.001)  # half a step of 2^-9


def test_a_narrow_range_by_hand():
    # Sizes from 2^-5 to 2^5: log2(M / μ) = 10 and log2(448² / 2) = 16.615, so that k = floor(16 · 1.6615) / 16 = 26 / 16.
    assert encode(torch.tensor([32.0, -1 / 32, 1.0])).power.tolist() == [1.625]
    assert len(encode(torch.ones(129)).scale) == 2  # groups of 128


def test_spreading_is_undone_exactly_before_rounding():
    values = normal(companding.GROUP) * 1e-3
    found = encode(values)
    spread = torch.copysign((values.abs() / found.centre).pow(found.power) / found.scale, values)
    back = torch.copysign((spread * found.scale).abs().pow(1 / found.power) * found.centre, spread)
    assert torch.allclose(back, values, rtol=1e-5)


@pytest.mark.parametrize("squares", [20, 300])
def test_groups_of_a_narrow_range_lose_less_than_in_plain_floats_of_8_bits(squares):
    first, second = normal(64 * companding.GROUP), normal(64 * companding.GROUP, squares, seed=1).square().mean(1)
    assert lost(decode(encode(first)), first) < 0.5 * lost(plain(first), first)  # a third was measured
    assert lost(decode(encode(second)), second) < (0.03 if squares == 20 else 0.01) * lost(plain(second), second)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("range", [1.0, 1e3, 1e12])
def test_signs_and_zeros_stay_and_nothing_else_becomes_zero(scale, range):
    values = normal(1000) * torch.logspace(0, -torch.tensor(range).log10(), 1000) * scale
    values[::7] = 0
    found = decode(encode(values))
    assert found.isfinite().all()
    assert torch.equal(found.sign(), values.sign())


def test_equal_sizes_are_kept_and_zeros_alone_are_zeros():
    values = torch.full((300,), -3.3)
    assert torch.allclose(decode(encode(values)), values)
    assert encode(values).power.tolist() == [1.0] * 3
    assert decode(encode(torch.zeros(130))).tolist() == [0.0] * 130
    assert decode(encode(torch.zeros(0))).tolist() == []


def test_a_zero_does_not_make_the_range_wider():
    values = normal(companding.GROUP).abs() + 1
    other = values.clone()
    other[5] = 0
    assert encode(other).power[0] >= encode(values).power[0] > 1


def test_powers_are_parts_of_sixteen_up_to_the_highest():
    powers = encode(torch.cat([normal(128) * 1e-5, 1 + 1e-4 * torch.rand(128), 10.0 ** torch.linspace(-37, 37, 128)])).power
    assert torch.equal(powers * companding.PARTS, (powers * companding.PARTS).round())
    assert powers[1] == companding.HIGHEST
    assert powers[2] == 1 / companding.PARTS
