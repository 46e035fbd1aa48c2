import math

import pytest
import torch

from modelwright.maths.divergence import mixed_kl


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float64).log().float()


def pair(seed=0, shape=(3, 5, 11)):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)


def test_forward_kl_equals_the_sum_worked_by_hand():
    p, q = logits([0.5, 0.5]), logits([0.25, 0.75])
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert mixed_kl(p, q).item() == pytest.approx(by_hand, abs=1e-6)


def test_skew_kl_equals_the_sum_worked_by_hand():
    p, q = logits([0.5, 0.5]), logits([0.25, 0.75])
    mix = [0.1 * 0.5 + 0.9 * 0.25, 0.1 * 0.5 + 0.9 * 0.75]
    by_hand = sum(0.5 * math.log(0.5 / m) for m in mix)
    assert mixed_kl(p, q, 0.1).item() == pytest.approx(by_hand, abs=1e-6)


def test_temperature_divides_the_logits():
    p, q = pair()
    assert torch.allclose(mixed_kl(p, q, 0.2, temperature=2.0), mixed_kl(p / 2, q / 2, 0.2))


def test_forward_kl_equals_that_of_torch():
    p, q = pair()
    log_p, log_q = p.log_softmax(-1).flatten(0, 1), q.log_softmax(-1).flatten(0, 1)
    theirs = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert torch.allclose(mixed_kl(p, q), theirs)


@pytest.mark.parametrize("w", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_every_mixed_kl_is_positive_and_zero_between_equals(w):
    p, q = pair()
    assert mixed_kl(p, q, w) >= 0
    assert mixed_kl(p, p.clone(), w).abs() < 1e-6


def test_skew_kl_falls_to_zero_as_the_weight_rises_to_one():
    p, q = pair()
    values = [mixed_kl(p, q, w).item() for w in (0.0, 0.3, 0.6, 0.9, 0.999)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-5
    assert mixed_kl(p, q, 1.0) == 0


def test_masked_positions_do_not_count():
    p, q = pair()
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    by_hand = torch.stack([mixed_kl(a, b, 0.1) for a, b in zip(p[mask], q[mask], strict=True)]).mean()
    assert torch.allclose(mixed_kl(p, q, 0.1, mask=mask), by_hand)


def test_the_mean_is_over_tokens_so_that_repeating_them_changes_nothing():
    p, q = pair()
    assert torch.allclose(mixed_kl(p, q, 0.1), mixed_kl(p.repeat(2, 1, 1), q.repeat(2, 1, 1), 0.1))


@pytest.mark.parametrize("w", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("forward", [True, False])
def test_the_gradient_is_finite_where_probabilities_are_zero(w, forward):
    p, q = pair()
    p[..., 0] = q[..., 0] = -math.inf  # impossible on both sides
    if not forward or w > 0:
        p[..., 1] = -math.inf  # impossible on one
    p, q = p.requires_grad_(), q.requires_grad_()
    value = mixed_kl(p, q, w) if forward else mixed_kl(p, q.clone().index_fill(-1, torch.tensor([1]), -1e4), w)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(p.grad).all()
    assert torch.isfinite(q.grad).all()


def test_half_precision_logits_are_summed_in_float32():
    p, q = pair()
    assert mixed_kl(p.bfloat16(), q.bfloat16()).dtype == torch.float32
