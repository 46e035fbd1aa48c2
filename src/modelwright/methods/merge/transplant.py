"""Give a model another model's tokenizer, without training.

Goddard, Fernandes Neto 2025, arXiv:2506.06607, section 3: the row of a token that only the donor has is written as a sum of
`atoms` rows of tokens that both have, in the donor's table, by orthogonal matching pursuit; the same sum of the model's
rows stands for it. Tokens that both have keep the model's row. Embedding and head apart; one table where they are tied.
Differs: tokens are compared by the bytes that they stand for; there is no matching by prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from modelwright.core.errors import ModelError, NeedError
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, quiet, unwrapped
from modelwright.core.progress import track
from modelwright.core.settings import count
from modelwright.core.vocabulary import meanings
from modelwright.maths.matching_pursuit import pursue

BATCH = 512  # tokens that are written as sums at once


@dataclass(frozen=True, kw_only=True)
class Transplant(ModelMethod):
    """Replace the model's vocabulary by the donor's; new tokens become sums of rows that both models have."""

    status: ClassVar[str] = "checked"
    takes: ClassVar[tuple[int, int | None]] = (1, 1)
    causal: ClassVar[bool] = True

    fill: Literal["pursuit", "mean", "zero", "random"] = "pursuit"  # rows of new tokens; random: from the rows' mean and spread
    atoms: int = count(64)  # rows in a sum

    @torch.no_grad()
    def model(self, model: Model, donors: Sequence[Model], rng: torch.Generator, notes: list[str]) -> Model:
        donor = donors[0]
        for one in (model, donor):
            if one.tokenizer is None:
                raise NeedError(f"{self.name()} compares tokenizers, and {one.name} has none. Copy tokenizer.json beside its weights.")
        module: Any = unwrapped(model.module)
        other: Any = unwrapped(donor.module)
        tables = ends(module, model.name)
        theirs = [table for table in ends(other, donor.name) if table.shape[1] > 1]
        rows = len(theirs[0])
        own = {meaning: number for meaning, number in meanings(model.tokenizer).items() if number < len(tables[0])}
        wanted = {meaning: number for meaning, number in meanings(donor.tokenizer).items() if number < rows}
        shared = torch.tensor([(number, own[meaning]) for meaning, number in wanted.items() if meaning in own]).view(-1, 2)
        new = torch.tensor([number for meaning, number in wanted.items() if meaning not in own], dtype=torch.long)
        if not len(shared):
            raise ModelError(
                f"{self.name()}: the tokenizers of {model.name} and {donor.name} share no token, so nothing can be carried over."
            )
        made = [
            self.table(table.float().cpu(), theirs[min(number, len(theirs) - 1)].float().cpu(), shared, new, rows, rng)
            for number, table in enumerate(tables)
        ]
        notes.append(f"{self.name()}: {len(shared):,} of {len(wanted):,} tokens keep their row, {len(new):,} are new ({self.fill})")
        with quiet():
            module.resize_token_embeddings(rows, mean_resizing=False)
        for table, values in zip(ends(module, model.name), made, strict=True):
            table.copy_(values)
        for config in (module.config, getattr(module, "generation_config", None)):
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if config is not None:
                    setattr(config, key, getattr(other.config, key, None))
        pad = module.config.get_text_config().pad_token_id
        module.get_input_embeddings().padding_idx = pad if pad is not None and pad < rows else None
        model.take_tokenizer(donor)
        return model

    def table(self, own: Tensor, theirs: Tensor, shared: Tensor, new: Tensor, rows: int, rng: torch.Generator) -> Tensor:
        """The new table [rows, width]; rows that no token has are 0.

        own: the model's [n, width]. theirs: the donor's [rows, its width]. shared: (donor's id, model's id) [m, 2]. new: ids.
        """
        made = own.new_zeros(rows, own.shape[1])
        made[shared[:, 0]] = own[shared[:, 1]]
        if self.fill == "mean":
            made[new] = own[shared[:, 1]].mean(0)
        elif self.fill == "random":
            kept = own[shared[:, 1]]
            spread = kept.std(0, correction=0)
            made[new] = kept.mean(0) + spread * torch.randn(len(new), own.shape[1], generator=rng)
        elif self.fill == "pursuit":
            for part in track(list(new.split(BATCH)), self.name()):
                places, shares = pursue(theirs[part], theirs[shared[:, 0]], self.atoms)
                made[part] = (shares[:, None] @ own[shared[places, 1]])[:, 0]
        return made


def ends(module: Any, name: str) -> list[Tensor]:
    """The tables of the embedding and, if it is another one, of the head; a head's bias as a table of one column.

    Raises:
        ModelError: the model has no embedding of tokens.
    """
    embedding = getattr(module, "get_input_embeddings", lambda: None)()
    if embedding is None or not hasattr(embedding, "num_embeddings"):
        raise ModelError(f"merge.transplant: {name} has no embedding of tokens, so no tokenizer can be given to it.")
    head = module.get_output_embeddings()
    if head is None:
        return [embedding.weight.data]
    apart = [] if head.weight is embedding.weight else [head.weight.data]
    return [embedding.weight.data, *apart, *([head.bias.data[:, None]] if getattr(head, "bias", None) is not None else [])]
