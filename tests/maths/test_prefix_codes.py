import heapq
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from modelwright.core.errors import WeightsError
from modelwright.maths import prefix_codes
from modelwright.maths.prefix_codes import (
    BLOCK,
    LANES,
    LONGEST,
    Coded,
    Reader,
    code_lengths,
    codes_of,
    decode,
    decode_table,
    encode,
    encode_plainly,
    entropy,
    histogram,
    lanes_of,
    merged,
    planned_bytes,
    starts_of,
)  # fmt: skip

COUNTS = (0, 1, 2, 5, 63, 1000, 1025, 4097, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 777, 6 * BLOCK)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def exponents(count, seed=0):
    """Those of normal numbers."""
    return ((torch.randn(count, generator=random(seed)).bfloat16().view(torch.int16) >> 7) & 255).to(torch.uint8)


def huffman(counts):
    """The cost in bits of an optimal code of any length."""
    heap, total = [count for count in counts if count], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        total += pair
        heapq.heappush(heap, pair)
    return total


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(prefix_codes, "compiled", lambda: None)


def test_a_case_by_hand():
    # a b c d occur 5, 2, 1, 1 times. Huffman: c + d = 2, with b 4, with a 9: lengths 1, 2, 3, 3, codes 0, 10, 110, 111.
    lengths = code_lengths(torch.tensor([5, 2, 1, 1]))
    assert lengths.tolist() == [1, 2, 3, 3]
    assert codes_of(lengths).tolist() == [0b0, 0b01, 0b011, 0b111]  # the first bit lowest
    # a b a c d: 0 10 0 110 111. Five symbols are one lane; bits from the lowest: 0 1 0 0 1 1 0 1 | 1 1.
    coded = encode(torch.tensor([0, 1, 0, 2, 3], dtype=torch.uint8), lengths)
    assert coded.codes[:2].tolist() == [0b10110010, 0b11]
    assert coded.bits.tolist() == [10]
    assert len(coded.codes) == 16  # a word, and one to spare
    assert decode(coded, 5).tolist() == [0, 1, 0, 2, 3]


def test_a_limit_by_hand():
    # 8, 4, 2, 1, 1 take 1, 2, 3, 4, 4 bits. With 3 at most the cheapest is 1, 3, 3, 3, 3: 8 + 3 * 8 = 32; 2, 2, 2, 3, 3 would be 34.
    assert code_lengths(torch.tensor([8, 4, 2, 1, 1])).tolist() == [1, 2, 3, 4, 4]
    assert code_lengths(torch.tensor([8, 4, 2, 1, 1]), longest=3).tolist() == [1, 3, 3, 3, 3]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(counts=some.lists(some.integers(0, 1000), min_size=2, max_size=40))
def test_lengths_are_those_of_huffman_where_none_is_too_long(counts):
    lengths = code_lengths(torch.tensor(counts), longest=40)
    if sum(map(bool, counts)) > 1:
        assert int((lengths.long() * torch.tensor(counts)).sum()) == huffman(counts)
        assert float((2.0 ** -lengths[lengths > 0].double()).sum()) == 1
    assert ((lengths > 0) == (torch.tensor(counts) > 0)).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(counts=some.lists(some.integers(1, 60), min_size=2, max_size=5), longest=some.integers(3, 4))
def test_no_lengths_within_the_limit_are_cheaper(counts, longest):
    cost = int((code_lengths(torch.tensor(counts), longest).long() * torch.tensor(counts)).sum())
    codes = (one for one in itertools.product(range(1, longest + 1), repeat=len(counts)) if sum(2.0**-length for length in one) <= 1)
    assert cost == min(sum(length * count for length, count in zip(one, counts, strict=True)) for one in codes)


def test_twelve_bits_cost_next_to_nothing_and_rare_symbols_have_a_code():
    counts = torch.tensor([2**n for n in range(40)])
    lengths = code_lengths(counts)
    assert lengths.max() == LONGEST
    assert (lengths > 0).all()
    normal = histogram(exponents(1 << 20))
    assert int((code_lengths(normal).long() * normal).sum()) <= 1.002 * huffman(normal.tolist())


def test_one_symbol_takes_a_bit_and_none_takes_nothing():
    assert code_lengths(torch.tensor([0, 7, 0])).tolist() == [0, 1, 0]
    assert code_lengths(torch.tensor([0, 0])).tolist() == [0, 0]
    same = torch.full((3000,), 9, dtype=torch.uint8)
    assert encode(same).bits.sum() == 3000
    assert torch.equal(decode(encode(same), 3000), same)


def test_entropy_is_that_of_the_formula():
    assert entropy(torch.tensor([1, 1, 2, 0])) == pytest.approx(1.5)
    assert entropy(torch.tensor([5])) == 0


@pytest.mark.parametrize("count", COUNTS)
def test_any_number_of_symbols_comes_back_and_both_ways_agree(count, monkeypatch):
    symbols = exponents(count)
    coded = encode(symbols)
    assert len(coded.bits) == lanes_of(count)
    assert all(torch.equal(one, two) for one, two in zip(coded, encode_plainly(symbols, coded.lengths), strict=True))
    assert torch.equal(decode(coded, count), symbols)
    monkeypatch.setattr(prefix_codes, "compiled", lambda: None)
    assert torch.equal(decode(coded, count), symbols)
    assert torch.equal(encode(symbols).codes, coded.codes)


def test_the_compiled_loops_have_the_same_layout():
    kernels = prefix_codes.compiled()
    for name in ("LONGEST", "LANES", "STEPS", "BLOCK"):
        assert getattr(kernels, name) == getattr(prefix_codes, name)
    assert int(kernels.FOUR) * LONGEST <= 64


def test_threads_change_no_bit():
    known = torch.get_num_threads()
    symbols = exponents(11 * BLOCK + 5)
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(encode(symbols))
            assert torch.equal(decode(found[-1], len(symbols)), symbols)
    finally:
        torch.set_num_threads(known)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_all_symbols_alike_often_take_eight_bits_and_come_back():
    symbols = torch.arange(256).repeat(700).to(torch.uint8)
    coded = encode(symbols)
    assert (coded.lengths == 8).all()
    assert torch.equal(decode(coded, len(symbols)), symbols)


def test_the_layout_is_the_one_that_is_described():
    symbols = exponents(BLOCK + 3000)
    coded = encode(symbols)
    starts, words = starts_of(coded.bits)
    assert len(coded.codes) == 8 * words
    assert starts[LANES] % 64 == 0
    bits = [byte >> place & 1 for byte in coded.codes.tolist() for place in range(8)]
    sizes, codes = coded.lengths.tolist(), codes_of(coded.lengths).tolist()
    for lane in (0, 17, LANES, LANES + 2):  # of the second block, whose 3000 symbols are three lanes
        own = symbols[lane:BLOCK:LANES] if lane < LANES else symbols[BLOCK + lane - LANES :: 3]
        at = int(starts[lane])
        for symbol in own.tolist():
            assert bits[at : at + sizes[symbol]] == [codes[symbol] >> place & 1 for place in range(sizes[symbol])]
            at += sizes[symbol]
        assert at - starts[lane] == coded.bits[lane]


@pytest.mark.parametrize("way", ["compiled", "plain"])
def test_blocks_can_be_read_alone(way, request):
    if way == "plain":
        request.getfixturevalue("plain")
    count = 4 * BLOCK + 100
    symbols = exponents(count)
    reader = Reader(encode(symbols), count)
    for blocks in ([1], [0, 3], [2, 4], [4]):
        expected = torch.cat([symbols[block * BLOCK : (block + 1) * BLOCK] for block in blocks])
        out = torch.empty_like(expected)
        reader.read(blocks, out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize(("split", "whole", "rest"), [((8, 7), torch.int16, None), ((8, 7), torch.int32, torch.int16),
                                                      ((5, 2), torch.int16, torch.uint8)])  # fmt: skip
def test_signs_and_mantissas_are_merged_while_it_decodes(split, whole, rest):
    count = 2 * BLOCK + 5
    symbols = torch.randint(1 << split[0], (count,), generator=random()).to(torch.uint8)
    signs = torch.randint(2 << split[1], (count,), generator=random(1)).to(torch.uint8)
    low = None if rest is None else torch.randint(1 << 30, (count,), generator=random(2)).to(rest)
    out = torch.empty(count, dtype=whole)
    Reader(encode(symbols), count).read(range(3), out, signs, low, split)
    assert torch.equal(out, merged(symbols, signs, low, split, whole))


def test_bytes_are_near_those_that_are_planned():
    symbols = exponents(3 * BLOCK + 5000)
    coded = encode(symbols)
    assert abs(len(coded.codes) - planned_bytes(len(symbols), int(coded.bits.sum()) / len(symbols))) <= 8 * 4


@pytest.mark.parametrize("way", ["compiled", "plain"])
def test_damage_is_found(way, request):
    count = BLOCK + 5000
    symbols = exponents(count)
    coded = encode(symbols)
    if way == "plain":
        request.getfixturevalue("plain")
    codes = coded.codes.clone()
    codes[100:140] = torch.randint(256, (40,), generator=random()).to(torch.uint8)
    with pytest.raises(WeightsError, match="do not end where they should"):
        decode(coded._replace(codes=codes), count)
    for wrong in (
        coded._replace(codes=coded.codes[:-8]),
        coded._replace(bits=coded.bits[:-1]),
        coded._replace(bits=coded.bits * 0 - 1),
        coded._replace(bits=coded.bits * 0 + 30000),
    ):
        with pytest.raises(WeightsError, match="do not fit their lanes"):
            decode(wrong, count)
    with pytest.raises(WeightsError, match="cannot have these lengths"):
        decode(coded._replace(lengths=torch.ones(256, dtype=torch.uint8)), count)


def test_lies_about_lanes_read_nothing_outside():
    symbols = exponents(5000)
    coded = encode(symbols)
    moved = coded.bits.clone()
    moved[0], moved[-1] = moved[0] - 500, moved[-1] + 500  # the same sum, so that the words are as many
    with pytest.raises(WeightsError, match="do not end where they should"):
        decode(Coded(coded.codes, moved, coded.lengths), 5000)


def test_the_table_has_every_code_at_all_places_that_begin_with_it():
    lengths = code_lengths(histogram(exponents(10000)))
    table = decode_table(lengths)
    for symbol, (length, code) in enumerate(zip(lengths.tolist(), codes_of(lengths).tolist(), strict=True)):
        found = (table == symbol | length << 8).nonzero().view(-1)
        assert len(found) == (1 << LONGEST - length if length else 0)
        assert ((found & ((1 << length) - 1)) == code).all()
