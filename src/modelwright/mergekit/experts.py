"""Mixtures of experts from dense models, as a configuration with `experts:` asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelwright.core import find, model, walk
from modelwright.core.errors import Faults, RecipeError, nearest
from modelwright.core.files import whole_folder
from modelwright.core.given import Given
from modelwright.core.method import Method

from .schema import Experts, Reader, Reference

GATES = ("hidden", "cheap_embed", "random", "uniform_random")
PROMPTED = GATES[:2]
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")


@dataclass(frozen=True)
class Mixture:
    """What is assembled: the method, the model that gives all but the experts, and the experts."""

    method: Method
    base: Reference
    experts: tuple[Reference, ...]
    dtype: str | None
    notes: tuple[str, ...]
    text: str


def prepared(document: Experts, names: Sequence[str | None], place: Callable[[Reference], Path]) -> Mixture:
    """The mixture that a document asks for; `names` are those of earlier documents, `place` gives the folder of any other model.

    Raises: a subclass of ModelwrightError with all that is wrong.
    """
    stated, reader, faults = document.stated, Reader(), Faults()
    base = reader.reference(stated.get("base_model"), "base_model")
    entries = stated["experts"] if isinstance(stated["experts"], list) else []
    if len(entries) < 2:
        reader.wrong("experts must be a list of two or more entries with `source_model:`.")
    experts = [one for number, entry in enumerate(entries) if (one := _expert(reader, entry, f"experts.{number}"))]
    gates = stated.get("gate_mode") or "hidden"
    if gates not in GATES:
        reader.wrong(f"gate_mode is one of {', '.join(GATES)}; got {gates!r}.{nearest(str(gates), GATES)}")
    if stated.get("shared_experts"):
        reader.wrong("shared_experts: experts that every token is sent to are not here. Remove them, or use mergekit-moe.")
    if stated.get("architecture") not in (None, "mixtral"):
        reader.wrong(f"architecture: {stated['architecture']} is not here; what is made is a mixtral.")
    dtype = reader.dtype(stated, "dtype")
    faults += map(RecipeError, reader.problems)
    settings: dict[str, Any] = {"gates": gates, "experts_per_token": stated.get("experts_per_token") or 2}
    prompts, against = ([list(entry.get(key) or ()) for entry in entries if isinstance(entry, Mapping)]
                        for key in ("positive_prompts", "negative_prompts"))  # fmt: skip
    if gates in PROMPTED:
        settings |= {"prompts": prompts} | ({"against": against} if any(against) else {})
    elif any(prompts) or any(against):
        reader.notes.append(f"gate_mode: {gates} reads no prompts; they are left out")
    method = None
    if not reader.problems:
        with faults.collected():
            method = find.find("merge.moe").build(settings)
        for reference in (base, *experts):
            if reference and not (reference.path in names and reference.adapter is None):
                with faults.collected():
                    model.open(place(reference))
    faults.refuse()
    assert method is not None and base is not None
    return Mixture(method, base, tuple(experts), dtype, (*document.notes, *reader.notes), document.text)


def _expert(reader: Reader, stated: Any, where: str) -> Reference | None:
    if not isinstance(stated, Mapping):
        reader.wrong(f"{where} must be a mapping with `source_model:`; got {stated!r}.")
        return None
    reader.known(stated, EXPERT_KEYS, f"{where}.")
    for key, none in (("noise_scale", 0), ("residual_scale", 1)):
        if stated.get(key) not in (None, none):
            reader.wrong(f"{where}.{key} is not here. Remove it, or use mergekit-moe.")
    return reader.reference(stated.get("source_model"), f"{where}.source_model")


def assemble(mixture: Mixture, place: Callable[[Reference], Path], folder: Path, *, seed: int, overwrite: bool) -> None:
    """Write the mixture; `place` gives a model's folder."""
    base = model.open(place(mixture.base))
    given = Given(donors=[model.open(place(expert)) for expert in mixture.experts], seed=seed, notes=list(mixture.notes))
    if mixture.dtype is not None:
        base.module.to(getattr(torch, mixture.dtype))
        for donor in given.donors:
            donor.module.to(getattr(torch, mixture.dtype))
    made = walk.change(base, mixture.method, given)
    with whole_folder(folder, overwrite=overwrite) as partial:
        model.save_module(made.module, partial)
        made.save_beside(partial)
        (partial / "mergekit_config.yml").write_text(mixture.text, "utf-8")
