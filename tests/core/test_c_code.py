"""Networks as C: compiled with every warning an error, they give what torch gives."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import tiny
from torch import nn

import modelwright as mw
from modelwright.c_code import Exported
from modelwright.core.errors import ModelError, RecipeError, SettingError
from modelwright.methods.quantize.rtn import Rtn

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


def compiled(folder: Path, inputs: torch.Tensor, outputs: torch.Size) -> torch.Tensor:
    """What the C in a folder gives for each of a batch of inputs."""
    subprocess.run(
        ["gcc", "-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic", "-shared", "-fPIC", "-o", "network.so", "network.c", "-lm"],
        cwd=folder, check=True,
    )  # fmt: skip
    function = ctypes.CDLL(str(folder / "network.so")).network
    rows = []
    for one in inputs.float().contiguous():
        out = torch.empty(outputs)
        function(ctypes.c_void_p(one.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        rows.append(out)
    return torch.stack(rows)


def agrees(module: nn.Module, inputs: torch.Tensor, folder: Path, **settings) -> Exported:
    """Write, compile, run and compare."""
    exported = mw.export_c(module, inputs[:1], folder, **settings)
    with torch.no_grad():
        expected = module.eval()(inputs)
    assert torch.allclose(compiled(folder, inputs, expected.shape[1:]), expected, atol=1e-5, rtol=1e-5)
    source = (folder / "network.c").read_text("utf-8")
    assert not any(word in source for word in ("alloc", "free("))
    return exported


class Residual(nn.Module):
    """A convolutional network with all that a small one has: shortcuts that pad, subsample, concatenate and transpose."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=(1, 0), dilation=(1, 2), groups=4)
        self.pool = nn.AvgPool2d((2, 1))
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        y = self.second(x)
        shortcut = F.pad(x[:, :, ::2, 1:-3:2][:, :, :, :-1], (0, 1, 0, 0, 4, 4))
        z = torch.cat([y + 2 * shortcut, x[:, :, ::2, :4]], dim=1)
        z = self.pool(z.transpose(2, 3) * 0.5)
        return self.head(torch.flatten(self.mean(z), 1))


def statistics(module: nn.Module) -> nn.Module:
    """Batch norms that have seen something."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return module


class Branching(nn.Module):
    """Does what its input says."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


class Last(nn.Module):
    """The last step of a recurrent layer, through a linear one."""

    def __init__(self, layer: nn.Module, out: nn.Module):
        super().__init__()
        self.layer, self.out = layer, out

    def forward(self, x):
        steps, _ = self.layer(x)
        return self.out(steps[:, -1])


NETWORKS = {
    "dense": lambda: (nn.Sequential(nn.Linear(7, 20), nn.Tanh(), nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 5), nn.Softmax(-1)), (7,)),
    "activations": lambda: (
        nn.Sequential(nn.ReLU6(), nn.Sigmoid(), nn.SiLU(), nn.Softplus(), nn.Hardtanh(), nn.LayerNorm(9), nn.ReLU(), nn.Dropout()), (4, 9)
    ),
    "residual": lambda: (statistics(Residual()), (3, 10, 12)),
    "one dimension": lambda: (
        statistics(nn.Sequential(
            nn.Conv1d(2, 6, 5, stride=2, padding=2), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(3, 2, padding=1), nn.AvgPool1d(2),
            nn.Flatten(), nn.Linear(24, 3),
        )), (2, 32),
    ),
    "maximum": lambda: (nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1, dilation=1), nn.Conv2d(1, 2, (3, 1))), (1, 9, 11)),
    "lstm": lambda: (Last(nn.LSTM(5, 8, 2, batch_first=True), nn.Linear(8, 3)), (6, 5)),
    "gru": lambda: (Last(nn.GRU(5, 8, 2, batch_first=True), nn.Linear(8, 3)), (6, 5)),
    "rnn": lambda: (Last(nn.RNN(5, 8, batch_first=True, bias=False), nn.Identity()), (6, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_c_gives_what_torch_gives(name, tmp_path):
    torch.manual_seed(0)
    module, shape = NETWORKS[name]()
    agrees(module, torch.randn(3, *shape), tmp_path / "c")


def test_numbers_select_rows(tmp_path):
    torch.manual_seed(0)
    module = Last(nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 11))
    words = nn.Sequential(nn.Embedding(11, 4), module)
    exported = mw.export_c(words, torch.zeros(1, 5, dtype=torch.long), tmp_path / "c")
    numbers = torch.randint(11, (3, 5))
    with torch.no_grad():
        assert torch.allclose(compiled(tmp_path / "c", numbers, torch.Size([11])), words(numbers), atol=1e-5)
    assert exported.macs == 5 * (4 + 6) * 24 + 6 * 11


def test_sizes_by_hand(tmp_path):
    """Of 10, 20, 30 and 5 values, 20 and 30 are alive at once; activations work where their input lies."""
    module = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    found = mw.export_c(module, torch.zeros(1, 10), tmp_path / "c")
    assert (found.macs, found.flash, found.ram) == (200 + 600 + 150, 4 * (950 + 55), 4 * (20 + 30))
    small = mw.export_c(module, torch.zeros(1, 10), tmp_path / "int8", weights="int8")
    assert small.flash == 950 + 4 * (55 + 55)  # a scale for each output


def test_whole_numbers_stand_for_the_rounded_weights(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs = torch.randn(3, 6)
    mw.export_c(module, inputs[:1], tmp_path / "c", weights="int8")
    rounded = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for own, other in zip(module, rounded, strict=True):
            if isinstance(own, nn.Linear):
                scale = own.weight.abs().amax(1, keepdim=True) / 127
                other.weight.copy_((own.weight / scale).round() * scale)
                other.bias.copy_(own.bias)
        assert torch.allclose(compiled(tmp_path / "c", inputs, torch.Size([2])), rounded(inputs), atol=1e-6)
        assert not torch.allclose(rounded(inputs), module(inputs), atol=1e-6)


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (Branching(), "Branching cannot be followed operation by operation"),
        (nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Softmin(-1)), r"PReLU.*Softmin"),
        (nn.Sequential(nn.GELU(approximate="tanh")), "GELU"),
    ],
)
def test_what_is_not_known_is_refused_by_name(module, named, tmp_path):
    with pytest.raises(ModelError, match=named):
        mw.export_c(module, torch.zeros(1, 4), tmp_path / "c")
    assert not any(tmp_path.iterdir())


def test_models_of_other_kinds_are_refused_with_what_to_do(tmp_path):
    packed = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    mw.apply(packed, Rtn(bits=8, group=0))
    for module, sentence in [
        (mw.open(tiny("llama")), "got a Model. Of a model of Modelwright, give its .module"),
        (tiny("llama"), "LlamaForCausalLM is a model of transformers, which is not written as C"),
        (packed, '0 is a PackedLinear. Give the network before it was stored so; weights="int8"'),
    ]:
        with pytest.raises(ModelError, match=re.escape(sentence)):
            mw.export_c(module, torch.zeros(1, 8), tmp_path / "c")


def test_a_layer_alone_is_a_network(tmp_path):
    torch.manual_seed(0)
    agrees(nn.Linear(4, 3), torch.randn(2, 4), tmp_path / "c")


def test_a_network_trains_or_not_as_it_did(tmp_path):
    for training in (True, False):
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(training)
        module[1].eval()  # frozen in a network that trains
        mw.export_c(module, torch.zeros(1, 4), tmp_path / str(training))
        assert [layer.training for layer in module.modules()] == [training, training, False]


def test_bad_wishes_are_refused(tmp_path):
    module = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(SettingError, match=r"a batch of 1; got torch.Size\(\[2, 4\]\)"):
        mw.export_c(module, torch.zeros(2, 4), tmp_path / "c")
    with pytest.raises(SettingError, match=r"takes no input of shape \[1, 5\]: mat1 and mat2 shapes"):
        mw.export_c(module, torch.zeros(1, 5), tmp_path / "c")
    with pytest.raises(SettingError, match="float32 or int8; got 'int4'"):
        mw.export_c(module, torch.zeros(1, 4), tmp_path / "c", weights="int4")
    mw.export_c(module, torch.zeros(1, 4), tmp_path / "c")
    with pytest.raises(RecipeError):
        mw.export_c(module, torch.zeros(1, 4), tmp_path / "c")
    assert module.training


class Basic(nn.Module):
    """A block of a ResNet for CIFAR-10, whose shortcut subsamples and pads (He et al. 2015, option A)."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.more, self.stride = (after - before) // 2, 2 if after > before else 1
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(y + x)


class Resnet20(nn.Module):
    """The whole network."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Basic(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(Basic(16, 32), Basic(32, 32), Basic(32, 32))
        self.layer3 = nn.Sequential(Basic(32, 64), Basic(64, 64), Basic(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean([2, 3]))


RESNET = Path(os.environ.get("MODELWRIGHT_DATA", "../shared/data")) / "models" / "resnet-cifar10" / "resnet20.safetensors"


@pytest.mark.skipif(not RESNET.exists(), reason=f"{RESNET} is not there")
def test_a_real_network(tmp_path):
    module = Resnet20()
    module.load_state_dict({name: value.float() for name, value in load_file(RESNET).items()})
    torch.manual_seed(0)
    found = agrees(module, torch.randn(2, 3, 32, 32), tmp_path / "c")
    assert found.ram == 4 * 3 * 16 * 32 * 32  # two activations of the first blocks and their shortcut
