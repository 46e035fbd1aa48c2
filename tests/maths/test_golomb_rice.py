import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from modelwright.core.errors import WeightsError
from modelwright.maths.bits import unpacked
from modelwright.maths.golomb_rice import bits_of_one, decode, encode, parameter
from modelwright.maths.prefix_codes import entropy


def places(count, share, seed=0):
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share).nonzero().view(-1)


def test_a_case_by_hand():
    # Ones at 1, 4 and 12 have the gaps 1, 2 and 7. With b = 1: 1 = 0·2 + 1, 2 = 1·2 + 0, 7 = 3·2 + 1: 1 | 01 | 0001 and 1 0 1.
    ones, lower = encode(torch.tensor([1, 4, 12]), 1)
    assert unpacked(ones, 8).int().tolist() == [1, 0, 1, 0, 0, 0, 1, 0]
    assert unpacked(lower, 8).int().tolist() == [1, 0, 1, 0, 0, 0, 0, 0]
    assert decode(ones, lower, 1, 3).tolist() == [1, 4, 12]


@pytest.mark.parametrize(("share", "b", "total"), [(0.05, 4, 0.339), (0.1, 3, 0.576), (0.2, 2, 0.939), (0.5, 0, 1.5)])
def test_the_parameter_and_the_bits_of_an_entry_are_the_papers(share, b, total):
    assert parameter(share) == b
    assert share * (bits_of_one(share) + 1) == pytest.approx(total, abs=1e-3)  # with a sign each


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_measured_sizes_are_within_two_hundredths_of_the_formula(share):
    found = places(1 << 20, share)
    ones, lower = encode(found, parameter(share))
    assert 8 * (len(ones) + len(lower)) == pytest.approx(len(found) * bits_of_one(share), rel=0.02)
    bound = entropy(torch.tensor([round(share * 1e6), round((1 - share) * 1e6)])) * (1 << 20)
    assert 8 * (len(ones) + len(lower)) < 1.05 * bound if share < 0.4 else True


@settings(max_examples=80, deadline=None, derandomize=True)
@given(gaps=some.lists(some.integers(0, 300), max_size=40), b=some.integers(0, 9))
def test_any_places_come_back(gaps, b):
    found = (torch.tensor(gaps, dtype=torch.int64) + 1).cumsum(0) - 1
    ones, lower = encode(found, b)
    assert torch.equal(decode(ones, lower, b, len(gaps)), found)
    assert len(ones) == math.ceil(sum((gap >> b) + 1 for gap in gaps) / 8)
    assert len(lower) == math.ceil(len(gaps) * b / 8)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_ones_and_nothing_but_ones_have_a_parameter(share):
    assert parameter(share) == 0


def test_another_number_of_ones_is_refused():
    ones, lower = encode(places(1000, 0.1), 3)
    with pytest.raises(WeightsError, match="are stored"):
        decode(ones, lower, 3, 7)
