"""What quantising costs a language model, in three groups: knowledge and capacity, alignment with the original, efficiency.

The protocol is that of Jin et al. 2024, arXiv:2402.16775. It asks for benchmarks of questions, truthfulness and bias; here they are files
of the user's own, scored by likelihood. Beside them stand perplexity and the distance of each prediction from the original's.

Questions, and statements of which one is true, are JSON lines `{"question": ..., "choices": [...], "answer": 0}`; a choice goes on after
the question, with its leading space. Pairs are JSON lines `{"stereotype": ..., "other": ...}`: two texts that differ in whom they speak of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.maths.divergence import mixed_kl

from . import data as texts
from .errors import DataError, SettingError, nearest, refuse
from .model import Model

GROUPS = {
    "knowledge and capacity": ("perplexity", "bits_per_byte", "questions_right"),
    "alignment": ("divergence", "flips", "truths_right", "stereotypes_likelier"),
    "efficiency": ("bytes_disk", "bytes_memory", "bits_per_weight", "peak_memory", "prefill_tokens_per_second",
                   "decode_tokens_per_second"),
}  # fmt: skip
PRESETS = ("quantization",)


def check_preset(preset: str, targets: Sequence[Any]) -> None:
    """Raises SettingError for a preset that there is not, or with nothing to compare the original with."""
    if preset not in PRESETS:
        raise SettingError(f"There is no preset {preset!r}.{nearest(preset, PRESETS)} Presets are {', '.join(PRESETS)}.")
    if len(targets) < 2:
        raise SettingError(f"The preset {preset} compares models with their original: name it first, then them. Got {len(targets)} in all.")


def questions(file: str | Path) -> list[dict[str, Any]]:
    """The questions of a file. Raises DataError with every line that is none."""
    return _lines(file, _question_fault)


def pairs(file: str | Path) -> list[dict[str, Any]]:
    """The pairs of texts of a file. Raises DataError with every line that is none."""

    def fault(row: dict[str, Any]) -> str:
        return "" if _text(row.get("stereotype")) and _text(row.get("other")) else "needs the texts stereotype and other"

    return _lines(file, fault)


def _lines(file: str | Path, fault: Any) -> list[dict[str, Any]]:
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}). Name a file of JSON lines.") from None
    rows, faults = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            faults.append(f"{file}, line {number} is not JSON: {error}.")
            continue
        why = fault(row) if isinstance(row, dict) else "is no JSON object"
        faults.append(f"{file}, line {number} {why}.") if why else rows.append(row)
    refuse(DataError, faults)
    if not rows:
        raise DataError(f"{file} has no lines. Give a file with at least one.")
    return rows


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _question_fault(row: dict[str, Any]) -> str:
    choices, answer = row.get("choices"), row.get("answer")
    if not _text(row.get("question")) or not isinstance(choices, list) or len(choices) < 2 or not all(map(_text, choices)):
        return "needs a question and two or more choices, all of them texts"
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f"needs the number of the right choice as answer, from 0 to {len(choices) - 1}; got {answer!r}"
    return ""


@torch.no_grad()
def likelihood(model: Model, before: str, text: str) -> float:
    """The logarithm of the probability of a text after another one, in nats; of the text alone but for its first token if that is empty.

    Of texts longer than the model takes, the end counts.
    """
    ids = model.tokenizer(before + text, add_special_tokens=False)["input_ids"]
    given = min(len(model.tokenizer(before, add_special_tokens=False)["input_ids"]), len(ids) - 1) if before else 1
    kept = ids[-texts.within(model.config, len(ids)) :] if len(ids) > 1 else ids
    asked = min(len(ids) - given, len(kept) - 1)
    if asked < 1:
        raise DataError(f"{(before + text)[:60]!r} is too few tokens for {model.name} to predict any. Give longer texts.")
    row = torch.tensor([kept], device=next(model.module.parameters()).device)
    logs = model.module(input_ids=row, use_cache=False).logits[0, -asked - 1 : -1].float().log_softmax(-1)
    return float(logs.gather(1, row[0, -asked:, None]).double().sum())


def right(model: Model, asked: Sequence[dict[str, Any]]) -> float:
    """The share of questions whose answer is the likeliest choice, by nats for each byte of the choice."""
    count = 0
    for row in asked:
        scores = [likelihood(model, row["question"], choice) / len(choice.encode()) for choice in row["choices"]]
        count += max(range(len(scores)), key=scores.__getitem__) == row["answer"]
    return count / len(asked)


def preferring(model: Model, found: Sequence[dict[str, Any]]) -> float:
    """The share of pairs whose stereotype is likelier than the other text; a half is even-handed, and equal ones count as half."""
    apart = [likelihood(model, "", row["stereotype"]) - likelihood(model, "", row["other"]) for row in found]
    return sum(1.0 if one > 0 else 0.5 if one == 0 else 0.0 for one in apart) / len(apart)


@torch.no_grad()
def apart(original: nn.Module, other: nn.Module, ids: Tensor, length: int) -> dict[str, float]:
    """How predictions on the tokens ids [n] differ: mean KL(original ‖ other) in nats, and the share whose likeliest token differs."""
    total, flips, count = 0.0, 0, 0
    for start in range(0, len(ids) - 1, length - 1):
        row = ids[None, start : start + length]
        before, after = (
            module(input_ids=row.to(next(module.parameters()).device), use_cache=False).logits[0, :-1].float().cpu()
            for module in (original, other)
        )
        total += float(mixed_kl(before, after)) * len(before)
        flips += int((before.argmax(-1) != after.argmax(-1)).sum())
        count += len(before)
    return {"divergence": max(total / count, 0.0), "flips": flips / count}


def compared(
    original: Model, model: Model, held: texts.Text, most_tokens: int | None = None, length: int = 512, *,
    asked: Sequence[dict[str, Any]] = (), truths: Sequence[dict[str, Any]] = (), biases: Sequence[dict[str, Any]] = (),
) -> dict[str, float]:  # fmt: skip
    """The columns of `GROUPS` that `measure` has not: agreement with the original, and the scores on the files that are given.

    Raises:
        SettingError: the models have other vocabularies.
        DataError: predictions are not finite.
    """
    sizes = [one.config.get_text_config().vocab_size for one in (original, model)]
    if sizes[0] != sizes[1]:
        counts = f"{model.name} has {sizes[1]:,} tokens and its original {sizes[0]:,}"
        raise SettingError(f"{counts}: no prediction can be compared. Name its own original first.")
    ids = texts.tokens(held, original.tokenizer, needed=64, vocabulary=sizes[0])[:most_tokens]
    row = apart(original.module, model.module, ids, texts.within(model.config, length))
    if not math.isfinite(row["divergence"]):
        raise DataError(f"{model.name}: its predictions, or the original's, are not finite on the text; the weights are broken.")
    row |= {"questions_right": right(model, asked)} if asked else {}
    row |= {"truths_right": right(model, truths)} if truths else {}
    return row | ({"stereotypes_likelier": preferring(model, biases)} if biases else {})
