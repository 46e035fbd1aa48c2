"""Adapters side by side: each with as many trained numbers and as much text or as many examples as the others.

    modelwright run recipes/compare-adapters.yaml

A comparison trains every adapter on every task with every seed. Its size is chosen so that no more numbers train than `parameters`
allows, counted on an empty model; its learning rate, of the same few for all, is the one that does best on a part of the training data
after one run of the first seed. What is reported is measured on what no run has seen. Runs that are done are kept beside the result
until all of them are, so that a comparison that was killed goes on.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import small
from .core import adapters, labels, measure, plan, recipe, tuners, walk
from .core import data as texts
from .core.errors import DataError, ModelwrightError, RecipeError, SettingError, nearest, refuse
from .core.files import alone, place_of, refuse_existing, whole_folder, write_json, write_text
from .core.given import Given
from .core.method import AdapterMethod
from .core.model import Model, emptied, open, quiet, unwrapped
from .core.progress import console
from .core.public import callable_module
from .core.training import Course, Parts, Together, Training, Zeros, next_token, train

KEYS = ("compare", "tasks", "parameters", "tokens", "batch", "length", "rates", "seeds", "held", "save")
MADE = ("encoder", "vit")  # models that are made here
TUNED = 0.15  # of the training data, on which learning rates are compared
QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # of Student's t at 97.5 %, from 1 degree of freedom on
HEAD, WHOLE = "nothing", "all weights"  # rows that stand beside the adapters
Losses = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Parts]]


@dataclass(frozen=True)
class Comparison:
    """What to compare: `tokens` are seen in training, repeats too; `parameters` is a number, or a share such as 1 % of a model's."""

    methods: tuple[AdapterMethod, ...]
    tasks: Mapping[str, Mapping[str, Any]]  # name -> {model, data}, and examples, the number of labelled ones to train on
    save: str
    parameters: str | int = "1%"
    tokens: int = 100_000
    batch: int = 8  # sequences, or twice as many examples, in a step
    length: int = 128
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    held: float = 0.2  # of the data, to measure on; where the source sets some aside itself, that


def read(stated: Mapping[str, Any]) -> Comparison:
    """A comparison from a mapping, as YAML has it.

    Raises:
        RecipeError: keys or values that are none of a comparison's; all that is wrong is said at once.
    """
    problems = [
        f"A comparison has no key {key!r}.{nearest(key, KEYS)} Its keys are {', '.join(KEYS)}." for key in stated if key not in KEYS
    ]
    methods: list[AdapterMethod] = []
    listed = stated.get("compare")
    for number, text in enumerate(listed if isinstance(listed, list) else ()):
        try:
            method = recipe.read({"steps": [text]}).steps[0].method
        except ModelwrightError as error:
            problems += [f"method {number}: {reason.removeprefix('step 0: ')}" for reason in error.reasons]
            continue
        if isinstance(method, AdapterMethod) and not hasattr(method, "sources"):
            methods.append(method)
        else:
            problems.append(f"method {number}: {method.name()} is no adapter that begins with nothing beside a model. Leave it out.")
    given = stated.get("tasks")
    tasks: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    if not tasks or not all(isinstance(task, Mapping) and set(task) - {"examples"} == {"model", "data"} for task in tasks.values()):
        problems.append("tasks are names, each with {model: ..., data: ...}, such as `code: {model: starter, data: my.txt}`.")
    counts = [task.get("examples") or [] for task in tasks.values() if isinstance(task, Mapping)]
    if not all(isinstance(own, list) and all(isinstance(count, int) and count > 1 for count in own) for own in counts):
        problems.append("examples are a list of whole numbers of at least 2, such as [50, 100, 250].")
    for key, least in (("tokens", 1), ("batch", 1), ("length", 2)):
        if not isinstance(stated.get(key, least), int) or stated.get(key, least) < least:
            problems.append(f"{key} must be a whole number of at least {least}; got {stated[key]!r}.")
    for key in ("rates", "seeds"):
        found = stated.get(key, [1])
        if not isinstance(found, list) or not found or not all(isinstance(one, (int, float)) and one >= 0 for one in found):
            problems.append(f"{key} must be a list of numbers; got {found!r}.")
    if not isinstance(stated.get("save"), str):
        problems.append("Say where to save. Add `save: folder/`.")
    if not methods and not problems:
        problems.append("compare names no adapter. Give a list such as [adapt.lora, adapt.dora].")
    refuse(RecipeError, problems)
    more = {key: stated[key] for key in ("parameters", "tokens", "batch", "length", "held") if key in stated}
    more |= {key: tuple(stated[key]) for key in ("rates", "seeds") if key in stated}
    return Comparison(tuple(methods), dict(_apart(tasks)), stated["save"], **more)


def runs_of(asked: Comparison) -> int:
    """How many training runs a comparison takes at most."""
    return len(asked.tasks) * (len(asked.methods) + 2) * (len(asked.rates) + len(asked.seeds))


def _apart(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tasks, of one with a list of `examples` one for each number."""
    for name, task in tasks.items():
        counts = task.get("examples")
        for count in counts if isinstance(counts, list) else [counts]:
            alone = {"model": task["model"], "data": task["data"]}
            yield (name, alone) if count is None else (f"{name}, {count} examples", alone | {"curve": name, "examples": count})


def compare(stated: Comparison | Mapping[str, Any] | str | Path, *, overwrite: bool = False) -> list[dict[str, Any]]:
    """Run a comparison; writes comparison.json, README.md and a plot, comparison.svg, to its folder, and returns the rows.

    Raises, before work starts, a subclass of ModelwrightError for what is missing or cannot be done; an adapter that cannot stand on a
    task's model has a row that says why.
    """
    asked = stated if isinstance(stated, Comparison) else read(recipe.parse(stated) if isinstance(stated, (str, Path)) else stated)
    final = place_of(asked.save)
    refuse_existing(final, overwrite=overwrite)
    with alone(final) as beside:
        tasks = {name: task_of(name, asked, beside) for name, task in asked.tasks.items()}
        rows = [row for task in tasks.values() for row in task.rows(beside)]
        with whole_folder(final, overwrite=overwrite) as partial:
            from . import report

            write_json(partial / "comparison.json", {"asked": _plain(asked), "rows": rows})
            write_text(partial / "comparison.svg", report.comparison_plot(rows))
            write_text(partial / "README.md", report.comparison_page(rows, asked))
        for left in beside.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return rows


def _plain(asked: Comparison) -> dict[str, Any]:
    return asdict(asked) | {"methods": [{method.name(): method.settings()} for method in asked.methods]}


@dataclass
class Run:
    """What one training run left: the loss on what was set aside, and what it took."""

    score: float  # perplexity, or the share that is right
    trained: int  # numbers that train, but for a new head
    optimizer_bytes: int
    step_bytes: int  # that a step holds beyond the model and its adapter: activations, gradients, the optimizer's states
    step_seconds: float
    merges: str = ""  # "yes", or why not


class Probe(Course):
    """Looks at the optimizers as a run ends."""

    nbytes = 0

    def finish(self) -> None:
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        self.nbytes = sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor) and value.numel() > 1)


class Task:
    """A model and data: how an adapter on it trains, and how good it is then. Higher scores are better, or lower ones, as `better` says."""

    better: Callable[..., Any]
    column: str

    def __init__(self, name: str, asked: Comparison, model: Model):
        self.name, self.asked, self.model = name, asked, model
        count = measure.count(unwrapped(model.module))[0]
        share = str(asked.parameters)
        try:
            self.budget = round(float(share.removesuffix("%")) / 100 * count) if share.endswith("%") else int(share)
        except ValueError:
            raise SettingError(f"parameters is a number, or a share such as 1%; got {share!r}.") from None

    # What a kind of task fills in.

    def fresh(self) -> Model:
        """The model as it is before an adapter."""
        return Model(name=self.model.name, module=copy.deepcopy(self.model.module), tokenizer=self.model._tokenizer)

    def row_of(self, tuning: bool) -> tuple[Tensor, Losses, int, int]:
        """(the row of tokens that is trained on, the loss, sequences in a batch, tokens in a sequence)."""
        raise NotImplementedError

    def score(self, module: nn.Module, tuning: bool) -> float:
        """How good a model is on what was set aside, or on the part of the training data that rates are compared on."""
        raise NotImplementedError

    def steps(self) -> int:
        """Of the optimizer."""
        return max(1, self.asked.tokens // (self.asked.batch * self.asked.length))

    # What all have in common.

    def rows(self, beside: Path) -> list[dict[str, Any]]:
        """One row for each method, and two for what stands beside them."""
        methods: list[AdapterMethod | str] = [HEAD, WHOLE, *self.asked.methods]
        found = []
        for number, method in enumerate(methods, 1):
            name = method if isinstance(method, str) else method.name()
            console.print(f"{self.name}: {name} ({number} of {len(methods)})")
            try:
                of_curve = {key: self.asked.tasks[self.name][key] for key in ("curve", "examples") if key in self.asked.tasks[self.name]}
                found.append({"task": self.name, "method": name, **of_curve, **self.row(method, beside)})
            except ModelwrightError as error:
                found.append({"task": self.name, "method": name, "why not": str(error).removeprefix(f"{name}: ")})
        return found

    def row(self, method: AdapterMethod | str, beside: Path) -> dict[str, Any]:
        """What all runs of a method came to."""
        chosen = method if isinstance(method, str) else self.within(method)
        if chosen == HEAD and not self.heads():
            return {"column": self.column, "score": self.score(self.fresh().module.eval(), False), "trained": 0}
        rates = {rate: self.kept(beside, chosen, rate, self.asked.seeds[0], tuning=True) for rate in self.asked.rates}
        rate = type(self).better(rates, key=lambda one: rates[one].score if math.isfinite(rates[one].score) else self.worst())
        runs = [self.kept(beside, chosen, rate, seed, tuning=False) for seed in self.asked.seeds]
        scores = [run.score for run in runs]
        spread = None
        if len(scores) > 1 and all(map(math.isfinite, scores)):
            spread = statistics.stdev(scores) * QUANTILES[min(len(scores), 10) - 2] / math.sqrt(len(scores))
        settings = {} if isinstance(chosen, str) else chosen.settings()
        return {
            "column": self.column, "score": statistics.mean(scores), "spread": spread, "scores": scores, "rate": rate, "settings": settings,
            "trained": max(run.trained for run in runs), "optimizer_bytes": runs[0].optimizer_bytes,
            "step_bytes": runs[0].step_bytes, "step_seconds": statistics.median(run.step_seconds for run in runs), "merges": runs[0].merges,
        }  # fmt: skip

    def worst(self) -> float:
        """The score of a run that came to nothing."""
        return -math.inf if type(self).better is max else math.inf

    def heads(self) -> bool:
        """Whether a head is new and trains, whatever the adapter."""
        return False

    def within(self, method: AdapterMethod) -> AdapterMethod:
        """The method at the largest size at which no more numbers train than are allowed.

        Raises:
            SettingError: the smallest has more, or there is no size that its layers take.
        """
        if not method.sized_by:
            if (fixed := self.counted(method)) > self.budget:
                raise SettingError(f"{fixed:,} numbers train, and no setting makes them fewer; {self.budget:,} are allowed.")
            return method
        counts: dict[int, int | None] = {}
        refused: list[str] = []

        def count(size: int) -> int | None:
            if size not in counts:
                try:
                    counts[size] = self.counted(type(method)(**{**method.settings(), **type(method).sized(size)}))
                except ModelwrightError as error:
                    counts[size] = None
                    refused.append(str(error))
            return counts[size]

        size, misses, fit = 1, 0, False
        while misses < 3 and size <= 2 * self.budget:  # twice as large each time, until after those that fit three do not
            found = count(size)
            fit |= found is not None and found <= self.budget
            misses = misses + 1 if fit and (found is None or found > self.budget) else 0
            size *= 2
        fits = {size: found for size, found in counts.items() if found is not None and found <= self.budget}
        for span in (2.0, 1.4, 1.1) if fits else ():  # closer and closer around the best
            best = max(fits, key=lambda one: fits[one])
            for other in {round(best * span ** (step / 4)) for step in range(-4, 5)} - counts.keys() - {0}:
                if (found := count(other)) is not None and found <= self.budget:
                    fits[other] = found
        if not fits:
            fewest = min((found for found in counts.values() if found is not None), default=None)
            why = f"at least {fewest:,} numbers train" if fewest is not None else refused[-1].removeprefix(f"{method.name()}: ")
            raise SettingError(f"{why}; {self.budget:,} are allowed.")
        best = max(fits, key=lambda one: fits[one])
        return type(method)(**{**method.settings(), **type(method).sized(best)})

    def counted(self, method: AdapterMethod) -> int:
        """How many numbers train, on an empty model."""
        module, _ = plan.predict(emptied(self.model.module), method.grown(), Given())
        return sum(value.numel() for value in module.parameters() if value.requires_grad)

    def kept(self, beside: Path, method: AdapterMethod | str, rate: float, seed: int, tuning: bool) -> Run:
        """A run, or what it left if it was done before."""
        named: dict[str, Any] = {
            "task": self.name,
            **self.asked.tasks[self.name],
            "method": method if isinstance(method, str) else repr(method),
        }
        named |= {"rate": rate, "seed": seed, "tuning": tuning}
        named |= {key: getattr(self.asked, key) for key in ("tokens", "batch", "length", "held")}
        file = beside / f"run-{recipe.hashed(named)}.json"
        if not file.is_file():
            write_json(file, asdict(self.run(method, rate, seed, tuning)))
        return Run(**json.loads(file.read_text("utf-8")))

    def run(self, method: AdapterMethod | str, rate: float, seed: int, tuning: bool) -> Run:
        """Train once and measure."""
        model = self.fresh()
        module: Any = model.module
        new = self.new_of(module)
        if isinstance(method, AdapterMethod):
            given = Given(seed=seed, data=self.examples())
            torch.manual_seed(seed)
            module = walk.change(model, method, given).module
        elif method == HEAD:
            module.requires_grad_(False)
        for value in new:
            value.requires_grad_(True)
        settled = [value for value in module.parameters() if value.requires_grad and not any(value is one for one in new)]
        row, loss, batch, length = self.row_of(tuning)
        steps = self.steps()
        settings = Training(tokens=steps * batch * length, batch=batch, length=length, learning_rate=rate, weight_decay=0.0, seed=seed)
        probe, own = Probe(), tuners.course_of(module, steps, seed)
        started = time.perf_counter()
        try:
            train(module, row, settings, loss, course=Together([own or Zeros(()), probe]))
        except ModelwrightError:  # a rate at which it comes to nothing
            return Run(self.worst(), sum(value.numel() for value in settled), 0, 0, 0.0)
        seconds = (time.perf_counter() - started) / steps
        trained = sum(value.numel() for value in module.parameters() if value.requires_grad and not any(value is one for one in new))
        score = self.score(module.eval(), tuning)
        held = 0 if tuning else probe.nbytes + step_bytes(module.train(), row[: batch * length].view(batch, length), loss)
        merges = self.merges(module.eval()) if isinstance(method, AdapterMethod) and not tuning else ""
        return Run(score, trained, probe.nbytes, held, seconds, merges)

    def new_of(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters of a new head."""
        return []

    def examples(self) -> Any:
        """What an adapter may look at before it trains."""
        return None

    def merges(self, module: nn.Module) -> str:
        """The word yes, or why an adapter cannot be put into the weights."""
        try:
            adapters.folded(module)
        except (ModelwrightError, NotImplementedError, AttributeError, ValueError) as error:
            return str(error).splitlines()[0] or type(error).__name__
        return "yes"


def step_bytes(module: nn.Module, ids: Tensor, loss: Losses) -> int:
    """Bytes that a forward pass keeps for the backward one beside the model itself, and of the gradients that this gives."""
    own = {value.untyped_storage().data_ptr() for value in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        for part in (value._indices(), value._values()) if value.is_sparse else (value,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        found = loss(module, ids, torch.ones_like(ids, dtype=torch.bool))[0]
    gradients = sum(value.nbytes for value in module.parameters() if value.requires_grad)
    del found
    return sum(kept.values()) + gradients


class TextTask(Task):
    """The next token of a text."""

    better, column = staticmethod(min), "perplexity"

    def __init__(self, name: str, asked: Comparison, model: Model, text: texts.Text):
        super().__init__(name, asked, model)
        whole, self.measured = text.split(asked.held)
        self.whole = whole.thinned(4 * walk.CHARACTERS * asked.tokens)
        self.trained, self.tuned = self.whole.split(TUNED)

    @functools.cached_property
    def ids(self) -> dict[bool, Tensor]:
        """Tokens that are trained on, by whether rates are compared."""
        return {tuning: Given(data=text).ids(self.model) for tuning, text in ((True, self.trained), (False, self.whole))}

    def row_of(self, tuning: bool) -> tuple[Tensor, Losses, int, int]:
        return self.ids[tuning], next_token, self.asked.batch, texts.within(self.model.config, self.asked.length)

    def score(self, module: nn.Module, tuning: bool) -> float:
        model = Model(name=self.name, module=module, tokenizer=self.model._tokenizer or self.model.tokenizer)
        found = measure.quality(model, self.tuned if tuning else self.measured, self.asked.length, 20_000)
        return found["perplexity"]

    def examples(self) -> Any:
        return self.trained


class LabelTask(Task):
    """The classes of texts or images, with a new head that trains whatever the adapter is."""

    better, column = staticmethod(max), "right"

    def __init__(self, name: str, asked: Comparison, folder: str, examples: labels.Labelled):
        from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

        kind = AutoModelForSequenceClassification if examples.texts else AutoModelForImageClassification
        source = open(folder)
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(0)
            module, told = kind.from_pretrained(source.folder or folder, num_labels=examples.classes, dtype=torch.float32,
                                                ignore_mismatched_sizes=True, output_loading_info=True)  # fmt: skip
            for part, child in module.named_children():
                if part != module.base_model_prefix:  # a head of the same size would know its classes
                    for layer in (layer for layer in child.modules() if hasattr(layer, "reset_parameters")):
                        layer.reset_parameters()
        beside = {path for path, _ in module.named_parameters() if not path.startswith(f"{module.base_model_prefix}.")}
        self.new = {*told["missing_keys"], *beside}
        super().__init__(name, asked, Model(name=source.name, module=module.eval(), tokenizer=source._tokenizer))
        whole, measured = examples.split(asked.held)
        if (count := asked.tasks[name].get("examples", len(whole))) > len(whole):
            raise DataError(f"{examples.source} has {len(whole):,} examples to train on; {count:,} were asked for. Ask for fewer.")
        whole = whole.take(torch.randperm(len(whole), generator=torch.Generator().manual_seed(2))[:count])
        trained, tuned = whole.split(TUNED)
        made = functools.partial(labels.Labelled.inputs, tokenizer=source.tokenizer if examples.texts else None, length=asked.length)
        parts = {"whole": whole, "measured": measured, "trained": trained, "tuned": tuned}
        self.parts = {name: (made(part), part.labels) for name, part in parts.items()}
        inputs = self.parts["whole"][0]
        config: Any = module.config  # an example counts as so many tokens
        self.each = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1 + (config.image_size // config.patch_size) ** 2

    def heads(self) -> bool:
        return True

    def within(self, method: AdapterMethod) -> AdapterMethod:
        if method.causal:
            raise SettingError("it looks at the next tokens of a text, which this model does not predict.")
        return super().within(method)

    def steps(self) -> int:
        return max(1, self.asked.tokens // (2 * self.asked.batch * self.each))

    def new_of(self, module: nn.Module) -> list[nn.Parameter]:
        return [value for name, value in module.named_parameters() if name in self.new]

    def row_of(self, tuning: bool) -> tuple[Tensor, Losses, int, int]:
        inputs, classes = self.parts["trained" if tuning else "whole"]
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(1))

        def loss(module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Parts]:
            places = ids.flatten()
            found = F.cross_entropy(module(**{key: value[places] for key, value in inputs.items()}).logits, classes[places])
            return found, {"loss": found.detach()}

        return order, loss, self.asked.batch, 2

    @torch.no_grad()
    def score(self, module: nn.Module, tuning: bool) -> float:
        inputs, classes = self.parts["tuned" if tuning else "measured"]
        parts = torch.arange(len(classes)).split(64)
        found = torch.cat([module(**{key: value[part] for key, value in inputs.items()}).logits.argmax(-1) for part in parts])
        return float((found == classes).float().mean())

    def examples(self) -> Any:
        inputs, classes = self.parts["trained"]
        return [{key: value[part] for key, value in inputs.items()} for part in torch.arange(min(64, len(classes))).split(8)]


def task_of(name: str, asked: Comparison, beside: Path) -> Task:
    """A task, with its model made first where it is one that is made here.

    Raises a subclass of ModelwrightError for models and data that are not there.
    """
    model, data = asked.tasks[name]["model"], asked.tasks[name]["data"]
    if model in MADE:
        folder = beside / f"made-{model}"
        if not folder.is_dir():
            with whole_folder(folder) as partial:
                if model == "encoder":
                    small.encoder(texts.corpus(), partial)
                else:
                    small.vit().save_pretrained(partial)  # type: ignore[operator]
        return LabelTask(name, asked, str(folder), labels.read(data))
    if data in ("topics", "stripes", "turned stripes") or Path(data).suffix == ".npz" or _labelled(data):
        return LabelTask(name, asked, model, labels.read(data))
    opened = open(model)
    opened.module.float()
    return TextTask(name, asked, opened, texts.read(data))


def _labelled(data: str) -> bool:
    """Whether a file holds lines with labels."""
    path = Path(data)
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    return '"label"' in first


callable_module(__name__, compare)
