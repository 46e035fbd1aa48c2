"""Products straight from packed codes: what the dense weights give, for every grid, and without making them."""

import os

import pytest
import torch
from torch.nn.functional import linear

from modelwright.blocks.packed import PackedLinear
from modelwright.maths.packed_products import LEAST, ROWS, product
from modelwright.maths.rounding import encode, half_quadratic, scales
from modelwright.methods.quantize.nf4 import Nf4
from modelwright.methods.quantize.nvfp4 import Nvfp4

OUT, IN = 260, 384  # rows that do not fill the words of packed zero points
pytest.importorskip("numba")


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def packed(bits, group, zeros, dtype=torch.float32, out=OUT, size=IN):
    weight = (normal(out, size) + 0.3).to(dtype)
    scale, zero = half_quadratic(weight, bits, group) if zeros == "float" else scales(weight, bits, group, symmetric=zeros == "none")
    return PackedLinear.from_codes(encode(weight, scale, zero, bits), scale, zero, bits, normal(out).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", ["none", "packed", "float"])
@pytest.mark.parametrize("group", [None, 32, 6])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_product_is_that_of_the_dense_weights(bits, group, zeros, dtype, monkeypatch):
    layer = packed(bits, group, zeros, dtype)
    inputs = normal(2, 3, IN).to(dtype)
    expected = linear(inputs.double(), layer.dense().double(), layer.bias.double())
    monkeypatch.setattr(PackedLinear, "dense", lambda self: pytest.fail("made the weights"))
    found = layer(inputs)
    assert found.dtype == dtype
    assert found.shape == (2, 3, OUT)
    within = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert (found.double() - expected).norm() < within * expected.norm()


@pytest.mark.parametrize("zeros", ["none", "packed", "float"])
@pytest.mark.parametrize(("size", "group"), [(12, None), (20, 4), (22, None), (36, 12), (60, None), (1028, 4)])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_do_not_fill_their_words(bits, size, group, zeros):
    layer = packed(bits, group, zeros, out=1 + LEAST // size, size=size)
    inputs = normal(3, size)
    found = product(inputs, layer.weight_packed, bits, layer.weight_scale, layer.weight_zero_point)
    expected = linear(inputs.double(), layer.dense().double())
    assert found is not None
    assert (found.double() - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("zeros", ["none", "packed", "float"])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_outlier_and_inputs_with_a_mean_cost_no_digits(bits, zeros):
    weight = normal(OUT, IN)
    weight[:, 0] = 40  # all other codes lie close to the zero point
    scale, zero = scales(weight, bits, symmetric=zeros == "none")
    zero = zero.float() + 0.25 if zeros == "float" else zero
    layer = PackedLinear.from_codes(encode(weight, scale, zero, bits), scale, zero, bits)
    inputs = normal(1, IN) + 30
    inputs[:, 0] = 0
    expected = linear(inputs.double(), layer.dense().double())
    assert (layer(inputs).double() - expected).norm() < 2e-6 * expected.norm()
    if zeros == "float":
        return
    inputs[:, 0] = float("inf")
    assert torch.equal(layer(inputs), linear(inputs, layer.dense()))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_does_not_matter(kind):
    layer, inputs = packed(4, 32, "none"), normal(2, IN)
    expected = layer(inputs)
    torch.set_default_dtype(kind)
    try:
        assert torch.equal(layer(inputs), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [Nf4(), Nf4(nested=False), Nvfp4()], ids=repr)
def test_levels_of_four_bits_too(method, dtype, monkeypatch):
    layer = method.tensor(normal(OUT, IN).to(dtype))
    inputs = normal(3, IN).to(dtype)
    expected = linear(inputs.double(), layer.dense().double())
    monkeypatch.setattr(type(layer), "dense", lambda self: pytest.fail("made the weights"))
    assert (layer(inputs).double() - expected).norm() < (2e-6 if dtype == torch.float32 else 6e-3) * expected.norm()


def test_by_hand():
    # every weight is (code - zero) · scale = (5 - 2) · 0.5 = 1.5, so that ones give 1.5 times the number of columns
    codes = torch.full((LEAST // 128, 128), 5, dtype=torch.int8)
    scale, zero = torch.full((len(codes), 4), 0.5), torch.full((len(codes), 4), 2, dtype=torch.int8)
    layer = PackedLinear.from_codes(codes, scale, zero, 4)
    found = product(torch.ones(1, 128), layer.weight_packed, 4, scale, layer.weight_zero_point)
    assert torch.equal(found, torch.full((1, len(codes)), 192.0))


def test_threads_change_nothing():
    layer = packed(4, 32, "none", out=1536, size=1024)
    inputs = normal(1, 1024)
    known = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = layer(inputs)
        torch.set_num_threads(3)
        assert torch.equal(layer(inputs), alone)
    finally:
        torch.set_num_threads(known)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of newer Pythons, where threads run
def test_a_forked_process_has_threads_of_its_own():
    layer = packed(4, 32, "none", out=1536, size=1024)
    inputs, known = normal(1, 1024), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = layer(inputs)
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(layer(inputs), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(known)


def test_what_is_not_finite_stays_so():
    layer = packed(4, 32, "none")
    inputs = normal(1, IN)
    inputs[0, 3] = float("nan")
    assert layer(inputs).isnan().all()


def test_gradients_are_those_of_the_dense_weights():
    layer = packed(4, 32, "packed")
    inputs = normal(2, IN).requires_grad_()
    layer(inputs).sum().backward()
    assert torch.allclose(inputs.grad, layer.dense().sum(0).expand(2, -1))
    assert torch.equal(layer.bias.grad, torch.full((OUT,), 2.0))
    layer.bias.grad = None
    layer(normal(2, IN)).sum().backward()  # without gradients of the inputs, straight from the codes
    assert torch.equal(layer.bias.grad, torch.full((OUT,), 2.0))


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")  # torch's own, of dual numbers
def test_transforms_of_functions_go_by_the_dense_weights():
    layer, inputs = packed(4, 32, "none"), normal(2, IN)
    expected = linear(inputs, layer.dense(), layer.bias)
    assert torch.allclose(torch.vmap(layer)(inputs), expected, atol=1e-5)
    found, moved = torch.func.jvp(layer, (inputs,), (inputs,))
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(moved, expected - layer.bias, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(inputs, inputs))
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected - layer.bias, atol=1e-5)
    layer.weight_scale.requires_grad_()
    layer(inputs).sum().backward()
    assert torch.allclose(layer.weight_scale.grad, (layer.codes().view(OUT, -1, 32) * inputs.sum(0).view(-1, 32)).sum(-1), atol=1e-4)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert layer(fake.from_tensor(inputs)).shape == (2, OUT)


def test_packed_words_in_any_order_of_memory():
    layer = packed(4, None, "none", out=LEAST // 8, size=8)
    inputs = normal(1, 8)
    words = torch.empty_strided(layer.weight_packed.shape, (1, 7), dtype=torch.int32).copy_(layer.weight_packed)
    found = product(inputs, words, 4, layer.weight_scale)
    assert torch.equal(found, product(inputs, layer.weight_packed, 4, layer.weight_scale))


def test_the_rest_is_left_to_dense_weights():
    layer, inputs = packed(4, 32, "none"), normal(ROWS + 1, IN)
    own = (layer.weight_packed, 4, layer.weight_scale)
    assert product(inputs[:ROWS], *own) is not None
    assert product(inputs, *own) is None
    assert product(inputs[:0], *own) is None
    assert product(inputs[:1].to("meta"), *own) is None
    assert product(inputs[:1].clone().requires_grad_(), *own) is None
    bytes_ = packed(8, 32, "none")
    assert product(inputs[:1], bytes_.weight_packed, 8, bytes_.weight_scale, table=normal(16)) is None
    for small in (packed(3, 32, "none"), packed(4, 3, "none"), packed(4, 32, "none", out=60)):
        assert product(inputs[:1], small.weight_packed, small.bits, small.weight_scale) is None
        assert torch.allclose(small(inputs[:1]), linear(inputs[:1], small.dense(), small.bias))
