"""From a configuration to what each tensor of the result is made of. No tensor is read, nothing is written."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modelwright.anatomy import anatomy_of
from modelwright.core.errors import Faults, MethodError, ModelError, RecipeError, SettingError, nearest
from modelwright.core.kinds import Kind, differences, refuse_others, words_in, words_of
from modelwright.core.method import TensorMethod
from modelwright.core.weights import Checkpoint

from . import table
from .schema import Config, Parameters, Reference, Slice, Source, Tower

BLOCK = re.compile(r"(.*?\.)??(\d+)\.(.*)")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers", "encoder_layers", "depth")
TEXT = ("text_decoder", "language_model", "text_model")
BETWEEN = ("multi_modal_projector", "mm_projector", "projector", "merger", "connector")  # of sight and text
SIGHT = ("vision_tower", "vision_model", "visual", "image_encoder")


@dataclass(eq=False)
class Input:
    """A model that is merged: its config, and the shapes and dtypes of its tensors; its files, once they are there."""

    label: str
    config: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    folder: Path | None = None
    checkpoint: Checkpoint | None = None
    tokenizer: dict[str, Any] | None = None  # its tokenizer.json, where that is not in the folder

    def __post_init__(self) -> None:
        self.anatomy = anatomy_of(self.config)
        self.placed = {name: placed(name) for name in self.tensors}
        self.stacks = stacks(self.placed.values())

    @property
    def kind(self) -> Kind:
        """What it is beside its tensors."""
        made = self.tokenizer and words_of(self.tokenizer)
        return Kind(self.label, self.config, made or (words_in(self.folder) if self.folder else None))

    @classmethod
    def open(cls, label: str, folder: Path) -> Input:
        checkpoint = Checkpoint(folder)
        config = checkpoint.config
        if not config:
            raise ModelError(f"{label}: {folder} has no config.json. Copy it from the original model.")
        if "quantization_config" in config:
            raise ModelError(f"{label}: its layers are quantized or stored otherwise than dense. Merge the models that it was made from.")
        tensors = {name: (checkpoint.shape(name), checkpoint.dtype(name)) for name in checkpoint.names}
        narrow = [name for name, (_, dtype) in tensors.items() if dtype.is_floating_point and dtype.itemsize < 2]
        if narrow:
            raise ModelError(f"{label}: {len(narrow)} tensors have 8 bits, first {narrow[0]}. Merge the models that it was made from.")
        return cls(label, config, tensors, checkpoint.path, checkpoint)

    def stored(self, name: str) -> str | None:
        """The name under which a tensor is stored: its own, or one that it is tied to."""
        if name in self.tensors:
            return name
        if self.checkpoint and name in self.checkpoint.ties:
            return self.checkpoint.ties[name]
        for group in self.anatomy.ties:
            for alias in group:
                if name.endswith(alias):
                    start = name.removesuffix(alias)
                    return next((start + other for other in group if start + other in self.tensors), None)
        return None

    def role(self, name: str) -> str:
        known = self.anatomy.role(name)
        return known[0] if known else ""

    def ties_head(self, name: str) -> bool:
        """Whether a tensor that is not stored here is the embedding."""
        found = self.stored(name)
        return found is not None and found != name


def placed(name: str) -> tuple[str, int, str] | None:
    """(path of the stack, index, rest) of a tensor inside a block; None for those outside."""
    found = BLOCK.fullmatch(name)
    return (found[1] or "", int(found[2]), found[3]) if found else None


def stacks(places: Iterable[tuple[str, int, str] | None]) -> dict[str, int]:
    """Path -> number of blocks, of the lists of blocks: numbered without holes, each with two tensors or more."""
    seen: dict[str, Counter[int]] = {}
    for place in places:
        if place:
            seen.setdefault(place[0], Counter())[place[1]] += 1
    return {
        path: len(counts)
        for path, counts in seen.items()
        if sorted(counts) == list(range(len(counts))) and min(counts.values()) > 1
    }  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One model's tensor."""

    model: Input
    name: str


@dataclass(frozen=True)
class Made:
    """A tensor of the result: its method, its base and its donors; a copy where the method is None."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    method: TensorMethod | None
    base: Piece | None
    donors: tuple[Piece, ...]
    role: str = ""
    first: str = ""  # the name in the first source


@dataclass
class Plan:
    """All tensors of the result, its config, and what the user should know."""

    config: Config
    tensors: list[Made]
    result: dict[str, Any]  # config.json
    template: Input  # whose config and tokenizer the result has
    models: dict[Reference, Input]
    notes: list[str]
    as_mergekit: bool = False
    vocabulary: Any = None

    def as_input(self, label: str) -> Input:
        """The result as a model that a later document may name."""
        tensors = {made.name: (made.shape, made.dtype) for made in self.tensors}
        words = self.vocabulary.tokenizer if self.vocabulary else self.template.tokenizer
        return Input(label, self.result, tensors, self.template.folder, tokenizer=words)


class Planner:
    """Plans one document; reasons against it are collected."""

    def __init__(self, config: Config, models: Mapping[Reference, Input], faults: Faults, *, as_mergekit: bool):
        self.config, self.models, self.faults, self.as_mergekit = config, models, faults, as_mergekit
        self.notes = list(config.notes)
        self.said: dict[tuple[str, ...], list[str]] = {}
        self.out = getattr(torch, config.out_dtype or config.dtype or "", None)

    def plan(self, vocabulary: Callable[[Config, Mapping[Reference, Input], Input, list[str]], Any]) -> Plan | None:
        """The plan; None when something is against it. `vocabulary` plans the tokenizer."""
        before = len(self.faults)
        with self.faults.collected():
            self.entry = table.entry_of(self.config.method)
        if len(self.faults) > before:
            return None
        self.check_parameters()
        self.config = replace(self.config, towers=tuple(self.with_base(tower) for tower in self.config.towers))
        self.check_sources()
        if len(self.faults) > before:
            return None
        self.template = self.models[self.config.base or self.config.towers[0].slices[0].sources[0].model]
        self.words = None
        with self.faults.collected():
            self.check_kinds()
            self.words = vocabulary(self.config, self.models, self.template, self.notes)
        if len(self.faults) > before:
            return None
        tensors: list[Made] = []
        result = json.loads(json.dumps(self.template.config))
        with self.faults.collected():
            for tower, names in self.parts():
                tensors += self.tower(tower, names, result)
        for (kind, reason), names in self.said.items():
            text = f"{names[0]}{f' and {len(names) - 1} more tensors' if len(names) > 1 else ''}: {reason}"
            if kind == "note":
                self.notes.append(text)
            else:
                self.faults.append({"setting": SettingError, "model": ModelError}[kind](text))
        if len(self.faults) > before:
            return None
        self.finish(result, tensors)
        return Plan(self.config, tensors, result, self.template, dict(self.models), self.notes, self.as_mergekit, self.words)

    def with_base(self, tower: Tower) -> Tower:
        """The tower with an unlisted base among its models, where mergekit has it there: in karcher, and in linear with a weight."""
        (part, *others), base = tower.slices, self.config.base
        weighed = any("weight" in scope for scope in (self.config.parameters, tower.parameters, part.parameters))
        joins = self.config.method == "karcher" or self.config.method == "linear" and weighed
        if not joins or base is None or others or any(source.layers or source.model == base for source in part.sources):
            return tower
        return replace(tower, slices=(replace(part, sources=(*part.sources, Source(base))),))

    # Checks that need no tensor

    def scopes(self) -> Iterator[tuple[str, Parameters, bool]]:
        """(where, parameters, whether they are a model's) of all scopes."""
        yield "parameters", self.config.parameters, False
        for tower in self.config.towers:
            start = f"modules.{tower.name}." if tower.name else ""
            yield f"{start}parameters", tower.parameters, False
            for number, part in enumerate(tower.slices):
                yield f"{start}slices.{number}.parameters", part.parameters, False
                for source in part.sources:
                    yield f"{start}parameters of {source.model}", source.parameters, True

    def check_parameters(self) -> None:
        known = self.entry.parameters
        for where, parameters, of_model in self.scopes():
            for name in parameters:
                if name in known and (not of_model or name in self.entry.each) or name in table.PLAIN:
                    continue
                if name in self.entry.without:
                    self.notes.append(f"{where}: {name} is left out; {self.entry.without[name]}.")
                elif name in known:
                    self.notes.append(f"{where}: {name} is left out, as mergekit does; it is one for all models. Move it to the top.")
                elif name in table.EVERY:
                    self.notes.append(f"{where}: {name} is left out, as mergekit does; {self.config.method} has no such parameter.")
                elif near := nearest(name, known):
                    self.faults.append(SettingError(f"{where}: {self.config.method} has no parameter {name!r}.{near}"))
                else:
                    self.notes.append(f"{where}: {name} is left out, as mergekit does; its parameters are {', '.join(known) or 'none'}.")

    def check_sources(self) -> None:
        entry, method, base = self.entry, self.config.method, self.config.base
        for tower in self.config.towers:
            for number, part in enumerate(tower.slices):
                whole = part.sources[0].layers is None
                where = f"{f'module {tower.name}: ' if tower.name else ''}{'' if whole else f'slice {number}: '}"
                own = part.base or base
                listed = [source.model for source in part.sources]
                donors = listed if entry.base == "unused" else [model for model in listed if model != own]
                doubled = [str(model) for model, times in Counter(listed).items() if times > 1]
                if doubled:
                    self.wrong(f"{where}{doubled[0]} is listed more than once. Give it once, with the sum of its weights.")
                if entry.base == "needed" and own is None:
                    self.wrong(f"{where}{method} needs `base_model:`.")
                elif entry.base == "needed" and not whole and own not in listed:
                    self.wrong(f"{where}{method} needs its base {own} among the sources of every slice, with a layer_range.")
                low, high = entry.donors
                if len(donors) < low or high is not None and len(donors) > high:
                    count = f"{low}" if low == high else f"{low} or more"
                    besides = " besides the base" if entry.base != "unused" and own else ""
                    found = ", ".join(map(str, donors)) or "none"
                    self.wrong(f"{where}{method} takes {count} model{'s' if count != '1' else ''}{besides}; found {len(donors)}: {found}.")
                if entry.base == "unused" and base and base not in listed and whole and len(part.sources) >= low:
                    self.notes.append(f"{method} takes no base: base_model {base} gives config and tokenizer, and no weight")

    def wrong(self, text: str) -> None:
        self.faults.append(RecipeError(text))

    def check_kinds(self) -> None:
        """Refuse models of several kinds, and note what differs that no shape shows."""
        merged = {source.model for tower in self.config.towers for part in tower.slices for source in part.sources}
        others = [model.kind for reference, model in self.models.items() if reference in merged and model is not self.template]
        refuse_others(self.template.kind, others)
        self.notes += differences(self.template.kind, others, words=self.config.vocabulary is None)

    # Towers

    def parts(self) -> list[tuple[Tower, list[str]]]:
        """Each tower with the template's tensors that belong to it."""
        names = self.names(self.template)
        if not self.config.towers[0].name:
            return [(self.config.towers[0], names)]
        if [tower.name for tower in self.config.towers] == ["default"] and not any(belongs(name, SIGHT[0], SIGHT[:1]) for name in names):
            return [(self.config.towers[0], names)]  # mergekit's name for the one part that a model of text has
        left, found = list(names), []
        words = [tower.name for tower in self.config.towers]
        for tower in sorted(self.config.towers, key=lambda tower: tower.name in (*TEXT, "decoder")):  # what is left goes to the text
            mine = [name for name in left if belongs(name, tower.name, words)]
            left = [name for name in left if name not in set(mine)]
            if not mine:
                ways = sorted({name.removeprefix("model.").split(".")[0] for name in names})
                hint = f"{nearest(tower.name, ways)} Its parts are {', '.join(ways)}."
                raise RecipeError(f"modules: the model has no part {tower.name!r}.{hint}")
            found.append((tower, mine))
        if left:
            raise RecipeError(f"modules: {len(left)} tensors belong to none of {', '.join(words)}, first {left[0]}. Add their module.")
        return found

    def names(self, template: Input) -> list[str]:
        """A template's tensors; and a head of its own, if another model has one where it is tied."""
        found = list(template.tensors)
        for model in self.models.values():
            for name in model.tensors:
                if name not in template.tensors and template.ties_head(name) and name not in found:
                    found.append(name)
        return found

    def tower(self, tower: Tower, names: list[str], result: dict[str, Any]) -> list[Made]:
        """The tensors of a part of the model, its blocks numbered anew."""
        paths = [path for path in self.template.stacks if any((place := placed(name)) and place[0] == path for name in names)]
        whole = tower.slices[0].sources[0].layers is None
        if not whole and len(paths) != 1:
            found = ", ".join(path.rstrip(".") for path in paths) or "none"
            raise RecipeError(f"slices need a model with one list of blocks; found {found}. Give each its own entry of `modules:`.")
        inside = {name for name in names if (place := placed(name)) and place[0] in paths}
        outside = [name for name in names if name not in inside]
        if whole:
            return self.whole(tower, tower.slices[0], names, paths, result)
        tensors, path, total = [], paths[0], 0
        early = [name for name in outside if self.early(name)]
        tensors += [made for name in early if (made := self.made(tower, tower.slices[0], name, None, 0.0))]
        kinds: list[tuple[Input, int]] = []
        for number, part in enumerate(tower.slices):
            lengths = {source.layers[1] - source.layers[0] for source in part.sources if source.layers}
            short = []
            for source in part.sources:
                count = self.models[source.model].stacks.get(path, 0)
                if source.layers and source.layers[1] > count:
                    short.append(f"slice {number}: {source.model} has {count} layers, and layer_range is {list(source.layers)}.")
            if len(lengths) > 1:
                short.append(f"slice {number}: its sources have {' and '.join(map(str, sorted(lengths)))} layers. Give all the same.")
            self.faults += map(RecipeError, short)
            if short:
                continue
            (length,) = lengths
            leader = self.leader(part)
            first = next(source for source in part.sources if self.models[source.model] is leader).first
            rests = {index: [place[2] for place in leader.placed.values() if place and place[:2] == (path, index)]
                     for index in range(first, first + length)}  # fmt: skip
            for step in range(length):
                t = step / (length - 1) if length > 1 else 1.0
                kinds.append((leader, first + step))
                for rest in rests[first + step]:
                    made = self.made(tower, part, f"{path}{total + step}.{rest}", (path, step, rest), t)
                    tensors += [made] if made else []
            total += length
        tensors += [made for name in outside if name not in early and (made := self.made(tower, tower.slices[-1], name, None, 0.0))]
        renumber(result, self.template, path, total, kinds)
        return tensors

    def whole(self, tower: Tower, part: Slice, names: list[str], paths: list[str], result: dict[str, Any]) -> list[Made]:
        """All layers of every model, merged one by one."""
        if self.config.base and self.config.base not in [source.model for source in part.sources]:
            part = replace(part, sources=(*part.sources, Source(self.config.base)))
        for source in part.sources:
            model = self.models[source.model]
            other = [path for path in paths if model.stacks.get(path, 0) != self.template.stacks[path]]
            if other:
                counts = f"{model.stacks.get(other[0], 0)} layers and {self.template.label} {self.template.stacks[other[0]]}"
                self.wrong(f"{source.model} has {counts}. Use `slices:` with layer_range to merge models of other depths.")
        tensors = []
        for name in names:
            place, t = placed(name), 0.0
            if place and place[0] in paths:
                count = self.template.stacks[place[0]]
                t = place[1] / (count - 1) if count > 1 else 1.0
            made = self.made(tower, part, name, None, t)
            tensors += [made] if made else []
        return tensors

    def leader(self, part: Slice) -> Input:
        """The source that says which tensors a slice has."""
        listed = [self.models[source.model] for source in part.sources]
        return self.template if self.template in listed else listed[0]

    def early(self, name: str) -> bool:
        role = self.template.role(name)
        return role.startswith(("embed", "position")) or not role and "emb" in name

    # Tensors

    def made(self, tower: Tower, part: Slice, name: str, inside: tuple[str, int, str] | None, t: float) -> Made | None:
        """What the tensor `name` of the result is made of; `inside`: its stack, step in the slice, and the rest of its name."""
        base_reference = part.base or self.config.base
        base, donors, owners = None, [], []
        for source in part.sources:
            model = self.models[source.model]
            own = name if inside is None else f"{inside[0]}{source.first + inside[1]}.{inside[2]}"
            found = model.stored(own)
            is_base = source.model == base_reference
            if is_base and self.entry.base != "unused":
                base = Piece(model, found) if found else None
                continue
            if is_base and source not in self.listed(tower):
                continue  # given as base_model alone
            if found is None:
                self.say("note", f"{source.model} lacks it, so it is merged without that model", name)
                continue
            donors.append(Piece(model, found))
            owners.append((source, own))
        leader = base or (donors[0] if donors else None)
        if leader is None:
            self.say("model", "no source has it", name)
            return None
        shape, dtype = leader.model.tensors[leader.name]
        role = leader.model.role(name)
        for piece in donors:
            theirs = piece.model.tensors[piece.name][1]
            if theirs.is_floating_point is not dtype.is_floating_point:
                one, two = (str(each).removeprefix("torch.") for each in (theirs, dtype))
                self.say("model", f"{piece.model.label} stores it as {one}, and {leader.model.label} as {two}. "
                         "Merge the models that they were made from", name)  # fmt: skip
                return None
        if not dtype.is_floating_point:
            return Made(name, shape, dtype, None, None, (leader,), role, leader.name)
        if self.entry.base == "needed" and base is None:
            self.say("model", f"the base {base_reference} lacks it, and {self.config.method} starts from the base", name)
            return None
        low = self.entry.donors[0]
        if not donors and base:
            self.say("note", "only the base has it, so it is copied", name)
            return Made(name, shape, self.out or dtype, None, None, (base,), role, base.name)
        if len(donors) < low:
            self.say("model", f"{self.config.method} takes {low} models, and {len(donors)} have it", name)
            return None
        shape, kept = self.fitted(name, shape, base, donors, role)
        donors, owners = [donors[i] for i in kept], [owners[i] for i in kept]
        if not donors and base:
            return Made(name, shape, self.out or dtype, None, None, (base,), role, base.name)
        method = self.method(tower, part, name, t, owners, based=base is not None)
        return Made(name, shape, self.out or dtype, method, base, tuple(donors), role, leader.name) if method else None

    def listed(self, tower: Tower) -> list[Source]:
        return [source for part in tower.slices for source in part.sources]

    def fitted(
        self, name: str, shape: tuple[int, ...], base: Piece | None, donors: list[Piece], role: str
    ) -> tuple[tuple[int, ...], list[int]]:
        """The shape in which models of other vocabularies meet, and the numbers of the donors that take part.

        Sums of changes have the base's shape, and leave out a model with fewer rows; others take the rows that all have.
        """
        if self.words and self.words.holds(name, role):
            return (self.words.rows, *shape[1:]), list(range(len(donors)))
        shapes = [piece.model.tensors[piece.name][0] for piece in donors]
        if all(other == shape for other in shapes):
            return shape, list(range(len(donors)))
        rows_alone = all(other[1:] == shape[1:] and len(other) == len(shape) for other in shapes) and shape
        if not (rows_alone and role.split(".")[0] in ("embed", "head")):
            other = next(i for i, found in enumerate(shapes) if found != shape)
            self.say("model", f"{donors[other].model.label} has the shape {list(shapes[other])}, not {list(shape)}", name)
            return shape, list(range(len(donors)))
        if self.entry.base == "needed" and table.ours(self.entry.name).on_changes:
            kept = [i for i, found in enumerate(shapes) if found[0] >= shape[0]]
            for i, found in enumerate(shapes):
                what = "those beyond are left out" if found[0] > shape[0] else "the model is left out here"
                if found[0] != shape[0]:
                    self.say("note", f"{donors[i].model.label} has {found[0]} rows and the base {shape[0]}; {what}", name)
            return shape, kept
        least = min(found[0] for found in (*shapes, shape))
        self.say("note", f"models have {sorted({found[0] for found in (*shapes, shape)})} rows; the first {least} are merged. "
                 "Set tokenizer_source if ids differ", name)  # fmt: skip
        return (least, *shape[1:]), list(range(len(donors)))

    def method(
        self, tower: Tower, part: Slice, name: str, t: float, owners: Sequence[tuple[Source, str]], *, based: bool
    ) -> TensorMethod | None:
        """Our method with the parameters of this tensor."""
        outer = [part.parameters, tower.parameters, self.config.parameters]
        each: dict[str, list[Any]] = {}
        for parameter, (_, default) in self.entry.each.items():
            each[parameter] = []
            for source, own in owners:
                value = resolved(parameter, [source.parameters, *outer], own, t)
                value = default if value is None else value
                if value is table.REQUIRED:
                    self.say("setting", f"{self.config.method} needs `{parameter}` for {source.model}; no scope gives it here", name)
                    return None
                if parameter not in table.SHARES and (isinstance(value, str) or not math.isfinite(value)):
                    self.say("setting", f"{parameter} of {source.model} must be a number; got {value}", name)
                    return None
                if parameter == "weight" and self.as_mergekit and self.config.dtype and table.ours(self.entry.name).on_changes:
                    value = torch.tensor(value, dtype=getattr(torch, self.config.dtype)).item()  # mergekit weighs in that dtype
                each[parameter].append(value)
        once: dict[str, Any] = {}
        for parameter, (_, default) in self.entry.once.items():
            value = resolved(parameter, outer, name, t)
            once[parameter] = default if value is None else value
            if once[parameter] is table.REQUIRED:
                self.say("setting", f"{self.config.method} needs `{parameter}`; no scope gives it here", name)
                return None
        if based and table.ours(self.entry.name).on_changes and each.get("weight") and not any(each["weight"]):
            self.say("note", "all weights are 0, so it stays the base's", name)
        try:
            stated = table.settings(self.config.method, each, once, based=based, as_mergekit=self.as_mergekit)
            return table.made(self.entry.name, tuple(stated.items()))
        except (SettingError, MethodError) as error:
            self.say("setting", str(error), name)
            return None

    def say(self, kind: str, reason: str, name: str) -> None:
        """Remember a reason, to be said once with all tensors that it is about."""
        self.said.setdefault((kind, reason), []).append(name)

    def finish(self, result: dict[str, Any], tensors: list[Made]) -> None:
        """Notes on what was left out, and the config of the result."""
        whole = self.config.towers[0].slices[0].sources[0].layers is None
        for reference, model in self.models.items():
            if model is not self.template:
                more = [name for name in model.tensors if self.template.stored(name) is None and (whole or not placed(name))]
                if more:
                    self.notes.append(f"{reference}: {len(more)} tensors that {self.template.label} lacks are left out, first {more[0]}")
        names = {made.name for made in tensors}
        for made in tensors:
            if made.role == "head" and self.template.ties_head(made.name):
                result["tie_word_embeddings"] = False
                self.notes.append(f"{made.name}: stored on its own, because not all models tie it to the embedding")
        rows = self.words.rows if self.words else next((made.shape[0] for made in tensors if made.role == "embed"), None)
        for inner in [result, *(value for value in result.values() if isinstance(value, dict))]:
            if rows and isinstance(inner.get("vocab_size"), int) and (self.words or rows < inner["vocab_size"]):
                inner["vocab_size"] = rows
        if self.out is not None:
            result["dtype" if "torch_dtype" not in result else "torch_dtype"] = str(self.out).removeprefix("torch.")
        assert len(names) == len(tensors), "a tensor is planned twice"
        known = names.union(*(model.tensors for model in self.models.values()))
        words = {part for name in known for part in name.split(".")}
        for wanted in sorted(self.config.filters()):
            if not any(wanted in name for name in known):
                self.notes.append(f"the filter {wanted!r} is part of no tensor's name.{nearest(wanted, words)}")
        if self.as_mergekit:
            return
        if self.config.dtype and self.entry.name != "merge.linear":
            self.notes.append(f"dtype: {self.config.dtype} is that of the result; sums run in float32 (mergekit: in {self.config.dtype})")
        if self.entry.name == "merge.dare":
            self.notes.append("what stays is divided by density, as published (mergekit: brought to the sum of sizes that it had)")


def resolved(parameter: str, scopes: Sequence[Parameters], name: str, t: float) -> Any:
    """The value of the first scope that has one for this tensor; None when none has."""
    for scope in scopes:
        if parameter in scope:
            value = scope[parameter].at(name, t)
            if value is not None:
                return value
    return None


def belongs(name: str, word: str, words: Sequence[str]) -> bool:
    """Whether a tensor is in the part of the model that mergekit calls `word`."""
    parts = name.removeprefix("model.").split(".")[:-1]
    between = any(part.startswith(BETWEEN) for part in parts[:3])
    sees = bool(set(SIGHT) & set(parts[:2])) and not (between and BETWEEN[0] in words)
    if word in SIGHT:
        return sees
    if word in BETWEEN:
        return between
    if word in TEXT:
        return not sees and not between
    return word in parts[:2] or word == "decoder" and parts[0] in ("lm_head", "proj_out")


def renumber(result: dict[str, Any], template: Input, path: str, total: int, kinds: list[tuple[Input, int]]) -> None:
    """Set the number of layers in the config, and what it says of each layer."""
    old = template.stacks[path]
    sees, decodes = any(word in path for word in SIGHT), "decoder" in path
    inner = [result, *(value for key, value in result.items() if isinstance(value, dict) and ("vision" in key) == sees)]
    keys = [key for key in COUNTS if ("decoder" in key) == decodes and any(config.get(key) == old for config in inner)]
    keys = keys or [key for key in COUNTS if any(config.get(key) == old for config in inner)]
    for config in inner:
        if keys and config.get(keys[0]) == old:
            config[keys[0]] = total
        for key, value in list(config.items()):
            if isinstance(value, list) and len(value) == old and key.endswith(("layer_types", "rope_layers", "_pattern")):
                config[key] = [listed(model, key, value)[index] for model, index in kinds]


def listed(model: Input, key: str, default: list[Any]) -> list[Any]:
    """What a model's config says of its layers under this key."""
    for config in [model.config, *(value for value in model.config.values() if isinstance(value, dict))]:
        if isinstance(config.get(key), list):
            return config[key]
    return default
