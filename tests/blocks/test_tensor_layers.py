"""Layers that store a kernel, a table or a matrix as the parts of a tensor."""

import json

import pytest
import torch
from torch import nn

from modelwright.blocks import build
from modelwright.blocks.tensor_conv import TensorConv
from modelwright.blocks.tensor_embedding import TensorEmbedding
from modelwright.blocks.tensor_linear import TensorLinear
from modelwright.methods.factor.tensor import Tensor

FORMS = ("cp", "tucker", "tt")
CONVOLUTIONS = [
    lambda: nn.Conv2d(8, 12, 3, padding=1),
    lambda: nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False),
    lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1, stride=2),
    lambda: nn.Conv2d(8, 12, 3, padding="same", padding_mode="circular"),
    lambda: nn.Conv2d(8, 12, (4, 3), padding=(2, 1)),
    lambda: nn.Conv1d(8, 12, 5, padding=2, padding_mode="reflect"),
    lambda: nn.Conv3d(4, 6, 3, stride=2, padding=1),
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(weight, form, keep=0.5, **settings):
    layer = Tensor(form=form, keep=keep, iterations=5, **settings).tensor(weight, torch.Generator().manual_seed(0), [])
    assert not isinstance(layer, torch.Tensor)
    return layer


def convolved(make, form):
    torch.manual_seed(0)
    old = make()
    layer = made(old.weight.data, form)
    assert layer.why_not(old) == ""
    assert layer.standing_for(old) is layer
    layer.take_bias(old.bias)
    return layer, old


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", range(len(CONVOLUTIONS)))
@torch.no_grad()
def test_a_convolution_in_parts_is_that_of_the_kernel_it_stands_for(number, form):
    layer, old = convolved(CONVOLUTIONS[number], form)
    inputs = normal(2, old.in_channels, *([9, 11, 10][: len(old.kernel_size)]))
    assert layer.dense().shape == old.weight.shape
    old.weight.copy_(layer.dense())
    expected = old(inputs)
    found = layer(inputs)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_kernel_is_read_as_its_form_says():
    kernel = normal(6, 4, 3, 2)
    for form, whole in (("cp", (4, 6, 6)), ("tucker", (4, 6, 6)), ("tt", (4, 3, 2, 6))):
        layer = made(kernel, form)
        assert layer.tensor_shape == whole
    core, inward, outward = made(kernel, "tucker").parts
    rebuilt = torch.einsum("akb,ia,ob->oik", core, inward, outward).view(6, 4, 3, 2)
    assert torch.allclose(made(kernel, "tucker").dense(), rebuilt, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(20, 12), (17, 11), (64, 64), (97, 10)])
@pytest.mark.parametrize("parts", [2, 3])
@torch.no_grad()
def test_matrices_and_tables_are_those_that_they_stand_for(form, size, parts):
    layer = made(normal(*size), form, 0.6, parts=parts)
    assert isinstance(layer, TensorLinear)
    dense = layer.dense()
    assert dense.shape == size
    inputs, bias = normal(2, 3, size[1]), nn.Parameter(normal(size[0]))
    layer.take_bias(bias)
    assert torch.allclose(layer(inputs), nn.functional.linear(inputs, dense, bias), atol=1e-4)
    old = nn.Embedding(*size)
    old.embed_scale = torch.tensor(2.0)
    table = layer.standing_for(old)
    assert isinstance(table, TensorEmbedding)
    ids = torch.arange(size[0]).flip(0).repeat(2).view(2, -1)
    assert torch.allclose(table(ids), 2 * dense[ids], atol=1e-4)
    assert torch.equal(table.dense(), dense)
    assert table.replaces == "Embedding"


@torch.no_grad()
def test_a_table_by_hand():
    # Row 3 of 4 is (1, 1), column 2 of 4 is (1, 0): u[(1, 1)] · v[(1, 0)] = entry 1 · 2 + 1 of u times entry 1 · 2 + 0 of v.
    layer = TensorEmbedding(4, 4, form="cp", ranks=[1], rows=[2, 2], columns=[2, 2])
    layer.fill([torch.tensor([[1.0], [2], [3], [5]]), torch.tensor([[7.0], [11], [13], [17]])])
    assert layer(torch.tensor([3])).tolist() == [[3 * 13, 3 * 17, 5 * 13, 5 * 17]]
    assert layer.dense()[3].tolist() == layer(torch.tensor(3)).tolist()


def test_rows_are_made_without_the_table():
    layer = TensorEmbedding(64**3, 8**3, form="tt", ranks=[2, 2], rows=[64] * 3, columns=[8] * 3)
    layer.draw(1.0, torch.Generator().manual_seed(0))
    assert layer.stored_bytes() < 64**3 * 8**3 * 4 / 30_000
    assert layer(torch.tensor([[0, 64**3 - 1]])).shape == (1, 2, 512)


LAYERS = [
    *(lambda form=form: convolved(CONVOLUTIONS[1], form)[0] for form in FORMS),
    *(lambda form=form: convolved(CONVOLUTIONS[2], form)[0] for form in FORMS),
    *(lambda form=form: made(normal(20, 12), form) for form in FORMS),
    *(lambda form=form: made(normal(20, 12), form).standing_for(nn.Embedding(20, 12)) for form in FORMS),
]


@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_a_description_and_a_state_dict_make_it_anew(number):
    layer = LAYERS[number]()
    for device in ("cpu", "meta"):
        anew = build(json.loads(json.dumps(layer.describe())), torch.float32, device)
        assert type(anew) is type(layer)
        assert anew.stored_bytes() == layer.stored_bytes() == sum(value.nbytes for value in layer.state_dict().values())
        anew.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(anew.dense(), layer.dense())
        assert anew.describe() == layer.describe()
    assert layer.nonzeros() == sum(part.numel() for part in layer.parts)
    assert layer.to(torch.bfloat16).dense().dtype == torch.bfloat16


@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_all_parts_are_trained(number):
    layer = LAYERS[number]()
    layer.draw(0.5, torch.Generator().manual_seed(0))
    embeds = isinstance(layer, TensorEmbedding)
    inputs = torch.tensor([1, 2]) if embeds else normal(2, 8, 9, 9) if isinstance(layer, TensorConv) else normal(2, 12)
    layer(inputs).square().sum().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in layer.parts)


def test_the_work_is_counted():
    # 8 · 5 in, 9 · 5 for each rank, 5 · 12 out.
    assert TensorConv(12, 8, kernel=[3, 3], form="cp", ranks=[5]).work() == 8 * 5 + 9 * 5 + 5 * 12
    assert TensorConv(12, 8, kernel=[3, 3], form="tucker", ranks=[5, 9, 4]).work() == 8 * 5 + 5 * 9 * 4 + 4 * 12
    # in two groups 4 · 5 twice, and each output from its own group's 5.
    assert TensorConv(12, 8, kernel=[3, 3], form="cp", ranks=[5], groups=2).work() == 2 * (4 * 5 + 9 * 5) + 5 * 12
    # x [2, 2] · u1 [2, 2, 1] = 8 products, then · u2 = 8: 2 · 2 · 2 · 1 each.
    assert TensorLinear(4, 4, form="tt", ranks=[1], rows=[2, 2], columns=[2, 2]).work() <= 16


@pytest.mark.parametrize("form", FORMS)
def test_drawn_weights_have_the_deviation(form):
    ranks = {"cp": [9], "tucker": [4, 9, 5], "tt": [5, 6, 4]}[form]
    layer = TensorConv(16, 16, kernel=[3, 3], form=form, ranks=ranks)
    rng, squares = torch.Generator().manual_seed(0), 0.0
    for _ in range(100):
        layer.draw(0.2, rng)
        squares += float(layer.dense().detach().square().mean()) / 100
    assert squares**0.5 == pytest.approx(0.2, rel=0.1)


def test_layers_stand_only_where_they_can():
    conv, matrix = made(normal(12, 8, 3, 3), "cp"), made(normal(20, 12), "cp")
    assert "is a Linear" in conv.why_not(nn.Linear(8, 12))
    assert "is a ConvTranspose2d" in conv.why_not(nn.ConvTranspose2d(8, 12, 3))
    assert "is a Conv2d" in matrix.why_not(nn.Conv2d(8, 12, 3))
    assert matrix.why_not(nn.Linear(12, 20)) == matrix.why_not(nn.Embedding(20, 12)) == ""
