"""Orders of columns in which every run of a few consecutive ones holds strong and weak columns alike."""

from __future__ import annotations

import torch
from torch import Tensor

from modelwright.core.errors import SiteError
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


def assigned(score: Tensor, order: Tensor, pattern: tuple[int, int]) -> Tensor:
    """A better order: at each place of the runs in turn, the columns that stand there are given to the runs that gain most by them.

    score: [rows, n]. order: [n], in which every `of` consecutive places are a run. What n of m keep of the score never falls:
    each step is a linear assignment, and to move nothing is one. Zhang et al. 2024, Plug-and-play, ICLR, section 4.2.
    """
    from scipy.optimize import linear_sum_assignment

    keep, of = pattern
    runs = order.view(-1, of).clone()
    for place in range(of if keep < of else 0):  # runs of which all stay gain nothing
        others = score[:, runs[:, [other for other in range(of) if other != place]]]
        weakest = others.topk(keep, -1).values[..., -1]  # of those that stay without the new column [rows, runs]
        column = score[:, runs[:, place]]
        gains = torch.stack([(column - edge[:, None]).clamp_min(0).sum(0, dtype=torch.float64) for edge in weakest.unbind(1)])
        taken = linear_sum_assignment(gains.cpu().numpy(), maximize=True)[1]
        runs[:, place] = runs[torch.from_numpy(taken).to(runs.device), place]
    return runs.flatten()


def best_order(score: Tensor, inputs: Tensor, pattern: tuple[int, int], *, assign: bool = False) -> Tensor:
    """For each run, the order of its columns that keeps more of the score under n of m: as they are, or dealt, then `assigned`.

    score: [out, in]. inputs: [runs, copies, width], the columns of each run; copies move alike, and m divides the width.
    assign: whether to go on from the better of the two by linear assignment, in time that grows with width² · out.
    Returns the places to take them from, long [runs, width].
    Raises SiteError for scores that are NaN or infinite.
    """
    if not score.isfinite().all():
        raise SiteError("Some scores are NaN or infinite, so that no order is the best. Look for NaN in the model, or use other text.")
    runs, copies, width = inputs.shape
    places = inputs.to(score.device)
    order = dealt(score.sum(0)[places].sum(1), pattern[1])

    def kept(columns: Tensor) -> Tensor:
        taken = score[:, columns.flatten()]
        return taken.masked_fill(lowest(taken, pattern=pattern), 0).sum(0, dtype=torch.float64).view(runs, -1).sum(1)

    better = kept(places.gather(2, order[:, None].expand(runs, copies, width))) > kept(places)
    order = torch.where(better[:, None], order, torch.arange(width, device=order.device))
    if assign:
        order = torch.stack([assigned(score[:, own].flatten(0, 1), one, pattern) for own, one in zip(places, order, strict=True)])
    return order
