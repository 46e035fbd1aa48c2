"""What is gathered of a linear layer's inputs while calibration text runs through it; all sums in float32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from modelwright.maths.second_order import Moment, inverse_factor

SAMPLE = 512  # tokens, twice as many at most, whose inputs are kept


class Statistics:
    """Sums over the inputs x [tokens, in] of one matrix; only what the method asks for is gathered.

    gathers: of "norm" (or "square"), "mean", "variance" (and with it "mean"), "absolute", "largest", "range", "sequence", "moment" and
    "sample".
    """

    def __init__(self, inputs: int, gathers: Iterable[str] = (), device: torch.device | str = "cpu"):
        self.inputs = inputs
        self.tokens = 0
        wanted = set(gathers)
        unknown = wanted - {"norm", "square", "mean", "variance", "absolute", "largest", "range", "sequence", "moment", "sample"}
        assert not unknown, f"no such statistics: {unknown}"

        def zeros(*names: str) -> Tensor | None:
            return torch.zeros(inputs, device=device) if wanted & set(names) else None

        self._square = zeros("norm", "square")
        self._sum = zeros("mean", "variance")
        self._spread = zeros("variance")
        self._absolute = zeros("absolute")
        self._largest = zeros("largest")
        self._sequence = zeros("sequence")
        self._sequences = 0
        self._range = torch.tensor([[torch.inf], [-torch.inf]], device=device).repeat(1, inputs) if "range" in wanted else None
        self._moment: Moment | None = None  # made when the first inputs come
        self._sample = torch.zeros(0, inputs, device=device) if "sample" in wanted else None
        self._apart = 1  # tokens from one that is kept to the next
        self.rescaled = False  # whether what makes the inputs has been divided by a factor of the method's
        self._device = device
        self._gathers_moment = "moment" in wanted
        self._complete = False  # whether the moment is a mean by now
        self.sharers = 0  # matrices with these inputs that are still to be worked on, where that is counted
        self._factor: tuple[float, tuple[Tensor, Tensor, float]] | None = None

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Count the rows of x [..., in], which are tokens of one sequence, or of x [sequences, tokens, in]; 0 in a mask of these: pad."""
        real = mask.bool().to(x.device) if mask is not None and x.ndim > 2 and mask.shape == x.shape[:2] else None
        if self._sequence is not None and x.numel():  # an expert may see no token
            squares = x.detach().float().square()
            squares = (squares if real is None else squares.masked_fill(~real[..., None], 0)).sum(-2).view(-1, self.inputs)
            self._sequence += squares.sqrt().sum(0)
            self._sequences += len(squares)
        x = (x if real is None else x[real]).detach().reshape(-1, self.inputs).float()
        if self._spread is not None and len(x):  # before the sums below know of x
            assert self._sum is not None
            mean = x.mean(0)
            apart = mean - self._sum / max(self.tokens, 1)
            self._spread += (x - mean).square().sum(0) + apart.square() * (self.tokens * len(x) / (self.tokens + len(x)))
        if self._sample is not None:
            self._sample = torch.cat([self._sample, x[-self.tokens % self._apart :: self._apart]])
            while len(self._sample) > 2 * SAMPLE:
                self._sample, self._apart = self._sample[::2].clone(), 2 * self._apart
        self.tokens += len(x)
        if self._square is not None:
            self._square += x.square().sum(0)
        if self._sum is not None:
            self._sum += x.sum(0)
        if self._absolute is not None:
            self._absolute += x.abs().sum(0)
        if self._largest is not None and len(x):
            torch.maximum(self._largest, x.abs().amax(0), out=self._largest)
        if self._range is not None and len(x):
            self._range = torch.stack([torch.minimum(self._range[0], x.amin(0)), torch.maximum(self._range[1], x.amax(0))])
        if self._gathers_moment:
            assert not self._complete, "the moment has been read, so no inputs can be added"
            if self._moment is None:
                self._moment = Moment(self.inputs, self._device)
            self._moment.add(x)

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
    def variance(self) -> Tensor:
        """Mean square of each input's distance from its mean [in]; the sums of parts are joined as Chan et al. 1979 do."""
        return self._mean_of(self._spread)

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
    def sequence(self) -> Tensor:
        """L2 norm of each input over the tokens of a sequence, on average over the sequences [in]."""
        assert self._sequence is not None, "the method gathers no `sequence`"
        return self._sequence / max(self._sequences, 1)

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest value of each input ([in], [in])."""
        assert self._range is not None, "the method gathers no `range`"
        return self._range[0], self._range[1]

    @property
    def sample(self) -> Tensor:
        """Inputs [tokens, in] of tokens at even distances: of all that came, or of more than `SAMPLE` and at most twice that."""
        assert self._sample is not None, "the method gathers no `sample`"
        return self._sample

    @property
    def moment(self) -> Tensor:
        """Second moment E[x xᵀ] [in, in], not centred; a copy, and afterwards nothing can be added."""
        return self._mean_moment().square()

    def inverse_factor(self, damp: float) -> tuple[Tensor, Tensor, float]:
        """`second_order.inverse_factor` of the moment; not to be changed. To be called once for each matrix.

        It is found once for all sharers; on the call for the last of them, everything is let go.
        """
        self.sharers -= 1
        if self._factor and self._factor[0] == damp:
            factor = self._factor[1]
        else:
            factor = inverse_factor(self._let_go() if self.sharers == 0 else self._mean_moment(), damp)
        if self.sharers > 0:
            self._factor = damp, factor
        elif self.sharers == 0:
            self._moment = self._factor = None
        return factor

    def reorder(self, taken: Tensor) -> None:
        """The inputs trade places: each is now what was at `taken` [in] before. For one matrix's own inputs, without a moment."""
        assert not self._gathers_moment, "a moment cannot be reordered"
        assert self.sharers <= 1, "other matrices have these inputs too"
        for name in ("_square", "_sum", "_spread", "_absolute", "_largest", "_range", "_sequence"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held[..., taken.to(held.device)])
        if self._sample is not None:
            self._sample = self._sample[:, taken.to(self._sample.device)]

    def rescale(self, factor: Tensor) -> None:
        """The inputs are multiplied by `factor` [in] above 0 from now on, and so were those that came."""
        self.rescaled = True
        ones = (self._sample, self._sum, self._absolute, self._largest, self._range, self._sequence)
        for held, power in ((self._square, 2), (self._spread, 2), *((one, 1) for one in ones)):
            if held is not None:
                held *= factor**power
        if self._moment is not None:
            self._moment.rescale(factor)

    def recentre(self, shift: Tensor) -> None:
        """`shift` [in] is taken from the inputs from now on, and so it was from those that came. Sums of sizes cannot follow."""
        held = (self._square, self._spread, self._absolute, self._largest, self._sequence)
        assert not self._gathers_moment and all(part is None for part in held), "what is gathered cannot be recentred"
        for part, times in ((self._sample, 1), (self._range, 1), (self._sum, self.tokens)):
            if part is not None:
                part -= shift * times

    def finite(self) -> bool:
        """Whether no NaN or infinity came in."""
        held = (
            self._sample, self._square, self._sum, self._spread, self._absolute, self._largest, self._sequence,
            self._range if self.tokens else None,
        )  # fmt: skip
        sums = all(bool(part.isfinite().all()) for part in held if part is not None)
        return sums and (self._moment is None or self._moment.finite())

    def _let_go(self) -> Moment:
        """The moment, of which the caller becomes the only holder."""
        moment = self._mean_moment()
        self._moment = self._factor = None
        return moment

    def _mean_moment(self) -> Moment:
        assert self._gathers_moment, "the method reads a statistic that it does not name in `gathers`"
        if self._moment is None:
            self._moment = Moment(self.inputs, self._device)
        if not self._complete:
            self._complete = True
            self._moment.divide(max(self.tokens, 1))
        return self._moment

    def _mean_of(self, total: Tensor | None) -> Tensor:
        assert total is not None, "the method reads a statistic that it does not name in `gathers`"
        return total / max(self.tokens, 1)
