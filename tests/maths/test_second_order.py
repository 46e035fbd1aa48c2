import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modelwright.core.errors import SiteError
from modelwright.maths import second_order
from modelwright.maths.grids import Affine
from modelwright.maths.masks import lowest
from modelwright.maths.rounding import decode, encode, scales
from modelwright.maths.second_order import Moment, inverse_factor, rounded, sweep, without_columns, zeroed


@pytest.fixture
def layer():
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 192, generator=random)
    mix = torch.randn(192, 192, generator=random) / 8 + torch.eye(192)
    inputs = torch.randn(1000, 192, generator=random) @ mix
    return weight, 2 / 1000 * inputs.T @ inputs


def damped(moment, damp):
    return moment.double() + damp * moment.diagonal().mean().double() * torch.eye(len(moment))


def masked(remove):
    """Pick 0 where a given mask [out, in] says so."""

    def choose(start, block, columns):
        keep = (~remove[:, start : start + len(block)]).t().float().contiguous()
        return lambda k, column: column * keep[k]

    return choose


def cost(weight, result, moment):
    change = (weight - result).double()
    return torch.trace(change @ moment.double() @ change.T).item()


def test_the_factor_is_that_of_the_inverse(layer):
    _, moment = layer
    upper, dead, used = inverse_factor(moment, 0.01)
    assert used == 0.01
    assert not dead.any()
    assert torch.equal(upper, upper.triu())
    expected = torch.linalg.cholesky(torch.linalg.inv(damped(moment, 0.01)), upper=True).float()
    assert torch.allclose(upper, expected, atol=2e-5)


def test_a_case_by_hand():
    # H = [[2, 1], [1, 1]], H⁻¹ = [[1, -1], [-1, 2]] = UᵀU with U = [[1, -1], [0, 1]].
    upper, _, _ = inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 1.0]]), damp=0.0)
    assert torch.allclose(upper, torch.tensor([[1.0, -1.0], [0.0, 1.0]]), atol=1e-6)
    # Zeroing column 0 of [3, 5] moves 3 · H_01 / H_11 = 3 to column 1.
    result, loss = sweep(torch.tensor([[3.0, 5.0]]), upper, masked(torch.tensor([[True, False]])))
    assert torch.allclose(result, torch.tensor([[0.0, 8.0]]), atol=1e-5)
    assert loss == pytest.approx(9.0, rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loss_is_exactly_the_damped_cost(layer, bits, symmetric):
    weight, moment = layer
    upper, _, _ = inverse_factor(moment)
    scale, zero = scales(weight, bits, 32, symmetric=symmetric)
    result, loss = sweep(weight, upper, rounded(Affine(scale, zero, bits)))
    assert loss == pytest.approx(cost(weight, result, damped(moment, 0.01)), rel=1e-4)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 40.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_with_identity_hessian_equals_rounding(layer, factor, symmetric):
    weight, _ = layer
    upper, _, _ = inverse_factor(factor * torch.eye(192))
    scale, zero = scales(weight, 3, 32, symmetric=symmetric)
    result, _ = sweep(weight, upper, rounded(Affine(scale, zero, 3)))
    assert torch.equal(result, decode(encode(weight, scale, zero, 3), scale, zero))


def test_gptq_beats_rounding_and_act_order_beats_gptq():
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 128, generator=random)
    inputs = torch.randn(500, 128, generator=random) @ torch.randn(128, 128, generator=random)
    inputs *= torch.linspace(0.05, 3, 128) ** 2
    moment = inputs.T @ inputs / 500
    scale, zero = scales(weight, 3, 32)
    plain = cost(weight, decode(encode(weight, scale, zero, 3), scale, zero), moment)
    upper, _, _ = inverse_factor(moment)
    result, _ = sweep(weight, upper, rounded(Affine(scale, zero, 3)))
    order = moment.diagonal().argsort(descending=True)
    upper, _, _ = inverse_factor(moment[order][:, order])
    permuted, _ = sweep(weight[:, order], upper, rounded(Affine(scale, zero, 3), order))
    ordered = permuted[:, order.argsort()]
    assert cost(weight, ordered, moment) < cost(weight, result, moment) < plain
    codes = encode(ordered, scale, zero, 3)  # static order: each column still lies on its own group's grid
    assert torch.equal(decode(codes, scale, zero), ordered)


@pytest.mark.parametrize("block", [32, 64, 96, 100, 128, 192, 1000])
@pytest.mark.parametrize("leaf", [8, 32])
def test_the_result_does_not_depend_on_the_block(layer, block, leaf, monkeypatch):
    monkeypatch.setattr(second_order, "LEAF", leaf)
    weight, moment = layer
    upper, _, _ = inverse_factor(moment)
    remove = lowest(weight**2, 0.5)
    result, loss = sweep(weight, upper, masked(remove), block=block)
    one_by_one = weight.clone()
    for j in range(192):
        error = torch.where(remove[:, j], one_by_one[:, j], 0.0) / upper[j, j]
        one_by_one[:, j:] -= error[:, None] * upper[j, j:]
    assert torch.allclose(result, one_by_one.masked_fill(remove, 0), atol=1e-4)
    assert (result[remove] == 0).all()
    assert loss == pytest.approx(cost(weight, result, damped(moment, 0.01)), rel=1e-4)


def test_compensation_beats_the_mask_alone_and_not_the_exact_least_squares(layer):
    weight, moment = layer
    upper, _, _ = inverse_factor(moment)
    full = damped(moment, 0.01)
    result, _ = sweep(weight, upper, zeroed(upper, 0.5))
    remove = result == 0
    exact = torch.zeros_like(weight)
    for row in range(len(weight)):
        keep = ~remove[row]
        right = full[keep] @ weight[row].double()
        exact[row, keep] = torch.linalg.solve(full[keep][:, keep], right).float()
    masked_only = cost(weight, weight.masked_fill(remove, 0), full)
    assert cost(weight, exact, full) <= cost(weight, result, full) <= masked_only


def test_one_pruned_column_is_the_exact_least_squares(layer):
    weight, moment = layer
    upper, _, _ = inverse_factor(moment)
    remove = torch.zeros_like(weight, dtype=torch.bool)
    remove[:, 0] = True
    result, _ = sweep(weight, upper, masked(remove))
    full = damped(moment, 0.01)
    expected = torch.linalg.solve(full[1:, 1:], full[1:] @ weight.double().T).T
    assert torch.allclose(result[:, 1:].double(), expected, atol=1e-4)


def test_unstructured_zeros_are_counted_block_by_block(layer):
    weight, moment = layer
    upper, _, _ = inverse_factor(moment)
    result, _ = sweep(weight, upper, zeroed(upper, 0.3))
    assert (result[:, :128] == 0).sum() == int(0.3 * 48 * 128)
    assert (result[:, 128:] == 0).sum() == int(0.3 * 48 * 64)
    score = weight[:, :128] ** 2 / upper.diagonal()[:128] ** 2
    assert torch.equal(result[:, :128] == 0, lowest(score.t(), 0.3).t())


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4), (1, 2)])
def test_patterns_are_chosen_from_the_weights_as_they_then_are(layer, pattern):
    weight, moment = layer
    upper, _, _ = inverse_factor(moment)
    result, loss = sweep(weight, upper, zeroed(upper, pattern=pattern))
    keep, run = pattern
    current, removed = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    for j in range(192):
        if j % run == 0:
            score = current[:, j : j + run] ** 2 / upper.diagonal()[j : j + run] ** 2
            removed[:, j : j + run] = lowest(score, pattern=pattern)
        error = torch.where(removed[:, j], current[:, j], 0.0) / upper[j, j]
        current[:, j:] -= error[:, None] * upper[j, j:]
    assert ((result.view(48, -1, run) == 0).sum(-1) == run - keep).all()
    assert torch.equal(result == 0, removed)
    assert loss == pytest.approx(cost(weight, result, damped(moment, 0.01)), rel=1e-4)


def test_pruning_and_rounding_together(layer):
    weight, moment = layer
    upper, _, _ = inverse_factor(moment)
    scale, zero = scales(weight, 4, 32)
    both = zeroed(upper, pattern=(2, 4), then=rounded(Affine(scale, zero, 4)))
    result, loss = sweep(weight, upper, both)
    assert ((result.view(48, -1, 4) == 0).sum(-1) >= 2).all()
    assert torch.equal(decode(encode(result, scale, zero, 4), scale, zero), result)
    assert loss == pytest.approx(cost(weight, result, damped(moment, 0.01)), rel=1e-4)


def test_with_a_diagonal_moment_the_score_is_wandas():
    random = torch.Generator().manual_seed(2)
    weight, norms = torch.randn(16, 64, generator=random), torch.rand(64, generator=random) + 0.1
    upper, _, _ = inverse_factor(torch.diag(norms**2), damp=0.0)
    result, _ = sweep(weight, upper, zeroed(upper, 0.5))
    remove = lowest(weight.abs() * norms, 0.5)
    assert torch.equal(result, weight.masked_fill(remove, 0))


def test_dead_columns_are_zeroed_and_change_nothing_else(layer):
    weight, moment = layer
    moment = moment.clone()
    moment[:, 5] = moment[5] = 0
    upper, dead, _ = inverse_factor(moment)
    assert dead.nonzero().tolist() == [[5]]
    result, _ = sweep(weight, upper, zeroed(upper, 0.2), dead=dead)
    assert (result[:, 5] == 0).all()
    scaled, _, _ = inverse_factor(moment * 1e-6)
    assert torch.allclose(scaled / 1e3, upper, rtol=1e-3, atol=1e-4)


def test_a_singular_moment_gets_more_damping():
    direction = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    moment = direction @ direction.T
    upper, _, used = inverse_factor(moment, damp=0.0)
    assert used > 0
    assert torch.isfinite(upper).all()


def test_a_moment_beyond_help_is_refused(monkeypatch):
    indefinite = torch.tensor([[1.0, 1e9], [1e9, 1.0]])
    with pytest.raises(SiteError, match=r"no inverse.*calibration text"):
        inverse_factor(indefinite)
    with pytest.raises(SiteError, match="not finite"):
        inverse_factor(torch.full((2, 2), float("nan")))


def test_inputs_are_unchanged_and_the_dtype_is_kept(layer):
    weight, moment = layer
    weight = weight.bfloat16()
    before, before_moment = weight.clone(), moment.clone()
    upper, _, _ = inverse_factor(moment)
    result, _ = sweep(weight, upper, zeroed(upper, 0.5), dead=torch.zeros(192, dtype=torch.bool))
    assert result.dtype == torch.bfloat16
    assert result.is_contiguous()
    assert torch.equal(weight, before)
    assert torch.equal(moment, before_moment)


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are alive at once."""

    def __init__(self):
        super().__init__()
        self.made, self.most = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.made += [weakref.ref(one) for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        self.made = [one for one in self.made if one() is not None]
        alive = {one().untyped_storage().data_ptr(): one().untyped_storage().nbytes() for one in self.made}
        self.most = max(self.most, sum(alive.values()))
        return out


def moment_of(inputs):
    moment = Moment(inputs.shape[1])
    moment.add(inputs)
    return moment


@pytest.mark.parametrize("width", [7, 192, 500, 1100])
def test_a_moment_in_strips_is_that_of_the_square(width):
    inputs = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(1))
    moment = moment_of(inputs)
    square = moment.square()
    assert torch.allclose(square, inputs.T @ inputs, atol=1e-2)
    assert torch.equal(moment.diagonal(), square.diagonal())
    assert torch.equal(moment.reversed_upper().triu(), square.flip(0, 1).triu())
    assert torch.equal(inverse_factor(moment)[0], inverse_factor(square)[0])


def test_a_moment_holds_half_of_the_square():
    assert sum(strip.nbytes for strip in Moment(1920).strips) == pytest.approx(0.55 * 4 * 1920**2)


@pytest.mark.parametrize("width", [3, 512, 700, 1100])
def test_turning_in_place_mirrors_at_the_antidiagonal(width):
    upper = torch.randn(width, width, generator=torch.Generator().manual_seed(2)).triu()
    expected = upper.flip(0, 1).T.clone()
    second_order._turn(upper)
    assert torch.equal(upper, expected)


def test_factoring_needs_one_square_beside_the_moment():
    width = 2048
    moment = moment_of(torch.randn(2 * width, width, generator=torch.Generator().manual_seed(3)))
    with Held() as held:
        inverse_factor(moment)
    assert 1 <= held.most / (4 * width**2) < 1.4  # two would do for the usual way


def test_a_moment_that_only_the_call_holds_is_freed_before_the_inverse(layer, monkeypatch):
    moments = [moment_of(layer[0])]
    strip = weakref.ref(moments[0].strips[0])
    seen = []
    invert = second_order._invert
    monkeypatch.setattr(second_order, "_invert", lambda upper: (seen.append(strip() is None), invert(upper)))
    inverse_factor(moments.pop(), 0.01)
    assert seen[0]


def cost_of(change, moment):
    return float(torch.trace(change.double() @ moment.double() @ change.double().T))


def test_columns_that_go_together_by_hand():
    # H = [[2, 1], [1, 2]] without damping: the column that stays takes over H_01 / H_11 = 1/2 of the one that goes.
    found = without_columns(torch.tensor([[4.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([True, False]), damp=0.0)
    assert found.tolist() == [[0.0, 3.0]]


def test_one_column_that_goes_is_sparsegpts_step(layer):
    weight, moment = layer
    gone = torch.zeros(192, dtype=torch.bool)
    gone[0] = True
    upper, _, _ = inverse_factor(moment, 0.01)
    remove = torch.zeros(48, 192, dtype=torch.bool)
    remove[:, 0] = True
    stepped, _ = sweep(weight, upper, masked(remove))
    assert torch.allclose(without_columns(weight, moment, gone), stepped, atol=1e-4)


def test_columns_that_go_together_are_the_brain_surgeons_and_cost_no_more_than_deletion(layer):
    weight, moment = layer
    for count in (1, 7, 150, 192):
        gone = torch.zeros(192, dtype=torch.bool)
        gone[torch.randperm(192, generator=torch.Generator().manual_seed(count))[:count]] = True
        whole = damped(moment, 0.01)
        inverse = torch.linalg.inv(whole)
        expected = weight.double() - weight[:, gone].double() @ torch.linalg.inv(inverse[gone][:, gone]) @ inverse[gone]
        found = without_columns(weight, moment, gone)
        assert torch.allclose(found.double(), expected, atol=1e-4)
        assert (found[:, gone] == 0).all()
        deleted = weight.masked_fill(gone, 0)
        assert cost_of(found - weight, whole) <= cost_of(deleted - weight, whole) * (1 + 1e-9)
        assert count == 192 or cost_of(found - weight, whole) < 0.999 * cost_of(deleted - weight, whole)


def test_inputs_that_were_never_seen_make_up_for_nothing():
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    gone = torch.tensor([False, True, False, False, True])
    assert torch.equal(without_columns(weight, torch.zeros(5, 5), gone), weight.masked_fill(gone, 0))
