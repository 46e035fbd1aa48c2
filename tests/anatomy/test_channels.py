"""Channels of networks without a family: what leaves together is found, and what is left computes as if the rest were zero."""

import copy

import pytest
import torch
from nets import image, net
from tiny import outputs, tiny
from torch import nn

from modelwright.anatomy import anatomy_of
from modelwright.anatomy.removal import remove_units
from modelwright.core.errors import SiteError
from modelwright.core.model import load_module, read_config, save_module

FOUND = {
    ("resnet", "channels"): {"blocks.0.conv1": 8, "blocks.1.conv1": 8, "blocks.2.conv1": 16, "blocks.3.conv1": 16},
    ("resnet", "stages"): {"conv": 8, "blocks.2.conv2": 16},
    ("padded", "channels"): {"0.conv1": 9, "1.conv1": 13},
    ("mobile", "channels"): {"widen.0": 18, "squeeze": 4, "head.1": 10},
    ("mobile", "stages"): {"first.0": 6},
    ("dense", "channels"): {"first": 6, "second": 4, "up": 7},
    ("cnn", "channels"): {"third": 12},
    ("cnn", "stages"): {"first": 8},
    ("mlp", "channels"): {"0": 20, "2": 20},
}


def made(name):
    return tiny(name) if name in ("cnn", "mlp") else net(name)


def logits(module):
    """What a network gives: on images, and the one of linears on rows."""
    linears = isinstance(module, nn.Sequential) and isinstance(module[0], nn.Linear)
    with torch.no_grad():
        return module(torch.randn(6, 12, generator=torch.Generator().manual_seed(0)) if linears else image())


@pytest.mark.parametrize(("name", "kind"), list(FOUND))
def test_the_sets_of_channels_are_found(name, kind):
    module = made(name)
    found = anatomy_of(module).units(module, kind)
    assert {units.scope: units.count for units in found} == FOUND[name, kind]
    assert {units.kind for units in found} == {kind}


@pytest.mark.parametrize(("name", "kind"), list(FOUND))
def test_removing_equals_silencing(name, kind):
    module, before = made(name), logits(made(name))
    anatomy = anatomy_of(module)
    silent = copy.deepcopy(module)
    keep = [[n for n in range(units.count) if n % 3 != 1] for units in anatomy.units(module, kind)]
    for units, rows in zip(anatomy.units(silent, kind), keep, strict=True):
        for part in (part for n in range(units.count) if n not in rows for part in units.group(n).slices if part.output):
            silent.get_parameter(part.name).data.narrow(part.dim, part.start, part.stop - part.start).zero_()
    record = remove_units(module, kind, keep)
    assert record.plain
    assert (logits(module) - logits(silent)).abs().max() < 1e-5
    assert (logits(module) - before).abs().max() > 1e-4
    smaller = sum(value.numel() for value in module.parameters())
    assert smaller < sum(value.numel() for value in silent.parameters())
    for child in module.modules():  # which know their sizes: one made anew of these has the same tensors
        if isinstance(child, nn.Conv2d):
            sizes = child.in_channels, child.out_channels, child.kernel_size
            assert nn.Conv2d(*sizes, groups=child.groups).weight.shape == child.weight.shape
        if isinstance(child, nn.BatchNorm2d):
            assert len(child.weight) == len(child.running_mean) == child.num_features
        if isinstance(child, nn.Linear):
            assert (child.out_features, child.in_features) == child.weight.shape


def test_a_depthwise_convolution_follows_what_gives_its_channels():
    module = net("mobile")
    units = {units.scope: units for units in anatomy_of(module).units(module, "channels")}["widen.0"]
    names = {span.name: (span.dim, span.output) for span in units.spans}
    assert names["depth.0.weight"] == (0, False)
    assert names["gate.weight"] == (0, False)
    assert names["squeeze.weight"] == names["narrow.0.weight"] == (1, True)
    assert {span.name for span in units.buffers} == {f"{norm}.1.running_{what}" for norm in ("widen", "depth") for what in ("mean", "var")}
    remove_units(module, "channels", [[0, 5, 9], [0, 1, 2, 3], list(range(10))])
    assert (module.depth[0].groups, module.depth[0].in_channels, module.depth[1].num_features) == (3, 3, 3)


def test_what_is_not_understood_keeps_its_channels():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x):
            x = self.one(x)
            return self.two(x.flip(1) if True else x)

    with pytest.raises(SiteError, match="has no channels to remove"):
        remove_units(Odd(), "channels", [0])
    shared = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    shared[2].weight = shared[0].weight
    with pytest.raises(SiteError, match="has no channels to remove"):
        anatomy_of(shared).units(shared, "channels")
    tokens = nn.Sequential(nn.Linear(4, 6), nn.AdaptiveAvgPool1d(6), nn.Linear(6, 3))  # which pools over what linears give
    with pytest.raises(SiteError, match="has no channels to remove"):
        anatomy_of(tokens).units(tokens, "channels")


def test_models_of_a_family_have_no_channels():
    with pytest.raises(SiteError, match="this llama model has no channels to remove"):
        remove_units(tiny(), "channels", [0])


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_resnet_of_transformers_loses_inner_channels_and_is_stored(tmp_path, layer_type):
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1], num_labels=3, layer_type=layer_type)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.ResNetForImageClassification(config).eval()
    units = anatomy_of(module).units(module, "channels")
    assert len(units) >= 3
    silent, inputs = copy.deepcopy(module), {"pixel_values": image()}
    keep = [list(range(each.count // 2)) for each in units]
    for each, rows in zip(units, keep, strict=True):
        for span in each.spans:
            if span.output:
                silent.get_parameter(span.name).data.narrow(span.dim, len(rows), each.count - len(rows)).zero_()
    record = remove_units(module, "channels", keep, plain=False)
    assert "has no number for these channels" in record.why_not_plain
    assert (outputs(module, inputs) - outputs(silent, inputs)).abs().max() < 1e-5
    save_module(module, tmp_path)
    assert torch.equal(outputs(load_module(tmp_path, read_config(tmp_path)).eval(), inputs), outputs(module, inputs))
