import copy
import itertools

import pytest
import torch
from calibration import normal
from nets import image, net
from tiny import tiny
from torch import nn

import modelwright as mw
from modelwright.core.errors import PlanError, SiteError
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.prune.precropping import PreCropping, synflow


def size(module):
    return sum(value.numel() for value in module.parameters())


def chain(*widths):
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Conv2d(*pair, 3, padding=1, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def test_a_case_by_hand():
    # Layers of 9 · (3·8, 8·8, 8·4) = 216, 576, 288 weights, of which half, 540, is 180 of each: p = 0.833, 0.3125, 0.625. The first
    # set of channels has an end that stays: 8 · 0.833 = 6.67; the second has none: 8 · √0.3125 = 4.47. 7 and 4 leave
    # 9 · (21 + 28 + 16) = 585 weights, too many; 175 of each give 6.48 and 4.41, so 6 and 4 with 522, the nearest below.
    module = mw.apply(chain(3, 8, 8, 4), PreCropping(keep=0.5))
    assert [layer.out_channels for layer in module if isinstance(layer, nn.Conv2d)] == [6, 4, 4]
    assert size(module) == 522


def test_synflow_by_hand():
    # R = 1ᵀ |W2| |W1| 1 with W1 = (3; -1) and W2 = (2, 1): every score is |w ∂R/∂w|: 3·2, 1·1 and the same. Of four, two stay: a path.
    module = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    module[0].weight.data, module[2].weight.data = torch.tensor([[3.0], [-1.0]]), torch.tensor([[2.0, 1.0]])
    before = copy.deepcopy(module)
    assert synflow(module, {"0": module[0], "2": module[2]}, 0.5, 100, 8) == {"0": 0.5, "2": 0.5}
    assert torch.equal(module[0].weight, before[0].weight)


def test_synflow_keeps_the_budget_and_no_layer_loses_all():
    module = net("resnet")
    layers = {path: child for path, child in module.named_modules() if isinstance(child, (nn.Conv2d, nn.Linear))}
    dense = synflow(module, layers, 0.05, 30, 16)
    sizes = {path: child.weight.numel() for path, child in layers.items()}
    assert sum(dense[path] * sizes[path] for path in layers) == pytest.approx(0.05 * sum(sizes.values()), abs=1)
    assert min(dense.values()) > 0


@pytest.mark.parametrize("density", ["expected", "synflow"])
@pytest.mark.parametrize(
    ("name", "scope", "keep"), [("resnet", "block", 0.6), ("resnet", "model", 0.3), ("mobile", "model", 0.6), ("dense", "block", 0.7)]
)
def test_the_budget_is_met_and_the_network_runs(name, scope, keep, density):
    module = net(name)
    whole, widest = size(module), max(child.weight[0].numel() for child in module.modules() if isinstance(child, (nn.Conv2d, nn.Linear)))
    mw.apply(module, PreCropping(keep=keep, scope=scope, density=density, side=16, rounds=10))
    assert keep * whole - 3 * widest < size(module) <= keep * whole
    module.train()
    module(image()).square().mean().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in module.parameters())


def test_blocks_keep_their_stages():
    module = mw.apply(net("resnet"), PreCropping(keep=0.6))
    assert [block.conv2.out_channels for block in module.blocks] == [8, 8, 16, 16]
    assert max(block.conv1.out_channels for block in module.blocks) < 16
    module = mw.apply(net("resnet"), PreCropping(keep=0.3, scope="model"))
    assert module.conv.out_channels < 8
    assert module.blocks[2].conv2.out_channels == module.blocks[2].shortcut[0].out_channels < 16


def test_a_depthwise_convolution_has_the_width_of_what_comes_before():
    module = mw.apply(net("mobile"), PreCropping(keep=0.14))
    assert module.widen[0].out_channels == module.depth[0].groups == module.gate.out_channels == module.narrow[0].in_channels < 18


def test_keeping_all_changes_nothing():
    module, before = net("resnet"), net("resnet")
    mw.apply(module, PreCropping(keep=1.0, fresh=False))
    assert torch.equal(module(image()), before(image()))


def test_weights_are_drawn_anew_by_the_seed_or_are_those_of_the_largest_channels():
    one, two, other = (mw.apply(net("resnet"), PreCropping(keep=0.6), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first, second) for first, second in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.conv.weight, other.conv.weight)
    assert (one.bn.running_mean == 0).all()
    module = chain(3, 4, 2)
    for channel, factor in enumerate((1.0, 4.0, 0.1, 3.0)):
        module[0].weight.data[channel] = factor
    module[2].weight.data = normal(2, 4, 3, 3) * 1e-3
    before = module[0].weight.clone()
    mw.apply(module, PreCropping(keep=0.5, fresh=False))
    assert torch.equal(module[0].weight, before[[1, 3]])


def test_what_cannot_be_is_refused_and_changes_nothing():
    module = net("resnet")
    with pytest.raises(PlanError, match=r"keep=0\.01 cannot be met; what may shrink leaves 0\.\d+\. Keep more, or scope: model"):
        mw.apply(module, PreCropping(keep=0.01))
    assert size(module) == size(net("resnet"))
    with pytest.raises(SiteError, match="no channels to remove"):
        mw.apply(tiny(), PreCropping())


def test_weight_pruners_leave_as_many_in_each():
    module = mw.apply(net("resnet"), Magnitude(sparsity=0.5, allocate="even"))
    left = {path: int((child.weight != 0).sum()) for path, child in module.named_modules() if isinstance(child, nn.Conv2d)}
    dense = {path for path in left if left[path] == module.get_submodule(path).weight.numel()}
    counts = [left[path] for path in left if path not in dense]
    assert max(counts) - min(counts) <= 1
    assert all(left[path] <= max(counts) for path in dense)
