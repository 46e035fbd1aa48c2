"""Vectors as sums of a few rows of a table: orthogonal matching pursuit, many vectors at once."""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = 1e-5  # share of a row's length below which what is new in it counts as rounding


def pursue(targets: Tensor, atoms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each target t the best coefficients c of `count` rows of `atoms`, chosen one after the other.

    targets: [n, d]. atoms: [m, d], of the same float dtype, float32 or wider. count: at most m are used.

    Each step takes the row with the largest |row · residual|, and the residual is what no row taken so far can give, so
    its length never grows: t ≈ Σ c_k atoms[place_k], the least-squares fit on the rows taken.
    Returns (places [n, count] long, c [n, count]). A row that adds nothing new gets the coefficient 0.
    """
    rows, width = targets.shape
    count = min(count, len(atoms))
    basis = targets.new_zeros(rows, count, width)  # Q: orthonormal, in the order in which rows are taken
    upper = torch.eye(count, dtype=targets.dtype, device=targets.device).repeat(rows, 1, 1)  # R: row_k = Σ_j R_jk Q_j
    places = torch.zeros(rows, count, dtype=torch.long, device=targets.device)
    residual = targets.clone()
    for step in range(count):
        scores = (residual @ atoms.mT).abs_()
        places[:, step] = scores.scatter_(1, places[:, :step], -1).argmax(1)
        row = atoms[places[:, step]]
        fresh = row.clone()
        for _ in range(2):  # once more, for what rounding left
            along = (basis[:, :step] @ fresh[:, :, None])[:, :, 0]
            fresh -= (along[:, None] @ basis[:, :step])[:, 0]
            upper[:, :step, step] += along
        length = fresh.norm(dim=1)
        new = length > NOTHING * row.norm(dim=1)
        upper[:, step, step] = torch.where(new, length, 1)
        basis[:, step] = torch.where(new[:, None], fresh / length[:, None], 0)
        residual -= (residual * basis[:, step]).sum(1, keepdim=True) * basis[:, step]
    along = basis @ targets[:, :, None]
    return places, torch.linalg.solve_triangular(upper, along, upper=True)[:, :, 0]
