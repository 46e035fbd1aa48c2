"""Merging tensor by tensor: θ0 + scale · norm(Σ wᵢ · agree(trim(θᵢ − θ0))).

The formula is `maths.task_vectors.merge`; a method says which of its parts it uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modelwright.core.errors import SettingError
from modelwright.core.method import TensorMethod
from modelwright.maths.slices import Entries, Sliced


@dataclass(frozen=True, kw_only=True)
class Merger(TensorMethod):
    """Merges donors into the model, which is their base; norms, biases and embeddings too."""

    every: ClassVar[bool] = True
    in_parts: ClassVar[bool] = True
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})

    weights: tuple[float, ...] | None = None  # one for each donor; all 1 when not given

    def weights_for(self, donors: int) -> list[float]:
        """One weight for each donor.

        Raises:
            SettingError: another number of weights than of donors.
        """
        if self.weights is None:
            return [1.0] * donors
        if len(self.weights) != donors:
            raise SettingError(f"{self.name()}: {len(self.weights)} weights for {donors} donors. Give one weight for each donor.")
        return list(self.weights)

    def tensor(self, weight: Entries, donors: list[Entries]) -> Tensor | Sliced:
        """The merged tensor; slices of it where the inputs lie on disk."""
        merged = self.merged(weight, donors)
        return merged.whole() if isinstance(weight, Tensor) else merged

    def merged(self, weight: Entries, donors: list[Entries]) -> Sliced:
        """The formula: the base's tensor and the donors' -> the merged one."""
        raise AssertionError(f"{self.name()} writes merged")
