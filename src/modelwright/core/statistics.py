"""What is gathered of a linear layer's inputs while calibration text runs through it; all sums in float32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

STRIP = 192  # inputs whose moments are added up together


class Statistics:
    """Sums over the inputs x [tokens, in] of one matrix; only what the method asks for is gathered.

    gathers: of "norm" (or "square"), "mean", "absolute", "largest", "moment".
    """

    def __init__(self, inputs: int, gathers: Iterable[str] = (), device: torch.device | str = "cpu"):
        self.inputs = inputs
        self.tokens = 0
        wanted = set(gathers)
        unknown = wanted - {"norm", "square", "mean", "absolute", "largest", "moment"}
        assert not unknown, f"no such statistics: {unknown}"

        def zeros(*names: str) -> Tensor | None:
            return torch.zeros(inputs, device=device) if wanted & set(names) else None

        self._square = zeros("norm", "square")
        self._sum = zeros("mean")
        self._absolute = zeros("absolute")
        self._largest = zeros("largest")
        self._moment: Tensor | None = None  # made when the first inputs come
        self._device = device
        self._gathers_moment = "moment" in wanted
        self._complete = False  # whether the moment is a mean by now

    def add(self, x: Tensor) -> None:
        """Count the rows of x [..., in]."""
        x = x.detach().reshape(-1, self.inputs).float()
        self.tokens += len(x)
        if self._square is not None:
            self._square += x.square().sum(0)
        if self._sum is not None:
            self._sum += x.sum(0)
        if self._absolute is not None:
            self._absolute += x.abs().sum(0)
        if self._largest is not None and len(x):
            torch.maximum(self._largest, x.abs().amax(0), out=self._largest)
        if self._gathers_moment:
            assert not self._complete, "the moment has been read, so no inputs can be added"
            if self._moment is None:
                self._moment = torch.zeros(self.inputs, self.inputs, device=self._device)
            for start in range(0, self.inputs, STRIP):  # from the diagonal on; `moment` fills in the other half
                stop = start + STRIP
                self._moment[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    @property
    def norm(self) -> Tensor:
        """Root mean square of each input [in]: the L2 norm up to a factor that all inputs share."""
        return self.square.sqrt()

    @property
    def square(self) -> Tensor:
        """Mean square of each input [in]."""
        return self._mean_of(self._square)

    @property
    def mean(self) -> Tensor:
        """Mean of each input [in]."""
        return self._mean_of(self._sum)

    @property
    def absolute(self) -> Tensor:
        """Mean absolute value of each input [in]."""
        return self._mean_of(self._absolute)

    @property
    def largest(self) -> Tensor:
        """Largest absolute value of each input [in]."""
        assert self._largest is not None, "the method gathers no `largest`"
        return self._largest

    @property
    def moment(self) -> Tensor:
        """Second moment E[x xᵀ] [in, in], not centred; not a copy, and afterwards nothing can be added."""
        assert self._gathers_moment, "the method reads a statistic that it does not name in `gathers`"
        if self._moment is None:
            self._moment = torch.zeros(self.inputs, self.inputs, device=self._device)
        if not self._complete:
            self._complete = True
            self._moment /= max(self.tokens, 1)
            for start in range(STRIP, self.inputs, STRIP):
                stop = start + STRIP
                self._moment[start:stop, :start] = self._moment[:start, start:stop].T
        return self._moment

    def finite(self) -> bool:
        """Whether no NaN or infinity came in."""
        held = (self._square, self._sum, self._absolute, self._largest, self._moment)
        return all(bool(part.isfinite().all()) for part in held if part is not None)

    def _mean_of(self, total: Tensor | None) -> Tensor:
        assert total is not None, "the method reads a statistic that it does not name in `gathers`"
        return total / max(self.tokens, 1)
