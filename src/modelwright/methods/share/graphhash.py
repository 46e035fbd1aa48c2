"""Let tokens that stand in the same places share a row of the embedding: GraphHash for language models.

Wu et al. 2024, arXiv:2412.17245. Tokens and the places in which they stand, the ids before and behind them, are the two sides of a
graph whose edges count; communities of greatest modularity are the buckets. `random`, `frequency` and `double` are the paper's
baselines; `double_graph` adds a row by hash from the same table to that of the community. The hash is that of `unified_embedding`.
Differs: for a trained model, so that a row begins as the best fit to the rows that share it, a token weighing as often as it occurs.
The resolution is searched for the most communities within the buckets; those left over go to the most frequent tokens, one each.
Tokens that the text does not have share what is left then, at least one. The head keeps a row for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site, anatomy_of
from modelwright.anatomy._rotation import untie
from modelwright.blocks.bucket_embedding import BucketEmbedding
from modelwright.core.errors import DataError, LayoutError, PlanError, SiteError
from modelwright.core.given import Batch
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, put
from modelwright.core.settings import count, fraction, number
from modelwright.maths.communities import communities, neighbours, shared_rows

SEARCH = 12  # resolutions that are tried, between 2^-4 and 2^12


@dataclass(frozen=True, kw_only=True)
class GraphHash(ModelMethod):
    """Store one row of the embedding for tokens that stand in the same places; for models whose head is not tied to it."""

    status: ClassVar[str] = "checked"
    neutral = dict(keep=1.0)
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})
    fails = {"ties_survive": "the head keeps a row for each token"}

    form: Literal["graph", "random", "frequency", "double", "double_graph"] = "graph"  # who shares a row with whom
    keep: float = fraction(0.5, low=1e-3)  # rows of the table, of the vocabulary; 1 leaves it as it is
    resolution: float | None = number(None, low=0)  # of the communities, whose number then is not by keep
    window: int = count(1, unit="tokens")  # how far from a token its contexts are

    def table(self, module: Any) -> tuple[Site, nn.Embedding]:
        """The embedding of the tokens.

        Raises:
            SiteError: there is none, or more than the head uses it too.
            PlanError: the buckets are too few.
        """
        found = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
        site = next((site for site in anatomy_of(module).sites(module) if module.get_submodule(site.module) is found), None)
        if site is None or not isinstance(found, nn.Embedding):
            raise LayoutError(f"{self.name()} chooses no weight: this model has no embedding of tokens that is a dense table.")
        users = next((names for names in anatomy_of(module).tied(module) if site.name in names), (site.name,))
        head = module.get_output_embeddings()
        if len(users) > 1 + (head is not None and head.weight is found.weight):
            raise SiteError(f"{self.name()}: {site.name} is also {users[1]}, which would lose its rows too. This model cannot share them.")
        if int(self.keep * found.num_embeddings) < 2:
            raise PlanError(f"{self.name()}: keep={self.keep:g} of {found.num_embeddings} rows leaves fewer than 2. Keep more.")
        return site, found

    @torch.no_grad()
    def model(self, model: Model, calibration: Sequence[Batch], seed: int, notes: list[str]) -> Model:
        module: Any = model.module
        if self.keep == 1 and self.resolution is None:
            return model
        tied = getattr(getattr(module, "config", None), "tie_word_embeddings", False)
        site, old = self.table(module)
        untie(module)
        if tied:
            notes.append(f"{self.name()}: the head was tied to the embedding, and now stores its rows by itself")
        rows = [ids[mask.bool()] for batch in calibration for ids, mask in zip(batch["input_ids"].cpu(), masks(batch), strict=True)]
        if not rows:
            raise DataError(f"{self.name()} was given no text. Give some in `data`.")
        counts = torch.bincount(torch.cat(rows), minlength=old.num_embeddings)
        labels, buckets = self.labels(rows, counts, seed)
        layer = self.layer(old, buckets)
        if layer.map is not None:
            layer.map = labels.int().to(old.weight.device)
        places = layer.places(torch.arange(old.num_embeddings, device=old.weight.device))
        heavy = (counts + 1).to(old.weight.device)
        layer.table = nn.Parameter(shared_rows(old.weight, places, buckets, heavy))
        put(module, site, layer)
        error = float((layer.dense() - old.weight).float().norm() / old.weight.float().norm().clamp(min=1e-30))
        notes.append(f"{self.name()}: {old.num_embeddings:,} tokens share {buckets:,} rows ({self.form}); the table moved by {error:.3f}")
        return model

    def labels(self, rows: Sequence[Tensor], counts: Tensor, seed: int) -> tuple[Tensor, int]:
        """The bucket of each token where there is a map, and how many there are."""
        size, buckets = len(counts), int(self.keep * len(counts))
        often = counts.argsort(descending=True, stable=True)
        if not self.form.endswith("graph"):
            found = torch.arange(size) % buckets
            if self.form == "frequency":
                found = buckets // 2 + found % (buckets - buckets // 2)
                found[often[: buckets // 2]] = torch.arange(buckets // 2)
            return found, buckets
        edges = neighbours(rows, self.window, size)
        unseen = torch.ones(size, dtype=torch.bool)
        unseen[edges[0]] = False
        room = buckets - int(unseen.any())
        if self.resolution is not None:
            found = padded(communities(*edges, self.resolution, seed)[0], size)
        else:
            found, low, high = torch.where(unseen, -1, 0), -4.0, 12.0
            for _ in range(SEARCH):
                tried = padded(communities(*edges, 2 ** ((low + high) / 2), seed)[0], size)
                fits = int(tried.max()) + 1 <= room
                low, high = ((low + high) / 2, high) if fits else (low, (low + high) / 2)
                found = tried if fits and tried.max() >= found.max() else found
            for token in often.tolist():
                if int(found.max()) + 1 >= room:
                    break
                if found[token] >= 0 and int((found == found[token]).sum()) > 1:
                    found[token] = found.max() + 1
        first = int(found.max()) + 1
        left = 1 if self.resolution is not None else buckets - first
        found[unseen] = first + torch.arange(int(unseen.sum())) % max(left, 1)
        return found, first + (left if unseen.any() else 0)

    def layer(self, old: nn.Embedding, buckets: int) -> BucketEmbedding:
        salts = {"double": (0, 1), "double_graph": (0,)}.get(self.form, ())
        return BucketEmbedding(
            old.num_embeddings, old.embedding_dim, buckets=buckets, mapped=self.form != "double", salts=salts,
            dtype=old.weight.dtype, device=old.weight.device,
        )  # fmt: skip

    def planned(self, module: Any, donors: int) -> Any:
        if self.keep < 1:
            site, old = self.table(module)
            untie(module)
            put(module, site, self.layer(old, int(self.keep * old.num_embeddings)))
        return module


def masks(batch: Batch) -> Tensor:
    """Which of a batch's tokens [batch, length] are real."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).cpu()


def padded(labels: Tensor, size: int) -> Tensor:
    """Labels of `size` tokens, -1 for those that no text has."""
    return nn.functional.pad(labels, (0, size - len(labels)), value=-1)
