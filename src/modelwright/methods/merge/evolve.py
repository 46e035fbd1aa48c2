"""Search the coefficients of a merge for the least loss on text.

Akiba et al. 2024, arXiv:2403.13187, section 3.1 (parameter space), as in mergekit's evolve: CMA-ES over one weight, and for
methods that keep a part one `keep`, for each donor and each group of blocks; weights of 1/n first, and a first step of a
sixth of the range. Also on a grid, and with Optuna's TPE.
What a method finds over all tensors without a look at the weights, such as the quantiles of `merge.pcb`, is found once and not
for each trial.
Differs: minimises the loss of the next token on the calibration text, where the paper maximises task scores. Data-flow space
(the order of layers) is not searched.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from modelwright.core import find, kinds, walk
from modelwright.core.given import Given
from modelwright.core.method import DRIVEN, ModelMethod
from modelwright.core.model import Model, unwrapped
from modelwright.core.model import put as write
from modelwright.core.settings import count, number
from modelwright.core.together import same_tensors
from modelwright.maths.slices import Sliced
from modelwright.methods.merge._mechanism import Merger, SparseTaskVectors
from modelwright.methods.merge._objective import nats, search


@dataclass(frozen=True, kw_only=True)
class Evolve(ModelMethod):
    """Merge with the weights, found by trial, that predict the calibration text best."""

    status: ClassVar[str] = "checked"
    alike: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})
    small: ClassVar[Mapping[str, Any]] = {"trials": 4}

    method: str = "merge.task_arithmetic"  # of the merge family, that works tensor by tensor
    trials: int = count(60)  # merges that are tried
    sampler: Literal["cmaes", "tpe", "grid"] = "cmaes"  # how the next one is chosen
    points: int = count(5, low=2)  # of the grid, for each coefficient
    groups: int = count(1)  # runs of blocks that have coefficients of their own
    lowest: float = number(0.0)  # weight that is tried
    highest: float = number(1.0)  # weight that is tried

    def problems(self) -> list[str]:
        found = [] if self.lowest < self.highest else [f"lowest {self.lowest} is not less than highest {self.highest}."]
        cls = find.find(self.method)
        if not issubclass(cls, Merger) or set(cls.needs()) - DRIVEN != {"donors"}:
            found.append(f"method is one that merges donors tensor by tensor, such as merge.ties; {self.method} is not.")
        return found

    def model(
        self,
        model: Model,
        donors: Sequence[Model],
        calibration: Sequence[Mapping[str, Tensor]],
        rng: torch.Generator,
        seed: int,
        notes: list[str],
    ) -> Model:
        module = unwrapped(model.module)
        same_tensors(model, donors)
        with contextlib.ExitStack() as stack:
            for each in (module, *(unwrapped(donor.module) for donor in donors)):
                stack.enter_context(walk.split_experts(each))  # so that a trial's tensors are those of the step that is told
            pots = {id(each): kinds.held(unwrapped(each.module)) for each in (*donors, model)}
            pots[id(model)] = {name: value.clone() for name, value in pots[id(model)].items()}
            sites, surveys = walk.everything(module), dict[Merger, Any]()

            @torch.no_grad()
            def put(genes: Mapping[str, float]) -> Given:
                """Merge with these coefficients, into the model, as a step with this seed does."""
                given = Given(donors=donors, seed=seed)
                for group in range(self.groups):
                    merger = self.merger(genes, group, len(donors))
                    chosen = walk.choose(module, sites, merger)
                    asked = merger.surveyed()
                    if asked not in surveys:
                        surveys.clear()
                        surveys[asked] = walk.survey(asked, given, lambda one: [pots[id(one)][site.name] for site, _ in chosen], model)  # noqa: B023
                    for site, local in chosen:
                        if self.group(site) == group:
                            extras = walk.needed(local, given, site, lambda one: pots[id(one)][site.name], surveys[asked])  # noqa: B023
                            result = walk.call(local, pots[id(model)][site.name], site, extras)
                            write(module, site, result.whole() if isinstance(result, Sliced) else result)
                return given

            def objective(trial: Any) -> float:
                put({gene: trial.suggest_float(gene, low, high) for gene, (low, high) in self.genes(len(donors)).items()})
                return nats(module, calibration)

            ranges, first = self.genes(len(donors)), self.first(len(donors))
            study = search(objective, ranges, first, self.sampler, self.trials, self.points, rng.initial_seed() % (1 << 31), self.name())
            told = put(study.best_params).notes
        shown = [self.merger(study.best_params, group, len(donors)) for group in range(self.groups)]
        before, after = study.trials[0].value, study.best_value
        notes.append(f"{self.name()}: {before:.4f} nats with the first coefficients, {after:.4f} with the best of {len(study.trials)}")
        notes += [f"blocks of group {group + 1} of {self.groups}: {{{one.name()}: {one.settings()}}}" for group, one in enumerate(shown)]
        notes += told
        return model

    def genes(self, donors: int) -> dict[str, tuple[float, float]]:
        """Each coefficient with its range, such as "weight 0 1" of group 0 and donor 1."""
        kinds = {"weight": (self.lowest, self.highest)}
        cls = find.find(self.method)
        if issubclass(cls, SparseTaskVectors):
            kinds["keep"] = cls.searched
        return {
            f"{kind} {group} {donor}": kinds[kind] for kind, group, donor in itertools.product(kinds, range(self.groups), range(donors))
        }

    def merger(self, genes: Mapping[str, float], group: int, donors: int) -> Merger:
        """The merge of one group of blocks."""
        settings: dict[str, Any] = {"weights": [genes[f"weight {group} {donor}"] for donor in range(donors)]}
        if f"keep {group} 0" in genes:
            settings["keep_each"] = [genes[f"keep {group} {donor}"] for donor in range(donors)]
        made = find.find(self.method).build(settings)
        assert isinstance(made, Merger), made
        return made

    def group(self, site: Any) -> int:
        """The group of a weight; what stands outside the blocks belongs to the first."""
        return 0 if site.depth is None or not site.depths else min(site.depth * self.groups // site.depths, self.groups - 1)

    def first(self, donors: int) -> dict[str, float]:
        """Equal weights that sum to one, and everything kept; as near as the ranges allow."""
        return {
            gene: min(max(1 / donors if gene.startswith("weight") else 1.0, low), high) for gene, (low, high) in self.genes(donors).items()
        }
