"""Means on the sphere: each is a sum of the vectors, with coefficients that follow from their Gram matrix, in float64.

G_ij = v_i · v_j [..., n, n]. So a tensor is read once for its dot products and once for its sum, a slice at a time,
however often an iteration turns: a mean of directions never leaves the span of the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modelwright.maths._kernels import kernels
from modelwright.maths.slices import Entries, Sliced, Stacked, each, flat, halves, slices
from modelwright.maths.task_vectors import NOTHING, average, by_rows, sums_in

Coefficients = Callable[[Tensor], Tensor]  # G [..., n, n] -> what each vector counts in the sum [..., n]


def mean(
    tensors: Sequence[Entries],
    coefficients: Coefficients,
    dtype: torch.dtype,
    *,
    base: Entries | None = None,
    by_row: bool = False,
    by_column: bool = False,
) -> Sliced:
    """The sum of tensors of one shape, with coefficients that depend on their dot products.

    dtype: of the result. base: what is taken from each tensor first and added to the sum at the end. by_row: each row
    of a matrix has dot products and coefficients of its own. by_column: each column, which is all entries that differ in
    their first index alone. Otherwise the whole tensor is one vector.
    """
    assert all(tuple(tensor.shape) == tuple(tensors[0].shape) for tensor in tensors), [tensor.shape for tensor in tensors]
    shape = tuple(tensors[0].shape)
    width, count = shape[-1] if shape else 1, math.prod(shape)
    parts = [flat(tensor) for tensor in (*tensors, *([] if base is None else [base]))]

    def vectors(read: Sequence[Tensor]) -> tuple[Tensor, Tensor | float]:
        stacked = torch.stack([one.double() for one in read])
        return (stacked, 0.0) if base is None else (stacked[:-1] - stacked[-1], stacked[-1])

    def rows(*read: Tensor) -> Tensor:
        each_row, start = vectors(read)  # [n, rows, width]
        return torch.einsum("rn,nrw->rw", coefficients(torch.einsum("nrw,mrw->rnm", each_row, each_row)), each_row) + start

    if by_row:
        return Sliced(shape, dtype, by_rows(parts, width, count, rows))

    if by_column:
        columns = math.prod(shape[1:])

        def column(at: slice) -> Tensor:
            return torch.arange(at.start, at.stop) % columns

        def pairs(at: slice) -> Tensor:
            whole, _ = vectors([part(at) for part in parts])
            return torch.einsum("np,mp->nmp", whole, whole).cpu()

        gram = torch.zeros(len(tensors), len(tensors), columns, dtype=torch.float64)
        for at, found in zip(slices(count), each(pairs, count), strict=True):
            gram.index_add_(2, column(at), found)
        of_columns = coefficients(gram.permute(2, 0, 1)).T  # [n, columns]

        def mixed(at: slice) -> Tensor:
            whole, start = vectors([part(at) for part in parts])
            return (of_columns[:, column(at)].to(whole.device) * whole).sum(0) + start

        return Sliced(shape, dtype, mixed)

    stacked = Stacked(parts, sums_in(dtype, *(tensor.dtype for tensor in tensors)))

    def products(at: slice) -> Tensor:
        read = stacked.read(at)
        if (loops := kernels("_entry_kernels")) and (rows := halves(read)):
            found = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
            loops.products(rows[: len(tensors)], rows[-1] if base is not None else rows[0][:0], found.numpy())
            return found
        whole = stacked.widened(read)
        if base is not None:
            whole = whole[:-1].sub_(whole[-1])
        return (whole @ whole.T).double().cpu()

    gram = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for found in each(products, count):
        gram += found
    shares = coefficients(gram).tolist()
    if base is not None:
        tensors, shares = [*tensors, base], [*shares, 1 - sum(shares)]
    return average(tensors, shares, normalize=False, dtype=dtype)


def lengths(gram: Tensor) -> Tensor:
    """‖v_i‖ [..., n]."""
    return gram.diagonal(dim1=-2, dim2=-1).sqrt()


def cosines(gram: Tensor) -> Tensor:
    """Of the angles between the vectors [..., n, n]; 0 where one of them is 0."""
    size = lengths(gram)
    return (gram / (size[..., :, None] * size[..., None, :])).nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)


def slerp(gram: Tensor, t: float, straight: float = 1.0) -> Tensor:
    """From the first of two vectors to the second along the arc [..., 2]: sin((1-t)θ)/sin θ and sin(tθ)/sin θ.

    straight: where |cos θ| reaches it, and where a vector is 0, the straight line is taken: 1-t and t.
    Source: Shoemake 1985, section 3.3.
    """
    cosine = cosines(gram)[..., 0, 1]
    angle = cosine.arccos()
    shares = torch.stack([torch.sin((1 - t) * angle), torch.sin(t * angle)], -1) / angle.sin()[..., None]
    line = (cosine.abs() >= straight) | (lengths(gram) == 0).any(-1)
    return torch.where(line[..., None], torch.tensor([1 - t, t], dtype=gram.dtype, device=gram.device), shares)


def tangent_mean(gram: Tensor, weights: Sequence[float]) -> Tensor:
    """The direction of Σ w_i v̂_i with the length Σ w_i ‖v_i‖ [n]; of one vector, and of two whose directions cancel, Σ w_i v_i."""
    size, shares, cosine = lengths(gram), gram.new_tensor(weights), cosines(gram)
    if len(shares) == 1 or len(shares) == 2 and shares @ cosine @ shares < NOTHING**2 * (shares @ shares):
        return shares
    return _unit(cosine, shares) / size.masked_fill(size == 0, 1) * (shares @ size)


def karcher_mean(gram: Tensor, weights: Sequence[float], iterations: int, tolerance: float) -> Tensor:
    """The direction with the least Σ w_i angle², with the length Σ w_i ‖v_i‖ [n], for weights that sum to 1.

    Gradient descent: u ← exp_u(Σ w_i log_u(v̂_i)) from the tangent mean, until the step is shorter than `tolerance`.
    Source: Karcher 1977; Afsari 2011.
    """
    size, shares, cosine = lengths(gram), gram.new_tensor(weights), cosines(gram)
    mean = _unit(cosine, shares)  # u = Σ mean_i v̂_i
    for _ in range(iterations):
        to = (cosine @ mean).clamp(-1, 1)  # cos of the angles from u
        logs = shares / torch.sinc(to.arccos() / math.pi).clamp(min=1e-6)  # w_i θ_i / sin θ_i
        step = logs - (logs @ to) * mean  # Σ w_i log_u(v̂_i): what of the vectors lies beside u
        length = (step @ cosine @ step).clamp(min=0).sqrt()
        if length < tolerance:
            break
        mean = _unit(cosine, length.cos() * mean + torch.sinc(length / math.pi) * step)
    return mean / size.masked_fill(size == 0, 1) * (shares @ size)


def _unit(cosine: Tensor, shares: Tensor) -> Tensor:
    """Coefficients of unit vectors such that their sum has length 1; unchanged where it is 0."""
    length = (shares @ cosine @ shares).clamp(min=0).sqrt()
    return shares / length if length > 1e-12 else shares
