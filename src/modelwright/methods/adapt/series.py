"""Train small bottlenecks in the stream, before or after a layer: series adapters.

Hu, Lan, Wang, Xu, Lim, Lee, Bing, Poria 2023, arXiv:2304.01933, section 2.2 (AdapterH), after Houlsby et al. 2019,
arXiv:1902.00751: f(h) = scale · U φ(D h), before a layer as W (h + f(h)), after one as y + f(y). The authors put them before the
gate and the up projection and after the down projection, and so on the narrower side of each: with `side: auto` they stand there.
Differs: U begins at zero, so that attaching changes no output; the authors' code has normal numbers in both as a default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from modelwright.blocks.bottlenecks import Narrow
from modelwright.blocks.bottlenecks import Series as SeriesPart
from modelwright.methods.adapt._mechanism import Bottlenecked


@dataclass(frozen=True, kw_only=True)
class Series(Bottlenecked):
    """Train two narrow matrices with a curve between them in the path of each layer; stays beside the model when trained."""

    status: ClassVar[str] = "checked"
    sites: ClassVar[tuple[str, ...]] = ("mlp", "linear")

    side: Literal["auto", "before", "after"] = "auto"  # of the layer; auto: where fewer numbers pass, and after where it makes none more

    def part(self, weight: Tensor, bias: Tensor | None) -> SeriesPart:
        rows, columns = weight.shape
        side = self.side if self.side != "auto" else "before" if columns < rows else "after"
        width = columns if side == "before" else rows
        return SeriesPart(Narrow(width, width, self.inner, self.activation, self.scale), side)
