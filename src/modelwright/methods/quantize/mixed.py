"""Give each matrix the bits that the outputs ask for, and solve for its codes as GPTQ does: mixed precision by sensitivity.

Folklore, as HAWQ (Dong et al. 2019, arXiv:1905.03696) and its successors have it: each matrix alone is rounded to each of `choices`, and
the divergence KL(before ‖ after) of the predictions on the text is its harm; options are chosen by harm + λ · bits for `bits` on
average over all weights. The codes are then those of `quantize.gptq` on what enters the matrices of the unchanged model.
Differs: sensitivity is measured, and not estimated by second derivatives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.anatomy import anatomy_of
from modelwright.core.errors import SiteError
from modelwright.core.given import Batch, first
from modelwright.core.gradients import logits_of
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, put, unwrapped, weight_of
from modelwright.core.passage import Resident, real, statistics_of
from modelwright.core.progress import track
from modelwright.core.settings import count, number
from modelwright.core.walk import Chosen, alike, choose, dense_sites, refuse_not_finite, split_experts
from modelwright.maths import grids
from modelwright.maths.allocation import least_harm
from modelwright.methods.quantize._mechanism import Grouped
from modelwright.methods.quantize.gptq import Gptq

TOGETHER = 16  # matrices whose moments are in memory at once


@dataclass(frozen=True, kw_only=True)
class Mixed(Grouped, ModelMethod):  # type: ignore[misc]  # sizes are planned matrix by matrix
    """Store weights as integers of other widths from matrix to matrix, `bits` on average, where the text shows they are needed."""

    status: ClassVar[str] = "checked"
    causal: ClassVar[bool] = True
    by_place: ClassVar[bool] = False
    small = dict(bits=4.0, choices=(4,), group=32)

    bits: float = number(4.0, low=2, high=8, unit="bits")  # per weight on average, of the codes
    choices: tuple[int, ...] = (2, 3, 4, 6, 8)  # bits that a matrix may have
    symmetric: bool = True  # false adds zero points, and then modelwright is needed to load
    tries: int = count(16, unit="sequences")  # of the text, on which harm is measured

    def problems(self) -> list[str]:
        if not self.choices or not all(2 <= bits <= 8 for bits in self.choices):
            return [f"choices are bits from 2 to 8; got {list(self.choices)}."]
        low = min(self.choices)
        return [f"bits are {self.bits:g} on average, and the least of choices is {low}. Give more, or a lower choice."] * (self.bits < low)

    def promise(self) -> dict[str, Any]:
        return {}  # the bits are an average

    def model(self, model: Model, calibration: Sequence[Batch], notes: list[str], details: list[Any]) -> Model:
        module = unwrapped(model.module)
        with torch.no_grad(), split_experts(module):
            sites = [site for site in anatomy_of(module).sites(module) if site.role not in ("embed", "position")]
            chosen = dense_sites(module, self, choose(module, sites, self, notes), notes)
            if not chosen:
                raise SiteError(f"{self.name()}: all chosen matrices are stored otherwise than dense. Quantise a model once.")
            sizes = torch.tensor([weight.numel() for site, _ in chosen if (weight := weight_of(module, site)) is not None])
            costs = sizes[:, None] * torch.tensor(self.choices)
            harm = self.harm(model, chosen, first(calibration, self.tries))
            places = least_harm(harm, costs, self.bits * float(sizes.sum()))
            widths = [self.choices[place] for place in places]
            made: list[nn.Module] = []
            for start in track(range(0, len(chosen), TOGETHER), self.name()):
                part = [site for site, _ in chosen[start : start + TOGETHER]]
                found = statistics_of(model, part, Gptq.gathers, calibration)
                for site, bits in zip(part, widths[start:], strict=False):
                    weight, seen = weight_of(module, site), found.pop(site.name)
                    assert weight is not None
                    refuse_not_finite(site, seen, self)
                    if not seen.tokens:
                        notes.append(f"{self.name()}: {site.module} saw no calibration token; it was worked on as if all inputs were alike")
                    solver = Gptq(bits=bits, group=self.group, symmetric=self.symmetric)
                    made.append(solver.layer(weight, seen if seen.tokens else alike(seen, Gptq.gathers)))
            for (site, _), layer in zip(chosen, made, strict=True):
                put(module, site, layer)
        for (site, _), bits, row in zip(chosen, widths, harm.tolist(), strict=True):
            details.append({"matrix": site.name, "bits": bits, "harm": dict(zip(map(str, self.choices), row, strict=True))})
        spread = ", ".join(f"{matrices} of {bits}" for bits, matrices in sorted(Counter(widths).items()))
        mean = float((sizes * torch.tensor(widths)).sum() / sizes.sum())
        notes.append(f"{self.name()}: {mean:.3f} bits on average; matrices by their bits: {spread}")
        return model

    def harm(self, model: Model, chosen: Chosen, batches: Sequence[Batch]) -> Tensor:
        """Of each matrix and choice, the mean divergence of a token's prediction when that matrix alone is rounded [sites, choices].

        Raises:
            SiteError: the predictions are NaN or infinite.
        """
        walk, module = Resident(model), unwrapped(model.module)
        right = [self.predicted(walk, batch) for batch in batches]
        if not all(one.isfinite().all() for one in right):
            raise SiteError(f"{self.name()}: the predictions are NaN or infinite on the text. Use a wider dtype, or other text.")
        harm = torch.zeros(len(chosen), len(self.choices), dtype=torch.float64)
        for row, (site, _) in zip(harm, track(chosen, f"{self.name()}: sensitivity"), strict=True):
            weight = weight_of(module, site)
            assert weight is not None
            before = weight.clone()
            try:
                for place, bits in enumerate(self.choices):
                    grid = grids.affine(before, bits, self.group_of(before.shape[1]), symmetric=self.symmetric)
                    weight.copy_(grids.nearest(before, grid))
                    apart = [F.kl_div(self.predicted(walk, batch), one, log_target=True, reduction="sum")
                             for batch, one in zip(batches, right, strict=True)]  # fmt: skip
                    row[place] = float(sum(apart)) / sum(len(one) for one in right)
            finally:
                weight.copy_(before)
        return harm

    def predicted(self, walk: Resident, batch: Batch) -> Tensor:
        """The logarithms of the probabilities of the next tokens [tokens, vocabulary], without padding."""
        return real(logits_of(walk.forward(batch)).float(), batch.get("attention_mask")).log_softmax(-1)

    def passes(self, blocks: int) -> float:
        return 2 + 7 * blocks * len(self.choices)  # of the matrices of a block, seven as a rule

    def planned(self, weight: Tensor) -> nn.Module:  # type: ignore[override]  # matrix by matrix, as its sizes are planned
        """With the choice that is nearest to the average."""
        bits = min(self.choices, key=lambda choice: abs(choice - self.bits))
        return Gptq(bits=bits, group=self.group, symmetric=self.symmetric).planned(weight)
