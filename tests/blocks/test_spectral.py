import json

import pytest
import torch

from modelwright.blocks import build
from modelwright.blocks.spectral import SpectralConv

FORMS = (None, "cp", "tucker", "tt")


def made(**settings):
    torch.manual_seed(0)
    return SpectralConv(3, 4, **({"modes": (6, 6), "keep": 0.3} | settings)).double()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def plain(layer, inputs, number=0):
    """The same by the definition: full transforms, and a sum over inputs at each kept frequency."""
    weight = layer.dense()
    weight = weight[number] if layer.layers > 1 else weight
    rows, columns = inputs.shape[-2:]
    states, out = torch.fft.rfft2(inputs, norm="forward"), []
    out = torch.zeros(len(inputs), layer.out_channels, rows, columns // 2 + 1, dtype=torch.complex128)
    for row in range(-(layer.modes[0] // 2), layer.modes[0] - layer.modes[0] // 2):
        for column in range(layer.modes[1] // 2 + 1):
            if -(rows // 2) <= row < rows - rows // 2 and column <= columns // 2:
                own = weight[:, :, row + layer.modes[0] // 2, column]
                out[:, :, row % rows, column] = states[:, :, row % rows, column] @ own
    return torch.fft.irfft2(out, s=(rows, columns), norm="forward") + layer.bias[number].view(-1, 1, 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("sides", [(12, 10), (9, 11), (4, 5)])
@torch.no_grad()
def test_parts_give_what_the_rebuilt_weight_gives(form, layers, sides):
    layer, inputs = made(form=form, layers=layers), noise(2, 3, *sides)
    layer.bias.copy_(noise(layers, 4))
    for number in range(layers):
        found = layer(inputs, number)
        assert found.shape == (2, 4, *sides)
        assert torch.allclose(found, plain(layer, inputs, number), atol=1e-10)


@torch.no_grad()
def test_a_case_by_hand():
    # cos 2πx has the frequencies ±1 with halves; W = 3 there gives 3 cos 2πx, and nothing of the frequency 2.
    layer = SpectralConv(1, 1, modes=[2], form=None, bias=False).double()
    layer.part_0.zero_()
    layer.part_0[0, 0, 1, 0] = 3
    angle = 2 * torch.pi * torch.arange(8, dtype=torch.float64) / 8
    assert torch.allclose(layer((angle.cos() + (2 * angle).cos())[None, None]), 3 * angle.cos())


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_finer_grid_shows_the_same_function(form):
    layer = made(form=form, modes=(5, 5))
    coarse, fine = (torch.meshgrid(*[torch.arange(n, dtype=torch.float64) / n] * 2, indexing="ij") for n in (12, 24))

    def wave(x, y):
        return torch.stack([torch.cos(2 * torch.pi * (x + 2 * y)), torch.sin(4 * torch.pi * x), torch.cos(2 * torch.pi * (2 * x - y))])[
            None
        ]

    assert torch.allclose(layer(wave(*fine))[..., ::2, ::2], layer(wave(*coarse)), atol=1e-10)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_the_weight_begins_with_its_deviation(form, layers):
    squares = []
    rng = torch.Generator().manual_seed(0)
    layer = SpectralConv(6, 10, modes=(6, 6), form=form, keep=0.3, layers=layers)
    for _ in range(60):
        layer.draw(rng)
        squares.append(float(layer.dense().detach().abs().square().mean()))
    assert sum(squares) / 60 == pytest.approx(2 / 16, rel=0.15)


@pytest.mark.parametrize("form", FORMS)
def test_the_weight_holds_no_more_than_its_share(form):
    layer = SpectralConv(16, 16, modes=(16, 16), form=form, keep=0.1, bias=False)
    whole = 16 * 16 * 16 * 9
    held = sum(part.numel() for part in layer.parts)
    assert held == whole if form is None else 0.05 * whole < held <= 0.1 * whole
    full = SpectralConv(16, 16, modes=(16, 16), form=form, keep=1.0, bias=False)
    assert sum(part.numel() for part in full.parts) <= whole


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_description_and_a_state_dict_make_it_anew(form, layers):
    layer, inputs = made(form=form, layers=layers), noise(1, 3, 8, 8)
    anew = build(json.loads(json.dumps(layer.describe())), torch.float64, "meta")
    anew.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(anew(inputs, layers - 1), layer(inputs, layers - 1))
    assert not any(value.is_complex() for value in layer.state_dict().values())


@pytest.mark.parametrize("form", FORMS)
def test_all_parts_are_trained(form):
    layer = made(form=form, layers=2)
    (layer(noise(2, 3, 8, 8), 0) + layer(noise(2, 3, 8, 8), 1)).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in layer.parameters())
    bfloat = made(form=form).to(torch.bfloat16)
    assert bfloat(noise(1, 3, 8, 8).bfloat16()).dtype == torch.bfloat16
