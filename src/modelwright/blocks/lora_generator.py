"""Makes the low-rank updates of an adapter for a task from its description: SG-LoRA.

Li et al. 2025, arXiv:2509.10535. Of tasks with trained adapters (experts) the nearest in description make a condition: with weights α,
a softmax of cosines over a temperature, μ* = Σ α μ_k and σ*² = Σ α σ_k² + Σ α (μ_k - μ*)². A variational autoencoder learns the
experts' numbers X given c = (μ*, σ*²): an encoder q(z | X, c), a prior p(z | c) and a decoder X̂ = f(z, c), with the loss
‖X - X̂‖² + balance · KL(q ‖ p). For a new task z comes from the prior. Experts must begin alike, or their factors cannot be averaged.
Differs: in training, the condition of a task leaves the task itself out, or the decoder would only copy; numbers are normalised tensor by
tensor; and each tensor's part of the condition first goes through a linear of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.core.errors import ModelError

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # path of a layer -> B [out, r] and A [r, in]


class Experts(nn.Module):
    """Adapters of several tasks, each as several samples of it, such as its last checkpoints; and the embeddings of the tasks' texts.

    samples: of each task, its adapters. texts: [tasks, text].
    Raises:
        ModelError: adapters have other layers or ranks than the first, or there are not as many texts as tasks, or only one.
    """

    values: Tensor
    texts: Tensor
    middle: Tensor
    spread: Tensor

    def __init__(self, samples: Sequence[Sequence[Pairs]], texts: Tensor):
        super().__init__()
        if len(samples) != len(texts) or len(samples) < 2:
            raise ModelError(f"There are {len(samples)} tasks and {len(texts)} texts. Give two tasks or more, and a text for each.")
        self.shapes = {path: (up.shape, down.shape) for path, (up, down) in samples[0][0].items()}
        for pairs in (pairs for task in samples for pairs in task):
            if {path: (up.shape, down.shape) for path, (up, down) in pairs.items()} != self.shapes:
                raise ModelError("The adapters differ in layers or ranks. Train all with the same settings.")
        raw = torch.stack([torch.stack([self._flat(pairs) for pairs in task]) for task in samples])  # [tasks, samples, numbers]
        self.sizes = [shape.numel() for shapes in self.shapes.values() for shape in shapes]
        cut = raw.split(self.sizes, -1)
        self.register_buffer("middle", torch.cat([one.mean().expand(one.shape[-1]) for one in cut]))
        self.register_buffer("spread", torch.cat([one.std().clamp(min=1e-8).expand(one.shape[-1]) for one in cut]))
        self.register_buffer("values", (raw - self.middle) / self.spread)
        self.register_buffer("texts", F.normalize(texts.float(), dim=1))

    @staticmethod
    def _flat(pairs: Pairs) -> Tensor:
        return torch.cat([value.detach().float().flatten() for pair in pairs.values() for value in pair])

    def pairs(self, values: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Normalised numbers as the tensors that they are."""
        shapes = [shape for pair in self.shapes.values() for shape in pair]
        cut = [part.view(shape) for part, shape in zip((values * self.spread + self.middle).split(self.sizes), shapes, strict=True)]
        return {path: (cut[2 * place], cut[2 * place + 1]) for place, path in enumerate(self.shapes)}

    def shares(self, text: Tensor, count: int, temperature: float, without: int | None = None) -> Tensor:
        """How much each task counts for a text [text]: α [tasks] of the nearest tasks, 0 of the others."""
        cosines = self.texts @ F.normalize(text.to(self.texts), dim=0)
        if without is not None:
            cosines[without] = -torch.inf
        best, places = cosines.topk(min(count, len(cosines) - (without is not None)))
        return torch.zeros_like(cosines).index_put((places,), (best / temperature).softmax(0))

    def condition(self, text: Tensor, count: int, temperature: float, without: int | None = None) -> Tensor:
        """c = (μ*, σ*²), [2, numbers]."""
        shares = self.shares(text, count, temperature, without)[:, None]
        means, variances = self.values.mean(1), self.values.var(1, correction=0)
        mean = (shares * means).sum(0)
        return torch.stack([mean, (shares * (variances + (means - mean).square())).sum(0)])

    def average(self, text: Tensor, count: int, temperature: float) -> dict[str, tuple[Tensor, Tensor]]:
        """The mean of the nearest experts: what a generator must be better than."""
        return self.pairs(self.condition(text, count, temperature)[0])


class LoraGenerator(nn.Module):
    """Learns from experts to make adapters for texts.

    count: experts that make a condition. temperature: of their shares. balance: weight of the divergence. latent, hidden, width: sizes
    of z, of the networks, and of what each tensor's part of the condition becomes.
    """

    def __init__(self, experts: Experts, *, count: int = 4, temperature: float = 0.1, balance: float = 1.0, latent: int = 16,
                 hidden: int = 256, width: int = 64):  # fmt: skip
        super().__init__()
        self.experts, self.count, self.temperature, self.balance = experts, count, temperature, balance
        numbers, given = sum(experts.sizes), width * len(experts.sizes)
        self.parts = nn.ModuleList(nn.Linear(2 * size, width) for size in experts.sizes)
        self.encoder = _network(numbers + given, hidden, 2 * latent)
        self.prior = _network(given, hidden, 2 * latent)
        self.decoder = _network(latent + given, hidden, hidden, numbers)

    def forward(self, text: Tensor, draw: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """B and A of each layer for a text's embedding [text]; of the prior's mean, or of a draw."""
        given = self._given(self.experts.condition(text, self.count, self.temperature)[None])
        mean, spread = _normal(self.prior(given))
        z = mean + spread * torch.randn_like(mean) if draw else mean
        return self.experts.pairs(self.decoder(torch.cat([z, given], 1))[0])

    def loss(self, values: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Of numbers X [batch, numbers] and c [batch, 2, numbers]: the mean of ‖X - X̂‖², and of KL(q(z | X, c) ‖ p(z | c))."""
        given = self._given(conditions)
        mean, spread = _normal(self.encoder(torch.cat([values, given], 1)))
        prior, apart = _normal(self.prior(given))
        made = self.decoder(torch.cat([mean + spread * torch.randn_like(mean), given], 1))
        ratio = (spread / apart).square()
        divergence = 0.5 * (ratio + ((mean - prior) / apart).square() - 1 - ratio.log()).sum(1)
        return (values - made).square().sum(1).mean(), divergence.mean()

    def fit(self, steps: int = 2000, learning_rate: float = 1e-3, batch: int = 64) -> list[float]:
        """Learn from the experts, each from a condition that leaves it out; gives the losses. Random numbers are torch's."""
        experts = self.experts
        rows = [experts.condition(text, self.count, self.temperature, without=task) for task, text in enumerate(experts.texts)]
        conditions, losses = torch.stack(rows), []
        optimizer = torch.optim.Adam(self.parameters(), learning_rate)
        for _ in range(steps):
            tasks, samples = (torch.randint(size, (batch,)) for size in experts.values.shape[:2])
            apart, divergence = self.loss(experts.values[tasks, samples], conditions[tasks])
            loss = apart + self.balance * divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def _given(self, conditions: Tensor) -> Tensor:
        cut = conditions.split(self.experts.sizes, -1)
        return torch.cat([part(one.flatten(1)) for part, one in zip(self.parts, cut, strict=True)], 1)


def _network(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _normal(values: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations from what a network gives [batch, 2 · latent]."""
    mean, log = values.chunk(2, 1)
    return mean, log.clamp(-10, 10).exp()
