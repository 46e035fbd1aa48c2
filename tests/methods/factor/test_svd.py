import pytest
import torch
from calibration import blocks_of, normal
from tiny import outputs, tiny

import modelwright as mw
from modelwright.blocks.low_rank import LowRankLinear
from modelwright.core.errors import SiteError
from modelwright.methods.factor.svd import Svd


def dense(result):
    return result.dense() if isinstance(result, LowRankLinear) else result


def test_a_case_by_hand():
    # diag(1, 4, 1, 1) has the singular values 4, 1, 1, 1: rank 1 keeps the 4, at (1, 1), as √4 · √4 (up to both signs).
    layer = Svd(rank=1).tensor(torch.diag(torch.tensor([1.0, 4.0, 1.0, 1.0])))
    assert layer.a.weight.abs().tolist() == [[0.0, 2.0, 0.0, 0.0]]
    assert layer.b.weight.abs().tolist() == [[0.0], [2.0], [0.0], [0.0]]
    assert dense(layer).tolist() == torch.diag(torch.tensor([0.0, 4.0, 0.0, 0.0])).tolist()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("store", ["factors", "dense"])
def test_its_error_is_the_singular_values_that_are_dropped(shape, rank, store):
    weight = normal(*shape)
    result = dense(Svd(rank=rank, store=store).tensor(weight))
    dropped = torch.linalg.svdvals(weight.double())[rank:]
    assert (weight - result).double().square().sum().item() == pytest.approx(dropped.square().sum().item(), rel=1e-4)
    assert torch.linalg.matrix_rank(result, rtol=1e-4) == rank


def test_a_weight_of_the_rank_is_kept():
    weight = normal(24, 3) @ normal(3, 40, seed=1)
    assert torch.allclose(dense(Svd(rank=3).tensor(weight)), weight, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_the_full_rank_gives_the_weight(shape):
    weight = normal(*shape)
    assert torch.allclose(Svd(rank=min(shape), store="dense").tensor(weight), weight, atol=1e-6)


def test_dense_and_factors_are_the_same_product_and_dense_is_rounded_once():
    weight = normal(32, 48).bfloat16()
    exact = Svd(rank=6, store="dense").tensor(weight.double())
    assert torch.equal(Svd(rank=6, store="dense").tensor(weight), exact.bfloat16())
    factors = Svd(rank=6).tensor(weight)
    assert factors.a.weight.dtype == factors.b.weight.dtype == torch.bfloat16
    assert torch.allclose(factors.dense().double(), exact, atol=0.05)


@pytest.mark.parametrize("keep", [0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(64, 160), (160, 64), (64, 64)])
def test_keep_is_the_share_of_the_entries_that_both_factors_hold(keep, shape):
    layer = Svd(keep=keep).tensor(normal(*shape))
    assert layer.rank == int(keep * shape[0] * shape[1] / sum(shape))
    held = layer.a.weight.numel() + layer.b.weight.numel()
    assert keep - sum(shape) / (shape[0] * shape[1]) < held / (shape[0] * shape[1]) <= keep


@pytest.mark.parametrize("shape", [(64, 160), (160, 64), (64, 64)])
@pytest.mark.parametrize("store", ["factors", "dense"])
def test_keeping_all_leaves_the_weight_bit_for_bit(shape, store):
    weight = normal(*shape)
    assert Svd(keep=1.0, store=store).tensor(weight) is weight


def test_a_weight_that_factors_would_not_shrink_is_left():
    weight = normal(64, 64)
    assert Svd(rank=32).tensor(weight) is weight  # 32 · (64 + 64) = 64 · 64
    assert isinstance(Svd(rank=31).tensor(weight), LowRankLinear)


def test_factors_are_balanced():
    layer = Svd(rank=4).tensor(normal(24, 40))
    assert torch.allclose(layer.b.weight.norm(dim=0), layer.a.weight.norm(dim=1), rtol=1e-5)


def test_a_model_in_either_form_gives_the_same_outputs():
    factors, dense_ = mw.open(tiny()), mw.open(tiny())
    mw.apply(factors, Svd(keep=0.6))
    mw.apply(dense_, Svd(keep=0.6, store="dense"))
    assert torch.allclose(outputs(factors.module), outputs(dense_.module), atol=1e-4)
    assert len(blocks_of(dense_)) == 4 * 7
    assert sum(value.numel() for value in factors.module.parameters()) < sum(value.numel() for value in dense_.module.parameters())


def test_a_rank_that_a_matrix_does_not_have_is_refused():
    with pytest.raises(SiteError, match=r"k_proj.weight is 32 × 64, so its rank is at most 32; asked for 40"):
        mw.apply(tiny(), Svd(rank=40))


def test_ranks_are_rounded_down_to_a_multiple_but_never_to_0():
    # Half of 48 × 80 is a rank of 15.
    assert [Svd(multiple=multiple).rank_of((48, 80)) for multiple in (1, 4, 8, 15, 16)] == [15, 12, 8, 15, 16]
    assert Svd(rank=10, multiple=4).rank_of((48, 80)) == 8
    assert Svd(multiple=8).tensor(normal(48, 80)).rank == 8
