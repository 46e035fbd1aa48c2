import pytest
import torch

from modelwright.maths.low_rank import factor, gradient_of_product, rank_for, rounding, whitening


@pytest.fixture
def layer():
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=random)
    inputs = torch.randn(300, 40, generator=random) @ torch.randn(40, 40, generator=random)
    return weight, inputs


def output_error(weight, factors, inputs):
    tall, wide = factors
    return torch.linalg.norm(inputs.double() @ (weight - tall @ wide).double().T).item() ** 2


def test_a_case_by_hand():
    tall, wide = factor(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), 1)
    assert torch.allclose(tall @ wide, torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    tall, wide = factor(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), 1, torch.tensor([1.0, 2.0]))
    assert torch.allclose(tall @ wide, torch.tensor([[0.0, 0.0], [0.0, 2.0]]))


@pytest.mark.parametrize("rank", [1, 5, 23, 24])
def test_the_output_error_is_the_sum_of_the_dropped_squares(layer, rank):
    weight, inputs = layer
    metric = whitening(inputs.T @ inputs)
    values = torch.linalg.svdvals(weight.double() @ metric)
    expected = (values[rank:] ** 2).sum().item()
    assert output_error(weight.double(), factor(weight.double(), rank, metric), inputs) == pytest.approx(
        expected, rel=1e-6, abs=1e-6 * (values**2).sum().item()
    )


def test_the_metric_of_the_outputs_is_at_least_as_good_as_any_other(layer):
    weight, inputs = layer
    best = output_error(weight, factor(weight, 6, whitening(inputs.T @ inputs)), inputs)
    scaled = output_error(weight, factor(weight, 6, inputs.abs().mean(0).sqrt()), inputs)
    plain = output_error(weight, factor(weight, 6), inputs)
    assert best <= scaled * (1 + 1e-6)
    assert best <= plain * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("kind", ["plain", "diagonal", "full"])
def test_full_rank_gives_the_weight_back(shape, kind):
    random = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(shape, generator=random), torch.randn(200, shape[1], generator=random)
    metric = {"plain": None, "diagonal": inputs.abs().mean(0), "full": whitening(inputs.T @ inputs)}[kind]
    tall, wide = factor(weight, min(shape), metric)
    assert torch.allclose(tall @ wide, weight, atol=1e-5)


def test_under_a_multiple_of_the_identity_all_metrics_coincide(layer):
    weight, _ = layer
    products = [torch.matmul(*factor(weight, 7, metric)) for metric in (None, torch.full((40,), 3.0), whitening(9 * torch.eye(40)))]
    assert torch.allclose(products[0], products[1], atol=1e-5)
    assert torch.allclose(products[0], products[2], atol=1e-5)


def test_the_factors_share_the_singular_values(layer):
    weight, _ = layer
    tall, wide = factor(weight, 4)
    assert torch.allclose(tall.norm(dim=0), wide.norm(dim=1), rtol=1e-4)


def test_a_singular_moment_is_lifted(layer):
    weight, inputs = layer
    moment = inputs[:10].T @ inputs[:10]
    metric = whitening(moment)
    assert torch.isfinite(metric).all()
    assert torch.allclose(metric @ metric.T, moment.double(), atol=1e-4 * moment.diagonal().mean().item())
    assert torch.isfinite(torch.matmul(*factor(weight, 5, metric))).all()


def test_a_zero_weight_has_zero_factors():
    tall, wide = factor(torch.zeros(4, 6), 2)
    assert (tall @ wide == 0).all()


def test_the_dtype_is_kept(layer):
    tall, wide = factor(layer[0].bfloat16(), 3)
    assert tall.dtype == wide.dtype == torch.bfloat16
    assert (tall.shape, wide.shape) == ((24, 3), (3, 40))


def test_rank_for_a_budget():
    assert rank_for(0.5, 100, 100) == 25
    assert rank_for(0.5, 24, 40) == 7
    assert rank_for(0.001, 10, 10) == 1
    rank = rank_for(0.3, 77, 131)
    assert rank * (77 + 131) <= 0.3 * 77 * 131 < (rank + 1) * (77 + 131)


def test_what_rounding_alone_gives_by_hand():
    # Entries of size 2, 9 by 16: the step between two values, times the size, times 3 + 4.
    assert rounding(torch.full((9, 16), 2.0)) == pytest.approx(2**-23 * 2 * 7)
    assert rounding(torch.full((9, 16), -2.0, dtype=torch.bfloat16)) == pytest.approx(2**-7 * 2 * 7)


def test_the_gradient_of_a_product_is_what_a_step_takes_from_it_and_never_points_against_the_true_one():
    random = torch.Generator().manual_seed(0)
    shapes = ((5, 2), (2, 7), (5, 7), (30, 7), (30, 5))
    tall, wide, weight, x, y = (torch.randn(*shape, dtype=torch.float64, generator=random) for shape in shapes)
    scale, whole = 1.7, weight + 1.7 * tall @ wide
    for value in (tall, wide, whole):
        value.requires_grad_(True)
    ((x @ (weight + scale * tall @ wide).T - y) ** 2).mean().backward()
    (true,) = torch.autograd.grad(((x @ whole.T - y) ** 2).mean(), whole)
    found = gradient_of_product(tall.detach(), wide.detach(), tall.grad, wide.grad)
    first = tall.grad @ wide.detach() + tall.detach() @ wide.grad
    assert float((first * true).sum()) == pytest.approx(float(tall.grad.square().sum() + wide.grad.square().sum()) / scale)
    stepped = (tall - tall.grad) @ (wide - wide.grad)
    assert torch.allclose(found, (tall @ wide - stepped).detach())
    assert torch.allclose(gradient_of_product(0 * tall, wide, tall.grad, 0 * wide), tall.grad @ wide)
