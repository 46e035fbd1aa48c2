"""Parts of diffusion networks: reused over steps, taken out, taught alone and together."""

import copy

import pytest
import torch
from nets import noisy, unet
from torch import nn

from modelwright.blocks.conditional import ConditionalConv2d
from modelwright.blocks.passing import Passing
from modelwright.core.errors import DataError, ModelError, SettingError
from modelwright.core.pieces import assemble, incubate, remove_parts, sensitivity
from modelwright.core.reuse import FeatureCache, dense_ends, every, switched


def sampled(net, steps=6, prepare=None):
    """What a plain sampler makes of noise in so many steps."""
    sample = noisy()["sample"]
    with torch.no_grad():
        for step in range(steps):
            found = net(sample=sample, timestep=torch.full((2,), steps - step))
            sample = sample - 0.1 * getattr(found, "sample", found)
    return sample


def test_schedules_by_hand():
    assert [step for step in range(7) if every(3)(step)] == [0, 3, 6]
    assert [step for step in range(10) if dense_ends(10, 3, 2)(step)] == [0, 1, 2, 5, 8, 9]
    assert [switched(6, 2)(step) for step in range(6)] == [0, 0, 1, 1, 0, 0]
    with pytest.raises(SettingError, match="period of 0"):
        every(0)


def test_a_cache_of_period_1_is_the_network_itself():
    net = unet()
    before = sampled(net)
    with FeatureCache([net.middle, net.up[0]], every(1)) as cache:
        assert torch.equal(sampled(net), before)
    assert (cache.computed, cache.reused) == (12, 0)


def test_what_is_reused_is_what_the_last_computed_step_gave():
    net, seen = unet(), []
    handle = net.middle.register_forward_hook(lambda _, args, found: seen.append((args[0], found)))
    with FeatureCache(net.middle, every(2), clock=net) as cache:
        sampled(net)
        assert (cache.computed, cache.reused) == (3, 3)
    handle.remove()
    given, made = zip(*seen, strict=True)
    assert all(made[step] is made[step - 1] for step in (1, 3, 5))
    assert not torch.equal(given[0], given[1])
    assert torch.equal(made[2], net.middle(given[2], torch.sin(torch.full((2, 1), 4.0) * 0.1 * 2.0 ** torch.arange(8))))
    assert "forward" not in vars(net.middle)
    assert net.state_dict().keys() == unet().state_dict().keys()


def test_a_network_whose_parts_are_all_reused_gives_its_first_output_again():
    net = unet()
    with FeatureCache(net, lambda step: False), torch.no_grad():
        first = net(**noisy(3))
        assert net(**noisy(9, seed=5)) is first


def test_a_cache_suits_blocks_of_a_transformer_and_counts_the_clock():
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    net = nn.Sequential(block, block, nn.Linear(16, 16)).eval()  # the block is called twice in each step
    tokens = torch.randn(2, 5, 16)
    with torch.no_grad(), FeatureCache(block, every(2), clock=net) as cache:
        net(tokens)
        assert cache.computed == 2
        net(tokens)
        assert (cache.computed, cache.reused) == (2, 2)
        cache.reset()
        net(tokens[:1])
        with pytest.raises(ModelError, match=r"is given \[2, 5, 16\] at step 1, and kept what it gave for \[1, 5, 16\]"):
            net(tokens)


def test_one_part_has_one_cache():
    net = unet()
    with FeatureCache(net.middle, every(2)), pytest.raises(ModelError, match="has another forward already"):
        FeatureCache([net.up[0], net.middle], every(2))
    assert "forward" not in vars(net.up[0])


# Removal


PARTS = ("down.0", "down.1", "middle", "up.0", "up.1")


def test_what_is_taken_out_leaves_the_channels_of_the_skips():
    net, reads = unet(), []
    for block in net.up:
        block.register_forward_hook(lambda _, args, made: reads.append(args[0].shape[1]))
    for number, path in enumerate(PARTS):
        smaller = copy.deepcopy(net)
        remove_parts(smaller, [path], noisy())
        reads.clear()
        assert smaller(**noisy()).shape == (2, 3, 16, 16), number
        assert all(width in (32, 24) for width in reads)
        assert sum(value.numel() for value in smaller.parameters()) < sum(value.numel() for value in net.parameters())


def test_the_way_around_by_hand():
    net = unet()
    x, time = torch.randn(2, 16, 4, 4), torch.zeros(2, 8)
    remove_parts(net, ["middle", "down.1", "up.0"], noisy())
    assert torch.equal(net.middle(x, time), x)
    assert torch.equal(net.down[1](x[:, :8], time), unet().down[1].conv_shortcut(x[:, :8]))
    plain = Passing(in_channels=16, out_channels=10)
    assert torch.equal(plain(x), x[:, :10])
    with pytest.raises(ModelError, match="makes 16 channels of 8 and has no 1 × 1 shortcut"):
        Passing.of(nn.Conv2d(8, 16, 3, padding=1), x[:, :8], x)
    with pytest.raises(ModelError, match="changes more than channels"):
        Passing.of(nn.AvgPool2d(2), x, x[:, :, :2, :2])


def test_sensitivity_is_the_change_without_the_part_and_a_part_that_does_nothing_has_none():
    net = unet()
    net.middle.conv2.weight.data.zero_()
    net.middle.conv2.bias.data.zero_()
    batches = [noisy(3), noisy(7, seed=1)]
    found = sensitivity(net, PARTS, batches)
    assert min(found, key=found.get) == "middle"
    assert found["middle"] == 0
    smaller = copy.deepcopy(net)
    remove_parts(smaller, ["down.0"], batches[0])
    with torch.no_grad():
        change = sum((smaller(**batch) - net(**batch)).square().mean().item() for batch in batches) / 2
    assert found["down.0"] == pytest.approx(change)
    assert net.state_dict().keys() == unet().state_dict().keys()
    with pytest.raises(DataError, match="No batch was given"):
        sensitivity(net, PARTS, [])


# Teaching


def test_a_piece_learns_what_the_teachers_piece_gives_and_nothing_else_changes():
    teacher, student = unet(), copy.deepcopy(unet())
    student.middle = nn.Conv2d(16, 16, 1)
    student.middle.forward = lambda x, time: nn.Conv2d.forward(student.middle, x)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    batches = [noisy(step, seed=step) for step in range(4)]
    found = incubate(teacher, student, ["middle"], batches, steps=40, learning_rate=2e-2)
    assert found["middle"][1] < 0.3 * found["middle"][0]
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"middle.weight", "middle.bias"}
    assert incubate(teacher, copy.deepcopy(teacher), ["middle"], batches, steps=0)["middle"] == (0, 0)
    student.middle = nn.Identity()
    student.middle.forward = lambda x, time: x[:, :8]
    with pytest.raises(ModelError, match="same shapes"):
        incubate(teacher, student, ["middle"], batches)


def test_the_assembled_student_comes_nearer_to_its_teacher():
    teacher, student = unet(), copy.deepcopy(unet())
    batches = [noisy(step, seed=step) | {"target": torch.zeros(2, 3, 16, 16)} for step in range(3)]
    remove_parts(student, ["middle"], batches[0])
    losses = assemble(teacher, student, ["up.0", "up.1"], batches, steps=30, learning_rate=2e-3, target=0.0)
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    # The first loss by hand, with all three terms.
    student = copy.deepcopy(teacher)
    remove_parts(student, ["middle"], batches[0])
    parts = {}
    for net in (teacher, student):
        parts[net] = [net(**{key: batches[0][key] for key in ("sample", "timestep")})]
        net.up[0].register_forward_hook(lambda _, args, made, net=net: parts[net].append(made))
        net(**{key: batches[0][key] for key in ("sample", "timestep")})
    (t, f), (s, g) = parts[teacher], parts[student]
    expected = 2 * s.square().mean() + 3 * (s - t).square().mean() + 5 * (g - f).square().mean()
    first = assemble(teacher, student, ["up.0"], batches, steps=1, target=2.0, output=3.0, features=5.0)[0]
    assert first == pytest.approx(expected.item(), rel=1e-5)


# Conditional kernels


def test_one_kernel_is_the_plain_convolution():
    own, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1), torch.randn(3, 4, 9, 9)
    made = ConditionalConv2d.inheriting(own, [], share=1.0)
    assert torch.allclose(made(x), own(x), atol=1e-5)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_kernels_are_mixed_by_hand(gate):
    own, other = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, bias=False)
    made, x = ConditionalConv2d.inheriting(own, [other], gate=gate, share=0.8), torch.randn(3, 4, 5, 5)
    assert torch.allclose(made.shares(x), torch.tensor([0.8, 0.2]).expand(3, 2), atol=1e-5)
    assert torch.allclose(made(x), 0.8 * own(x) + 0.2 * other(x), atol=1e-5)
    made.mix.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    shares = made.shares(x)
    assert (shares.std(0) > 0).all()  # each image has its own
    expected = shares[:, 0, None, None, None] * own(x) + shares[:, 1, None, None, None] * other(x)
    assert torch.allclose(made(x), expected, atol=1e-5)


def test_with_equal_kernels_shares_that_sum_to_1_do_not_matter():
    own, x = nn.Conv2d(4, 6, 3), torch.randn(3, 4, 5, 5)
    made = ConditionalConv2d.inheriting(own, [copy.deepcopy(own), copy.deepcopy(own)])
    made.mix.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    assert torch.allclose(made(x), own(x), atol=1e-5)


def test_kernels_that_cannot_be_mixed_are_refused():
    own = nn.Conv2d(4, 6, 3)
    with pytest.raises(ModelError, match=r"own is \(6, 4, 3, 3\), another \(6, 4, 1, 1\)"):
        ConditionalConv2d.inheriting(own, [nn.Conv2d(4, 6, 1)])
    with pytest.raises(ModelError, match="one group"):
        ConditionalConv2d.inheriting(nn.Conv2d(4, 4, 3, groups=2), [])
    with pytest.raises(ModelError, match="share above 0 and below 1"):
        ConditionalConv2d.inheriting(own, [nn.Conv2d(4, 6, 3)], share=1.0)


def test_a_kernel_is_inherited_from_a_block_that_is_gone():
    net = unet()
    gone = net.middle.conv2
    remove_parts(net, ["middle"], noisy())
    net.up[0].conv2 = ConditionalConv2d.inheriting(net.up[0].conv2, [gone])
    found = assemble(unet(), net, ["up.0"], [noisy(1), noisy(2)], steps=20, learning_rate=2e-3)
    assert found[-1] < found[0]


# The real thing


def test_a_unet_of_diffusers_is_cached_and_loses_a_block():
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'modelwright[diffusion]'")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = diffusers.UNet2DModel(
            sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip
    before = sampled(net)
    with FeatureCache([net.mid_block, net.up_blocks[0]], every(1), clock=net):
        assert torch.equal(sampled(net), before)
    with FeatureCache([net.mid_block, net.up_blocks[0]], dense_ends(6, 2, 1), clock=net) as cache:
        found = sampled(net)
    assert cache.reused == 4
    assert 0 < (found - before).abs().max() < 0.5 * before.abs().max()
    parts = ["down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "mid_block.resnets.0", "mid_block.attentions.0", "up_blocks.0.resnets.0"]
    batches = [noisy(2) | {"timestep": torch.tensor(2)}]
    harm = sensitivity(net, parts, batches)
    assert all(value > 0 for value in harm.values())
    student = copy.deepcopy(net)
    remove_parts(student, [min(harm, key=harm.get)], batches[0])
    losses = assemble(net, student, ["mid_block", "up_blocks.0"], batches, steps=15, learning_rate=1e-3)
    assert losses[-1] < losses[0]
