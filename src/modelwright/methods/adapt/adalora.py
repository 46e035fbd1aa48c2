"""Train low-rank updates whose ranks move to the layers that need them, within one budget.

Zhang, Chen, Bukharin, Karampatziakis, He, Cheng, Chen, Zhao 2023, arXiv:2303.10512: ΔW = P diag(λ) Q, with a penalty on
P and Q that are not orthogonal; in the course of the run the triplets that matter least by their smoothed sensitivity are silenced,
from `initial` to a mean of `rank` along a cubic curve; through peft.
Differs: `begin` and `end` are shares of the run, where the paper has numbers of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from modelwright.core.settings import count, fraction, number
from modelwright.methods.adapt._mechanism import StockAdapter, beyond

RUN = 1_000_000  # steps that the config speaks of, until a run says how many it has


@dataclass(frozen=True, kw_only=True)
class Adalora(StockAdapter):
    """LoRA that gives each layer the rank it needs while it trains; needs more steps than LoRA."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank", "initial")
    neutral = {}  # λ starts at zero: attaching changes no output
    config = "AdaLoraConfig"
    calls = dict(rank="target_r", initial="init_r", alpha="lora_alpha", dropout="lora_dropout", every="deltaT", penalty="orth_reg_weight")
    apart = ("begin", "end")

    rank: int = count(8)  # at the end, on average
    initial: int = count(12)  # the rank of each update at first
    alpha: float = number(16.0, low=0)  # the update is scaled by alpha over the rank at first
    dropout: float = fraction(0.0, high=0.99)  # of the update's inputs, while training
    begin: float = fraction(0.1)  # of the run, where ranks begin to fall
    end: float = fraction(0.7)  # of the run, where they have fallen; the rest trains what is left
    every: int = count(10, unit="steps")  # between two times that ranks are chosen anew
    penalty: float = number(0.5, low=0)  # of what is not orthogonal, in the loss

    @classmethod
    def sized(cls, size: int) -> dict[str, Any]:
        return {"rank": size, "initial": -(-3 * size // 2)}

    def problems(self) -> list[str]:
        return (
            ["begin is after end. Let it be before."] * (self.begin >= self.end)
            + ["rank is not below initial, and ranks only fall. Let initial be higher."]
            * (isinstance(self.rank, int) and isinstance(self.initial, int) and self.rank >= self.initial)
        )  # fmt: skip

    def unfit(self, shape: tuple[int, ...]) -> str:
        return beyond(self.initial, shape)

    def told(self, roles: Mapping[str, str]) -> dict[str, Any]:
        return {"total_step": RUN, "tinit": round(self.begin * RUN), "tfinal": RUN - round(self.end * RUN)}
