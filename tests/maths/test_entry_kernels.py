"""The compiled loops over entries against the same formulas in torch, which stay for other dtypes and devices."""

import math

import numpy as np
import pytest
import torch

from modelwright.maths import masks, spherical, task_vectors
from modelwright.methods.merge import arcee_fusion

kernels = pytest.importorskip("modelwright.maths._entry_kernels", reason="needs numba")
COUNTS = (1, 1023, 1024, 3000)


def halves(*tensors):
    return tuple(tensor.view(torch.uint16).numpy() for tensor in tensors)


def drawn(count, number, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=random).bfloat16() for _ in range(number)]


@pytest.mark.parametrize("count", COUNTS)
def test_a_weighted_sum_is_that_of_float32(count):
    tensors, shares, out = drawn(count, 3), np.array([0.3, -0.5, 1.25], np.float32), torch.empty(count)
    kernels.weighted(halves(*tensors), shares, out.numpy())
    assert torch.equal(out, sum(float(share) * tensor.float() for share, tensor in zip(shares, tensors, strict=True)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_out_even_with_a_share_of_0(value):
    tensors, out = drawn(5, 2), torch.empty(5)
    tensors[1][3] = value
    kernels.weighted(halves(*tensors), np.array([1, 0], np.float32), out.numpy())
    assert out.isfinite().tolist() == [True, True, True, False, True]
    kernels.moved(*halves(tensors[0]), halves(tensors[1]), np.array([0], np.float32), out.numpy())
    assert out.isfinite().tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("count", COUNTS)
def test_changes_are_added_in_float32(count):
    base, *donors = drawn(count, 3)
    donors[0].copy_(base)  # adds nothing, whatever its weight
    out = torch.empty(count)
    kernels.moved(*halves(base), halves(*donors), np.array([7, 0.5], np.float32), out.numpy())
    assert torch.equal(out, base.float() + 0.5 * (donors[1].float() - base.float()))


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("count", COUNTS)
def test_dot_products_are_those_in_float64(count, apart):
    base, *tensors = drawn(count, 4)
    gram = np.ones((3, 3))
    kernels.products(halves(*tensors), halves(base)[0] if apart else halves(base)[0][:0], gram)
    rows = torch.stack(tensors).double() - (base.double() if apart else 0)
    expected = 1 + (rows @ rows.T).numpy()
    assert np.allclose(gram, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert (gram == gram.T).all()


@pytest.mark.parametrize("size", [1e-3, 0.05, 2.0])
def test_divergences_are_those_in_float64(size):
    before = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    after = (before + size * torch.randn(5, 300, generator=torch.Generator().manual_seed(1))).bfloat16()
    found = arcee_fusion.divergence(before, after)
    assert torch.allclose(found.double(), arcee_fusion.divergence(before.double(), after.double()), rtol=1e-5)


@pytest.mark.parametrize("first", [0, 3, 7, 20])
def test_scores_may_begin_and_end_inside_a_row(first):
    before, after = drawn(40, 2)
    factors, out = torch.rand(5), torch.empty(13)
    kernels.sizes(*halves(before[first : first + 13], after[first : first + 13]), factors.numpy(), 8, first, out.numpy())
    whole = (after.float() - before.float()).abs() * factors.repeat_interleave(8)
    assert torch.equal(out, whole[first : first + 13])


def test_the_chosen_are_those_that_reach_the_least():
    before, after = drawn(4, 2)
    out = torch.empty(4, dtype=torch.bfloat16)
    kernels.chosen(np.array([0.1, 0.5, 0.9, math.nan], np.float32), 0.5, *halves(before, after), *halves(out))
    assert out[:3].tolist() == [before[0].item(), after[1].item(), after[2].item()]
    assert out[3].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_looking_counts_what_numpy_counts(dtype, monkeypatch):
    values = torch.tensor([0.5, 0.1, 0.2, 0.7, 0.2, 0.9, 0.3, math.nan, 0.7, -1.0], dtype=dtype)
    low, high = values[2].item(), values[3].item()
    found = masks._look(values, low, high)
    monkeypatch.setattr(masks, "kernels", lambda _: None)
    plain = masks._look(values, low, high)
    assert found[:3] == plain[:3] == (3, 2, 2)  # NaN is not at or above anything
    assert found[3].tolist() == plain[3].tolist() == [values[0].item(), values[6].item()]


@pytest.mark.parametrize("formula", ["average", "moved", "mean", "arcee"])
def test_the_loops_give_what_torch_gives(formula, monkeypatch):
    base, *donors = (tensor.view(30, 100) for tensor in drawn(3000, 3))
    merges = {
        "average": lambda: task_vectors.average(donors, [1.0, 3.0]),
        "moved": lambda: task_vectors.moved(base, donors, [1.0, 3.0], 0.7, normalize=True),
        "mean": lambda: spherical.mean(donors, lambda gram: gram.diagonal() / gram.sum(), torch.bfloat16, base=base),
        "arcee": lambda: arcee_fusion.ArceeFusion().tensor(base, donors[:1]),
    }
    found = merges[formula]().whole()
    for module in (task_vectors, spherical, masks, arcee_fusion):
        monkeypatch.setattr(module, "kernels", lambda _: None)
    plain = merges[formula]().whole()
    assert torch.allclose(found.float(), plain.float(), rtol=2**-7)
    assert (found != plain).float().mean() < 0.01  # where sums that differ in their last bits lie between two neighbours
