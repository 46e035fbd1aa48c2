"""Canonical Huffman codes of at most LONGEST bits, in lanes that are decoded beside each other.

Lengths: package-merge (Larmore, Hirschberg 1990, A fast algorithm for optimal length-limited Huffman codes, JACM 37(3)). Layout:
blocks of BLOCK symbols, each by itself, so that threads share them and a part can be decoded alone. Inside a block of P lanes, lane j
has the symbols j, j + P, j + 2P, ...: step k of all lanes gives the symbols kP to (k + 1)P, which lie beside each other. Codes of a
block stand lane after lane, from a whole word of 64 bits on, the first bit of a code in the lowest free bit (as in Deflate, RFC 1951).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modelwright.core.errors import WeightsError
from modelwright.maths._kernels import kernels
from modelwright.maths.slices import each

LONGEST = 12  # bits of a code: one table of 4096 entries decodes each
LANES = 64  # of a block, at most
STEPS = 1 << 10  # symbols of a lane, at most
BLOCK = LANES * STEPS
BATCH = 4  # blocks that a thread works on at a time, as many entries as `slices.SLICE`
WORD = 64  # bits
compiled = functools.partial(kernels, "_prefix_kernels")
accelerated = functools.partial(kernels, "_prefix_triton")


class Coded(NamedTuple):
    """A stream of symbols."""

    codes: Tensor  # uint8 [bytes], whole words of 8, one of them spare
    bits: Tensor  # int16 [lanes], the bits that the codes of each lane take
    lengths: Tensor  # uint8 [alphabet], the length of each symbol's code, 0 of those that do not occur


def entropy(counts: Tensor) -> float:
    """The fewest bits that a symbol can take on average, by how often each occurs [alphabet]: -Σ p log2 p."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log2()).sum()) + 0.0


def code_lengths(counts: Tensor, longest: int = LONGEST) -> Tensor:
    """The lengths of an optimal prefix code of at most `longest` bits, uint8 [alphabet]; 0 for symbols that do not occur.

    One symbol alone takes 1 bit. Needs 2^longest >= symbols.
    """
    found = torch.zeros(len(counts), dtype=torch.uint8)
    present = counts.nonzero().view(-1)
    if len(present) < 2:
        found[present] = 1
        return found
    order = present[counts[present].argsort(stable=True)]
    weights, members = counts[order].numpy().astype(np.float64), np.eye(len(order), dtype=np.int16)
    weight, member = weights, members  # of the coins and packages of a level, by rising weight
    for _ in range(longest - 1):
        even = len(weight) // 2 * 2
        weight = np.concatenate([weights, weight[:even:2] + weight[1:even:2]])
        member = np.concatenate([members, member[:even:2] + member[1:even:2]])
        rising = weight.argsort(kind="stable")
        weight, member = weight[rising], member[rising]
    found[order] = torch.from_numpy(member[: 2 * len(order) - 2].sum(0)).to(torch.uint8)
    return found


def codes_of(lengths: Tensor) -> Tensor:
    """The canonical codes by their lengths, int16 [alphabet], bits reversed: the first bit of a code is its lowest."""
    found = torch.zeros(len(lengths), dtype=torch.int16)
    order, widths = _canonical(lengths)
    found[order] = _reversed()[widths.cumsum(0) - widths].to(torch.int16)
    return found


def decode_table(lengths: Tensor) -> Tensor:
    """By the next LONGEST bits of a stream: symbol | length << 8 of the code that stands there, int16 [4096].

    Raises WeightsError for lengths that no code has.
    """
    order, widths = _canonical(lengths)
    if len(order) and (lengths.max() > LONGEST or widths.sum() > 1 << LONGEST):
        shown = sorted(lengths[order].tolist())
        raise WeightsError(f"A prefix code cannot have these lengths: {shown}. The file is damaged; fetch it again.")
    entries = (order | lengths[order].long() << 8).to(torch.int16).repeat_interleave(widths)
    return torch.nn.functional.pad(entries, (0, (1 << LONGEST) - len(entries)))[_reversed()]


def _canonical(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The symbols that have codes, by their length and number, and how many of the numbers of LONGEST bits begin with the code of each."""
    order = lengths.argsort(stable=True)[int((lengths == 0).sum()) :]
    return order, (1 << LONGEST) >> lengths[order].long()


@functools.cache
def _reversed() -> Tensor:
    """The numbers of LONGEST bits with their bits in reverse, int64 [4096]."""
    numbers = torch.arange(1 << LONGEST)
    return sum(((numbers >> bit) & 1) << (LONGEST - 1 - bit) for bit in range(LONGEST))  # type: ignore[return-value]


def lanes_of(count: int) -> int:
    """How many lanes `count` symbols take: of the last block only as many as it needs."""
    return count // BLOCK * LANES + -(-(count % BLOCK) // STEPS)


def starts_of(bits: Tensor) -> tuple[Tensor, int]:
    """The bit at which each lane starts, int64 [lanes], and the words of the whole stream with the spare one."""
    blocks = -(-len(bits) // LANES)
    lanes = torch.zeros(blocks, LANES, dtype=torch.int64, device=bits.device)
    lanes.view(-1)[: len(bits)] = bits
    words = (lanes.sum(1) + WORD - 1) // WORD
    first = WORD * (words.cumsum(0) - words)
    starts = first.unsqueeze(1) + lanes.cumsum(1) - lanes
    return starts.view(-1)[: len(bits)], int(words.sum()) + 1


def planned_bytes(count: int, bits: float) -> int:
    """The bytes of the codes of `count` symbols that take so many bits on average."""
    blocks, rest = divmod(count, BLOCK)
    words = [-(-int(bits * part) // WORD) for part in (BLOCK, rest)]
    return 8 * (blocks * words[0] + words[1] + 1)


def encode(symbols: Tensor, lengths: Tensor | None = None) -> Coded:
    """Code symbols, uint8 [n]; `lengths`, uint8 [alphabet], are those of an optimal code unless they are given."""
    if lengths is None:
        lengths = code_lengths(histogram(symbols))
    kernels = compiled()
    if kernels is None:
        return encode_plainly(symbols, lengths)
    bits = torch.zeros(lanes_of(len(symbols)), dtype=torch.int16)
    flat, sizes = symbols.numpy(), lengths.numpy()
    _shared(lambda first, last: kernels.measure(flat, sizes, bits.numpy(), first, last), len(symbols))
    starts, words = starts_of(bits)
    stream = torch.zeros(words * 8, dtype=torch.uint8)
    codes, places = codes_of(lengths).numpy(), starts.numpy()
    _shared(lambda first, last: kernels.write(flat, codes, sizes, places, stream.numpy().view(np.uint64), first, last), len(symbols))
    return Coded(stream, bits, lengths)


def decode(coded: Coded, count: int) -> Tensor:
    """The `count` symbols of a stream, uint8 [count], on its device.

    Raises WeightsError when the stream is damaged.
    """
    out = torch.empty(count, dtype=torch.uint8, device=coded.codes.device)
    Reader(coded, count).read(range(-(-count // BLOCK)), out)
    return out


def histogram(symbols: Tensor, alphabet: int = 256) -> Tensor:
    """How often each symbol occurs, int64 [alphabet]."""
    found = torch.zeros(alphabet, dtype=torch.int64)
    for part in each(lambda at: torch.bincount(symbols[at], minlength=alphabet), len(symbols)):
        found += part
    return found


class Reader:
    """A stream of `count` symbols, to decode blocks of.

    Raises WeightsError for a stream that is damaged: one whose parts do not fit each other, here, and one whose lanes do not end where
    they should, when it is read.
    """

    def __init__(self, coded: Coded, count: int):
        self.coded, self.count = coded, count
        fits = len(coded.bits) == lanes_of(count) and bool(((coded.bits >= 0) & (coded.bits <= LONGEST * STEPS)).all())
        self.starts, words = starts_of(coded.bits)
        if not fits or len(coded.codes) != 8 * words:
            raise WeightsError(f"Codes of {count:,} values do not fit their lanes. The file is damaged; fetch it again.")
        self.table = decode_table(coded.lengths.cpu())

    def read(self, blocks: Sequence[int], out: Tensor, signs: Tensor | None = None, rest: Tensor | None = None,
             split: tuple[int, int] = (0, 0)) -> None:  # fmt: skip
        """Decode blocks, by rising number, one after another into `out` [entries of these blocks], whole numbers.

        With `signs`, uint8 like `out`, each symbol becomes the upper bits of a float, see `merged`, by `split`; with `rest` like
        it, the lower bits follow.
        """
        if out.device.type == "cuda" and accelerated() is not None:
            self.on_accelerator(blocks, out, signs, rest, split)
            return
        kernels = compiled() if out.device.type == "cpu" else None
        if kernels is None:
            symbols = self._plainly(blocks)
            out.copy_(symbols if signs is None else merged(symbols, signs, rest, split, out.dtype))
            return
        words = np.require(self.coded.codes.numpy(), requirements="A").view(np.uint64)
        lanes, starts, table = self.coded.bits.numpy(), self.starts.numpy(), _unsigned(self.table)
        chosen, values = np.asarray(blocks, dtype=np.int64), _unsigned(out)
        parts = [None if part is None else _unsigned(part) for part in (signs, rest)]

        def work(at: slice) -> int:
            return kernels.read(words, starts, lanes, table, self.count, chosen, at.start, at.stop, *parts, *split, values)

        if sum(each(work, len(chosen), BATCH)):
            raise _damaged()

    def on_accelerator(self, blocks: Sequence[int], out: Tensor, signs: Tensor | None, rest: Tensor | None, split: tuple[int, int]) -> None:
        """`read` by a kernel of triton."""
        device = out.device
        numbers, table = torch.tensor(blocks, device=device, dtype=torch.int64), self.table.to(device)
        sizes = (LONGEST, LANES, STEPS)
        ends = accelerated().read(self.coded.codes, self.starts, table, numbers, self.count, signs, rest, split, out, sizes)
        lanes = numbers.unsqueeze(1) * LANES + torch.arange(LANES, device=device)
        expected = (self.starts + self.coded.bits)[lanes.clamp(max=max(len(self.starts) - 1, 0))]
        if not torch.equal(ends, torch.where(lanes < len(self.starts), expected, -1)):
            raise _damaged()

    def _plainly(self, blocks: Sequence[int]) -> Tensor:
        """The symbols of blocks, all lanes a step at a time, on any device."""
        device = self.coded.codes.device
        whole = [block for block in blocks if (block + 1) * BLOCK <= self.count]
        groups = [(whole, LANES, BLOCK)] if whole else []  # blocks, lanes of each, symbols of each
        if len(whole) < len(blocks):
            left = self.count % BLOCK
            groups.append(([self.count // BLOCK], lanes_of(left), left))
        halves = self.coded.codes.view(torch.int32)  # of words, so that a window never needs more than two
        table = self.table.to(device)
        found = []
        for numbers, width, count in groups:
            lanes = (torch.tensor(numbers, device=device).unsqueeze(1) * LANES + torch.arange(width, device=device)).view(-1)
            places, ends = self.starts[lanes].clone(), (self.starts + self.coded.bits)[lanes]
            symbols = torch.zeros(len(lanes), -(-count // width), dtype=torch.uint8, device=device)
            for step in range(symbols.shape[1]):
                some = torch.arange(len(lanes), device=device) % width < count - step * width  # of the last step, those that have one
                half = (places >> 5).clamp_(max=len(halves) - 2)
                window = (halves[half].long() & 0xFFFFFFFF) | halves[half + 1].long() << 32
                entry = table[(window >> (places & 31)) & ((1 << LONGEST) - 1)].long()
                symbols[:, step] = (entry & 255).to(torch.uint8)
                places += (entry >> 8) * some
            if not torch.equal(places, ends):
                raise _damaged()
            found.append(symbols.view(len(numbers), width, -1).transpose(1, 2).reshape(len(numbers), -1)[:, :count].reshape(-1))
        return torch.cat(found) if found else torch.empty(0, dtype=torch.uint8, device=device)


def encode_plainly(symbols: Tensor, lengths: Tensor) -> Coded:
    """`encode` in whole-array operations."""
    count, codes = len(symbols), codes_of(lengths).long()
    order = []  # the symbols' places, lane after lane
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        width = lanes_of(size)
        places = torch.arange(width * -(-size // width)).view(-1, width).T.reshape(-1)
        order.append(start + places[places < size])
    places = torch.cat(order) if order else torch.empty(0, dtype=torch.int64)
    inside, block = places % BLOCK, places // BLOCK
    widths = torch.where(block < count // BLOCK, LANES, lanes_of(count % BLOCK) or 1)
    lane = block * LANES + inside % widths
    chosen = symbols[places].long()
    sizes = lengths.long()[chosen]
    bits = torch.zeros(lanes_of(count), dtype=torch.int64).index_add_(0, lane, sizes)
    starts, words = starts_of(bits)
    ends = sizes.cumsum(0)
    before = ends - sizes
    first = torch.full((len(bits),), count * LONGEST + 1).scatter_reduce_(0, lane, before, "amin")
    at = starts[lane] + before - first[lane]
    stream = torch.zeros(2 * words, dtype=torch.int64)  # halves of words; a code touches two at most, and no two codes a bit
    value = codes[chosen] << (at & 31)
    stream.index_add_(0, at >> 5, value & 0xFFFFFFFF).index_add_(0, (at >> 5) + 1, value >> 32)
    halves = torch.where(stream >= 1 << 31, stream - (1 << 32), stream).to(torch.int32)
    return Coded(halves.view(torch.uint8), bits.to(torch.int16), lengths)


def merged(exponents: Tensor, signs: Tensor, rest: Tensor | None, split: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Floats as whole numbers of `dtype` from their exponents, uint8, and s ‖ m, the sign and the mantissa's upper bits, uint8.

    split: the bits of the exponent, and of m. rest: the mantissa's lower bits, as whole numbers of their width.
    """
    exponent, mantissa = split
    sign, upper = signs.long() >> mantissa, signs.long() & ((1 << mantissa) - 1)
    found = (sign << (exponent + mantissa)) | (exponents.long() << mantissa) | upper
    if rest is not None:
        width = 8 * rest.element_size()
        found = found << width | (rest.long() & ((1 << width) - 1))
    return found.to(dtype)  # keeps the lowest bits


def _unsigned(values: Tensor) -> np.ndarray[Any, Any]:
    return values.numpy().view(f"u{values.element_size()}")


def _shared(work: Any, count: int) -> None:
    """Call work(first, last) for all blocks of `count` symbols, on all cores."""
    for _ in each(lambda at: work(at.start, at.stop), -(-count // BLOCK), BATCH):
        pass


def _damaged() -> WeightsError:
    return WeightsError("Codes do not end where they should. The file is damaged; fetch it again.")
