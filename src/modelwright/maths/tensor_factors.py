"""Tensors of three ways and more as few small parts: CP, Tucker, and tensor trains (TT).

W [I_1, ..., I_N] is a sum over ranks of products of the parts' entries. The forms differ in who shares which rank:

| form   | parts                                                   | W                                  |
|--------|---------------------------------------------------------|------------------------------------|
| cp     | a factor [I_n, R] for each way                          | Σ_r u1[i1, r] ··· uN[iN, r]        |
| tucker | a core [R_1, ..., R_N], then a factor [I_n, R_n] each   | Σ core[r1, ...] u1[i1, r1] ···     |
| tt     | a core [R_{n-1}, I_n, R_n] each, R_0 = R_N = 1          | Σ G1[1, i1, r1] G2[r1, i2, r2] ··· |

Kolda, Bader 2009, Tensor decompositions and applications, SIAM Review 51(3); Oseledets 2011, Tensor-train decomposition, SIAM
Journal on Scientific Computing 33(5); ranks and initial spread as in Kossaifi et al. 2023, arXiv:2310.00120.
Differs: the weights λ of CP are spread over its factors; ranks never exceed the share; that paper
names no rule for the ranks of a train, which here are one rank, less where the tensor's sides allow no more. Ways that are
`fixed` in Tucker have no factor, and stay in the core as they are. Real and complex tensors alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from math import prod
from typing import Literal

import torch
from torch import Tensor

Form = Literal["cp", "tucker", "tt"]
RANKS = "ABCDEFGHJ"  # their letters; in a train two more than inner ranks
NEAR = 1e-7  # how strongly a factor of CP is held to what it was, as a share of its mean curvature


# Sizes


def ranks_for(form: Form, shape: Sequence[int], keep: float, fixed: Sequence[int] = ()) -> tuple[int, ...]:
    """The ranks with which the parts hold at most `keep` of a tensor's entries; each at least 1.

    cp: R = keep ∏I / ΣI, one rank. tucker: R_n = c I_n, rounded, with c^N ∏I + c Σ I_n² = keep ∏I, to a thousandth of c; a fixed
    way has R_n = I_n and no part in the sum, and N counts the others; no rank exceeds the product of the others. tt: N - 1
    inner ranks, all the same unless a side of the tensor is smaller.
    """
    whole, ways = prod(shape), range(len(shape))
    if form == "cp":
        return (max(1, int(keep * whole / sum(shape))),)
    if form == "tt":
        sides = [min(prod(shape[:n]), prod(shape[n:])) for n in ways[1:]]

        def trained(rank: int) -> tuple[int, ...]:
            return tuple(min(rank, side) for side in sides)

        return trained(_largest(1, max(sides), lambda rank: size_of(form, shape, trained(rank)) <= keep * whole))

    def scaled(thousandths: int) -> tuple[int, ...]:
        c = thousandths / 1000
        ranks = [size if n in fixed else min(max(1, round(c * size)), size) for n, size in enumerate(shape)]
        while True:  # no rank is of use above the product of the others
            best = [rank if n in fixed else min(rank, prod(ranks[:n]) * prod(ranks[n + 1 :])) for n, rank in enumerate(ranks)]
            if best == ranks:
                return tuple(ranks)
            ranks = best

    return scaled(_largest(0, 1000, lambda c: size_of(form, shape, scaled(c), fixed) <= keep * whole))


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest whole number that fits, where all below it do; `low` where none does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def shapes_of(form: Form, shape: Sequence[int], ranks: Sequence[int], fixed: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """The shapes of the parts of a tensor of this shape, in their order."""
    if form == "cp":
        return [(size, ranks[0]) for size in shape]
    if form == "tucker":
        return [tuple(ranks), *((size, ranks[n]) for n, size in enumerate(shape) if n not in fixed)]
    ends = (1, *ranks, 1)
    return [(ends[n], size, ends[n + 1]) for n, size in enumerate(shape)]


def size_of(form: Form, shape: Sequence[int], ranks: Sequence[int], fixed: Sequence[int] = ()) -> int:
    """How many entries the parts have together."""
    return sum(map(prod, shapes_of(form, shape, ranks, fixed)))


def spread(form: Form, shape: Sequence[int], ranks: Sequence[int], deviation: float, fixed: Sequence[int] = ()) -> float:
    """The standard deviation of independent parts with which W has the standard deviation `deviation`.

    W sums as many products as there are rank indices, each of as many entries as there are parts: σ² = ∏R · s^(2·parts).
    """
    sums = prod(rank for n, rank in enumerate(ranks) if n not in fixed)
    return (deviation / sums**0.5) ** (1 / len(shapes_of(form, shape, ranks, fixed)))


# Sums of products


def terms(form: Form, ways: Sequence[str], fixed: Sequence[int] = ()) -> list[str]:
    """The letters of each part's dimensions, small for those of the ways and large for ranks.

    ways: the letters of each way; several where a way is a product of dimensions into which its parts are unfolded.
    """
    if form == "cp":
        return [way + RANKS[0] for way in ways]
    if form == "tt":
        return [RANKS[n] + way + RANKS[n + 1] for n, way in enumerate(ways)]
    core = "".join(way if n in fixed else RANKS[n] for n, way in enumerate(ways))
    return [core, *(way + RANKS[n] for n, way in enumerate(ways) if n not in fixed)]


def path(letters: Sequence[str], sizes: Mapping[str, int], out: str) -> Iterator[tuple[int, int, str]]:
    """The order in which `contract` multiplies: places of two tensors in what is left, and the letters of their product.

    Always the two whose product is smallest beside what it replaces, so that what lies between stays small. A product
    goes to the end.
    """
    held = list(letters)

    def joined(one: int, two: int) -> str:
        needed = set(out).union(*(term for n, term in enumerate(held) if n not in (one, two)))
        return "".join(letter for letter in dict.fromkeys(held[one] + held[two]) if letter in needed)

    def size(term: str) -> int:
        return prod(sizes[letter] for letter in term)

    while len(held) > 1:
        one, two = min(combinations(range(len(held)), 2), key=lambda pair: size(joined(*pair)) - sum(size(held[n]) for n in pair))
        left = joined(one, two)
        held = [term for n, term in enumerate(held) if n not in (one, two)] + [left]
        yield one, two, left


def contract(letters: Sequence[str], tensors: Sequence[Tensor], out: str) -> Tensor:
    """The sum of products over all letters that `out` does not have, as by einsum, two tensors at a time (see `path`)."""
    held = list(zip(letters, tensors, strict=True))
    for one, two, left in path(letters, sizes_of(letters, tensors), out):
        product = torch.einsum(f"{held[one][0]},{held[two][0]}->{left}", held[one][1], held[two][1])
        held = [pair for n, pair in enumerate(held) if n not in (one, two)] + [(left, product)]
    return torch.einsum(f"{held[0][0]}->{out}", held[0][1])


def multiplications(letters: Sequence[str], sizes: Mapping[str, int], out: str) -> int:
    """How many products of entries `contract` makes with dimensions of these sizes."""
    held, total = list(letters), 0
    for one, two, left in path(letters, sizes, out):
        total += prod(sizes[letter] for letter in set(held[one] + held[two]))
        held = [term for n, term in enumerate(held) if n not in (one, two)] + [left]
    return total


def sizes_of(letters: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, int]:
    """The size of each letter."""
    return {letter: size for term, tensor in zip(letters, tensors, strict=True) for letter, size in zip(term, tensor.shape, strict=True)}


def rebuilt(form: Form, parts: Sequence[Tensor], fixed: Sequence[int] = ()) -> Tensor:
    """W [I_1, ..., I_N] of its parts."""
    ways = "abcdefgh"[: parts[0].ndim if form == "tucker" else len(parts)]
    return contract(terms(form, ways, fixed), parts, ways)


# Decompositions


def decomposed(
    form: Form,
    tensor: Tensor,
    ranks: Sequence[int],
    *,
    fixed: Sequence[int] = (),
    iterations: int = 50,
    rng: torch.Generator | None = None,
) -> list[Tensor]:
    """The parts of these ranks whose W is near a tensor, in its dtype; computed in float64.

    iterations: at most, of HOOI and ALS; 0 gives HOSVD. rng: for the start of CP, whose rank may exceed the sides.
    """
    exact = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    if form == "cp":
        parts = cp(exact, ranks[0], iterations, rng)
    else:
        parts = tucker(exact, ranks, fixed, iterations) if form == "tucker" else train(exact, ranks)
    return [part.to(tensor.dtype) for part in parts]


def tucker(tensor: Tensor, ranks: Sequence[int], fixed: Sequence[int] = (), iterations: int = 50) -> list[Tensor]:
    """HOSVD, then HOOI: each factor in turn is made the best one beside the others, until the core gains nothing."""
    free = [n for n in range(tensor.ndim) if n not in fixed]
    factors = {n: leading(unfolded(tensor, n), ranks[n]) for n in free}

    def projected(leave: int | None = None) -> Tensor:
        found = tensor
        for n in free:
            if n != leave:
                found = torch.tensordot(found.movedim(n, -1), factors[n].conj(), 1).movedim(-1, n)
        return found

    core = projected()
    for _ in range(iterations):
        for n in free:
            factors[n] = leading(unfolded(projected(n), n), ranks[n])
        before, core = core, projected()
        if core.norm() - before.norm() <= 1e-9 * tensor.norm():
            break
    return [core, *factors.values()]


def train(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Sequential singular value decompositions, first way to last; the squared error is at most the sum of what they drop."""
    rest, before, cores = tensor, 1, []
    for size, rank in zip(tensor.shape, ranks, strict=False):
        matrix = rest.reshape(before * size, -1)
        basis = leading(matrix, rank)
        cores.append(basis.view(before, size, rank))
        rest, before = basis.mH @ matrix, rank
    return [*cores, rest.reshape(before, tensor.shape[-1], 1)]


def cp(tensor: Tensor, rank: int, iterations: int = 50, rng: torch.Generator | None = None) -> list[Tensor]:
    """Alternating least squares from the leading singular vectors of each way, and random ones where there are no more.

    Every step adds a little of the distance from the factor before, so that it is solvable and the error never grows.
    """
    rng = rng or torch.Generator().manual_seed(0)
    factors = []
    for n, size in enumerate(tensor.shape):
        drawn = torch.randn(size, rank, generator=rng, dtype=tensor.dtype).to(tensor.device)
        known = leading(unfolded(tensor, n), min(rank, size))
        factors.append(torch.cat([known, drawn[:, known.shape[1] :] / size**0.5], 1))
    grams = [factor.mT @ factor.conj() for factor in factors]
    matrices = [unfolded(tensor, n) for n in range(tensor.ndim)]
    energy, error = float(tensor.abs().square().sum()), float("inf")
    for _ in range(max(iterations, 1)):
        for n, matrix in enumerate(matrices):
            others = [factor for m, factor in enumerate(factors) if m != n]
            letters = "abcdefgh"[: len(others)]
            products = contract([letter + "Z" for letter in letters], others, letters + "Z").flatten(0, -2)
            gram = torch.stack([each for m, each in enumerate(grams) if m != n]).prod(0)
            near = NEAR * gram.diagonal().abs().mean() * torch.eye(rank, dtype=gram.dtype, device=gram.device)
            seen = matrix @ products.conj()
            factors[n] = torch.linalg.solve(gram + near, seen + factors[n] @ near, left=False)
            if n + 1 < len(factors):  # the last keeps the size
                factors[n] = factors[n] / factors[n].norm(dim=0).clamp(min=1e-300)
            grams[n] = factors[n].mT @ factors[n].conj()
        own = torch.stack(grams).prod(0).sum().real
        before, error = error, float(energy - 2 * (seen * factors[-1].conj()).sum().real + own)
        if before - error <= 1e-8 * energy:
            break
    size = factors[-1].norm(dim=0)
    shared = size ** (1 / len(factors))
    return [*(factor * shared for factor in factors[:-1]), factors[-1] / size.clamp(min=1e-300) * shared]


def unfolded(tensor: Tensor, way: int) -> Tensor:
    """The tensor as a matrix whose rows run along one way."""
    return tensor.movedim(way, 0).flatten(1)


def leading(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal columns [rows, rank] that hold most of a matrix [rows, columns]; rank at most rows."""
    if len(matrix) <= matrix.shape[1]:
        return torch.linalg.eigh(matrix @ matrix.mH)[1].flip(1)[:, :rank]
    return torch.linalg.svd(matrix, full_matrices=rank > matrix.shape[1])[0][:, :rank]


# Matrices as tensors


def folded(size: int, parts: int) -> tuple[int, ...]:
    """So many whole numbers, near each other, whose product is at least `size`, and little more."""
    if parts == 1:
        return (size,)
    first = max(1, round(size ** (1 / parts)) - 1)
    while first**parts < size:
        first += 1
    exact = [n for n in range(first, 2 * first) if size % n == 0]
    first = exact[0] if exact else first
    return (first, *folded(-(-size // first), parts - 1))
