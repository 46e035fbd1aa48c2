"""Orders of columns in which every run of a few consecutive ones holds strong and weak columns alike."""

from __future__ import annotations

import torch
from torch import Tensor

from modelwright.maths.masks import lowest


def dealt(strength: Tensor, hands: int) -> Tensor:
    """Deal columns like cards to runs of `hands`: the places to take them from, long [..., n], for strengths [..., n].

    Sorted from the strongest, they are cut into `hands` strips; every second strip is turned round, and run i is column i
    of each strip. Zhang et al. 2024, Plug-and-play, ICLR, section 4.2.
    """
    assert strength.shape[-1] % hands == 0, (strength.shape, hands)
    strips = strength.argsort(dim=-1, descending=True, stable=True).unflatten(-1, (hands, -1))
    turned = [strip.flip(-1) if number % 2 else strip for number, strip in enumerate(strips.unbind(-2))]
    return torch.stack(turned, -1).flatten(-2)


def best_order(score: Tensor, inputs: Tensor, pattern: tuple[int, int]) -> Tensor:
    """For each run, the order of its columns that keeps more of the score under n of m: as they are, or dealt.

    score: [out, in]. inputs: [runs, copies, width], the columns of each run; copies move alike, and m divides the width.
    Returns the places to take them from, long [runs, width].
    """
    runs, copies, width = inputs.shape
    places = inputs.to(score.device)
    order = dealt(score.sum(0)[places].sum(1), pattern[1])

    def kept(columns: Tensor) -> Tensor:
        taken = score[:, columns.flatten()]
        return taken.masked_fill(lowest(taken, pattern=pattern), 0).sum(0, dtype=torch.float64).view(runs, -1).sum(1)

    better = kept(places.gather(2, order[:, None].expand(runs, copies, width))) > kept(places)
    return torch.where(better[:, None], order, torch.arange(width, device=order.device))
