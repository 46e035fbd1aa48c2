import pytest
import torch
from torch import nn

from modelwright.blocks._part import Layer
from modelwright.blocks.gated import Activated, Constant, Fixed, Gated, Opposed, Prompt, Quality, Scales, Source, by_sample
from modelwright.core.errors import ModelError


def sources(count=3, rows=4, columns=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [Source(torch.randn(rows, k + 1, generator=random), torch.randn(k + 1, columns, generator=random)) for k in range(count)]


def layer(rows=4, columns=6):
    torch.manual_seed(1)
    return Layer.plain(nn.Linear(columns, rows))


def test_a_gate_of_ones_is_the_plain_sum_and_no_source_is_the_layer():
    own, x, found = layer(), torch.randn(2, 5, 6), sources()
    part = Fixed(found, Constant(Scales(3, 4)))
    nn.init.ones_(part.gate.own.scales)
    expected = own(x) + sum(source(x) for source in found)
    assert torch.allclose(part(x, own), expected, atol=1e-5)
    weight, bias = part.merged(own.weight, own.bias)
    assert torch.allclose(nn.functional.linear(x, weight, bias), expected, atol=1e-5)
    assert torch.equal(Gated((), Activated(4))(x, own), own(x))


def test_a_gate_by_hand():
    # LN((1, 3)) = (-1, 1) = LN((2, 6)), up to eps. With w_y = 1, w_v = 2, w_b = 3 and c = 0: -1 - 2 + 3 = 0 and 1 + 2 + 3 = 6.
    gate = Activated(2, open=0.0)
    for value, number in ((gate.of_layer, 1.0), (gate.of_source, 2.0), (gate.of_both, 3.0), (gate.out, 10.0)):
        nn.init.constant_(value, number)
    (found,) = gate(torch.tensor([[1.0, 3.0]]), [torch.tensor([[2.0, 6.0]])])
    assert torch.allclose(found, 10 * torch.sigmoid(torch.tensor([[0.0, 6.0]])), atol=1e-4)


def test_the_order_of_sources_does_not_matter_and_a_closed_gate_is_the_layer():
    own, x, found = layer(), torch.randn(2, 5, 6), sources()
    gate = Activated(4)
    for value in (gate.of_layer, gate.of_source, gate.of_both):
        nn.init.normal_(value)
    assert torch.allclose(Gated(found, gate)(x, own), Gated(found[::-1], gate)(x, own), atol=1e-5)
    nn.init.zeros_(gate.out)
    assert torch.equal(Gated(found, gate)(x, own), own(x))


def test_one_source_behind_an_open_gate_counts_whole():
    own, x, found = layer(), torch.randn(2, 5, 6), sources(1)
    assert torch.allclose(Gated(found, Activated(4, open=40.0))(x, own), own(x) + found[0](x), atol=1e-5)


def test_quality_decides_between_two_sources_sample_by_sample():
    own, x, found = layer(), torch.randn(3, 5, 6), sources(2)
    part, quality = Fixed(found, Opposed()), Quality(0.5, 0.5)
    part.join(quality)
    quality.judge(torch.tensor([0.0, 1.0, 0.3]))
    together = part(x, own)
    assert torch.allclose(together[0], own(x[0]) + found[0](x[0]), atol=1e-5)
    assert torch.allclose(together[1], own(x[1]) + found[1](x[1]), atol=1e-5)
    assert torch.allclose(together[2], own(x[2]) + 0.7 * found[0](x[2]) + 0.3 * found[1](x[2]), atol=1e-5)
    windows = part(x.repeat_interleave(2, 0), own)  # as attention in windows has it
    assert torch.allclose(windows[::2], together, atol=1e-6)
    quality.judge(torch.tensor([-5.0, 9.0, 0.5]))
    assert quality.given.tolist() == [0.0, 1.0, 0.5]
    with pytest.raises(ValueError, match=r"A scorer is at work, so that each sample has another weight"):
        part.merged(own.weight, own.bias)


def test_rows_must_be_of_whole_samples():
    assert by_sample(torch.ones(2, 7), torch.ones(4, 3, 7)).shape == (4, 1, 7)
    with pytest.raises(ModelError, match=r"A layer gives 5 rows for 2 samples"):
        by_sample(torch.ones(2), torch.ones(5, 3))


def test_a_prompt_says_how_much_channels_count():
    torch.manual_seed(0)
    prompt, states = Prompt(8, most=3.0), torch.randn(2, 5, 8)
    assert torch.equal(prompt(torch.zeros(1, 1, 8)), torch.ones(1, 8))
    made = prompt.up(nn.functional.gelu(prompt.down(states)))
    weights = torch.softmax(made @ prompt.score.weight[0] + prompt.score.bias, 1)
    assert torch.allclose(prompt(states), torch.einsum("bn,bnd->bd", weights, made).relu().clamp(max=3), atol=1e-6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.allclose(prompt(states, mask)[0], prompt(states[:1, :3])[0], atol=1e-6)
    assert torch.allclose(prompt(states, mask)[1], prompt(states)[1], atol=1e-6)
    assert prompt(100 * states).max() == 3
    with pytest.raises(ModelError, match=r"have 6 channels, and the adapter knows 8"):
        prompt(torch.zeros(1, 1, 6))
