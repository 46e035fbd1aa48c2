"""Which things belong together: communities of a bipartite graph, and rows that several of them share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def communities(left: Tensor, right: Tensor, weights: Tensor, resolution: float, seed: int) -> tuple[Tensor, Tensor]:
    """The communities of greatest modularity that Louvain's method finds, of the left nodes and of the right ones.

    left, right, weights: [edges], the two ends of every edge and its weight. Returned are labels [1 + the largest left, or right,
    node], counted from 0 on each side for itself, the community of the smallest node first; -1 for nodes without an edge.
    resolution: higher ones give more and smaller communities. One seed gives the same labels.
    Blondel et al. 2008, arXiv:0803.0476; on bipartite graphs, Wu et al. 2024, arXiv:2412.17245.
    """
    import networkx

    graph = networkx.Graph()
    ends = sorted(zip(left.tolist(), right.tolist(), weights.tolist(), strict=True))
    graph.add_nodes_from(("left", node) for node in sorted(set(left.tolist())))
    graph.add_nodes_from(("right", node) for node in sorted(set(right.tolist())))
    graph.add_weighted_edges_from((("left", one), ("right", two), weight) for one, two, weight in ends)
    found = networkx.community.louvain_communities(graph, resolution=resolution, seed=seed)
    sides = []
    for side, nodes in (("left", left), ("right", right)):
        labels = torch.full((int(nodes.max()) + 1 if len(nodes) else 0,), -1)
        groups = sorted(sorted(node for which, node in group if which == side) for group in found)
        for label, group in enumerate(group for group in groups if group):
            labels[torch.tensor(group)] = label
        sides.append(labels)
    return sides[0], sides[1]


def neighbours(rows: Sequence[Tensor], window: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens stand beside which: edges (token, context, how often), each [edges].

    rows: ids [length]. The context of a token at a distance d from it, 1 to `window` and behind as well as ahead, is its id there;
    behind and ahead and each distance are contexts of their own, from 0 to 2 · window · vocabulary.
    """
    pairs = []
    for ids in rows:
        for distance in range(1, min(window, len(ids) - 1) + 1):
            before, after = ids[:-distance].long(), ids[distance:].long()
            ahead = 2 * (distance - 1) * vocabulary
            pairs.append(before * (2 * window * vocabulary) + ahead + after)
            pairs.append(after * (2 * window * vocabulary) + ahead + vocabulary + before)
    keys, counts = torch.cat(pairs).unique(return_counts=True) if pairs else (torch.empty(0).long(), torch.empty(0).long())
    return keys // (2 * window * vocabulary), keys % (2 * window * vocabulary), counts


def shared_rows(rows: Tensor, places: Tensor, size: int, weights: Tensor, steps: int = 200) -> Tensor:
    """The table [size, columns] whose sums table[places].sum(0) are nearest to rows [n, columns], in rows' dtype.

    places: [lookups, n]. weights: [n], how much each row's squared distance counts. With one lookup these are weighted means.
    Conjugate gradients on the normal equations, in float64; places that nothing reads are 0.
    """
    exact, heavy = rows.double(), weights.double()[:, None]

    def gathered(values: Tensor) -> Tensor:
        total = values.new_zeros(size, values.shape[1])
        for each in places:
            total.index_add_(0, each, values)
        return total

    diagonal = gathered(heavy).clamp(min=1e-300)
    table = exact.new_zeros(size, rows.shape[1])
    residual = gathered(heavy * exact)
    start = residual.square().sum(0)
    scaled = residual / diagonal
    step, product = scaled.clone(), (residual * scaled).sum(0)
    for _ in range(steps):
        turned = gathered(heavy * step[places].sum(0))
        length = product / (step * turned).sum(0).clamp(min=1e-300)
        table, residual = table + length * step, residual - length * turned
        if bool((residual.square().sum(0) <= 1e-24 * start).all()):
            break
        scaled = residual / diagonal
        before, product = product, (residual * scaled).sum(0)
        step = scaled + product / before.clamp(min=1e-300) * step
    return table.to(rows.dtype)
