"""The kernel for accelerators, run by triton's interpreter; where there is no triton, nothing is run."""

import pytest
import torch

from modelwright.blocks.packed import PackedLinear
from modelwright.maths import packed_products
from modelwright.maths._kernels import kernels
from modelwright.maths.rounding import encode, half_quadratic, scales
from modelwright.methods.quantize.nf4 import Nf4
from modelwright.methods.quantize.nvfp4 import Nvfp4

pytest.importorskip("triton", reason="torch for accelerators brings it along")
OUT, IN = 19, 160  # rows that fill neither the words of packed zero points nor the last program; bytes that fill no block


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The kernel in the place of the processor's, for matrices of any size, in small steps, since an interpreter takes its time."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels.cache_clear()
    for name, value in (("TALL", 4), ("WIDE", 32)):
        monkeypatch.setattr(packed_products.accelerated(), name, value)
    monkeypatch.setattr(packed_products, "LEAST", 1)
    monkeypatch.setattr(packed_products, "_on_processor", packed_products._on_accelerator)
    yield
    kernels.cache_clear()


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def the_same(layer, inputs, monkeypatch):
    """Whether a layer gives the products with its dense weights, without making them."""
    expected = torch.nn.functional.linear(inputs.double(), layer.dense().double())
    monkeypatch.setattr(type(layer), "dense", lambda self: pytest.fail("made the weights"))
    found = layer(inputs)
    assert found.dtype == inputs.dtype
    assert found.shape == expected.shape
    within = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[inputs.dtype]
    return (found.double() - expected).norm() < within * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", ["none", "packed", "float"])
@pytest.mark.parametrize("group", [None, 32, 10])
def test_the_product_is_that_of_the_dense_weights(group, zeros, dtype, monkeypatch):
    weight = (normal(OUT, IN) + 0.3).to(dtype)
    scale, zero = half_quadratic(weight, 4, group) if zeros == "float" else scales(weight, 4, group, symmetric=zeros == "none")
    layer = PackedLinear.from_codes(encode(weight, scale, zero, 4), scale, zero, 4)
    assert the_same(layer, normal(1, 3, IN).to(dtype), monkeypatch)


@pytest.mark.parametrize("method", [Nf4(), Nf4(nested=False), Nvfp4()], ids=repr)
def test_levels_too(method, monkeypatch):
    assert the_same(method.tensor(normal(OUT, IN)), normal(2, IN), monkeypatch)


@pytest.mark.parametrize("count", [1, 5, 8])
def test_any_few_inputs(count, monkeypatch):
    weight = normal(OUT, IN)
    scale, _ = scales(weight, 4, 32)
    assert the_same(PackedLinear.from_codes(encode(weight, scale, None, 4), scale, None, 4), normal(count, IN), monkeypatch)


def test_by_hand():
    # every weight is (code - zero) · scale = (5 - 2) · 0.5 = 1.5, so that ones give 1.5 times the number of columns
    codes, scale = torch.full((3, 128), 5, dtype=torch.int8), torch.full((3, 4), 0.5)
    layer = PackedLinear.from_codes(codes, scale, torch.full((3, 4), 2, dtype=torch.int8), 4)
    found = packed_products.product(torch.ones(1, 128), layer.weight_packed, 4, scale, layer.weight_zero_point)
    assert torch.equal(found, torch.full((1, 3), 192.0))


def test_other_bits_are_left_to_dense_weights():
    assert packed_products.product(torch.ones(1, 64), torch.zeros(3, 16, dtype=torch.int32), 8, torch.ones(3, 1)) is None
