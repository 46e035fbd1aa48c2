"""Puts low-rank updates into the space of texts, so that a text finds those that it asks for.

Li et al. 2025, arXiv:2508.02107 (AutoLoRA), the encoder and the retrieval: of each layer a learned probe X [probes, in] gives the
tokens LN(X Aᵀ Bᵀ) [probes, out], which a linear for each type of layer brings to one width; a transformer layer reads them together
with one token of its own, from which the embedding is made. It sees the product B A alone, so that (B M, M⁻¹ A) is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # path of a layer -> B [out, r] and A [r, in]


class LoraEncoder(nn.Module):
    """An embedding [text], of length 1, of an adapter's low-rank updates of any ranks.

    layers: path -> outputs and inputs of each layer that an adapter may update; one that an adapter leaves alone gives zeros. Layers of
    one type, the last word of their paths, share a linear. text: the size of the embedding. width, heads, inner: of the transformer layer.
    """

    def __init__(self, layers: Mapping[str, tuple[int, int]], text: int, *, width: int = 2048, probes: int = 1, heads: int = 32,
                 inner: int = 8192):  # fmt: skip
        super().__init__()
        self.layers = dict(layers)
        self.probes = nn.ParameterList(torch.randn(probes, columns) / columns**0.5 for _, columns in layers.values())
        types = {(path.rpartition(".")[2], rows) for path, (rows, _) in layers.items()}
        self.types = nn.ModuleDict({f"{kind}-{rows}": nn.Linear(rows, width) for kind, rows in sorted(types)})
        self.first = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.reader = nn.TransformerEncoderLayer(width, heads, inner, dropout=0.0, batch_first=True)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, text)

    def forward(self, pairs: Pairs) -> Tensor:
        """The embedding of one adapter."""
        tokens: list[Tensor] = [self.first]
        for (path, (rows, _)), probe in zip(self.layers.items(), self.probes, strict=True):
            linear: nn.Module = self.types[f"{path.rpartition('.')[2]}-{rows}"]
            if path in pairs:
                up, down = (value.to(probe) for value in pairs[path])
                tokens.append(linear(F.layer_norm(probe @ down.T @ up.T, (rows,))))
            else:
                tokens.append(torch.zeros(len(probe), self.first.shape[1]).to(probe))
        read = self.reader(torch.cat(tokens)[None])[0, 0]
        return F.normalize(self.out(self.norm(read)), dim=0)


def contrast(adapters: Tensor, texts: Tensor, temperature: float = 0.07) -> Tensor:
    """InfoNCE in both directions between embeddings [n, text] of adapters and of the texts that belong to them, in this order."""
    scores = F.normalize(adapters, dim=1) @ F.normalize(texts, dim=1).T / temperature
    own = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def retrieve(text: Tensor, adapters: Tensor | Sequence[Tensor], count: int) -> list[tuple[int, float]]:
    """The places of the adapters [n, text] that are nearest to a text's embedding [text], with their cosines; the nearest first."""
    held = adapters if isinstance(adapters, Tensor) else torch.stack(list(adapters))
    cosines, places = F.cosine_similarity(held, text[None], dim=1).topk(min(count, len(held)))
    return list(zip(places.tolist(), cosines.tolist(), strict=True))
