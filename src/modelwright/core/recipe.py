"""Recipes: a model, text, steps and a place to save, in YAML or in Python; run step by step, resumed after a kill.

Every finished step is a folder beside the result, named by the hash of its settings and inputs; a run that finds
the folder of a step goes on from there. Long steps keep their progress block by block, training step by step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import data as texts
from . import find, kinds, walk
from .errors import Faults, ModelError, ModelwrightError, PlanError, RecipeError, WeightsError, nearest, refuse
from .files import alone, place_of, refuse_existing, refuse_inputs, whole_folder, write_json, write_text
from .given import Given
from .measure import peak_memory, sizes
from .method import Method
from .model import RECORD, Folded, Model, base_of, check_readable, open
from .progress import console

INPUT = "$input"  # the model that the recipe starts from
GIVEN = ("donors", "base", "teacher")  # needs that a step states beside its settings
TEXT = "data"  # and text of its own
KEYS = ("model", "data", "samples", "length", "seed", "steps", "save")


@dataclass(frozen=True)
class Step:
    """A method with the models that it is given, and text of its own under `data` where the recipe's is not for it."""

    method: Method
    given: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> Any:
        """The step as YAML has it."""
        inside = {**self.given, **self.method.settings()}
        return {self.method.name(): inside} if inside else self.method.name()


@dataclass(frozen=True)
class Recipe:
    """What to do: `steps` on `model`, with text `data`, saved to `save`."""

    model: Any = "starter"  # a folder, a hub name, "starter", or {new: llama, config: {...}} for fresh weights
    steps: tuple[Step, ...] = ()
    data: Any = None  # .txt .jsonl .parquet, a folder, a hub name, or "corpus"
    samples: int = 128  # calibration sequences
    length: int = 512  # tokens in each
    seed: int = 0
    save: str | None = None

    def plain(self) -> dict[str, Any]:
        """The recipe as lists, dicts and scalars."""
        shown: dict[str, Any] = {"model": self.model.name if isinstance(self.model, Model) else _plain_name(self.model)}
        shown |= {
            key: getattr(self, key) for key in ("data", "samples", "length", "seed") if getattr(self, key) != getattr(Recipe, key, None)
        }
        shown["steps"] = [step.plain() for step in self.steps]
        return shown | ({"save": self.save} if self.save else {})

    def yaml(self) -> str:
        """The recipe as YAML; `read` gives it back."""
        stream = io.StringIO()
        _yaml().dump(self.plain(), stream)
        return stream.getvalue()


def _plain_name(model: Any) -> Any:
    return str(model) if isinstance(model, Path) else model


def placed(name: Any, own: str = "") -> str:
    """A name in a recipe so that it means the same from any working directory: what lies here gets its whole path."""
    if "+" in str(name) and not Path(name).exists():  # a model and its adapters
        return "+".join(placed(part, own) for part in str(name).split("+"))
    return str(name) if str(name) == own or not Path(name).exists() else str(Path(name).resolve())


def _placed_text(data: Any) -> Any:
    """The same for a text."""
    if isinstance(data, Mapping):
        return {**data, "source": placed(data["source"], "corpus")}
    return placed(data, "corpus") if isinstance(data, (str, Path)) else data


def whole_names(recipe: Recipe) -> Recipe:
    """The recipe with every model and text in it named so that it runs from any working directory."""
    model, data = recipe.model.name if isinstance(recipe.model, Model) else recipe.model, recipe.data
    data = _placed_text(data)
    steps = []
    for step in recipe.steps:
        given: dict[str, Any] = {
            need: [placed(name, INPUT) for name in value] if isinstance(value, list) else placed(value, INPUT)
            for need, value in step.given.items()
            if need != TEXT
        }
        given |= {TEXT: _placed_text(step.given[TEXT])} if TEXT in step.given else {}
        method = step.method
        if sources := getattr(method, "texts", None):
            method = replace(method, texts=tuple(placed(source, "corpus") for source in sources))  # type: ignore[call-arg]
        steps.append(Step(method, given))
    return replace(recipe, model=model if isinstance(model, Mapping) else placed(model, "starter"), data=data, steps=tuple(steps))


def read(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file, YAML text or a mapping, with `overrides` such as "steps.0.blocks=2".

    Raises:
        RecipeError: not YAML, or keys that a recipe does not have.
        SettingError, MethodError, NeedError: for the steps; all that is wrong is said at once.
    """
    stated = source if isinstance(source, Mapping) else parse(source)
    if not isinstance(stated, Mapping):
        raise RecipeError(f"A recipe is a mapping with the keys {', '.join(KEYS)}; found {type(stated).__name__}.")
    if "merge_method" in stated and "steps" not in stated:
        raise RecipeError("This is a configuration of mergekit, and no recipe. Merge it: modelwright merge config.yaml folder/")
    stated = json.loads(json.dumps(stated, default=str))
    problems = []
    for change in overrides:
        try:
            override(stated, change)
        except RecipeError as error:
            problems.append(str(error))
    problems += [f"A recipe has no key {key!r}.{nearest(key, KEYS)} Its keys are {', '.join(KEYS)}." for key in stated if key not in KEYS]
    steps = stated.get("steps")
    if not isinstance(steps, list) or not steps:
        problems.append("A recipe needs `steps:`, a list of methods with their settings, such as `- quantize.rtn: {bits: 4}`.")
        steps = []
    made: dict[int, Step] = {}
    for number, text in enumerate(steps):
        try:
            made[number] = _step(text)
        except ModelwrightError as error:
            problems += [f"step {number}: {reason}" for reason in error.reasons]
    if problems:  # else the plan says these, among what else it finds
        problems += [f"step {number}: {word}" for number, step in made.items() for word in walk.strange_patterns(step.method)]
    for key in ("samples", "length", "seed"):
        if key in stated and (
            not isinstance(stated[key], int) or isinstance(stated[key], bool) or stated[key] < (0 if key == "seed" else 1)
        ):
            problems.append(f"{key} must be a whole number; got {stated[key]!r}.")
    for key, types in (("model", (str, dict)), ("data", (str, dict, type(None))), ("save", (str,))):
        if key in stated and not isinstance(stated[key], types):
            problems.append(f"{key} must be a text{' or a mapping' if dict in types else ''}; got {stated[key]!r}. Put it in quotes.")
    refuse(RecipeError, problems)
    known = {key: stated[key] for key in KEYS if key in stated and key != "steps"}
    return Recipe(**known, steps=tuple(made.values()))


def parse(source: str | Path) -> Any:
    """The contents of a YAML file, or of YAML text."""
    return _loaded(source, "recipe", lambda text: _yaml().load(text))


def parse_all(source: str | Path, what: str) -> list[Any]:
    """The documents of a YAML file, or of YAML text; `what` they are, for messages."""
    return _loaded(source, what, lambda text: list(_yaml().load_all(text)))


def _loaded(source: str | Path, what: str, load: Callable[[str], Any]) -> Any:
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import YAMLError

    text, name = str(source), f"The {what}"
    if "\n" not in text and not text.lstrip().startswith("{"):
        path, name = Path(text), text
        if not path.is_file():
            raise RecipeError(f"There is no {what} {path}. Name a YAML file.")
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    try:
        return load(text)
    except DuplicateKeyError as error:
        key, line = str(error.problem).split('"')[1], error.problem_mark.line + 1
        raise RecipeError(f"{name} has the key {key!r} twice, the second time in line {line}. Keep one.") from None
    except YAMLError as error:
        raise RecipeError(f"{name} is not valid YAML: {error}".replace('in "<unicode string>", ', "in ")) from error


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml: Any = YAML(typ="safe", pure=True)  # YAML 1.2: `on` is a text and 1e-4 a number
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 110
    return yaml


def _step(stated: Any) -> Step:
    if isinstance(stated, str):
        stated = {stated: {}}
    if not isinstance(stated, Mapping) or len(stated) != 1:
        raise RecipeError(f"A step is one method with its settings, such as `prune.wanda: {{sparsity: 0.5}}`; got {stated!r}.")
    name, settings = next(iter(stated.items()))
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise RecipeError(f"{name}: settings are a mapping, such as {{sparsity: 0.5}}; got {settings!r}.")
    cls = find.find(name)
    given = {key: settings[key] for key in GIVEN if key in settings and key in cls.needs()}
    if TEXT in settings and cls.reads_text() and TEXT not in {field.name for field in dataclasses.fields(cls)}:
        given[TEXT] = settings[TEXT]
        if not isinstance(given[TEXT], (str, dict)):
            raise RecipeError(f"{name}: data must be a text, or {{source: ..., held: 0.1}}; got {given[TEXT]!r}.")
    for key, value in ((key, given[key]) for key in GIVEN if key in given):
        listed = value if key == "donors" else [value]
        if not isinstance(listed, list) or not all(isinstance(each, (str, Path)) for each in listed):
            raise RecipeError(
                f"{name}: {key} must be {'a list of models' if key == 'donors' else 'a model'}, by folder or hub name; got {value!r}."
            )
    return Step(cls.build({key: value for key, value in settings.items() if key not in given}), given)


def override(stated: Any, text: str) -> None:
    """Set one value, such as steps.0.blocks=2; a step's method name is left out of the path."""
    path, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"An override is written path=value, such as steps.0.blocks=2; got {text!r}.")
    parsed = parse(value + "\n") if value else None
    *way, last = path.split(".")
    here = stated
    if way[:1] == ["steps"] and len(way) == 2 and way[1].isdigit():
        steps = stated.get("steps") or []
        if int(way[1]) < len(steps) and isinstance(steps[int(way[1])], str):
            steps[int(way[1])] = {steps[int(way[1])]: {}}  # a step that is its bare name
    for place, part in enumerate(way):
        if place == 1 and way[0] == "steps" and isinstance(here, list) and not (part.isdigit() and int(part) < len(here)):
            known = f"{len(here)} steps, numbered 0 to {len(here) - 1}" if len(here) > 1 else f"{len(here)} step, numbered 0"
            raise RecipeError(f"--set {text}: the recipe has {known}; there is no step {part}.")
        here = (
            here[int(part)]
            if isinstance(here, list) and part.isdigit() and int(part) < len(here)
            else here.get(part)
            if isinstance(here, dict)
            else None
        )
        if here is None:
            raise RecipeError(f"--set {text}: the recipe has no {part!r} there.")
    if isinstance(here, dict) and len(way) == 2 and way[0] == "steps":
        method, settings = next(iter(here.items()))
        here[method] = settings = settings or {}
        here = settings
    elif not isinstance(here, dict):
        raise RecipeError(f"--set {text}: steps.{last} is a whole step; set one of its settings, such as steps.{last}.bits=4.")
    here[last] = parsed


# Running


@dataclass
class Run:
    """A finished run: the model, and one row of the account for the input and for every step."""

    model: Model
    account: list[dict[str, Any]]


def run(
    recipe: Recipe | str | Path | Model,
    steps: Sequence[Method | Step] | None = None,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    keep_steps: bool = False,
    work: Path | None = None,
    trust_remote_code: bool = False,
    **others: Any,
) -> Run:
    """Run a recipe: `run("recipe.yaml")`, or `run("starter", [Wanda(), ...], data="corpus", save="small/")`.

    keep_steps: leave the folders of the steps; work: where they lie, by default beside the result. Runs that share
    a folder share the steps that they have in common. trust_remote_code: let the input model's folder run code of its own;
    a recipe cannot say so itself.

    Raises, before work starts, a subclass of ModelwrightError for whatever is missing or cannot be done.
    """
    if steps is not None:
        recipe = Recipe(model=recipe, steps=tuple(step if isinstance(step, Step) else Step(step) for step in steps), **others)  # type: ignore[arg-type]
    elif not isinstance(recipe, Recipe):
        recipe = read(str(recipe), overrides)
    from . import plan  # which itself reads recipes

    if trust_remote_code and isinstance(recipe.model, (str, Path)):
        recipe = replace(recipe, model=open(recipe.model, trust_remote_code=True))
    faults = Faults()
    with faults.collected():
        _refuse_target(recipe, overwrite)
    model, given = prepare(recipe, faults)
    predicted = plan.predicted(recipe, model, given, faults).rows
    faults.refuse()
    assert model is not None and recipe.save is not None
    for name in {id(each): each for each in (model, *map(open, map(str, _models_of(recipe))))}.values():
        check_readable(name)
    final = place_of(recipe.save)
    with contextlib.nullcontext(work) if work else alone(final) as beside:
        refuse_existing(final, overwrite=overwrite)
        account = _steps(recipe, model, given, predicted, beside, final, overwrite)
        if not keep_steps and work is None:
            _remove_steps(beside)
    return Run(open(final), account)


def _steps(
    recipe: Recipe, model: Model, given: Given, predicted: Sequence[Any], beside: Path, final: Path, overwrite: bool
) -> list[dict[str, Any]]:
    """Run the steps, each into a folder in `beside` unless that is there, and write the result; returns the account."""
    from modelwright import __version__, report

    source = _anew(model)
    key = hashed(__version__, model_digest(model), _text_digest(given), recipe.samples, recipe.length, recipe.seed)
    account: list[dict[str, Any]] = [{"step": "input", **sizes(model)}]
    folder: Path | None = None
    for number, step in enumerate(recipe.steps):
        key = hashed(
            key, step.plain(), _code_digest(step.method), [model_digest(open(name)) for name in _names(step.given) if name != INPUT],
            [texts.digest(texts.read(source)) for source in getattr(step.method, "texts", None) or ()],
            [_text_digest(Given(**text)) for text in [step_text(step)] if text],
        )  # fmt: skip
        folder = beside / f"{number:02d}-{step.method.name().replace('/', '_')}-{key}"
        if folder.is_dir():
            console.print(f"step {number} {step.method.name()}: done before, taken from {folder.name}")
            row = json.loads((beside / f"{folder.name}.json").read_text("utf-8"))
        else:
            unfinished = beside / f"{folder.name}.work"
            local = replace(given, **step_models(step, source), **step_text(step), work=unfinished, notes=[], details=[])
            started = time.perf_counter()
            whole = beside / f"{folder.name}.whole"
            faults = Faults()
            with peak_memory() as memory, faults.collected(f"step {number}: {step.method.name()}: "):
                result = walk.write(model, step.method, local, whole, overwrite=True)
            faults.refuse()
            row = {"step": step.method.name(), "seconds": time.perf_counter() - started, "peak_bytes": memory.bytes, **sizes(result)}
            row["notes"] = local.notes + _surprises(predicted[number + 1], row)
            write_json(beside / f"{folder.name}.json", row)
            os.rename(whole, folder)
            shutil.rmtree(unfinished, ignore_errors=True)
        account.append(row)
        model = open(folder)
    assert folder is not None
    with whole_folder(final, overwrite=overwrite) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        write_text(partial / "recipe.yaml", whole_names(recipe).yaml())
        write_json(partial / "account.json", account)
        _keep_base(partial, beside, final)
        if report.uneven(widths := report.bits_by_matrix(model)):
            write_text(partial / report.BITS, report.bits_plot(widths))
        write_text(partial / "README.md", report.run_card(recipe.plain()["model"], whole_names(recipe).yaml(), account, partial))
    return account


def _remove_steps(beside: Path) -> None:
    """Remove the folders of steps, and nothing else that lies there."""
    for path in beside.iterdir():
        if re.fullmatch(r"\d\d+-.+-[0-9a-f]{16}(\.json|\.work|\.whole)?(\.partial)?", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _refuse_target(recipe: Recipe, overwrite: bool) -> None:
    """Raise RecipeError when the result has no place to go."""
    if recipe.save is None:
        raise RecipeError("The recipe does not say where to save. Add `save: folder/`.")
    for name in [recipe.model, *_models_of(recipe)]:
        with contextlib.suppress(ModelError, WeightsError):  # a model that cannot be opened is said where it is named
            refuse_inputs(recipe.save, [] if isinstance(name, Mapping) else open(name).sources)
    refuse_existing(recipe.save, overwrite=overwrite)


def _surprises(expected: Any, found: Mapping[str, Any]) -> list[str]:
    """Where what was measured is not what the plan and the method's promise said."""
    notes = []
    for what, one, two in (("bytes", expected.bytes, found["bytes_memory"]), ("zeros", expected.zeros, found["zeros"])):
        fewer = what == "zeros" and two >= one  # more zeros than promised are no surprise: rounding makes them too
        if abs(one - two) > 0.02 * found["parameters"] and not fewer:
            notes.append(f"{found['step']}: {one:,.0f} {what} were predicted, {two:,.0f} were measured")
    return notes


def _keep_base(partial: Path, beside: Path, final: Path) -> None:
    """Take along the base of an adapter that stands on an earlier step, and name its place."""
    file = partial / "adapter_config.json"
    if not file.is_file():
        return
    stated = json.loads(file.read_text("utf-8"))
    base = Path(stated["base_model_name_or_path"])
    if base.absolute().is_relative_to(beside.absolute()):
        if not (partial / "base").is_dir():  # which a step that changed the base has written already
            shutil.copytree(base, partial / "base")
        write_json(file, stated | {"base_model_name_or_path": str(final.absolute() / "base")})


def _models_of(recipe: Recipe) -> list[Any]:
    return [name for step in recipe.steps for name in _names(step.given) if name != INPUT]


def _text_digest(given: Given) -> str | None:
    return texts.digest(given.data) if isinstance(given.data, texts.Text) else None


def _code_digest(method: Method) -> str:
    """A hash of the file that holds the method, so that a changed formula is run again."""
    return hashlib.sha256(Path(inspect.getfile(type(method))).read_bytes()).hexdigest()


def prepare(recipe: Recipe, faults: Faults) -> tuple[Model | None, Given]:
    """The input model and what all steps are given. What is missing or cannot be opened goes to `faults`."""
    text = None
    with faults.collected("data: "):
        text = read_data(recipe.data)
    given = Given(data=text, seed=recipe.seed, samples=recipe.samples, length=recipe.length)
    present = replace(given, data=() if recipe.data is not None else None)
    model = None
    with faults.collected("model: "):
        if isinstance(recipe.model, Mapping):
            from modelwright.starter import new

            if recipe.data is None or text is not None:
                model = new.model(recipe.model, text, recipe.seed)
        else:
            model = open(recipe.model)
    for number, step in enumerate(recipe.steps):
        named = {key: step.given[key] for key in GIVEN if key in step.given}
        opened = {INPUT: model} if model else {}
        for key in named:
            for name in _names({key: named[key]}):
                if name != INPUT:
                    with faults.collected(f"step {number}: {step.method.name()}: {key}: "):
                        opened[name] = open(name)
        own: dict[str, Any] = {TEXT: ()} if TEXT in step.given else {}
        with faults.collected(f"step {number}: {step.method.name()}: data: "):
            step_text(step)
        with faults.collected(f"step {number}: "):
            replace(present, **named, **own).refuse_lacking(step.method)
        for source in (
            *(getattr(step.method, "texts", None) or ()),
            *(getattr(step.method, key) for key in getattr(step.method, "reads", ())),
        ):
            with faults.collected(f"step {number}: {step.method.name()}: "):
                texts.read(source)
        donors = [opened[name] for name in named.get("donors", ()) if name in opened]
        doubled = walk.doubled(step.method, None if number else model, donors)
        faults += [PlanError(f"step {number}: {sentence}") for sentence in doubled]
        beside = [opened[name] for name in (named.get("base"),) if name in opened]
        with faults.collected(f"step {number}: {step.method.name()}: "):
            kinds.refuse_unlike(step.method, [*([model] if model and not number else ()), *donors, *beside])
    return model, given


def read_data(stated: Any) -> texts.Text | None:
    """The text of a recipe's `data:`: a source, or {source: ..., held: 0.1} to leave that part out, or several in turn.

    Raises:
        RecipeError: a mapping with other keys.
    """
    if not isinstance(stated, Mapping):
        return None if stated is None else texts.read(stated)
    parts = stated.get("held")
    parts = parts if isinstance(parts, list) else [parts]
    sound = set(stated) == {"source", "held"} and isinstance(stated["source"], str)
    if not sound or not all(isinstance(part, float) and 0 < part < 1 for part in parts):
        raise RecipeError(
            f"data is a source, or a mapping such as {{source: my.txt, held: 0.1}}, with one share or a list; got {dict(stated)!r}."
        )
    text = texts.read(stated["source"])
    for part in parts:
        text = text.split(part)[0]
    return text


def check_order(recipe: Recipe, model: Model) -> tuple[dict[int, list[str]], list[str]]:
    """(why steps cannot follow those before them, by number; warnings)."""
    marks, warnings = set(model.marks), []
    problems: dict[int, list[str]] = {}
    makers: dict[str, str] = {}
    for number, step in enumerate(recipe.steps):
        method = step.method
        for mark in method.lacks(marks):
            maker = makers.get(f"-{mark}")
            because = f"step {maker} leaves it without" if maker else f"the model is {', '.join(sorted(marks))}"
            packed = mark == "float" and not maker and "packed" in marks
            advice = "Make it dense before, with `quantize.dequantize`." if packed else "Put it earlier."
            sentence = f"step {number}: {method.name()} wants a model that is {mark}, but {because}. {advice}"
            problems.setdefault(number, []).append(sentence)
        for mark in sorted(method.lost() & marks):
            if mark == "sparse":
                warnings.append(f"step {number} ({method.name()}) fills in the zeros of step {makers.get(mark, 'input')}.")
            makers[f"-{mark}"] = f"{number} ({method.name()})"
        for mark in method.gained():
            makers[mark] = f"{number} ({method.name()})"
        marks = (marks | method.gained()) - method.lost()
    return problems, warnings


def step_text(step: Step) -> dict[str, Any]:
    """The text of its own that a step has, under `data`; nothing where it has the recipe's."""
    return {TEXT: read_data(step.given[TEXT])} if TEXT in step.given else {}


def step_models(step: Step, source: Model) -> dict[str, Any]:
    """The models that a step names, opened."""

    def opened(name: Any) -> Model:
        return open(name) if name != INPUT else _anew(source)

    models: dict[str, Any] = {}
    if "donors" in step.given:
        models["donors"] = [opened(name) for name in step.given["donors"]]
    for key in ("base", "teacher"):
        if key in step.given:
            models[key] = opened(step.given[key])
    return models


def _anew(model: Model) -> Model:
    """The model opened, or copied, once more, because steps change models in memory."""
    if isinstance(model, Folded) and not model.changed:
        return Folded(model.base, model.adapter)
    if model.folder is None or model.changed:
        return copy.deepcopy(model)
    return open(str(model.folder), trust_remote_code=model.trust_remote_code)


def model_digest(model: Model) -> str:
    """A hash of everything that a model is: all its files, and an adapter's base; or its tensors, if they changed in memory."""
    digest = hashlib.blake2b(digest_size=16)
    if not model.sources or model.changed:
        for name, value in model.module.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
    listed = [path for place in model.sources for path in (sorted(place.iterdir()) if place.is_dir() else [place])]
    for file in (path for path in listed if path.is_file() and path.name not in (RECORD, "account.json")):
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            while block := handle.read(1 << 24):
                digest.update(block)
    base = model.sources[-1] / "adapter_config.json"
    if len(model.sources) == 1 and base.is_file():
        digest.update(model_digest(open(base_of(base))).encode())
    return digest.hexdigest()


def _names(given: Mapping[str, Any]) -> list[str]:
    found = []
    for value in (value for need, value in given.items() if need != TEXT):
        found += value if isinstance(value, list) else [value]
    return found


def hashed(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
