"""What a mergekit configuration says, as frozen dataclasses.

A parameter is a value, a list over the layers of a slice, or either with a filter on tensor names; the first entry
whose filter matches wins. Source: arcee-ai/mergekit, its YAML configuration.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelwright.core.errors import RecipeError, nearest

KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype", "parameters", "tokenizer_source", "tokenizer",
    "chat_template", "name",
)  # fmt: skip
MOE_KEYS = ("base_model", "gate_mode", "dtype", "experts_per_token", "experts", "shared_experts", "architecture", "name")
DTYPES = ("float32", "float16", "bfloat16", "float64")
TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
WORDS_KEYS = ("tokens", "pad_to_multiple_of")  # of `tokenizer`, and easily put beside it
MISSPELT = 0.8  # likeness from which a key counts as a misspelt one
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

Value = bool | float | str | tuple[Any, ...]


@dataclass(frozen=True)
class Reference:
    """A model: a folder or hub name, and an adapter that is merged into it first."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    def __str__(self) -> str:
        parts = [(self.path, self.revision)] + ([(self.adapter, self.adapter_revision)] if self.adapter else [])
        return "+".join(f"{path}@{revision}" if revision else str(path) for path, revision in parts)


@dataclass(frozen=True)
class Parameter:
    """The values of a parameter, each with the part of a tensor's name that it is for; None for all."""

    entries: tuple[tuple[str | None, Value], ...]

    def at(self, name: str, t: float) -> Any:
        """The value for a tensor of this name at place t, 0 to 1, of its slice; None where no filter matches."""
        for wanted, value in self.entries:
            if wanted is None or wanted == "*" or wanted in name:
                return along(value, t) if isinstance(value, tuple) else value
        return None


Parameters = Mapping[str, Parameter]


def along(values: Sequence[Any], t: float) -> Any:
    """The value at t of straight lines between equally spaced anchors; of what are no numbers, the anchor before."""
    last = len(values) - 1
    below = min(int(t * last), max(last - 1, 0))
    if last == 0 or not all(isinstance(value, float) for value in values):
        return values[int(t * last)]
    share = t * last - below
    return (1 - share) * values[below] + share * values[below + 1]


@dataclass(frozen=True)
class Source:
    """Layers [start, stop) of a model, or all of it, with parameters of its own."""

    model: Reference
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)

    @property
    def first(self) -> int:
        """Its first layer."""
        return self.layers[0] if self.layers else 0


@dataclass(frozen=True)
class Slice:
    """Layers of the result, and what they are made of."""

    sources: tuple[Source, ...]
    base: Reference | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Tower:
    """A part of the model with its own layers; named "" when it is all."""

    name: str
    slices: tuple[Slice, ...]
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Where a token's embedding comes from: a model's row for a token or an id, or zeros."""

    model: Reference | None = None
    token: str | None = None
    number: int | None = None
    force: bool = False  # also in models that have the token


@dataclass(frozen=True)
class Vocabulary:
    """The result's tokenizer: "union", "base" or a model's."""

    source: str | Reference
    tokens: Mapping[str, Row] = field(default_factory=dict)
    multiple: int = 1  # of which the number of embedding rows is one


@dataclass(frozen=True)
class Config:
    """One merge."""

    method: str
    towers: tuple[Tower, ...]
    base: Reference | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    parameters: Parameters = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None
    name: str | None = None
    notes: tuple[str, ...] = ()
    text: str = ""  # the whole configuration as YAML, its other documents too

    @property
    def references(self) -> list[Reference]:
        """All models in the order in which they are named, the base first; each once."""
        found = [*([self.base] if self.base else [])]
        for tower in self.towers:
            for part in tower.slices:
                found += [*([part.base] if part.base else []), *(source.model for source in part.sources)]
        if self.vocabulary:
            found += [self.vocabulary.source] if isinstance(self.vocabulary.source, Reference) else []
            found += [row.model for row in self.vocabulary.tokens.values() if row.model]
        return list(dict.fromkeys(found))

    def filters(self) -> set[str]:
        """All parts of tensor names for which some parameter has a value of its own."""
        scopes = [self.parameters]
        for tower in self.towers:
            scopes.append(tower.parameters)
            for part in tower.slices:
                scopes += [part.parameters, *(source.parameters for source in part.sources)]
        entries = [entry for scope in scopes for parameter in scope.values() for entry in parameter.entries]
        return {wanted for wanted, _ in entries if wanted is not None and wanted != "*"}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts to be assembled from dense models."""

    stated: Mapping[str, Any]
    name: str | None = None
    notes: tuple[str, ...] = ()
    text: str = ""  # as of a `Config`


def read(source: str | Path | Mapping[str, Any]) -> list[Config | Experts]:
    """The merges that a configuration asks for, in order: one, or those of a file with several documents.

    Raises:
        RecipeError: all that is wrong with it, at once.
    """
    from modelwright.core import recipe

    if not isinstance(source, (str, Path, Mapping)):
        raise RecipeError(f"A configuration of mergekit is a YAML file, YAML text or a mapping; got {source!r}.")
    if isinstance(source, str) and not source.strip():
        source = {}
    documents = (
        [plain(source)] if isinstance(source, Mapping) else [part for part in recipe.parse_all(source, "configuration") if part is not None]
    )
    if not any(documents):
        raise RecipeError("The configuration is empty. Write `merge_method:` and `models:`.")
    found, problems = [], []
    for number, stated in enumerate(documents, 1):
        reader = Reader(f"document {number}: " if len(documents) > 1 else "")
        found.append(reader.document(stated))
        problems += reader.problems
    names = [made.name for made in found if made and made.name]
    problems += [f"name: {name!r} is given to {names.count(name)} documents. Give each its own." for name in dict.fromkeys(names)
                 if names.count(name) > 1]  # fmt: skip
    if len(found) > 1 and sum(made is None or made.name is None for made in found) != 1:
        problems.append("Of several documents, one has no `name`: the final one. Every other needs a name.")
    if problems:
        from modelwright.core.errors import refuse

        refuse(RecipeError, problems)
    text = "---\n".join(map(dumped, documents))
    made = [replace(one, text=text) for one in found if one is not None]
    return sorted(made, key=lambda one: one.name is None)


class Reader:
    """Reads one document; what is wrong goes to `problems`, what is left out to `notes`."""

    def __init__(self, place: str = ""):
        self.place = place
        self.problems: list[str] = []
        self.notes: list[str] = []

    def wrong(self, text: str) -> None:
        self.problems.append(self.place + text)

    def known(self, stated: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
        """Note the keys that mean nothing here; those that are nearly a key which is not stated are wrong."""
        for key in stated:
            if key in WORDS_KEYS and not where:
                self.wrong(f"{key} belongs under `tokenizer:`, as in tokenizer: {{source: union, {key}: ...}}.")
            elif key not in keys and (near := nearest(str(key), set(keys) - set(stated), MISSPELT)):
                self.wrong(f"{where}{key} is no key here.{near}")
            elif key not in keys:
                self.notes.append(f"{self.place}{where}{key}: left out, as mergekit does; it is no key here.{nearest(str(key), keys)}")

    def document(self, stated: Any) -> Config | Experts | None:
        if not isinstance(stated, Mapping):
            self.wrong(f"A mergekit configuration is a mapping with `merge_method:`; found {type(stated).__name__}.")
            return None
        if "steps" in stated and "merge_method" not in stated:
            self.wrong("This is a recipe, and no configuration of mergekit. Run it: modelwright run recipe.yaml")
            return None
        name = stated.get("name")
        name = None if name is None else str(name)
        if "experts" in stated and "merge_method" not in stated:
            self.known(stated, MOE_KEYS, "")
            if not stated.get("base_model"):
                self.wrong("experts: a mixture of experts needs `base_model:`.")
            return Experts(dict(stated), name, tuple(self.notes))
        self.known(stated, KEYS, "")
        method = stated.get("merge_method")
        if not isinstance(method, str):
            near = [key for key in stated if key not in KEYS and "merge_method" in nearest(str(key), KEYS)]
            hint = f" Is {near[0]!r} meant?" if near else " Write, for example, `merge_method: linear`."
            self.wrong(f"merge_method is missing.{hint}" if method is None else f"merge_method must be a text; got {method!r}.")
            method = ""
        made = Config(
            method=method, name=name,
            towers=self.towers(stated),
            base=self.reference(stated["base_model"], "base_model") if stated.get("base_model") is not None else None,
            dtype=self.dtype(stated, "dtype"), out_dtype=self.dtype(stated, "out_dtype"),
            parameters=self.parameters(stated, ""),
            vocabulary=self.vocabulary(stated),
            chat_template=self.chat_template(stated.get("chat_template")),
        )  # fmt: skip
        return replace(made, notes=tuple(self.notes))

    def towers(self, stated: Mapping[str, Any]) -> tuple[Tower, ...]:
        """Of `models`, `slices` or `modules`: exactly one."""
        given = [key for key in ("models", "slices", "modules") if stated.get(key) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            self.wrong(f"A configuration has exactly one of models, slices and modules; found {found}.")
            return ()
        if given != ["modules"]:
            return (Tower("", self.slices(stated, "")),)
        modules = stated["modules"]
        if not isinstance(modules, Mapping) or not modules:
            self.wrong("modules must be a mapping from the name of a part to its models or slices.")
            return ()
        towers: list[Tower] = []
        for name, inner in modules.items():
            where = f"modules.{name}."
            if not isinstance(inner, Mapping) or sum(inner.get(key) is not None for key in ("models", "slices")) != 1:
                self.wrong(f"modules.{name} must have exactly one of models and slices.")
                continue
            self.known(inner, ("models", "slices", "parameters"), where)
            towers.append(Tower(str(name), self.slices(inner, where), self.parameters(inner, where)))
        return tuple(towers)

    def slices(self, stated: Mapping[str, Any], where: str) -> tuple[Slice, ...]:
        if stated.get("models") is not None:
            return (Slice(self.sources(stated["models"], f"{where}models", whole=True)),)
        stated_slices = stated["slices"]
        if not isinstance(stated_slices, Sequence) or isinstance(stated_slices, str) or not stated_slices:
            self.wrong(f"{where}slices must be a list of entries with `sources:`.")
            return ()
        found = []
        for number, inner in enumerate(stated_slices):
            here = f"{where}slices.{number}"
            if not isinstance(inner, Mapping) or not inner.get("sources"):
                self.wrong(f"{here} must be a mapping with `sources:`, a list of models with their layer_range.")
                continue
            self.known(inner, ("sources", "base_model", "parameters", "residual_weight"), f"{here}.")
            base = inner.get("base_model")
            found.append(Slice(
                self.sources(inner["sources"], f"{here}.sources", whole=False),
                None if base is None else self.reference(base, f"{here}.base_model"),
                self.parameters(inner, f"{here}."),
            ))  # fmt: skip
        return tuple(found)

    def sources(self, stated: Any, where: str, *, whole: bool) -> tuple[Source, ...]:
        if not isinstance(stated, Sequence) or isinstance(stated, str) or not stated:
            self.wrong(f"{where} must be a list of entries such as {{model: folder}}.")
            return ()
        found = []
        for number, inner in enumerate(stated):
            here = f"{where}.{number}"
            if not isinstance(inner, Mapping) or inner.get("model") is None:
                near = nearest("model", map(str, inner)) if isinstance(inner, Mapping) else ""
                self.wrong(f"{here} must be a mapping with `model:`; got {inner!r}.{near}")
                continue
            self.known(inner, ("model", "parameters") if whole else ("model", "parameters", "layer_range"), f"{here}.")
            layers = None if whole else self.layers(inner.get("layer_range"), here)
            model = self.reference(inner["model"], f"{here}.model")
            if model:
                found.append(Source(model, layers, self.parameters(inner, f"{here}.")))
        return tuple(found)

    def layers(self, stated: Any, where: str) -> tuple[int, int]:
        numbers = isinstance(stated, Sequence) and len(stated) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in stated)
        if not numbers or not 0 <= stated[0] < stated[1]:
            self.wrong(f"{where}.layer_range must be [first, one after the last], such as [0, 24]; got {stated!r}.")
            return (0, 1)
        return (stated[0], stated[1])

    def reference(self, stated: Any, where: str) -> Reference | None:
        """A model, from "path[@revision][+adapter[@revision]]" or from a mapping."""
        if isinstance(stated, Mapping):
            self.known(stated, ("model", "lora", "override_architecture"), f"{where}.")
            parts = [self.path(stated.get("model"), f"{where}.model")]
            parts += [self.path(stated["lora"], f"{where}.lora")] if stated.get("lora") else []
            if stated.get("override_architecture"):
                self.notes.append(f"{self.place}{where}.override_architecture: left out; tensors are found by their names.")
        elif isinstance(stated, (str, int)) and not isinstance(stated, bool) and str(stated).strip():
            parts = [split_revision(text) for text in str(stated).split("+")] if not Path(str(stated)).exists() else [(str(stated), None)]
            if len(parts) > 2:
                self.wrong(f"{where} has one adapter at most, model+adapter; got {stated!r}.")
        else:
            parts = [None]
        found = [part for part in parts if part and part[0]]
        if len(found) < len(parts):
            self.wrong(f"{where} must be a model: a folder, a hub name, or {{model: ..., lora: ...}}; got {stated!r}.")
            return None
        (path, revision), (adapter, adapter_revision) = found[0], found[1] if len(found) > 1 else (None, None)
        return Reference(path, revision, adapter, adapter_revision)

    def path(self, stated: Any, where: str) -> tuple[str, str | None] | None:
        if isinstance(stated, Mapping):
            self.known(stated, ("path", "revision"), f"{where}.")
            return (str(stated["path"]), stated.get("revision")) if stated.get("path") else None
        return split_revision(stated) if isinstance(stated, str) else None

    def dtype(self, stated: Mapping[str, Any], key: str) -> str | None:
        if stated.get(key) is None:
            return None
        name = str(stated[key]).removeprefix("torch.")
        if name not in DTYPES:
            self.wrong(f"{key} is one of {', '.join(DTYPES)}; got {stated[key]!r}.{nearest(name, DTYPES)}")
        return name

    def parameters(self, stated: Mapping[str, Any], where: str) -> Parameters:
        inner = stated.get("parameters")
        if inner is None:
            return {}
        if not isinstance(inner, Mapping):
            self.wrong(f"{where}parameters must be a mapping from names to values; got {inner!r}.")
            return {}
        return {
            str(name): Parameter(self.entries(value, f"{where}parameters.{name}")) for name, value in inner.items() if value is not None
        }

    def entries(self, stated: Any, where: str) -> tuple[tuple[str | None, Value], ...]:
        conditional = [stated] if isinstance(stated, Mapping) else stated
        if isinstance(conditional, list) and conditional and isinstance(conditional[0], Mapping):
            found = []
            for inner in conditional:
                if not isinstance(inner, Mapping) or inner.get("value") is None:
                    self.wrong(f"{where} must be a list of {{filter: ..., value: ...}}; got {inner!r}.")
                    continue
                self.known(inner, ("value", "filter"), f"{where}.")
                wanted = inner.get("filter")
                found.append((None if wanted is None else str(wanted), self.value(inner["value"], where)))
            return tuple(found)
        return ((None, self.value(stated, where)),)

    def value(self, stated: Any, where: str) -> Value:
        if isinstance(stated, list):
            if not stated or any(isinstance(part, (list, Mapping)) for part in stated):
                self.wrong(f"{where} must be a value or a list of values over the layers; got {stated!r}.")
                return 0.0
            return tuple(scalar(part) for part in stated)
        if isinstance(stated, Mapping):
            self.wrong(f"{where} must be a value, a list, or {{filter: ..., value: ...}}; got {stated!r}.")
            return 0.0
        return scalar(stated)

    def vocabulary(self, stated: Mapping[str, Any]) -> Vocabulary | None:
        if stated.get("tokenizer_source") is not None and stated.get("tokenizer") is not None:
            self.wrong("A configuration has tokenizer_source or tokenizer, not both.")
            return None
        if stated.get("tokenizer_source") is not None:
            source = self.vocabulary_source(stated["tokenizer_source"], "tokenizer_source")
            return Vocabulary(source) if source else None
        inner = stated.get("tokenizer")
        if inner is None:
            return None
        if not isinstance(inner, Mapping):
            self.wrong(f"tokenizer must be a mapping such as {{source: union}}; got {inner!r}.")
            return None
        self.known(inner, ("source", "tokens", "pad_to_multiple_of"), "tokenizer.")
        source = self.vocabulary_source(inner.get("source") or "union", "tokenizer.source")
        multiple = inner.get("pad_to_multiple_of")
        if multiple is not None and (not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1):
            self.wrong(f"tokenizer.pad_to_multiple_of must be a whole number of at least 1; got {multiple!r}.")
            multiple = None
        tokens = inner.get("tokens") or {}
        if not isinstance(tokens, Mapping):
            self.wrong(f"tokenizer.tokens must be a mapping from tokens to where their embeddings come from; got {tokens!r}.")
            tokens = {}
        rows = {str(token): self.row(value, f"tokenizer.tokens.{token}", str(token)) for token, value in tokens.items()}
        return Vocabulary(source, rows, multiple or 1) if source else None

    def vocabulary_source(self, stated: Any, where: str) -> str | Reference | None:
        return stated if stated in ("union", "base") else self.reference(stated, where)

    def row(self, stated: Any, where: str, token: str) -> Row:
        if not isinstance(stated, Mapping) or stated.get("source") is None:
            self.wrong(f"{where} must be a mapping with `source:`; got {stated!r}.")
            return Row()
        self.known(stated, ("source", "force"), f"{where}.")
        force, source = bool(stated.get("force", False)), stated["source"]
        if isinstance(source, Mapping) and "kind" in source:
            self.known(source, ("kind", "model", "token", "token_id"), f"{where}.source.")
        if isinstance(source, Mapping) and source.get("kind") == "zero":
            return Row(force=force)
        if isinstance(source, Mapping) and source.get("kind") == "model_token":
            if (source.get("token") is None) == (source.get("token_id") is None):
                self.wrong(f"{where}.source has exactly one of token and token_id.")
            number = source.get("token_id")
            return Row(self.reference(source.get("model"), f"{where}.source.model"), source.get("token"), number, force)
        if isinstance(source, Mapping) and "kind" in source:
            self.wrong(f"{where}.source.kind is model_token or zero; got {source['kind']!r}.")
            return Row()
        return Row(self.reference(source, f"{where}.source"), token, None, force)

    def chat_template(self, stated: Any) -> str | None:
        if stated is None:
            return None
        if not isinstance(stated, str) or not (stated == "auto" or stated in TEMPLATES or "{" in stated):
            near = nearest(str(stated), (*TEMPLATES, "auto"))
            self.wrong(f"chat_template is auto, one of {', '.join(TEMPLATES)}, or a Jinja template; got {stated!r}.{near}")
            return None
        return stated


def split_revision(text: str) -> tuple[str, str | None]:
    """("path", "revision") of "path@revision"."""
    path, _, revision = text.partition("@") if not Path(text).exists() else (text, "", "")
    return path, revision or None


def scalar(stated: Any) -> Any:
    """A number, a truth value or a text; numbers written as texts are numbers."""
    if isinstance(stated, bool):
        return stated
    if isinstance(stated, (int, float)):
        return float(stated)
    text = str(stated).strip()
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) else text


def dumped(stated: Mapping[str, Any]) -> str:
    """The configuration as YAML."""
    from modelwright.core.recipe import _yaml

    stream = io.StringIO()
    _yaml().dump(plain(stated), stream)
    return stream.getvalue()


def plain(value: Any) -> Any:
    """Mappings and lists as dicts and lists, paths as texts."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
