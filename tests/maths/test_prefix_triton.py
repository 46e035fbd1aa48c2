"""The kernel for accelerators, run by triton's interpreter; where there is no triton, nothing is run."""

import pytest
import torch

from modelwright.core.errors import WeightsError
from modelwright.maths import prefix_codes
from modelwright.maths._kernels import kernels
from modelwright.maths.coded_floats import SPLITS, encode
from modelwright.maths.prefix_codes import Coded, Reader, merged

pytest.importorskip("triton", reason="torch for accelerators brings it along")
COUNT = 2 * 4 * 16 + 37  # of the small blocks below


@pytest.fixture
def small(monkeypatch):
    """Blocks of few lanes and steps, since an interpreter takes its time."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels.cache_clear()
    for name, value in (("LANES", 4), ("STEPS", 16), ("BLOCK", 64)):
        monkeypatch.setattr(prefix_codes, name, value)
    monkeypatch.setattr(prefix_codes, "compiled", lambda: None)
    yield
    kernels.cache_clear()


@pytest.mark.parametrize("dtype", list(SPLITS))
@pytest.mark.parametrize("count", [1, 5, 64, 65, COUNT])
def test_it_gives_every_bit(small, dtype, count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    coded, split = encode(values), SPLITS[dtype]
    signs = torch.empty(count, dtype=torch.uint8)
    signs[:] = (values.view(split.whole).long() >> split.below >> split.upper + split.exponent & 1) << split.upper
    signs |= (values.view(split.whole).long() >> split.below & ((1 << split.upper) - 1)).to(torch.uint8)
    blocks = range(-(-count // prefix_codes.BLOCK))
    out = torch.empty(count, dtype=split.whole)
    Reader(Coded(*coded[:3]), count).on_accelerator(blocks, out, signs, coded.rest, (split.exponent, split.upper))
    assert torch.equal(out, values.view(split.whole))


def test_symbols_alone_and_some_blocks(small):
    symbols = torch.randint(9, (COUNT,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    reader = Reader(prefix_codes.encode(symbols), COUNT)
    for blocks in ([1], [0, 2]):
        expected = torch.cat([symbols[64 * block : 64 * block + 64] for block in blocks])
        out = torch.empty_like(expected)
        reader.on_accelerator(blocks, out, None, None, (0, 0))
        assert torch.equal(out, expected)
    assert torch.equal(merged(symbols, symbols * 0, None, (8, 7), torch.int16), symbols.short() << 7)


def test_damage_is_found(small):
    symbols = torch.randint(9, (COUNT,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    coded = prefix_codes.encode(symbols)
    codes = coded.codes.clone()
    codes[2:12] = 255 - codes[2:12]
    with pytest.raises(WeightsError, match="do not end where they should"):
        Reader(coded._replace(codes=codes), COUNT).on_accelerator(range(3), torch.empty_like(symbols), None, None, (0, 0))
