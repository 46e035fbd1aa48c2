"""The main job: search for the best model that fits a budget, and say what was paid.

    modelwright fit Qwen/Qwen3-0.6B --budget 40% --data my.txt --save small/

Every trial is a recipe: blocks removed, weights zeroed, matrices factored, integers of some bits, each allotted over
the blocks by how much the blocks mind. Trials are scored on calibration text alone; the held-out text is read once,
for the final table. The study lies on disk, so that a killed search goes on and several processes can share it.

A trial streams from disk to disk and is scored as its files have it; the original is in memory only while it is scored,
probed and measured. So a fit holds one model at a time and the activations of its text. Recovery trains, which takes
more; it is left out where that does not fit into the memory that is free.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gc
import io
import json
import math
import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import psutil
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from modelwright.anatomy import anatomy_of, matches

from . import __version__, report
from .core import data as texts
from .core import find, measure, plan, recipe, walk
from .core.budget import Budget
from .core.errors import DataError, ModelError, PlanError, RecipeError
from .core.files import locked, place_of, publish, refuse_existing, refuse_inputs, write_json, write_text
from .core.given import Given
from .core.model import Model, check_readable, open, stored_bytes, unwrapped, weight_of
from .core.progress import bar, console, track
from .core.public import callable_module
from .core.recipe import INPUT, Recipe, Step
from .maths.allocation import least_harm

PROBE_EVERY = 3  # of the scored sequences serve for probing
SCORED = 0.1  # of the rest is what trials are scored on
HELD = 0.1  # of the text is kept for the final table
BITS = (2, 3, 4, 5, 6, 8)
WHOLE = 100_000_000  # parameters up to which a fit spends all tokens of its effort; a larger model gets fewer
LEAST = 1e-3  # of what the block loses that minds most, what any is taken to lose
JOURNAL = "study.journal"
FEWEST = 512  # calibration tokens, however large the model is
PARTS = {"attn": ("attn",), "mlp": ("mlp", "experts")}  # of a block, searched apart, and their roles
PROBES: dict[str, tuple[str, dict[str, Any]]] = {
    "bits": ("quantize.rtn", {"bits": 3}),
    "rank": ("factor.svd", {"keep": 0.5, "store": "dense"}),
    "zeros": ("prune.magnitude", {"sparsity": 0.5}),
}


@dataclass(frozen=True)
class Effort:
    """How much a fit spends."""

    trials: int = 36
    samples: int = 48  # calibration sequences for the methods' statistics
    score: int = 24  # sequences that trials are scored on
    length: int = 256  # tokens in each
    recover: int = 80_000  # tokens of distillation
    final: int = 100_000  # tokens that the final table is measured on, at most
    probes: tuple[str, ...] = ("bits", "rank", "zeros")  # the search asks for the first alone, the report shows all

    @classmethod
    def quick(cls) -> Effort:
        return cls(trials=10, samples=16, score=8, recover=16_000)

    @property
    def tokens(self) -> int:
        """Calibration tokens of a trial."""
        return self.samples * self.length

    def of(self, tokens: int) -> Effort:
        """The same search on that many calibration tokens, with scoring, recovery and the final table in proportion."""
        share = tokens / self.tokens
        length = max(2, min(self.length, tokens // 4))
        return replace(
            self,
            samples=max(1, tokens // length),
            score=max(2, round(self.score * self.length * share / length)),
            length=length,
            recover=max(8 * length, round(self.recover * share)),
            final=max(16 * length, round(self.final * share)),
            probes=self.probes if share >= 1 else self.probes[:1],
        )

    def for_size(self, parameters: int) -> Effort:
        """The effort for a model of that size: above 100 M parameters, tokens fall with the root of the size.

        So a model of ten times the size takes about three times as long, and its statistics still come from more than a
        few sequences.
        """
        if parameters <= WHOLE:
            return self
        return self.of(min(self.tokens, max(FEWEST, round(self.tokens * math.sqrt(WHOLE / parameters)))))


@dataclass
class Fitted:
    """What a fit found."""

    model: Model
    recipe: Recipe
    folder: Path
    table: list[dict[str, Any]]  # the original and the chosen model, measured on held-out text
    frontier: list[dict[str, Any]]  # a row for every trial


class Job:
    """What the phases of one fit share."""

    def __init__(self, model: Model, name: str, budget: Budget, data: Any, effort: Effort, seed: int, work: Path):
        self.model, self.name, self.budget, self.data, self.effort, self.seed, self.work = model, name, budget, data, effort, seed, work
        if not isinstance(data, (str, Path)):
            raise DataError("A fit writes a recipe that names its text again, so give a file, a folder, a hub name or corpus as data.")
        text = texts.read(data)
        rest, self.held = text.split(HELD)
        self.calibration, scored = rest.split(SCORED)  # so that no step has seen what trials are scored on
        self.given = Given(data=self.calibration, seed=seed, samples=effort.samples, length=effort.length)
        length = texts.within(model.config, effort.length)
        rows = texts.windows(Given(data=scored).ids(model), length)
        if len(rows) < 4:
            raise DataError(
                f"{data}: the {SCORED:.0%} of it that trials are scored on has {rows.numel()} tokens; a fit needs at least {4 * length}. "
                "Give more text."
            )
        picked = torch.linspace(0, len(rows) - 1, min(effort.score, len(rows)) + 2).round().long()[1:-1]
        self.score_rows = rows[picked]
        self.given = replace(self.given, data=self.given.batches(model))  # tokenised once for all trials
        sites = model.sites()
        self.depths = len(sites) and max(site.depths for site in sites)
        self.roles = {site.role.split(".")[0] for site in sites}

    def score(self, module: nn.Module, every: int = 1) -> float:
        """Nats per token on the text that trials are scored on, or on every n-th sequence of it."""
        rows = self.score_rows[::every]
        losses, counts = measure.window_losses(module, rows.flatten(), rows.shape[1])
        return float(losses.sum() / counts.sum())

    def source(self) -> Model:
        """The original, not read yet; a method that cannot stream changes what it is given, so each use opens its own."""
        return open(str(self.model.folder), trust_remote_code=self.model.trust_remote_code)

    def forget(self) -> None:
        """Give the memory of the original back; the next use reads it again."""
        self.model.forget()
        gc.collect()  # modules hold each other, so that they would go late

    def tell(self, seconds: float) -> None:
        """Say what the fit will spend, and how long that takes where the score of the original took these seconds."""
        effort, scored = self.effort, self.score_rows.numel()
        probed = self.depths * (2 * len(effort.probes) + 1) * scored / PROBE_EVERY
        search = effort.trials * (3 * effort.tokens + scored)  # a block runs about three times for its statistics
        minutes = (probed + search + 2 * effort.final) * seconds / scored / 60
        time_ = f"{minutes:,.0f} minutes" if minutes < 100 else f"{minutes / 60:,.0f} hours"
        console.print(
            f"{effort.trials} trials, each with {effort.tokens:,} tokens of calibration and {scored:,} of scoring; up to "
            f"{effort.recover:,} tokens of recovery and {effort.final:,} of measuring. At {scored / seconds:,.0f} tokens a second this "
            f"takes {time_} and the solvers' time; --tokens and --trials set it."
        )


def fit(
    model: Any = "starter",
    *,
    budget: str | int | float = "40%",
    data: Any = "corpus",
    save: str | Path = "small",
    quick: bool = False,
    trials: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Fitted:
    """Find the best model within a budget, recover it by distillation, and write it with a report.

    model: a folder, a hub name, or "starter". budget: "40%" of the weight files, "300MB", or "2x" smaller.
    data: text for calibration and, its held-out tenth, for the final table. save: the folder to write: `model/`,
        `recipe.yaml`, `report.html`, `frontier.csv`. trials: how many recipes to try. quick: a short search.
    tokens: of calibration in every trial; scoring, recovery and the final table change in proportion. By default 12,288
        (quick: 4,096), and fewer for models above 100 M parameters.

    Raises:
        PlanError: no trial meets the budget; the text says which came nearest.
    """
    refuse_existing(save, overwrite=overwrite)
    folder = place_of(save)
    effort = Effort.quick() if quick else Effort()
    effort = replace(effort, trials=trials) if trials is not None else effort
    given = open(model, trust_remote_code=trust_remote_code)
    name = given.name
    if given.folder is None or given.changed or "packed" in given.marks or "adapters" in given.marks:
        raise ModelError(f"{name}: a fit starts from an unquantised model without adapters that lies in a folder or on the hub.")
    refuse_inputs(save, given.sources)
    effort = effort.of(tokens) if tokens is not None else effort.for_size(sum(value.numel() for value in given.skeleton().parameters()))
    source = open(str(given.folder), trust_remote_code=given.trust_remote_code)  # a reader of its own, to forget
    check_readable(source)
    limits = Budget.parse(budget, measure.disk_bytes(source.stored_in))
    key = recipe.hashed(
        __version__, recipe.model_digest(source), texts.digest(texts.read(data)), limits.bytes, dataclasses.asdict(effort), seed
    )
    work = folder.with_name(f"{folder.name}.fit") / key
    work.mkdir(parents=True, exist_ok=True)
    job = Job(source, name, limits, data, effort, seed, work)
    before = time.perf_counter()
    started = job.score(source.module)
    job.tell(time.perf_counter() - before)
    sensitivity = probe(job)
    job.forget()
    with shared(work, folder):
        found = search(job, sensitivity, started)
        with locked(work / "lock"):  # of several processes, one at a time goes on from here
            (work / JOURNAL).stat()
            refuse_existing(folder, overwrite=overwrite)
            return conclude(job, sensitivity, found, started, folder)


@contextlib.contextmanager
def shared(work: Path, folder: Path) -> Iterator[None]:
    """Inside, another process that works on the same fit may finish it and remove the work folder.

    Raises:
        RecipeError: that has happened.
    """
    try:
        yield
    except OSError:
        if (work / JOURNAL).exists() or not folder.exists():
            raise
        shutil.rmtree(work, ignore_errors=True)
        raise RecipeError(f"Another process that shared this fit has finished it. The result is {folder}.") from None


def conclude(job: Job, sensitivity: dict[str, dict[str, float]], found: list[FrozenTrial], started: float, folder: Path) -> Fitted:
    """Settle on a trial, measure it and the original on held-out text, and write the folder."""
    name, work, limits = job.name, job.work, job.budget
    frontier = [_row(trial) for trial in found]
    chosen, best, result, recovered = settle(job, found, sensitivity)
    console.print("measuring the original and the chosen model on held-out text")
    table, written = [], []
    for each, label in ((job.model, "original"), (result.model, "chosen")):
        row = {
            "model": label,
            **measure.sizes(each),
            **measure.quality(each, job.held, job.effort.length, most_tokens=job.effort.final),
            **measure.speed(each),
        }
        table.append(row)
        written.append([measure.continuation(each, prompt) for prompt in prompts(job)])
        each.forget()
        job.forget()
    with_folder = work / "out"
    shutil.rmtree(with_folder, ignore_errors=True)
    with_folder.mkdir()
    shutil.copytree(result.model.stored_in, with_folder / "model", ignore=shutil.ignore_patterns("recipe.yaml"))
    write_text(with_folder / "recipe.yaml", best.yaml())
    write_text(with_folder / "frontier.csv", as_csv(frontier))
    samples = list(zip(prompts(job), *written, strict=True))
    page = report.Page(
        name=name, budget=limits.text, budget_bytes=limits.bytes, table=table, frontier=frontier, chosen=_row(chosen),
        sensitivity=sensitivity, samples=samples, recipe=best.yaml(), account=result.account, score=started, recovered=recovered,
        bits=report.bits_by_matrix(result.model),
    )  # fmt: skip
    write_text(with_folder / "report.html", report.html(page))
    write_text(with_folder / "model" / "README.md", report.card(page, result.model))
    publish(with_folder, folder)
    shutil.rmtree(work, ignore_errors=True)
    with contextlib.suppress(OSError):
        work.parent.rmdir()  # other searches may lie there
    return Fitted(open(folder / "model"), best, folder, table, frontier)


# Probe


def probe(job: Job) -> dict[str, dict[str, float]]:
    """How much the score suffers when one block's attention or MLP alone is rounded, factored or pruned, in nats.

    Kept in the work folder; keys "block 0 attn", "block 0 mlp", ...; "removed" is the loss without the block.
    """
    file = job.work / "probe.json"
    if file.is_file():
        return json.loads(file.read_text("utf-8"))
    module = unwrapped(job.model.module)
    anatomy = anatomy_of(module)
    path = anatomy.blocks(module)
    original = job.score(module, PROBE_EVERY)
    found: dict[str, dict[str, float]] = {}
    for depth in track(range(job.depths), "probe"):
        for part, roles in PARTS.items():
            sites = [site for site in anatomy.sites(module) if site.depth == depth and matches(site, None, roles)]
            if sites:
                found[f"block {depth} {part}"] = {
                    name: _with_weights(job, module, sites, find.find(method).build(settings)) - original
                    for name, (method, settings) in ((name, PROBES[name]) for name in job.effort.probes)
                }
        if path is not None:
            found[f"block {depth}"] = {"removed": _without_block(job, module, path, depth) - original}
    write_json(file, found)
    return found


@torch.no_grad()
def _with_weights(job: Job, module: nn.Module, sites: list[Any], method: Any) -> float:
    """The score with a tensor-level method applied to these sites alone; the module is as before afterwards."""
    before = []
    for site in sites:
        weight = weight_of(module, site)
        assert weight is not None
        before.append((weight, weight.clone()))
        for part in weight if weight.ndim == 3 else [weight]:
            result = method.tensor(part)
            part.copy_(result if isinstance(result, torch.Tensor) else result.dense())
    score = job.score(module, PROBE_EVERY)
    for weight, own in before:
        weight.copy_(own)
    return score


def _without_block(job: Job, module: nn.Module, path: str, depth: int) -> float:
    """The score with one block handing its input on."""
    block = module.get_submodule(f"{path}.{depth}")

    def hand_on(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return (args[0], *out[1:]) if isinstance(out, tuple) else args[0]

    handle = block.register_forward_hook(hand_on)
    try:
        return job.score(module, PROBE_EVERY)
    finally:
        handle.remove()


# Search


def starts(depths: int) -> Iterator[dict[str, Any]]:
    """The trials that every search begins with, from large to small."""
    plain = {"drop": 0, "tilt": 0.0, "group": 64, "attn": "integers", "mlp": "integers"}
    for bits in (8, 4, 3, 5, 6, 2):
        yield plain | {"attn_bits": bits, "mlp_bits": bits}
    yield plain | {"attn_bits": 4, "mlp_bits": 4, "tilt": 0.5}
    yield plain | {"attn_bits": 5, "mlp_bits": 5, "drop": min(1, depths // 3)}
    yield plain | {"attn_bits": 5, "mlp_bits": 5, "mlp": "factors", "mlp_keep": 0.7}
    yield plain | {"attn_bits": 5, "mlp": "zeros", "mlp_sparsity": 0.7}


def ask(trial: optuna.Trial, depths: int) -> dict[str, Any]:
    """One point of the search space."""
    point: dict[str, Any] = {
        "drop": trial.suggest_int("drop", 0, depths // 3),
        "tilt": trial.suggest_float("tilt", 0.0, 1.0),
        "group": trial.suggest_categorical("group", (32, 64, 128)),
    }
    for part in PARTS:
        form = point[part] = trial.suggest_categorical(part, ("integers", "factors", "zeros"))
        if form in ("integers", "factors"):
            point[f"{part}_bits"] = trial.suggest_categorical(f"{part}_bits", BITS)
        if form == "factors":
            point[f"{part}_keep"] = trial.suggest_float(f"{part}_keep", 0.4, 1.0)
        if form == "zeros":
            point[f"{part}_sparsity"] = trial.suggest_float(f"{part}_sparsity", 0.4, 0.9)
    return point


def steps_of(job: Job, point: dict[str, Any], sensitivity: dict[str, dict[str, float]]) -> list[Step]:
    """The steps that a point of the search space stands for: structure first, integers last."""
    steps = []
    left = list(range(job.depths))
    if point["drop"]:
        steps.append(Step(find.find("prune.shortgpt").build({"blocks": point["drop"]})))
        influence = sorted(left, key=lambda depth: sensitivity.get(f"block {depth}", {}).get("removed", 0.0))
        left = sorted(influence[point["drop"] :])
    bits: dict[str, Any] = {}
    factors: dict[str, Any] = {}
    zeros: dict[str, Any] = {}
    for part, roles in PARTS.items():
        minds = [sensitivity.get(f"block {depth} {part}", {}) for depth in left]
        if point[part] == "factors":
            factors |= dict.fromkeys(roles, round(point[f"{part}_keep"], 3))
        if point[part] == "zeros":
            zeros |= dict.fromkeys(roles, round(point[f"{part}_sparsity"], 3))
        else:
            bits |= dict.fromkeys(roles, allotted(point[f"{part}_bits"], point["tilt"], [mind.get("bits", 0.0) for mind in minds]))
    bits, factors, zeros = ({role: value for role, value in chosen.items() if role in job.roles} for chosen in (bits, factors, zeros))
    if factors:
        steps.append(Step(find.find("factor.svd_llm").build({"keep": factors, "multiple": 32})))
    if zeros:
        steps.append(Step(find.find("prune.sparsegpt").build({"sparsity": zeros, "store": "sparse"})))
    if bits:
        steps.append(Step(find.find("quantize.gptq").build({"bits": bits, "group": point["group"]})))
    return steps


def allotted(bits: int, tilt: float, minds: list[float]) -> int | list[int]:
    """Bits for every block, `bits` on average at most: by the search of `quantize.mixed`, on what rounding does to the blocks.

    minds: what a block loses when it alone is rounded, in nats, at one width; a bit more makes it a quarter. tilt: 1 takes that as it
    is, 0 as if all blocks lost the same.
    """
    if not minds or tilt == 0:
        return bits
    lost = torch.tensor(minds, dtype=torch.float64)
    lost = lost.nan_to_num(nan=math.inf).clamp(max=float(lost[lost.isfinite()].max()) if lost.isfinite().any() else 1.0)
    lost = lost.clamp(min=max(LEAST * float(lost.max()), 1e-12)) ** tilt
    widths = torch.tensor(BITS, dtype=torch.float64)
    places = least_harm(lost[:, None] * 4.0**-widths, widths.expand(len(minds), -1), bits * len(minds))
    found = [BITS[place] for place in places]
    return bits if set(found) == {bits} else found


def search(job: Job, sensitivity: dict[str, dict[str, float]], original: float) -> list[FrozenTrial]:
    """All finished trials of the study, after as many as the effort says; values are (bytes, nats per token)."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(job.work / JOURNAL), _JournalLock(job.work / JOURNAL))),
            study_name="fit", directions=["minimize", "minimize"], load_if_exists=True,
        )  # fmt: skip
        with bar("search", job.effort.trials) as tick:
            while len(_finished(study)) < job.effort.trials:
                with locked(job.work / "asking"):
                    trial = _next_trial(job, study)
                point = ask(trial, job.depths)
                steps = steps_of(job, point, sensitivity)
                size, score = try_out(job, steps)
                trial.set_constraint("budget", size - job.budget.bytes)
                trial.set_user_attr("steps", json.dumps([step.plain() for step in steps]))
                study.tell(trial, (float(size), score))
                tick(done=len(_finished(study)), note=f"{size / job.budget.bytes:.0%} of the budget, {score - original:+.3f} nats")
        return _finished(study)


def _next_trial(job: Job, study: optuna.Study) -> optuna.Trial:
    """The next trial, marked as this process's own; those of processes that were killed are given up first."""
    _give_up_dead_trials(study)
    number = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING)))
    # A sampler of its own for every trial, so that a search that was killed goes on as if it had not been.
    study.sampler = optuna.samplers.TPESampler(seed=job.seed * 100_003 + number, n_startup_trials=4)
    fixed = next((start for place, start in enumerate(starts(job.depths)) if place == number), None)
    if fixed is not None:
        study.enqueue_trial(fixed)
    trial = study.ask()
    trial.set_user_attr("process", f"{socket.gethostname()}/{os.getpid()}")
    return trial


class _JournalLock(JournalFileOpenLock):
    """The study's lock, held by the kernel for a process: it ends with it, where a lock of optuna's own blocks others for a while.

    A line that a killed process left half written is cut off, so that the next does not join it.
    """

    def __init__(self, journal: Path):
        self.journal = journal
        self.held = contextlib.ExitStack()

    def acquire(self) -> bool:
        self.held.enter_context(locked(self.journal.with_suffix(".lock")))
        with self.journal.open("ab+") as file:
            end = file.tell()
            file.seek(0)
            if end and (whole := file.read().rfind(b"\n") + 1) < end:
                file.truncate(whole)
        return True

    def release(self) -> None:
        self.held.close()


def try_out(job: Job, steps: list[Step]) -> tuple[int, float]:
    """(bytes of the weight files, nats per token) of the model after these steps."""
    folder = job.work / f"trial-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    model = job.source()
    for number, step in enumerate(steps):
        model = walk.write(model, step.method, replace(job.given, notes=[]), folder / str(number))
    size, score = measure.disk_bytes(model.stored_in), job.score(model.module)
    model.forget()
    gc.collect()
    shutil.rmtree(folder)
    return size, score if math.isfinite(score) else 1e6


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _give_up_dead_trials(study: optuna.Study) -> None:
    """Close the trials of a process that was killed; those of other machines and live processes go on."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, _, process = str(trial.user_attrs.get("process", "/")).partition("/")
        if host == socket.gethostname() and process.isdigit() and not psutil.pid_exists(int(process)) or not process:
            study.tell(trial.number, state=TrialState.FAIL)


def within_budget(job: Job, found: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials within the budget, best score first.

    Raises:
        PlanError: none is; the text says which came nearest.
    """
    within = [trial for trial in found if trial.values[0] <= job.budget.bytes]
    if not within:
        nearest = min(found, key=lambda trial: trial.values[0])
        raise PlanError(
            f"None of {len(found)} trials meets the budget of {job.budget.bytes:,} bytes ({job.budget.text}). The nearest has "
            f"{nearest.values[0]:,.0f} bytes: {nearest.user_attrs['steps']}. Ask for at least that, or for more trials."
        )
    return sorted(within, key=lambda trial: trial.values[1])


# The chosen recipe


def settle(job: Job, trials: list[FrozenTrial], sensitivity: dict[str, dict[str, float]]) -> tuple[FrozenTrial, Recipe, recipe.Run, float]:
    """The best trial whose files really fit the budget, run with and without recovery; the better by score.

    Raises:
        PlanError: the files of no trial fit.
    """
    for trial in within_budget(job, trials):
        candidates = candidates_of(job, steps_of(job, trial.params, sensitivity))
        fitting = [each for each in candidates if measure.disk_bytes(each[2].model.stored_in) <= job.budget.bytes]
        if fitting:
            score, made, done = min(fitting, key=lambda each: each[0])
            return trial, made, done, score
    raise PlanError(f"The files of no trial fit the budget of {job.budget.bytes:,} bytes, though some came near. Ask for a little more.")


def candidates_of(job: Job, steps: list[Step]) -> list[tuple[float, Recipe, recipe.Run]]:
    """(score, recipe, run) of the steps as they are and with recovery by distillation."""
    found = []
    for number, candidate in enumerate([steps, *with_recovery(job, steps)]):
        made = Recipe(
            model=recipe.placed(job.name, "starter"),
            data={"source": recipe.placed(job.data, "corpus"), "held": [HELD, SCORED]},
            samples=job.effort.samples,
            length=job.score_rows.shape[1],
            seed=job.seed,
            steps=tuple(candidate),
            save="again",
        )
        done = recipe.run(
            replace(made, model=job.source(), save=str(job.work / f"candidate{number}")),
            overwrite=True, keep_steps=True, work=job.work / "steps",
        )  # fmt: skip
        found.append((job.score(done.model.module), made, done))
        done.model.forget()
        gc.collect()
    return found


def with_recovery(job: Job, steps: list[Step]) -> list[list[Step]]:
    """The steps with distillation before the integers, where structure went, and after them; none where memory is short."""
    settings = {"tokens": job.effort.recover, "batch": 8, "length": job.score_rows.shape[1], "save_every": 50, "learning_rate": 5e-4}
    empty = job.model.skeleton()
    if sum(value.numel() for value in empty.parameters()) > WHOLE:
        settings["accumulation"] = 8  # one sequence at a time, to save memory
    recover = Step(find.find("distill.recover").build(settings), {"teacher": INPUT})
    needed = training_peak(job, empty, recover.method)
    free = psutil.virtual_memory().available
    if needed > free:
        console.print(f"recovery is left out: it would take {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free")
        return []
    made: list[Step] = []
    for step in steps:
        if step.method.name() == "quantize.gptq" and made:
            made.append(recover)
        made.append(step)
    return [[*made, recover]]


def training_peak(job: Job, empty: nn.Module, method: Any) -> int:
    """The resident memory that recovery is expected to reach: the plan's, the teacher, and what the backward pass keeps."""
    shapes = [empty.get_parameter(site.name).shape for site in job.model.sites() if site.depth is not None]
    kept = sum(shape[-1] + shape[-2] for shape in shapes)  # inputs and outputs of every matrix, for each token
    tokens = method.batch // method.accumulation * method.length
    return plan.peak(empty, method, job.given, stored_bytes(empty), streaming=False) + stored_bytes(empty) + 4 * tokens * kept


def prompts(job: Job) -> list[str]:
    """The first words of three documents."""
    longest = [document for document in job.calibration.documents if len(document.split()) > 30]
    picked = longest[:: max(1, len(longest) // 3)][:3] or list(job.calibration.documents[:1])
    return [" ".join(document.split()[:8]) for document in picked]


def _row(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "bytes": int(trial.values[0]),
        "nats_per_token": trial.values[1],
        **trial.params,
        "steps": trial.user_attrs["steps"],
    }


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV, with every column that any of them has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


callable_module(__name__, fit)
