"""Mixtures of experts from dense models, as a configuration with `experts:` asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelwright.core import model, walk
from modelwright.core.errors import Faults, RecipeError, nearest
from modelwright.core.files import whole_folder
from modelwright.core.given import Given
from modelwright.methods.merge._mixture import LAYOUTS, refuse_other_experts
from modelwright.methods.merge.moe import Moe

from .schema import Experts, Reader, Reference

GATES = ("hidden", "cheap_embed", "random", "uniform_random")
PROMPTED = GATES[:2]
SCALES = (("noise_scale", "noise_each", 0.0), ("residual_scale", "residual_each", 1.0))  # theirs, ours, what changes nothing
PROMPTS = ("positive_prompts", "negative_prompts")
EXPERT_KEYS = ("source_model", *PROMPTS, "noise_scale", "residual_scale")


@dataclass(frozen=True)
class Mixture:
    """What is assembled: the method, the model that gives all but the experts, and the experts."""

    method: Moe
    base: Reference
    experts: tuple[Reference, ...]
    dtype: str | None
    notes: tuple[str, ...]
    text: str


def prepared(document: Experts, earlier: Mapping[str, Mapping[str, Any]], place: Callable[[Reference], Path]) -> Mixture:
    """The mixture that a document asks for.

    earlier: name -> config.json of what earlier documents make. place: gives the folder of any other model.

    Raises: a subclass of ModelwrightError with all that is wrong.
    """
    stated, reader, faults = document.stated, Reader(), Faults()
    base = reader.reference(stated.get("base_model"), "base_model")
    entries = stated["experts"] if isinstance(stated["experts"], list) else []
    if len(entries) < 2:
        reader.wrong("experts must be a list of two or more entries with `source_model:`.")
    shared = stated.get("shared_experts") or []
    if not isinstance(shared, list) or len(shared) > 1:
        reader.wrong("shared_experts must be a list of one entry with `source_model:`; mixtures here have one such expert at most.")
        shared = []
    named = [*((f"experts.{number}", entry) for number, entry in enumerate(entries)), *(("shared_experts.0", entry) for entry in shared)]
    entries = [entry for _, entry in named]
    experts = [one for where, entry in named if (one := _expert(reader, entry, where))]
    gates = stated.get("gate_mode") or "hidden"
    if gates not in GATES:
        reader.wrong(f"gate_mode is one of {', '.join(GATES)}; got {gates!r}.{nearest(str(gates), GATES)}")
    architecture = str(stated.get("architecture") or "").lower()
    fitting = [name for name in LAYOUTS if name.startswith(architecture) and LAYOUTS[name].shared == bool(shared)]
    if architecture.startswith("deepseek"):
        reader.wrong("architecture: deepseek has code of its own that transformers does not have. Leave it out: a shared expert without "
                     "prompts counts whole in a qwen too.")  # fmt: skip
    elif architecture and not fitting:
        kinds = ", ".join(f"{name} ({'one shared expert' if one.shared else 'none'})" for name, one in LAYOUTS.items())
        reader.wrong(f"architecture: {stated['architecture']} with {len(shared)} shared experts is not here. There are {kinds}.")
    dtype = reader.dtype(stated, "dtype")
    faults += map(RecipeError, reader.problems)
    settings: dict[str, Any] = {"gates": gates, "shared": len(shared)}
    if stated.get("experts_per_token") is not None:
        settings["experts_per_token"] = stated["experts_per_token"]
    if architecture and len(fitting) == 1:
        settings["architecture"] = fitting[0]
    for key, ours, none in SCALES:
        values = [entry.get(key) for entry in entries if isinstance(entry, Mapping)]
        if any(value not in (None, none) for value in values):
            settings[ours] = [none if value is None else value for value in values]
    prompts, against = ([entry.get(key) or [] for entry in entries if isinstance(entry, Mapping)] for key in PROMPTS)
    if gates in PROMPTED:
        settings |= {"prompts": prompts} | ({"against": against} if any(against) else {})
    elif any(prompts) or any(against):
        reader.notes.append(f"gate_mode: {gates} reads no prompts; they are left out")
    method: Moe | None = None
    if not reader.problems:
        with faults.collected():
            method = Moe.build(settings)
        modules: list[Any] = []
        for reference in (base, *experts):
            with faults.collected():
                modules.append(_empty(reference, earlier, place))
        if method is not None and len(modules) == 1 + len(experts):
            with faults.collected():
                method.config(modules[0], len(experts))
                refuse_other_experts(modules[0], list(map(str, experts)), modules[1:])
    faults.refuse()
    assert method is not None and base is not None
    return Mixture(method, base, tuple(experts), dtype, (*document.notes, *reader.notes), document.text)


def _empty(reference: Reference | None, earlier: Mapping[str, Mapping[str, Any]], place: Callable[[Reference], Path]) -> Any:
    """The empty module of a model that lies on disk, or that an earlier document makes."""
    from transformers import AutoConfig

    assert reference is not None
    if reference.path in earlier and reference.adapter is None:
        return model.empty_module(AutoConfig.for_model(**earlier[reference.path]))
    return model.open(place(reference)).skeleton()


def _expert(reader: Reader, stated: Any, where: str) -> Reference | None:
    if not isinstance(stated, Mapping):
        reader.wrong(f"{where} must be a mapping with `source_model:`; got {stated!r}.")
        return None
    reader.known(stated, EXPERT_KEYS, f"{where}.")
    for key, _, _ in SCALES:
        value = stated.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            reader.wrong(f"{where}.{key} must be a number; got {value!r}.")
    for key in PROMPTS:
        texts = stated.get(key)
        if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            reader.wrong(f"{where}.{key} must be a list of texts, such as [write code]; got {texts!r}.")
    return reader.reference(stated.get("source_model"), f"{where}.source_model")


def assemble(mixture: Mixture, place: Callable[[Reference], Path], folder: Path, *, seed: int, overwrite: bool) -> None:
    """Write the mixture; `place` gives a model's folder."""
    base = model.open(place(mixture.base))
    given = Given(donors=[model.open(place(expert)) for expert in mixture.experts], seed=seed, notes=list(mixture.notes))
    if mixture.dtype is not None:
        base.module.to(getattr(torch, mixture.dtype))
    made = walk.change(base, mixture.method, given)
    with whole_folder(folder, overwrite=overwrite) as partial:
        model.save_module(made.module, partial)
        made.save_beside(partial)
        (partial / "mergekit_config.yml").write_text(mixture.text, "utf-8")
