"""W ≈ A C B with A and B block-diagonal and C two of every four: ARMOR, Liu et al. 2025, arXiv:2510.05528.

A [out / n, n, n] and B [in / n, n, n] are held as their blocks. The loss is Σ hⱼ (A C B - W)ᵢⱼ² / Σ hⱼ Wᵢⱼ², with h [in].
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from modelwright.maths.masks import lowest

PAIRS = torch.tensor(list(itertools.combinations(range(4), 2)))  # which two of four stay
SMALLEST = 1e-9  # added to the diagonal of the equations of a pair
PATIENCE, PROGRESS = 100, 1e-6  # an iteration ends when so many steps have lowered the loss by no more than this share


def rows_by(blocks: Tensor, matrix: Tensor) -> Tensor:
    """A M: blocks [k, n, n] times the rows of a matrix [k · n, m]."""
    return (blocks @ matrix.view(len(blocks), blocks.shape[1], -1)).flatten(0, 1)


def loss(left: Tensor, core: Tensor, right: Tensor, weight: Tensor, h: Tensor) -> Tensor:
    """The share of the weighted square that A C B misses, a scalar."""
    error = rows_by(left, rows_by(right.mT, core.T).T.contiguous()) - weight
    return (h * error.square()).sum() / (h * weight.square()).sum()


def gradients(left: Tensor, core: Tensor, right: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half the gradient of the loss's numerator by A and B, as blocks, and by all entries of C."""
    size = left.shape[1]
    inner = rows_by(right.mT, core.T).T.contiguous()  # C B
    outer = rows_by(left, core)  # A C
    error = h * (rows_by(left, inner) - weight)
    by_left = error.view(-1, size, error.shape[1]) @ inner.view(-1, size, error.shape[1]).mT
    by_right = outer.T.reshape(-1, size, len(outer)) @ error.T.reshape(-1, size, len(outer)).mT
    return by_left, rows_by(left.mT, rows_by(right, error.T.contiguous()).T.contiguous()), by_right


def exchange(left: Tensor, core: Tensor, right: Tensor, weight: Tensor, h: Tensor, rng: torch.Generator) -> Tensor:
    """C with one run of four chosen anew in every pair of blocks, which cannot raise the loss.

    A run is drawn by the size of its gradient. Of its six pairs the one that the loss gains most by stays, with the best values.
    """
    size = left.shape[1]
    over, across = len(left), len(right)

    def blocks(matrix: Tensor) -> Tensor:
        return matrix.view(over, size, across, size).transpose(1, 2)

    by_core = blocks(gradients(left, core, right, weight, h)[1])
    chances = by_core.abs().reshape(over, across, -1, 4).sum(-1).flatten(0, 1)
    chances = chances + (chances.sum(1, keepdim=True) == 0)
    drawn = torch.multinomial(chances.cpu(), 1, generator=rng).view(over, across).to(core.device)
    row, run = drawn // (size // 4), drawn % (size // 4)
    j, k = torch.arange(over)[:, None].expand(over, across), torch.arange(across)[None].expand(over, across)
    places = 4 * run[..., None] + torch.arange(4, device=core.device)  # [over, across, 4]
    column = left[j, :, row]  # of A [over, across, n]
    spread = right[k[..., None], places] * h.view(across, 1, size).sqrt()  # rows of B [over, across, 4, n]
    own = blocks(core)[j[..., None], k[..., None], row[..., None], places]
    error = blocks(rows_by(left, rows_by(right.mT, core.T).T.contiguous()) - weight) * h.view(across, 1, size).sqrt()
    length = column.square().sum(-1, keepdim=True)
    projected = torch.einsum("jkxn,jkx->jkn", error, column) - length * torch.einsum("jks,jksn->jkn", own, spread)
    pulled = torch.einsum("jksn,jkn->jks", spread, projected)
    product = spread @ spread.mT
    pairs = PAIRS.to(core.device)
    wanted = pulled[..., pairs]  # [over, across, 6, 2]
    equations = product[..., pairs[:, :, None], pairs[:, None, :]] + SMALLEST * torch.eye(2, device=core.device)
    solved = torch.linalg.solve(equations.double(), wanted.double()).to(core.dtype)
    best = (wanted * solved).sum(-1).argmax(-1)
    values = -solved.gather(2, best[..., None, None].expand(over, across, 1, 2))[..., 0, :]
    values = values / length.clamp_min(torch.finfo(core.dtype).tiny)
    changed = torch.zeros_like(own).scatter(-1, pairs[best], values)
    result = core.clone()
    blocks(result)[j[..., None], k[..., None], row[..., None], places] = changed
    return result


def wrapped(weight: Tensor, h: Tensor, size: int, rng: torch.Generator, *, steps: int, rate: float = 1e-4) -> tuple[Tensor, Tensor, Tensor]:
    """A, C and B for a weight [out, in] float32 by Adam on all of them and exchanges in C, the best of all steps.

    size: n, of the blocks, which divides both sides and which 4 divides. With no steps A and B are identities.
    """
    rows, columns = weight.shape
    by_column = weight.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    turned = weight / by_column
    by_row = turned.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    target = turned / by_row[:, None]
    left, right = (torch.eye(size, device=weight.device).repeat(side // size, 1, 1) for side in (rows, columns))
    core = target.masked_fill(lowest(target.square() * h, pattern=(2, 4)), 0)
    best, found = loss(left, core, right, target, h), (left.clone(), core.clone(), right.clone())
    optimizer = torch.optim.Adam([left, core, right], lr=rate)
    since, reference = 0, best
    total = (h * target.square()).sum().clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(steps):
        mask = core != 0
        left.grad, core.grad, right.grad = (2 * each / total for each in gradients(left, core, right, target, h))
        core.grad *= mask
        optimizer.step()
        core.mul_(mask)
        core.copy_(exchange(left, core, right, target, h, rng))
        now = loss(left, core, right, target, h)
        if now < best:
            best, found = now, (left.clone(), core.clone(), right.clone())
        since += 1
        if best < reference * (1 - PROGRESS):
            since, reference = 0, best
        if since >= PATIENCE:
            break
    left, core, right = found
    return left * by_row.view(-1, size, 1), core, right * by_column.view(-1, 1, size)
