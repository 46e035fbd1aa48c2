"""What uses of a shared block have of their own, and attention within groups of tokens."""

import copy
import json

import pytest
import torch
from torch import nn

from modelwright.blocks import build
from modelwright.blocks.recursion import Recursion
from modelwright.blocks.sliced_attention import SlicedAttention
from modelwright.core import tiny
from modelwright.core.errors import ModelError


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)), with parts that multiply by 2 and by 3 and norms that add 1 and 10."""

    class Times(nn.Module):
        def __init__(self, factor: float = 1.0, more: float = 0.0):
            super().__init__()
            self.factor, self.more = factor, more

        def forward(self, x):
            return self.factor * x + self.more

    def __init__(self):
        super().__init__()
        self.first, self.attn = self.Times(more=1.0), self.Times(2.0)
        self.second, self.mlp = self.Times(more=10.0), self.Times(3.0)

    def forward(self, x):
        x = x + self.attn(self.first(x))
        return x + self.mlp(self.second(x))


def hosted(**settings) -> tuple[Block, Recursion]:
    block = Block()
    part = Recursion(features=2, **settings)
    part.begin(torch.Generator().manual_seed(0))
    part.join(block, "recursion")
    return block, part


def test_scalars_by_hand():
    block, part = hosted(ways=[("first", "attn"), ("second", "mlp")])
    x = torch.tensor([[1.0, 0.0]])
    assert block(x).tolist() == [[50.0, 38.0]]  # 1 + 2·2 = 5, 5 + 3·15; 0 + 2·1 = 2, 2 + 3·12
    part.scales.data = torch.tensor([3.0, 0.5, 2.0, -1.0])
    assert block(x).tolist() == [[-35.0, -31.0]]  # 3·1 + 2·2/2 = 5, 2·5 - 3·15; 3·0 + 2·1/2 = 1, 2·1 - 3·11
    part.leave()
    assert block(x).tolist() == [[50.0, 38.0]]
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in block.modules())


def test_a_projection_adds_nothing_at_first_and_then_its_mlp_of_the_normed():
    block, part = hosted(inner=3)
    x = torch.tensor([[[1.0, 0.0], [-2.0, 0.5]]])
    plain = Block()(x)
    assert torch.equal(block(x), plain)
    part.body.up.weight.data = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]])
    part.projection_scales.data = torch.tensor([0.5, 2.0])
    normed = nn.functional.layer_norm(plain, (2,))
    inner = nn.functional.gelu(normed @ part.body.down.weight.T)
    assert torch.allclose(block(x), 0.5 * plain + 2 * inner @ part.body.up.weight.T, atol=1e-5)
    assert part.body.down.weight.std() > 0.1


def test_copies_have_scalars_of_their_own_and_both_learn():
    block, part = hosted(ways=[("first", "attn"), ("second", "mlp")], inner=4)
    other = copy.deepcopy(block)
    other.recursion.scales.data *= 2
    x = torch.ones(1, 2)
    assert block(x).tolist() == [[5 + 45, 5 + 45]]
    assert other(x).tolist() == [[2 * 5 * 2 + 2 * 3 * 20] * 2]
    block(x).sum().backward()
    assert part.scales.grad.tolist() == pytest.approx([2 * 4, 2 * 16, 10, 90])  # c₀ reaches the MLP too: d(x + 3 (x + 10))/dx = 4
    assert part.body.up.bias.grad is not None
    assert other.recursion.scales.grad is None


def test_descriptions_make_them_anew():
    for part in (Recursion(features=4, inner=6, ways=[("a", "b")]), Recursion(features=4, inner=2), SlicedAttention(groups=3, seed=5)):
        again = build(json.loads(json.dumps(part.describe())), device="meta")
        assert type(again) is type(part)
        assert again.describe() == part.describe()
        assert {name: value.shape for name, value in again.state_dict().items()} == {n: v.shape for n, v in part.state_dict().items()}
    names = set(Recursion(features=4, inner=6, ways=[("a", "b")]).state_dict())
    body = {f"body.{layer}.{leaf}" for layer in ("entry", "down", "up") for leaf in ("weight", "bias")}
    assert names == {"scales", "projection_scales"} | body


def attention() -> nn.Module:
    return tiny.tiny("vit").get_submodule("vit.layers.0.attention")


def sliced(groups: int, seed: int | None = None) -> tuple[nn.Module, SlicedAttention]:
    host = attention()
    guest = SlicedAttention(groups=groups, seed=seed)
    guest.join(host, "slices")
    return host, guest


STATES = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("seed", [None, 3])
def test_one_group_is_attention_to_all_and_the_tokens_come_back_to_their_places(seed):
    host, guest = sliced(1, seed)
    assert torch.allclose(host(STATES)[0], attention()(STATES)[0], atol=1e-6)
    assert (guest.order(17).tolist() == list(range(17))) is (seed is None)


@torch.no_grad()
@pytest.mark.parametrize(("groups", "seed", "sizes"), [(2, None, [9, 8]), (4, 3, [5, 4, 4, 4]), (17, None, [1] * 17), (40, 3, [1] * 17)])
def test_it_is_attention_under_a_mask_of_the_groups(groups, seed, sizes):
    host, guest = sliced(groups, seed)
    order = guest.order(17)
    assert sorted(order.tolist()) == list(range(17))
    group = torch.empty(17, dtype=torch.long)
    group[order] = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    mask = (group[:, None] == group[None]).expand(2, 1, 17, 17)
    assert torch.allclose(host(STATES)[0], attention()(STATES, mask)[0], atol=1e-5)
    assert torch.equal(host(STATES)[0], host(STATES)[0])  # the same order at each call


def test_masks_are_refused():
    with pytest.raises(ModelError, match="given a mask"):
        sliced(2)[0](STATES, torch.ones(2, 1, 17, 17, dtype=torch.bool))
