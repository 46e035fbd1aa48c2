"""Small convolutional networks that tests share."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions with norms around which the input goes; where sizes change, through a convolution of one place."""

    def __init__(self, before: int, after: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """Two stages of two residual blocks."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Residual(width, width), Residual(width, width), Residual(width, 2 * width, 2), Residual(2 * width, 2 * width)
        )
        self.linear = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.bn(self.conv(x))))
        return self.linear(nn.functional.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class Padded(Residual):
    """A shortcut that leaves places out and fills channels up with zeros, as in the first ResNets for CIFAR."""

    def __init__(self, before: int, after: int, stride: int = 2):
        super().__init__(before, after, stride)
        more = (after - before) // 2

        class Shortcut(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more))

        self.shortcut = Shortcut()


class Mobile(nn.Module):
    """Inverted residual blocks with depthwise convolutions and a gate of channels."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.SiLU())
        self.widen = nn.Sequential(nn.Conv2d(6, 18, 1, bias=False), nn.BatchNorm2d(18), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(18, 18, 3, 1, 1, groups=18), nn.BatchNorm2d(18), nn.ReLU6())
        self.squeeze, self.gate = nn.Conv2d(18, 4, 1), nn.Conv2d(4, 18, 1)
        self.narrow = nn.Sequential(nn.Conv2d(18, 6, 1), nn.BatchNorm2d(6))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, 10), nn.ReLU(), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        inner = self.depth(self.widen(x))
        gate = torch.sigmoid(self.gate(torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(inner, 1)))))
        return self.head(x + self.narrow(inner * gate))


class Dense(nn.Module):
    """Convolutions whose outputs are put side by side, a group norm, and one called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.third, self.twice = nn.Conv2d(10, 8, 3, 2), nn.Conv2d(8, 8, 1)
        self.grouped, self.normed = nn.Conv2d(8, 8, 3, groups=2), nn.GroupNorm(2, 8)
        self.up, self.last = nn.ConvTranspose2d(8, 7, 2, 2), nn.Conv2d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.relu(self.first(x))
        x = self.third(self.norm(torch.cat([one, self.second(one)], 1)))
        x = self.normed(self.grouped(self.twice(torch.relu(self.twice(x)))))
        return self.last(torch.relu(self.up(x))).mean((2, 3))


NETS = {"resnet": ResNet, "mobile": Mobile, "dense": Dense, "padded": lambda: nn.Sequential(Padded(3, 9), Padded(9, 13), nn.Flatten(),
        nn.Linear(13 * 16, 5))}  # fmt: skip


def net(name: str, seed: int = 0) -> nn.Module:
    """A network in eval mode, with running statistics and norms that are no identity."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = NETS[name]()
        for child in made.modules():
            if isinstance(child, nn.BatchNorm2d):
                for value, low in ((child.weight, 0.5), (child.bias, -0.5), (child.running_mean, -0.2), (child.running_var, 0.5)):
                    value.data.uniform_(low, low + 1)
    return made.eval()


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A residual block of a diffusion U-Net, which the time shifts."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm, self.conv1, self.time = nn.GroupNorm(2, before), nn.Conv2d(before, after, 3, padding=1), nn.Linear(8, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        inner = self.conv1(torch.relu(self.norm(x))) + self.time(time)[:, :, None, None]
        return self.conv2(torch.relu(inner)) + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class UNet(nn.Module):
    """Two blocks on each side of a middle one, with skips from side to side, that predicts the noise in an image."""

    def __init__(self):
        super().__init__()
        self.entry = nn.Conv2d(3, 8, 3, padding=1)
        self.down, self.middle = nn.ModuleList([Block(8, 8), Block(8, 16)]), Block(16, 16)
        self.up, self.exit = nn.ModuleList([Block(32, 16), Block(24, 8)]), nn.Conv2d(8, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = torch.sin(timestep[:, None].float() * 0.1 * 2.0 ** torch.arange(8))
        x, skips = self.entry(sample), []
        for block in self.down:
            x = block(x, time)
            skips.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        x = self.middle(x, time)
        for block in self.up:
            x = torch.cat([nn.functional.interpolate(x, scale_factor=2.0), skips.pop()], 1)
            x = block(x, time)
        return self.exit(x)


def unet(seed: int = 0) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet().eval()


def noisy(step: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A batch of a U-Net: two noisy images at one step."""
    return {"sample": image(seed), "timestep": torch.full((2,), step)}
