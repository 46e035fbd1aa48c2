"""Remove the neurons that a policy, learnt from the weights alone, would not draw: PruneNet.

Sengupta, Chaudhary, Chakraborty 2025, arXiv:2501.15296. Of the matrix W [n, width] through which a block's neurons read, the policy
gives each row the probability α = sigmoid((W Pᵀ + b) r), with P, b and r shared by all blocks, and noise makes of it
o = sigmoid(logit α + logit ε), ε uniform. Rows to keep are drawn by o without replacement. The reward R of block l is one over the
Kolmogorov-Smirnov distance of the singular values of W before and after, and a step of AdamW follows on
-R · discountˡ · Σ log o over the rows drawn, with fresh noise. The policy at the end of the episode with the largest sum of
rewards counts. Neurons of highest α stay, or of `draws` choices drawn once more the one with the least distance.
Differs: the reward is at most the number of singular values, which bounds it where the distance is 0. W Pᵀ r is computed as
W (Pᵀ r), which saves a product of n · n · width. floor(share · n) rows go. The policy is not kept for other models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.anatomy._base import Units
from modelwright.core.errors import SiteError
from modelwright.core.model import Model
from modelwright.core.progress import track
from modelwright.core.settings import count, fraction, number
from modelwright.maths.divergence import kolmogorov_smirnov
from modelwright.maths.masks import part_of
from modelwright.methods.prune._units import UnitPruner, per_member

Policy = tuple[Tensor, ...]  # P [n, width], b [n], r [n]


@dataclass(frozen=True, kw_only=True)
class PruneNet(UnitPruner):
    """Take neurons out so that the singular values of what reads the stream stay as they were; needs no text."""

    status: ClassVar[str] = "checked"
    neutral = dict(share=0.0)
    small = dict(episodes=2)

    units: tuple[str, ...] = ("mlp",)  # kinds that go: mlp
    scope: Literal["block"] = "block"  # each block loses the same share
    episodes: int = count(20, low=0)  # in each of which the policy learns from every block once; 0 for an untrained one
    learning_rate: float = number(1e-3, low=0)  # of AdamW
    discount: float = fraction(0.99)  # of a reward, for each block before its own
    entropy: float = number(0.0, low=0)  # weight of the mean entropy of α in what is learnt
    draws: int = count(0, low=0)  # choices drawn of which the nearest is taken; 0: no draw, the highest α stay

    def problems(self) -> list[str]:
        return [] if self.units == ("mlp",) else [f"units are mlp; got {', '.join(self.units)}. Use prune.llm_pruner for others."]

    def model(self, model: Model, rng: torch.Generator, notes: list[str]) -> Model:
        return self.pruned(model, rng, notes)

    def found(self, module: nn.Module, notes: list[str] | None = None) -> list[Units]:
        found, parameters = super().found(module, notes), dict(module.named_parameters())
        sizes = {tuple(reads(units, parameters).shape) for units in found}
        if len(sizes) > 1:
            shown = ", ".join(f"{rows} × {columns}" for rows, columns in sorted(sizes))
            raise SiteError(f"{self.name()}: one policy is for blocks of one size, and the MLPs read through {shown}. Use another method.")
        return found

    def look(self, model: Model, found: Sequence[Units], source: torch.Generator) -> list[Tensor]:
        """For each entry the scores of its units [count]."""
        parameters = dict(model.module.named_parameters())
        matrices = [reads(units, parameters).detach() for units in found]
        if not part_of(self.share, len(matrices[0])):
            return [torch.zeros(len(matrix)) for matrix in matrices]
        spectra = [torch.linalg.svdvals(matrix) for matrix in matrices]
        policy = self.learnt(matrices, spectra, source)
        if not self.draws:
            return [logits(policy, matrix) for matrix in matrices]
        return [self.nearest(policy, matrix, spectrum, source) for matrix, spectrum in zip(matrices, spectra, strict=True)]

    def scores(self, module: nn.Module, found: Sequence[Units], seen: list[Tensor]) -> list[Tensor]:
        return seen

    def learnt(self, matrices: Sequence[Tensor], spectra: Sequence[Tensor], rng: torch.Generator) -> Policy:
        """The best policy for matrices [n, width] with these singular values."""
        rows, width = matrices[0].shape
        bound = width**-0.5
        made = (bound * (2 * torch.rand(rows, width, generator=rng) - 1), bound * (2 * torch.rand(rows, generator=rng) - 1),
                torch.rand(rows, generator=rng))  # fmt: skip
        policy = tuple(part.to(matrices[0].device).requires_grad_() for part in made)
        best, most = policy, -torch.inf
        with torch.enable_grad():
            optimizer = torch.optim.AdamW(policy, lr=self.learning_rate)
            for _ in track(range(self.episodes), self.name()):
                total = 0.0
                for place, (matrix, spectrum) in enumerate(zip(matrices, spectra, strict=True)):
                    drawn = self.drawn(policy, matrix, rng)
                    reward = min(1 / max(distance(matrix, drawn, spectrum), 1e-12), len(spectrum))
                    found = logits(policy, matrix)
                    alpha = found.sigmoid()
                    spread = (F.softplus(-found) * alpha + F.softplus(found) * (1 - alpha)).mean()
                    chances = F.logsigmoid(found + noise(found, rng))[drawn].sum()
                    optimizer.zero_grad()
                    (-reward * self.discount**place * chances - self.entropy * spread).backward()
                    optimizer.step()
                    total += reward
                if total > most:
                    best, most = tuple(part.detach().clone() for part in policy), total
        return tuple(part.detach() for part in best)

    def drawn(self, policy: Policy, matrix: Tensor, rng: torch.Generator) -> Tensor:
        """The rows of a matrix [n, width] that one draw keeps."""
        with torch.no_grad():
            found = logits(policy, matrix)
            chances = (found + noise(found, rng)).sigmoid().clamp_min(1e-12)
        return torch.multinomial(chances.cpu(), max(len(matrix) - part_of(self.share, len(matrix)), 1), generator=rng).to(matrix.device)

    def nearest(self, policy: Policy, matrix: Tensor, spectrum: Tensor, rng: torch.Generator) -> Tensor:
        """1 for the rows of that draw whose singular values are nearest, 0 for the others [n]."""
        drawn = min((self.drawn(policy, matrix, rng) for _ in range(self.draws)), key=lambda rows: distance(matrix, rows, spectrum))
        return torch.zeros(len(matrix), device=matrix.device).index_fill(0, drawn, 1.0)


def reads(units: Units, tensors: Mapping[str, Tensor]) -> Tensor:
    """The first matrix through which units read, float32 [count, width]; of a gated MLP the gate."""
    return next(part for span, part in zip(units.spans, per_member(units, tensors), strict=True)
                if not span.output and tensors[span.name].ndim == 2)[:, 0]  # fmt: skip


def logits(policy: Policy, matrix: Tensor) -> Tensor:
    """logit α = (W Pᵀ + b) r [n]."""
    project, bias, rates = policy
    return matrix @ (project.T @ rates) + bias @ rates


def noise(like: Tensor, rng: torch.Generator) -> Tensor:
    """logit ε [n] of uniform ε."""
    return torch.rand(len(like), generator=rng).clamp(1e-6, 1 - 1e-6).logit().to(like.device)


def distance(matrix: Tensor, rows: Tensor, spectrum: Tensor) -> float:
    """How far the singular values of some rows are from those of the whole matrix, from 0 to 1."""
    return kolmogorov_smirnov(torch.linalg.svdvals(matrix[rows.sort().values]), spectrum)
