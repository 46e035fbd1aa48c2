"""What a recipe will cost, before a weight is read: the steps run on empty tensors."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of, matches, removal

from . import recipe as recipes
from . import stream, walk
from .errors import Faults, PlanError
from .given import Given
from .measure import count, flops_per_token
from .method import AdapterMethod, BlockMethod, LayerMethod, Method, SiteMethod, TensorMethod, TrainMethod
from .model import Model, emptied, put, quiet, stored_bytes, unwrapped, weight_of
from .settings import ByRole

PROGRAM = 450_000_000  # bytes of a process that has imported torch and transformers
RATE = 3e10  # float operations per second that a small machine reaches; decides the time class alone
CLASSES = ((10, "seconds"), (600, "minutes"), (7200, "an hour"), (100_000, "hours"), (float("inf"), "days"))


@dataclass
class Row:
    """The model after a step, as predicted, and what the step takes."""

    step: str
    parameters: int
    zeros: float  # expected number
    bytes: int  # of everything stored
    flops_per_token: int
    peak_bytes: int = 0
    time: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """A row for the input and for each step."""

    rows: list[Row]
    warnings: list[str]


def plan(recipe: Any, *, overrides: Any = ()) -> Plan:
    """Predict parameters, bytes, FLOPs, peak memory and time of every step of a recipe.

    Raises, with all reasons at once, what a run would refuse before its work starts.
    """
    recipe = recipe if isinstance(recipe, recipes.Recipe) else recipes.read(recipe, overrides)
    faults = Faults()
    found = predicted(recipe, *recipes.prepare(recipe, faults), faults)
    faults.refuse()
    return found


def predicted(recipe: recipes.Recipe, model: Model | None, given: Given, faults: Faults) -> Plan:
    """The plan of a prepared recipe; what cannot be done goes to `faults`, and the plan goes on without that step."""
    strange = [number for number, step in enumerate(recipe.steps) if not check_patterns(number, step.method, faults)]
    if model is None:
        return Plan([], [])
    unordered, warnings = recipes.check_order(recipe, model)
    skeleton = emptied(model.module) if model.loaded else copy.deepcopy(stream.split_skeleton(model))  # steps change its config
    rows = [_row("input", skeleton, 0)]
    streaming = not model.loaded
    for number, step in enumerate(recipe.steps):
        before = _row("", skeleton, 0)
        streaming = streaming and isinstance(step.method, (TensorMethod, LayerMethod, BlockMethod))
        faults += [PlanError(text) for text in unordered.get(number, ())]
        if number in strange or number in unordered:
            continue
        zeros = None
        with torch.no_grad(), faults.collected(f"step {number}: {step.method.name()}: "):
            skeleton, zeros = predict(skeleton, step.method, given)
        row = _row(step.method.name(), skeleton, zeros if zeros is not None else rows[-1].zeros)
        row.peak_bytes = peak(skeleton, step.method, given, before.bytes, streaming, donors=len(step.given.get("donors", ())))
        row.time = next(name for limit, name in CLASSES if work(step.method, given, before) / RATE < limit)
        row.notes = list(given.notes)
        given.notes.clear()
        rows.append(row)
    return Plan(rows, warnings)


def check_patterns(number: int, method: Method, faults: Faults) -> bool:
    """Whether `where`, `skip` and maps by role name parts of models; every word that does not goes to `faults`."""
    before = len(faults)
    for name, value in vars(method).items():
        patterns = [key for key in value if key != "*"] if isinstance(value, ByRole) else value if name in ("where", "skip") else None
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            with faults.collected(f"step {number}: {method.name()}: {name}: "):
                matches("", None, pattern)
    return len(faults) == before


def predict(module: nn.Module, method: Method, given: Given) -> tuple[nn.Module, float | None]:
    """The empty module after a method, and the zeros expected in it (None: as many as before)."""
    if isinstance(method, SiteMethod):
        expected: float | None = None
        sites = walk.everything(module) if method.every else anatomy_of(module).sites(module)
        for site, local in walk.choose(module, sites, method, given.notes):
            weight = weight_of(module, site)
            if weight is None:
                continue
            if "zeros" in (promised := local.promise()):
                expected = (expected or 0.0) + promised["zeros"] * weight.numel()
            if weight.ndim == 2 and not method.every:
                result = local.planned(weight)
                if not isinstance(result, Tensor):
                    put(module, site, result.to("meta"))
        return module, expected
    if isinstance(method, BlockMethod):
        path = anatomy_of(module).blocks(module)
        if path is not None:
            depths = len(module.get_submodule(path))  # type: ignore[arg-type]
            kept = method.keep([float(depth) for depth in range(depths)])
            removal.remove_blocks(module, [depth for depth in range(depths) if depth not in kept])
    elif isinstance(method, AdapterMethod):
        import peft

        targets = [site.module for site, _ in walk.choose(module, anatomy_of(module).sites(module), method)]
        with quiet():
            module = peft.get_peft_model(module, method.adapter(targets), low_cpu_mem_usage=True)  # type: ignore[attr-defined, arg-type]
    elif "adapters" in method.drops and hasattr(module, "get_base_model"):
        module = module.unload()  # type: ignore[operator]
    return module, None


def peak(module: nn.Module, method: Method, given: Given, size: int, streaming: bool, donors: int = 0) -> int:
    """The resident memory that a step is expected to reach, in bytes."""
    base = unwrapped(module)
    largest = max((value.numel() * value.element_size() for value in base.parameters()), default=0)
    if streaming and isinstance(method, TensorMethod):
        return PROGRAM + largest * (3 + donors)
    if isinstance(method, (LayerMethod, BlockMethod)):
        anatomy = anatomy_of(base)
        path = anatomy.blocks(base)
        block = max((stored_bytes(part) for part in base.get_submodule(path).children()), default=size) if path else size
        config = getattr(base, "config", None)
        width = getattr(config, "hidden_size", 1024)
        states = 2 * 2 * given.samples * given.length * width * 2
        solve = max((16 * site_inputs(base, site.name) ** 2 for site in anatomy.sites(base) if site.depth is not None), default=0)
        return PROGRAM + (2 * block + largest if streaming else size) + states + solve
    if isinstance(method, TrainMethod):
        trained = sum(value.numel() for value in module.parameters())
        width = getattr(getattr(base, "config", None), "vocab_size", 32000)
        return PROGRAM + size + 16 * trained + 3 * 4 * method.batch // method.accumulation * method.length * width
    return PROGRAM + size * (2 + donors)


def site_inputs(module: nn.Module, name: str) -> int:
    """The number of inputs of a matrix."""
    with contextlib.suppress(AttributeError):
        return int(module.get_parameter(name).shape[-1])
    return 0


def work(method: Method, given: Given, before: Row) -> float:
    """Float operations that a step takes, roughly."""
    tokens = given.samples * given.length
    if isinstance(method, TrainMethod):
        return 3.0 * before.flops_per_token * method.tokens * (1.4 if "teacher" in method.needs() else 1)
    if isinstance(method, LayerMethod):
        return 2.0 * before.flops_per_token * tokens + 300.0 * before.parameters
    if isinstance(method, BlockMethod):
        return 1.0 * before.flops_per_token * tokens
    return 100.0 * before.parameters


def _row(step: str, module: nn.Module, zeros: float) -> Row:
    base = unwrapped(module)
    return Row(step, count(base)[0], zeros, stored_bytes(module), flops_per_token(base))
