"""One vocabulary for models that have several: which row of each embedding belongs to which token of the result.

The rows of each model are brought into the result's order before they are merged. Source: arcee-ai/mergekit, tokenizer.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.core.errors import ModelError, RecipeError, nearest, refuse
from modelwright.core.files import read_json
from modelwright.core.kinds import words_of
from modelwright.core.model import tokenizer_files
from modelwright.maths.slices import SLICE, Entries, flat

from .plan import Input
from .schema import TEMPLATES, Config, Reference, Row

PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass
class Words:
    """The result's vocabulary. `rows` of its embeddings, of which the first `real` are tokens."""

    rows: int
    real: int
    tokenizer: dict[str, Any]  # the result's tokenizer.json
    source: Input  # whose other tokenizer files are taken
    tables: dict[Input, list[int]]  # of each model: its row for every token of the result, -1 where it has none
    fills: dict[int, list[tuple[Input, int]]] = field(default_factory=dict)  # token -> the rows whose mean stands for it
    heights: dict[Input, int] = field(default_factory=dict)  # embedding rows of each model

    def holds(self, name: str, role: str) -> bool:
        """Whether a tensor has a row for every token."""
        for model, rows in self.heights.items():
            found = model.stored(name)
            if found:
                return role == "embed" or role == "head" and model.tensors[found][0][:1] == (rows,)
        return False

    def permuted(self, model: Input, name: str, read: Callable[[Input, str], Entries]) -> Entries:
        """A model's tensor with its rows in the order of the result."""
        own = read(model, name)
        others = {other: flat(read(other, found)) for rows in self.fills.values() for other, _ in rows if (found := other.stored(name))}
        shape = (self.rows, *model.tensors[name][0][1:])
        return Permuted(own, shape, self.tables[model], self.fills, others, self.real)


class Permuted:
    """Rows of a tensor in another order, read by slices; what is missing is filled in, what follows is the mean row."""

    def __init__(self, own: Entries, shape: tuple[int, ...], table: list[int], fills: Mapping[int, list[tuple[Input, int]]],
                 others: Mapping[Input, Callable[[slice], Tensor]], real: int):  # fmt: skip
        self.shape, self.dtype = shape, own.dtype
        self._own, self._table, self._fills, self._others, self._real = flat(own), table, fills, others, real
        self._width = math.prod(shape[1:])
        self._mean: Tensor | None = None

    def __getitem__(self, at: slice) -> Tensor:
        start, stop, _ = at.indices(math.prod(self.shape))
        first, last = start // self._width, -(-stop // self._width)
        return self._rows(first, last)[start - first * self._width : stop - first * self._width]

    def _rows(self, first: int, last: int) -> Tensor:
        parts, row = [], first
        while row < last:
            if row >= self._real:
                parts.append(self._padding().repeat(last - row))
                break
            length = 1
            known = self._table[row]
            if known < 0:
                parts.append(self._filled(row))
            else:
                while row + length < min(last, self._real) and self._table[row + length] == known + length:
                    length += 1
                parts.append(self._own(slice(known * self._width, (known + length) * self._width)))
            row += length
        return torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype)

    def _filled(self, row: int) -> Tensor:
        found = [self._others[model](slice(i * self._width, (i + 1) * self._width)) for model, i in self._fills.get(row, ())]
        if not found:
            return torch.zeros(self._width, dtype=self.dtype)
        return torch.stack([part.float() for part in found]).mean(0).to(self.dtype) if len(found) > 1 else found[0].to(self.dtype)

    def _padding(self) -> Tensor:
        """The mean of all real rows."""
        if self._mean is None:
            total, step = torch.zeros(self._width, dtype=torch.float64), max(1, SLICE // self._width)
            for first in range(0, self._real, step):
                total += self._rows(first, min(first + step, self._real)).view(-1, self._width).sum(0, dtype=torch.float64)
            self._mean = (total / max(self._real, 1)).to(self.dtype)
        return self._mean


def plan(config: Config, models: Mapping[Reference, Input], template: Input, notes: list[str]) -> Words | None:
    """The vocabulary that a configuration asks for; None where it changes nothing.

    Raises:
        ModelError: a model has no tokenizer.
        RecipeError: a token or row that does not exist.
    """
    asked = config.vocabulary
    if asked is None:
        return None
    sources = {source.model for tower in config.towers for part in tower.slices for source in part.sources} | {config.base}
    merged = {reference: model for reference, model in models.items() if reference in sources}
    stated = {model: tokenizer_of(model) for model in dict.fromkeys([*merged.values(), *models.values()])}
    heights = {model: height(model) for model in stated}
    known = {model: {token: i for token, i in words_of(text).items() if i < heights[model]} for model, text in stated.items()}
    leader = models[asked.source] if isinstance(asked.source, Reference) else template
    made = union(stated, known, leader, list(merged.values())) if asked.source == "union" else copy.deepcopy(stated[leader])
    result = {token: i for token, i in words_of(made).items() if asked.source == "union" or i < heights[leader]}
    problems = [
        f"tokenizer.tokens: {token!r} is not in the result's tokenizer.{nearest(token, result)}"
        for token in asked.tokens
        if token not in result
    ]
    listed = [(token, row) for token, row in asked.tokens.items() if token in result]
    problems += [text for token, row in listed if (text := row_problem(token, row, models, known, heights))]
    refuse(RecipeError, problems)
    forced = {token for token, row in asked.tokens.items() if row.force}
    same = all(known[model] == result for model in merged.values()) and len({heights[model] for model in merged.values()}) == 1
    rows = next(iter(heights.values()))
    if same and not forced and rows % asked.multiple == 0:
        return None
    real = 1 + max(result.values(), default=-1)
    tables: dict[Input, list[int]] = {}
    for model in merged.values():
        table = [-1] * real
        for token, i in result.items():
            table[i] = -1 if token in forced else known[model].get(token, -1)
        tables[model] = table
    base = merged.get(config.base) if config.base else None
    fills: dict[int, list[tuple[Input, int]]] = {}
    for token, i in result.items():
        if any(table[i] < 0 for table in tables.values()):
            fills[i] = filling(token, asked.tokens.get(token), list(merged.values()), base, models, known)
    missing = sum(not rows for rows in fills.values())
    if missing - sum(row.model is None for row in asked.tokens.values()) > 0:
        notes.append(f"tokenizer: {missing} tokens are in no model's vocabulary; their embeddings are zeros")
    return Words(
        -(-real // asked.multiple) * asked.multiple, real, made, leader, tables, fills, {model: heights[model] for model in tables}
    )


def filling(token: str, asked: Row | None, merged: list[Input], base: Input | None, models: Mapping[Reference, Input],
            known: Mapping[Input, Mapping[str, int]]) -> list[tuple[Input, int]]:  # fmt: skip
    """The rows whose mean stands for a token in a model that lacks it: as asked; else the only one, the base's, or all."""
    if asked is not None:
        if asked.model is None:
            return []
        model = models[asked.model]
        return [(model, asked.number if asked.number is not None else known[model][str(asked.token)])]
    owners = [(model, known[model][token]) for model in merged if token in known[model]]
    own = [row for row in owners if row[0] is base]
    return own if own and len(owners) > 1 else owners


def row_problem(token: str, row: Row, models: Mapping[Reference, Input], known: Mapping[Input, Mapping[str, int]],
                heights: Mapping[Input, int]) -> str:  # fmt: skip
    """What is wrong with where a token's embedding is to come from; "" if nothing."""
    if row.model is None:
        return ""
    model = models[row.model]
    if row.number is not None:
        bad = not isinstance(row.number, int) or not 0 <= row.number < heights[model]
        return f"tokenizer.tokens.{token}: {row.model} has {heights[model]} rows; there is no token_id {row.number!r}." if bad else ""
    return "" if row.token in known[model] else f"tokenizer.tokens.{token}: {row.model} has no token {row.token!r}."


def height(model: Input) -> int:
    """Rows of a model's embedding."""
    found = [shape[0] for name, (shape, _) in model.tensors.items() if model.role(name) == "embed" and len(shape) == 2]
    if not found:
        raise ModelError(f"{model.label}: no embedding was found among its tensors, so its tokens cannot be put in another order.")
    return max(found)


def tokenizer_of(model: Input) -> dict[str, Any]:
    """A model's tokenizer.json; made by transformers where its folder has only an older form.

    Raises:
        ModelError: it has no tokenizer.
    """
    if model.tokenizer is not None:
        return model.tokenizer
    assert model.folder is not None
    file = model.folder / "tokenizer.json"
    if file.is_file():
        return read_json(file, ModelError, "Copy it from the original model.")
    if not tokenizer_files(model.folder):
        raise ModelError(f"{model.label} has no tokenizer, and tokenizer_source asks for one. Copy tokenizer.json beside its weights.")
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as work:
        try:
            AutoTokenizer.from_pretrained(model.folder).save_pretrained(work)
            return json.loads((Path(work) / "tokenizer.json").read_text("utf-8"))
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{model.label}: its tokenizer cannot be read ({error}). Copy it from the original model.") from error


def union(
    stated: Mapping[Input, dict[str, Any]], known: Mapping[Input, Mapping[str, int]], leader: Input, merged: list[Input]
) -> dict[str, Any]:
    """The leader's tokenizer and, after its tokens, those that other models have: plain ones first, then special ones."""
    made = copy.deepcopy(stated[leader])
    have = words_of(made)
    plain: dict[str, dict[str, Any]] = {}
    special: dict[str, dict[str, Any]] = {}
    for model in merged:
        added = {entry["content"]: entry for entry in stated[model].get("added_tokens") or []}
        for token in sorted(known[model], key=known[model].__getitem__):
            if token not in have and token in added:
                special.setdefault(token, added[token])
            elif token not in have:
                plain.setdefault(token, PLAIN_TOKEN)
    plain = {token: entry for token, entry in plain.items() if token not in special}
    first = 1 + max(have.values(), default=-1)
    new = [{**entry, "id": first + number, "content": token} for number, (token, entry) in enumerate([*plain.items(), *special.items()])]
    made["added_tokens"] = [*(made.get("added_tokens") or []), *new]
    return made


# Chat templates

TURNS = {
    "chatml": ("", "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"),
    "llama3": ("{bos}", "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
               "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "exaone": ("", "[|{role}|]{content}[|endofturn|]\n", "[|assistant|]"),
}  # fmt: skip
BY_ROLE = {
    "mistral": ("{bos}", {"system": "{content}\n\n", "user": "[INST] {content} [/INST]", "assistant": " {content}{eos}"}, ""),
    "alpaca": ("", {"system": "{content}\n\n", "user": "### Instruction:\n{content}\n\n", "assistant": "### Response:\n{content}{eos}\n\n"},
               "### Response:\n"),
}  # fmt: skip


def template_named(name: str) -> str:
    """The Jinja text of a chat format that goes by this name."""
    if name in TURNS:
        start, turn, last = TURNS[name]
        body = jinja(turn)
    else:
        start, roles, last = BY_ROLE[name]
        body = "".join(
            f"{{% {'if' if not number else 'elif'} message['role'] == '{role}' %}}{jinja(text)}"
            for number, (role, text) in enumerate(roles.items())
        )
        body += "{% endif %}"
    end = f"{{% if add_generation_prompt %}}{jinja(last)}{{% endif %}}" if last else ""
    return f"{jinja(start)}{{% for message in messages %}}{body}{{% endfor %}}{end}"


def jinja(text: str) -> str:
    """A format as a Jinja expression."""
    words = {"role": "message['role']", "content": "message['content']", "bos": "bos_token", "eos": "eos_token"}
    for word, value in words.items():
        text = text.replace(f"{{{word}}}", f"\0{value}\0")
    parts = [(json.dumps(part) if number % 2 == 0 else part) for number, part in enumerate(text.split("\0")) if part]
    return f"{{{{ {' + '.join(parts)} }}}}" if parts else ""


def chat_template(config: Config, models: Mapping[Reference, Input]) -> str | None:
    """The chat template that a configuration asks for; None when it asks for none, or for the commonest and there is none."""
    asked = config.chat_template
    if asked is None or asked in TEMPLATES:
        return template_named(asked) if asked else None
    if asked != "auto":
        return asked
    found = Counter(text for model in models.values() if (text := own_template(model)))
    return found.most_common(1)[0][0] if found else None


def own_template(model: Input) -> str | None:
    """The chat template in a model's folder."""
    if model.folder is None:
        return None
    if (model.folder / "chat_template.jinja").is_file():
        return (model.folder / "chat_template.jinja").read_text("utf-8")
    file = model.folder / "tokenizer_config.json"
    stated = json.loads(file.read_text("utf-8")).get("chat_template") if file.is_file() else None
    return stated if isinstance(stated, str) else None
