import pytest
import torch

from modelwright.core.errors import WeightsError
from modelwright.maths import prefix_codes
from modelwright.maths.coded_floats import SPLITS, decode, encode, least_bytes
from modelwright.maths.prefix_codes import BLOCK, LANES, entropy, histogram

DTYPES = list(SPLITS)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def bits_of(values):
    return values.view(SPLITS[values.dtype].whole)


def weights(count, dtype, seed=0):
    """Normal rows whose sizes differ, as in trained models."""
    return (torch.randn(count, generator=random(seed)) * 0.02).to(dtype)


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(prefix_codes, "compiled", lambda: None)


def test_a_case_by_hand(way):
    # 1.5 is 0 01111111 1000000; -2 is 1 10000000 0000000; 1 is 0 01111111 0000000. Exponent 127 twice, 128 once: a bit each.
    coded = encode(torch.tensor([1.5, -2.0, 1.0], dtype=torch.bfloat16))
    assert coded.signs.tolist() == [0b01000000, 0b10000000, 0b00000000]
    assert coded.lengths.nonzero().view(-1).tolist() == [127, 128]
    assert coded.codes[0] == 0b010  # the first value lowest
    assert coded.bits.tolist() == [3]
    assert coded.rest is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_bit_pattern_comes_back(dtype, way):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    assert torch.equal(bits_of(decode(encode(every.view(dtype)), dtype, len(every))), every)


def test_bit_patterns_of_float32_come_back(way):
    odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45, 3.4e38, 1.1754944e-38])
    every = torch.randint(-(1 << 31), 1 << 31, (BLOCK + 300,), generator=random()).to(torch.int32)
    payloads = torch.tensor([0x7FC00001, 0x7F800001, -1], dtype=torch.int32)  # NaNs that differ
    for values in (odd.view(torch.int32), every, payloads):
        assert torch.equal(bits_of(decode(encode(values.view(torch.float32)), torch.float32, len(values))), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000, 4097, BLOCK + 1, 3 * BLOCK - 1])
def test_any_number_of_values_comes_back(dtype, count, way):
    values = weights(count, dtype)
    assert torch.equal(bits_of(decode(encode(values), dtype, count)), bits_of(values))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, float("nan"), float("inf")])
def test_a_tensor_of_one_value_comes_back(dtype, value, way):
    values = torch.full((2000,), value, dtype=dtype)
    coded = encode(values)
    assert int(coded.bits.sum()) == 2000  # the one exponent takes a bit
    assert torch.equal(bits_of(decode(coded, dtype, 2000)), bits_of(values))


@pytest.mark.parametrize("count", [1, 1000, BLOCK, 300_000])
def test_its_bytes_are_those_of_the_entropy_and_a_tenth_of_a_bit(count):
    rows = torch.randn(count, generator=random()) * torch.randn(count, generator=random(1)).exp() * 0.02
    values = rows.bfloat16()
    spread = entropy(histogram(((bits_of(values) >> 7) & 255).to(torch.uint8)))
    header = 256 + 2 * LANES + 16  # lengths, the lanes of a block that is not whole, a word that is not and the spare one
    assert encode(values).nbytes <= header + count * (1 + (spread + 0.1) / 8)
    assert least_bytes(values) == pytest.approx(count * (1 + spread / 8))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 32)])
def test_large_tensors_come_within_a_hundredth_of_the_entropy(dtype, bits):
    values = weights(8 * BLOCK, dtype)
    coded = encode(values)
    assert least_bytes(values) <= coded.nbytes <= 1.01 * least_bytes(values)
    assert coded.nbytes < len(values) * bits / 8 * (0.68 if dtype == torch.bfloat16 else 0.9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_can_be_decoded_alone(dtype, way):
    count = 3 * BLOCK + 1001
    values = weights(count, dtype)
    coded = encode(values)
    for blocks in ([0], [1, 3], [2], [0, 1, 2, 3]):
        expected = torch.cat([values[block * BLOCK : (block + 1) * BLOCK] for block in blocks])
        assert torch.equal(bits_of(decode(coded, dtype, count, blocks)), bits_of(expected))


def test_the_order_is_that_of_the_values_whatever_their_strides():
    values = weights(600, torch.bfloat16).view(20, 30)
    assert torch.equal(decode(encode(values.T), torch.bfloat16, 600).view(30, 20), values.T)


def test_damage_is_said():
    coded = encode(weights(5000, torch.bfloat16))
    with pytest.raises(WeightsError, match="damaged"):
        decode(coded, torch.bfloat16, 9000)
