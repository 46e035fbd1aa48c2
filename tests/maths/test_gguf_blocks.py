"""Blocks of GGUF files: byte for byte those of the gguf package where it encodes, and decoded by it where it does not."""

import numpy as np
import pytest
import torch

from modelwright.maths.gguf_blocks import FORMS, decode, encode

gguf = pytest.importorskip("gguf")
WEIGHT = torch.randn(64, 2048, generator=torch.Generator().manual_seed(5))
EDGES = torch.cat([torch.zeros(1, 256), torch.full((1, 256), -0.25), torch.full((1, 256), 3.0), torch.eye(2, 256) * -1e-3,
                   torch.arange(-128.0, 128)[None], torch.linspace(1e-9, 1e-6, 256)[None]])  # fmt: skip


def kind(form):
    return gguf.GGMLQuantizationType[form]


@pytest.mark.parametrize("form", ["Q8_0", "Q4_0", "Q5_0"])
@pytest.mark.parametrize("weight", [WEIGHT, WEIGHT * 1e-4, EDGES], ids=["normal", "small", "edges"])
def test_bytes_are_those_of_the_gguf_package(form, weight):
    assert np.array_equal(encode(weight, form).numpy(), gguf.quants.quantize(weight.numpy(), kind(form)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [WEIGHT, EDGES], ids=["normal", "edges"])
def test_the_gguf_package_decodes_what_we_decode(form, weight):
    stored = encode(weight, form)
    assert stored.shape == (len(weight), weight.shape[1] // FORMS[form].values * FORMS[form].bytes)
    assert np.array_equal(decode(stored, form).numpy(), gguf.quants.dequantize(stored.numpy(), kind(form)))


@pytest.mark.parametrize(("form", "expected"), [("Q4_0", 0.00739), ("Q4_K", 0.00515), ("Q8_0", 2.84e-5)])
def test_errors_of_normal_weights_are_the_known_ones(form, expected):
    error = ((decode(encode(WEIGHT, form), form) - WEIGHT).square().mean() / WEIGHT.square().mean()).item()
    assert error == pytest.approx(expected, rel=0.03)


def test_the_error_of_q6_k_is_below_the_known_one_without_a_search():
    def error(found):
        return ((found - WEIGHT).square().mean() / WEIGHT.square().mean()).item()

    parts = WEIGHT.view(-1, 16, 16)
    scale = parts.gather(2, parts.abs().argmax(2, keepdim=True)) / -32
    d = scale.gather(1, scale.abs().argmax(1, keepdim=True)) / -128
    step = d.half().float() * (scale / d).round().clamp(-128, 127)
    plain = ((parts / step).round().clamp(-32, 31) * step).view(64, -1)
    assert error(plain) == pytest.approx(3.55e-4, rel=0.03)
    assert 0.85 * error(plain) < error(decode(encode(WEIGHT, "Q6_K"), "Q6_K")) < error(plain)


def test_a_block_of_q4_0_by_hand():
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1], weight[0, 16] = 8.0, -7.0, 1.0
    stored = encode(weight, "Q4_0")[0].tolist()
    assert stored[:2] == list(torch.tensor([-1.0]).half().view(torch.uint8))
    assert stored[2:4] == [0 | 7 << 4, 15 | 8 << 4]  # 8 and 1 in the first byte, -7 and 0 in the second
    assert stored[4:] == [0x88] * 14
    assert torch.equal(decode(encode(weight, "Q4_0"), "Q4_0"), weight)


def test_values_on_the_grid_of_q4_k_come_back():
    weight = torch.arange(16.0).repeat(16)[None] - 3
    assert torch.allclose(decode(encode(weight, "Q4_K"), "Q4_K"), weight, atol=4e-3)  # d is a float16


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros_and_rows_are_worked_on_alone(form):
    assert not decode(encode(torch.zeros(2, 256), form), form).any()
    assert torch.equal(encode(WEIGHT, form)[3], encode(WEIGHT[3], form))
