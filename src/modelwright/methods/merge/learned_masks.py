"""Learn on text which of each donor's changes it needs, and stitch those together.

He, Hu, Lin, Zhang, Zhao 2024, arXiv:2408.13656, section 3: scores S over a donor's change τ, begun at +`start` for its
`keep` largest entries and -`start` for the others, take full-batch steps S -= rate · σ'(S) (g ⊙ τ + l1) with g = ∂L/∂θ at
θ0 + σ(S) ⊙ τ; the mask is S > 0. L is the cross-entropy of the text's next tokens, or of the donor's own likeliest class
where a model predicts no tokens. Without steps it is `merge.localize_and_stitch`.
Differs: the penalty lowers every score, as in the paper, where both of the authors' codes push scores away from 0;
overlaps are counted over all donors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modelwright.anatomy import anatomy_of, matches
from modelwright.core.given import Batch
from modelwright.core.gradients import floats, logits_of, mean_gradients
from modelwright.core.model import Model, unwrapped
from modelwright.core.passage import Resident
from modelwright.core.settings import count, fraction, number
from modelwright.core.together import same_tensors
from modelwright.maths.slices import Joined, flat
from modelwright.maths.stitching import stitched
from modelwright.maths.task_vectors import least_of_largest
from modelwright.methods.merge._mechanism import Reader


@dataclass(frozen=True, kw_only=True)
class LearnedMasks(Reader):
    """Put into the model the changes of each donor that its text asks for; where several did, their mean."""

    status: ClassVar[str] = "checked"
    base_apart: ClassVar[bool] = True

    keep: float = fraction(0.1)  # of each donor's changes, at the start
    iterations: int = count(1, low=0)  # over all of a donor's text, each
    learning_rate: float = number(1e8, low=0)  # of the scores, whose gradients are tiny
    start: float = number(3.0, low=1e-3)  # size of the scores at first
    l1: float = number(0.0, low=0)  # what every entry that is taken over costs

    def model(self, model: Model, donors: Sequence[Model], calibration: Sequence[Sequence[Batch]]) -> Model:
        same_tensors(model, donors)
        own = floats(unwrapped(model.module))
        anatomy = anatomy_of(unwrapped(model.module))
        base = {name: value.data.clone() for name, value in own.items() if not matches(*(anatomy.role(name) or ("linear", None)), "embed")}
        ends = [{name: floats(unwrapped(donor.module))[name].data for name in base} for donor in donors]
        masks = [self._mask(model, donor, base, end, batches) for donor, end, batches in zip(donors, ends, calibration, strict=True)]
        weights = self.weights_for(len(donors))
        for name, start in base.items():
            chosen = [flat(mask[name]) for mask in masks]
            own[name].data.copy_(stitched(start, [end[name] for end in ends], chosen, weights, 1.0).whole())
        return model

    def _mask(
        self, model: Model, donor: Model, base: dict[str, Tensor], end: dict[str, Tensor], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """Where the donor's changes are taken over; the model's weights are `base` before and after."""
        own = floats(unwrapped(model.module))
        change = {name: end[name].float() - start.float() for name, start in base.items()}
        every = Joined(list(change.values()))
        least = least_of_largest(every.__getitem__, every.shape[0], self.keep)
        score = {name: torch.where((one.abs() >= least) & (one != 0), self.start, -self.start) for name, one in change.items()}
        labels = None if batches and "input_ids" in batches[0] else [_likeliest(donor, batch) for batch in batches]
        for _ in range(self.iterations):
            for name, start in base.items():
                own[name].data.copy_(start.float() + score[name].sigmoid() * change[name])
            gradients = mean_gradients(model, batches, labels)
            for name, one in score.items():
                slope = one.sigmoid() * (1 - one.sigmoid())
                one -= self.learning_rate * slope * (gradients[name] * change[name] + self.l1)
        for name, start in base.items():
            own[name].data.copy_(start)
        return {name: one > 0 for name, one in score.items()}


@torch.no_grad()
def _likeliest(donor: Model, batch: Batch) -> Tensor:
    return logits_of(Resident(donor).forward(batch)).argmax(-1)
