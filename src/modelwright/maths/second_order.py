"""Change a weight column by column and let the columns to the right make up for it.

For y = W x with second moment H = Σ x xᵀ, GPTQ (2210.17323) and SparseGPT (2301.00774) do the same: with H⁻¹ = Uᵀ U,
U upper triangular, replace column j by q, and take e U[j, j:] with e = (w_j - q) / U_jj from the columns from j on.
They differ only in q: GPTQ rounds, SparseGPT zeroes. Then tr((W - Q) H (W - Q)ᵀ) = Σ e², exactly.

Columns are worked on as contiguous rows of Wᵀ, and every update that can wait is one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modelwright.core.errors import SiteError
from modelwright.maths.grids import Grid
from modelwright.maths.masks import lowest, lowest_of_each

# choose(start, block [n, out], columns) is called as each block of n of all the columns begins, and returns
# pick(k, column [out]), which gives what column start + k becomes. `block` is live: at pick(k), its next columns up to
# a multiple of LEAF hold their values as of then.
Pick = Callable[[int, Tensor], Tensor]
Choose = Callable[[int, Tensor, int], Pick]

LEAF = 32  # columns whose updates are applied one at a time
TRIES = 6  # dampings that are tried, each ten times the last
STRIP = 192  # rows of a moment that are held together
TILE = 512  # rows and columns that are moved together


class Moment:
    """Second moment Σ x xᵀ [in, in] of inputs x, of which only strips of rows from the diagonal on are held.

    That is half the memory of the square. Strip k is H[k · STRIP : (k + 1) · STRIP, k · STRIP :], in float32.
    """

    def __init__(self, inputs: int, device: torch.device | str = "cpu"):
        self.inputs, self.device = inputs, device
        self.strips = [torch.zeros(min(STRIP, inputs - start), inputs - start, device=device) for start in range(0, inputs, STRIP)]

    def add(self, x: Tensor) -> None:
        """Add xᵀ x of the rows of x [tokens, in] float32."""
        for start, strip in zip(range(0, self.inputs, STRIP), self.strips, strict=True):
            strip.addmm_(x[:, start : start + STRIP].T, x[:, start:])

    def divide(self, count: int) -> None:
        """Divide by a count, in place."""
        for strip in self.strips:
            strip /= count

    def rescale(self, factor: Tensor) -> None:
        """Make it that of inputs that are multiplied by `factor` [in], in place."""
        for start, strip in zip(range(0, self.inputs, STRIP), self.strips, strict=True):
            strip.mul_(factor[start:]).mul_(factor[start : start + len(strip), None])

    def diagonal(self) -> Tensor:
        """[in]."""
        return torch.cat([strip.diagonal() for strip in self.strips])

    def finite(self) -> bool:
        """Whether it holds no NaN or infinity."""
        return all(bool(strip.isfinite().all()) for strip in self.strips)

    def square(self) -> Tensor:
        """All of H [in, in]: a copy."""
        square = torch.empty(self.inputs, self.inputs, device=self.device)
        for start, strip in zip(range(0, self.inputs, STRIP), self.strips, strict=True):
            square[start:, start : start + STRIP] = strip.T
            square[start : start + STRIP, start:] = strip
        return square

    def reversed_upper(self) -> Tensor:
        """H with rows and columns in reverse [in, in], of which only the upper triangle is filled: a copy."""
        turned = torch.empty(self.inputs, self.inputs, device=self.device)
        for start, strip in zip(range(0, self.inputs, STRIP), self.strips, strict=True):
            stop, first = self.inputs - start, self.inputs - start - len(strip)
            turned[:first, first:stop] = strip[:, len(strip) :].T.flip(0, 1)
            turned[first:stop, first:stop] = strip[:, : len(strip)].flip(0, 1)
        return turned


def inverse_factor(moment: Tensor | Moment, damp: float = 0.01) -> tuple[Tensor, Tensor, float]:
    """Factor the inverse of a damped second moment.

    moment: H [in, in], symmetric, at any positive scale; a `Moment` that only the call holds is freed on the way.
    damp: added to the diagonal, as a fraction of its mean.

    Returns (U, dead, damp used): U upper triangular [in, in] float32 with (H + damp · mean(diag H) · I)⁻¹ = Uᵀ U;
    `dead` [in], the columns that no input has reached, whose weights mean nothing; the damping, raised tenfold as
    often as the factorisation failed.
    Raises SiteError when H is not finite or stays singular.
    Differs: one Cholesky factorisation of the reversed matrix and one triangular inverse, for the usual two
    factorisations and one inverse; dead columns get the mean of the live diagonal and not 1, so that damping does
    not depend on H's scale.
    """
    diagonal = moment.diagonal().float()
    dead = diagonal == 0
    mean = diagonal.sum().item() / max(1, int((~dead).sum())) or 1.0
    if not torch.isfinite(diagonal).all():
        raise SiteError(
            "The second moment of a layer's inputs is not finite: the layers before it overflow. "
            "Use a wider dtype, or leave the layer out with `skip`."
        )
    live = torch.where(dead, mean, diagonal).flip(0)
    used = damp
    for _ in range(TRIES):
        reversed_ = moment.reversed_upper() if isinstance(moment, Moment) else moment.flip(0, 1).float()
        reversed_.diagonal().copy_(live + used * mean)
        lower = reversed_.mT  # in the layout that LAPACK works on in place
        failed = torch.empty((), dtype=torch.int32, device=moment.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            del moment, lower  # memory is tight where `in` is large
            _turn(reversed_)
            _invert(reversed_)
            return reversed_, dead, used
        used = max(used * 10, 1e-4)
    raise SiteError(
        f"The second moment [{len(dead)}, {len(dead)}] of a layer's inputs has no inverse, even with {used / 10:g} of "
        "its mean added to its diagonal. Give more calibration text, or leave the layer out with `skip`."
    )


def sweep(
    weight: Tensor,
    inverse: Tensor,
    choose: Choose,
    *,
    dead: Tensor | None = None,
    block: int = 128,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, float]:
    """Replace each column in turn by what `choose` picks, and pass its error on to the columns after it.

    weight: W [out, in] of any float dtype. inverse: U [in, in] from `inverse_factor`. dead: [in], columns that are 0
    from the start. block: columns between calls of `choose`, and between updates of all the rest. dtype: of the
    result, which float32 leaves a transposed view; by default weight's, and contiguous.

    Returns (Q [out, in], Σ e² = tr((W - Q) H_damped (W - Q)ᵀ)). W is not changed.
    """
    rows, columns = weight.shape
    result = torch.empty(columns, rows, dtype=torch.float32, device=weight.device)
    result.copy_(weight.detach().t())
    if dead is not None:
        result[dead] = 0
    errors = torch.empty(min(block, columns), rows, dtype=torch.float32, device=weight.device)
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part = result[start:stop]
        error = errors[: stop - start]
        _sweep_block(part, error, inverse[start:stop, start:stop], choose(start, part, columns))
        loss += torch.linalg.vector_norm(error, dtype=torch.float64) ** 2
        if stop < columns:
            result[stop:].addmm_(inverse[start:stop, stop:].t(), error, alpha=-1)
    layout = torch.contiguous_format if dtype is None else torch.preserve_format
    return result.t().to(dtype or weight.dtype, memory_format=layout), loss.item()


def rounded(grid: Grid, order: Tensor | None = None) -> Choose:
    """Pick the nearest point of a fixed grid: GPTQ.

    grid: of the original weight. order: [in], for a weight whose columns were permuted, the original place of each, which decides
    its group ("static" act-order).
    """
    near = [grid.near(group) for group in range(grid.groups)]

    def choose(start: int, block: Tensor, columns: int) -> Pick:
        places = range(start, start + len(block)) if order is None else order[start : start + len(block)].tolist()
        groups = [place // (columns // len(near)) for place in places]
        return lambda k, column: near[groups[k]](column)

    return choose


def masked(keep: Tensor, then: Choose) -> Choose:
    """Pick 0 where `keep` [out, in] is false, and what `then` picks elsewhere."""

    def choose(start: int, block: Tensor, columns: int) -> Pick:
        later, own = then(start, block, columns), keep[:, start : start + len(block)].t().to(block.dtype)
        return lambda k, column: later(k, column) * own[k]

    return choose


def zeroed(inverse: Tensor, sparsity: float = 0.0, *, pattern: tuple[int, int] | None = None, then: Choose | None = None) -> Choose:
    """Pick 0 where the error w² / U_jj² that this makes is least: SparseGPT.

    inverse: U [in, in]. sparsity: the fraction zeroed of each block of columns, all rows together.
    pattern: (n, m) keeps n of every m consecutive columns in each row, and overrides `sparsity`; m divides 32.
    then: what becomes of the entries that stay, such as `rounded`.
    """
    importance = inverse.diagonal().pow(-2)
    assert pattern is None or LEAF % pattern[1] == 0, pattern

    def choose(start: int, block: Tensor, columns: int) -> Pick:
        later = then and then(start, block, columns)
        weight = importance[start : start + len(block), None]
        if pattern:
            keep = torch.empty_like(block)
        else:
            keep = (~lowest(block * block * weight, sparsity)).float()

        def pick(k: int, column: Tensor) -> Tensor:
            if pattern and k % pattern[1] == 0:
                run = slice(k, k + pattern[1])
                keep[run] = ~lowest_of_each(block[run].square().mul_(weight[run]), pattern[0])
            return (later(k, column) if later else column) * keep[k]

        return pick

    return choose


def without_columns(weight: Tensor, moment: Tensor, gone: Tensor, damp: float = 0.01) -> Tensor:
    """W with some columns at 0 at once, and the others changed so that tr(ΔW H ΔWᵀ) is least.

    weight: W [out, in]. moment: H [in, in] at any positive scale. gone: [in], true for columns that become 0. damp: added to the
    diagonal, as a fraction of its mean. For the columns M that go and S that stay, ΔW = -W_M ([H⁻¹]_MM)⁻¹ [H⁻¹]_M (optimal brain
    surgeon) is W_M H_MS (H_SS)⁻¹ on S. float64; the result has W's dtype.
    """
    exact, whole = weight.double(), moment.double()
    mean = whole.diagonal().mean().item() or 1.0
    whole = whole + damp * mean * torch.eye(len(whole), dtype=torch.float64, device=whole.device)
    stays = ~gone
    lower = torch.linalg.cholesky(whole[stays][:, stays])
    result = torch.zeros_like(exact)
    result[:, stays] = exact[:, stays] + torch.cholesky_solve(whole[stays][:, gone] @ exact[:, gone].T, lower).T
    return result.to(weight.dtype)


def _sweep_block(part: Tensor, error: Tensor, inverse: Tensor, pick: Pick) -> None:
    """Sweep one block in place: part and error [columns, out], inverse the block's own square of U.

    Each leaf of columns is followed by a product that updates as many columns again as lie to its left in the block,
    so that most of the work is in products of large matrices.
    """
    _sweep_columns(part, error, inverse, pick, part.unbind(), error.unbind(), inverse.diagonal().tolist(), 0, len(part))


def _sweep_columns(
    part: Tensor, error: Tensor, inverse: Tensor, pick: Pick,
    columns: tuple[Tensor, ...], errors: tuple[Tensor, ...], scales: list[float], start: int, stop: int,
) -> None:  # fmt: skip
    """Sweep columns `start` to `stop` of a block. No closure: one that calls itself would keep all of these alive."""
    if stop - start > LEAF:
        middle = start + -(-(stop - start) // (2 * LEAF)) * LEAF
        _sweep_columns(part, error, inverse, pick, columns, errors, scales, start, middle)
        part[middle:stop].addmm_(inverse[start:middle, middle:stop].t(), error[start:middle], alpha=-1)
        _sweep_columns(part, error, inverse, pick, columns, errors, scales, middle, stop)
        return
    for k in range(start, stop):
        column = columns[k]
        chosen = pick(k, column)
        torch.sub(column, chosen, out=errors[k]).div_(scales[k])
        column.copy_(chosen)
        if k + 1 < stop:
            part[k + 1 : stop].addr_(inverse[k, k + 1 : stop], errors[k], alpha=-1)


def _turn(upper: Tensor) -> None:
    """Mirror an upper triangular matrix at its antidiagonal in place, so that entry (i, j) changes with (n-1-j, n-1-i)."""
    size = len(upper)
    steps = range(0, size, TILE)
    for i in steps:
        for j in steps:
            if j > i or size - j <= i:  # done from the other side, or below the diagonal
                continue
            one = upper[i : i + TILE, max(0, size - j - TILE) : size - j]
            other = upper[j : j + TILE, max(0, size - i - TILE) : size - i]
            held = one.T.flip(0, 1)
            one.copy_(other.T.flip(0, 1))
            other.copy_(held)


def _invert(upper: Tensor) -> None:
    """Invert an upper triangular matrix in place, by halves: most of the work is in matrix products."""
    size = len(upper)
    if size <= 128:
        upper.copy_(torch.linalg.solve_triangular(upper, torch.eye(size, device=upper.device), upper=True))
        return
    half = size // 2
    _invert(upper[:half, :half])
    _invert(upper[half:, half:])
    for start in range(0, half, TILE):  # from the top: the rows above, already changed, meet only zeros
        rows = slice(start, min(start + TILE, half))
        upper[rows, half:] = (upper[rows, :half] @ upper[:half, half:] @ upper[half:, half:]).neg_()
