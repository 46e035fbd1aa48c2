import pytest
import torch
from calibration import batches, correlated, gathered, normal
from tiny import outputs, tiny

import modelwright as mw
from modelwright.maths.low_rank import factor
from modelwright.methods.factor.svd import Svd
from modelwright.methods.factor.svd_llm import SvdLlm

WEIGHT = normal(24, 40)
INPUTS = correlated(300, 40)
SEEN = gathered(INPUTS)


def dense(result):
    return result if isinstance(result, torch.Tensor) else result.dense()


def lost(weight, result, inputs=INPUTS):
    """‖X (W - W')ᵀ‖²: what the outputs lose on the text."""
    return (inputs.double() @ (weight - result).double().T).square().sum().item()


def test_a_case_by_hand():
    # Inputs 10·e1 and e2, e3, e4 make H = diag(100, 1, 1, 1)/4, S = diag(10, 1, 1, 1)/2. Of W = diag(1, 2, 1, 1) the
    # products W S are (10, 2, 1, 1)/2: rank 1 keeps place 1 and loses 2² + 1 + 1 = 6 of Σ‖Wx‖². The plain SVD keeps the 2.
    inputs = torch.diag(torch.tensor([10.0, 1.0, 1.0, 1.0]))
    weight = torch.diag(torch.tensor([1.0, 2.0, 1.0, 1.0]))
    result = SvdLlm(rank=1).layer(weight, gathered(inputs)).dense()
    assert torch.allclose(result, torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0])), atol=1e-6)
    assert lost(weight, result, inputs) == pytest.approx(6)
    plain = Svd(rank=1).tensor(weight).dense()
    assert torch.allclose(plain, torch.diag(torch.tensor([0.0, 2.0, 0.0, 0.0])), atol=1e-6)
    assert lost(weight, plain, inputs) == pytest.approx(102)


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("store", ["factors", "dense"])
def test_its_error_on_the_text_is_the_singular_values_that_are_dropped(rank, store):
    result = dense(SvdLlm(rank=rank, store=store).layer(WEIGHT, SEEN))
    root = torch.linalg.cholesky(INPUTS.double().T @ INPUTS.double())
    dropped = torch.linalg.svdvals(WEIGHT.double() @ root)[rank:]
    assert lost(WEIGHT, result) == pytest.approx(dropped.square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("rank", [2, 6, 12])
def test_it_loses_less_on_the_text_than_asvd_and_svd(rank):
    ours = lost(WEIGHT, SvdLlm(rank=rank).layer(WEIGHT, SEEN).dense())
    b, a = factor(WEIGHT, rank, INPUTS.abs().mean(0) ** 0.5)  # ASVD: S = diag(mean|x|^0.5)
    assert ours <= lost(WEIGHT, b @ a)
    assert ours < 0.9 * lost(WEIGHT, Svd(rank=rank).tensor(WEIGHT).dense())


def test_the_full_rank_gives_the_weight():
    assert torch.allclose(SvdLlm(rank=24, store="dense").layer(WEIGHT, SEEN), WEIGHT, atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_with_inputs_that_are_all_alike_it_is_svd(size):
    alike = gathered(size * torch.eye(40))
    b, a = factor(WEIGHT, 6, torch.full((40,), size) ** 0.5)
    plain = Svd(rank=6).tensor(WEIGHT).dense()
    assert torch.allclose(SvdLlm(rank=6).layer(WEIGHT, alike).dense(), plain, atol=1e-5)
    assert torch.allclose(b @ a, plain, atol=1e-5)


def test_the_papers_update_of_the_left_factor_would_change_nothing():
    layer = SvdLlm(rank=6).layer(WEIGHT.double(), SEEN)
    moment, a = SEEN.moment.double(), layer.a.weight
    best = WEIGHT.double() @ moment @ a.T @ torch.linalg.inv(a @ moment @ a.T)  # least squares of W x on A x
    assert torch.allclose(layer.b.weight, best, atol=1e-6)


def test_inputs_that_leave_directions_empty_are_enough():
    inputs = correlated(10, 40)
    result = SvdLlm(rank=12).layer(WEIGHT, gathered(inputs)).dense()
    assert result.isfinite().all()
    assert lost(WEIGHT, result, inputs) < 1e-4 * lost(WEIGHT, torch.zeros_like(WEIGHT), inputs)  # 10 tokens, rank 12


def test_the_scale_of_the_inputs_does_not_matter():
    one, other = (SvdLlm(rank=6).layer(WEIGHT, gathered(size * INPUTS)).dense() for size in (1, 1000))
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 160), (160, 64)])
def test_keeping_all_leaves_the_weight_bit_for_bit(shape):
    weight = normal(*shape)
    assert SvdLlm(keep=1.0).layer(weight, gathered(correlated(20, shape[1]))) is weight


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_keeps_more_of_its_outputs_than_by_svd(kind):
    before = tiny(kind)
    expected, data = outputs(before), batches(before, 8)
    ours = outputs(mw.apply(tiny(kind), SvdLlm(keep=0.7), data=data))
    plain = outputs(mw.apply(tiny(kind), Svd(keep=0.7)))
    assert (ours - expected).norm() < (plain - expected).norm()
