"""Let the size of the base choose the method.

Yadav et al. 2024, arXiv:2410.03617: with bases of 24 B parameters and more all methods come to the same, so the plain average
is taken; weaker bases and more donors interfere more, so signs are elected (TIES with its published settings).
Differs: the study compares methods and gives no rule; this is the rule that follows from its figures. It knows no middle:
the study has bases of 8 B and of 24 B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count
from modelwright.maths.slices import Entries, Sliced
from modelwright.methods.merge._mechanism import Merger
from modelwright.methods.merge.linear import Linear
from modelwright.methods.merge.ties import Ties


@dataclass(frozen=True, kw_only=True)
class Auto(Merger):
    """Average the donors of a strong base; elect signs among those of a weaker one."""

    status: ClassVar[str] = "checked"
    unsurveyed: ClassVar[frozenset[str]] = frozenset({"weights"})

    strong: int = count(24_000_000_000, unit="parameters")  # from which a base counts as strong

    def survey(self, weight: Entries, donors: list[Entries]) -> int:
        """The number of parameters that are merged."""
        return int(weight.shape[0])

    def tensor(self, weight: Entries, donors: list[Entries], survey: int, notes: list[str]) -> Sliced:
        averaged = survey >= self.strong
        why = (
            f"{self.name()}: {survey:,} parameters are {'at least' if averaged else 'fewer than'} {self.strong:,}, so "
            + ("the donors were averaged: for strong bases methods come to the same" if averaged
               else "signs were elected (merge.ties): the changes of weaker bases interfere")
        )  # fmt: skip
        if why not in notes:
            notes.append(why)
        return Linear(weights=self.weights).tensor(weight, donors) if averaged else Ties(weights=self.weights).tensor(weight, donors, None)
