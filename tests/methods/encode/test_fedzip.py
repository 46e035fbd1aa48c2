import pytest
import torch
from test_deltas import changes, tuned
from tiny import tiny

import modelwright as mw
from modelwright.maths.few_values import encode
from modelwright.maths.slices import Sliced
from modelwright.methods.encode.fedzip import Fedzip


def coded(values, **settings):
    change = Sliced(tuple(values.shape), torch.float32, values.reshape(-1).__getitem__)
    ((_, found),) = Fedzip(**settings).coded({"a": change})
    return found


def dense(found):
    return found.read(slice(0, len(found.labels)))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_case_by_hand():
    # Four of eight stay: -5, 4, -3, 2. Below 0 the mean is -4, above it 3; 2 is nearer to 3 than to 0, 1.5 away, and -3 to -4.
    change = torch.tensor([[0.5, -5.0, 4.0, 0.1], [-3.0, 2.0, 0.0, -1.0]])
    found = coded(change, keep=0.5)
    assert found.values.tolist() == [-4.0, 3.0]
    assert dense(found).tolist() == [0.0, -4.0, 3.0, 0.0, -4.0, 3.0, 0.0, 0.0]


def test_each_tensor_has_three_values_of_which_one_is_nothing():
    before, after = tiny(), tuned(dtype=torch.float32)
    made = changes(before, mw.apply(after, Fedzip(), base=tiny()))
    for name, value in made.items():
        assert len(torch.unique((value * 1e4).round())) <= 3 + 4 * (value.ndim < 2), name  # sums with the base round
        if value.ndim == 2:
            assert int(value.count_nonzero()) <= round(0.2 * value.numel())


@pytest.mark.parametrize("seed", range(3))
def test_it_errs_no_more_than_any_grid_with_the_same_entries(seed):
    change = normal(60, 50, seed=seed) ** 3
    kept = torch.zeros(3000, dtype=torch.bool)
    kept[(-change.view(-1).abs()).argsort(stable=True)[:600]] = True
    error = float((dense(coded(change)) - change.view(-1)).square().sum())
    for low, high in torch.rand(100, 2, generator=torch.Generator().manual_seed(seed)) * 20:
        fixed = torch.where(change.view(-1) < 0, -low, high) * kept
        assert error <= float((fixed - change.view(-1)).square().sum())


def test_decoded_values_are_the_levels():
    found = coded(normal(40, 40), levels=7, keep=0.6)
    assert set(dense(found).tolist()) <= {0.0, *found.values.tolist()}
    assert len(found.values) == 6


def test_what_has_one_axis_loses_no_entry():
    found = coded(normal(400) * 0.1 + 3, keep=0.1)
    assert (found.labels > 0).all()


def test_gaps_take_as_many_bytes_as_rice_says_and_fewer_than_huffman_where_few_stay():
    found = coded(normal(1000, 1000), keep=0.05)
    sizes = {code: sum(part.nbytes for part in encode(found, code)[0].values()) for code in ("rice", "huffman")}
    share = float((found.labels > 0).float().mean())
    from modelwright.maths.golomb_rice import bits_of_one

    assert 8 * sizes["rice"] == pytest.approx(1_000_000 * share * (bits_of_one(share) + 1), rel=0.02)
    assert sizes["rice"] < 0.4 * sizes["huffman"]


def test_three_symbols_take_one_bit_or_two():
    found = coded(normal(500, 500), keep=0.2)
    parts, _ = encode(found, "huffman")
    assert sorted(parts["lengths"].tolist()) == [1, 2, 2]
    assert parts["lengths"][0] == 1
