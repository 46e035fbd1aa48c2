"""What a recipe will cost, before a weight is read: the steps run on empty tensors."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site, anatomy_of, removal
from modelwright.blocks.experts import split_experts
from modelwright.maths.slices import SLICE

from . import loading, sharing, stream, walk
from . import recipe as recipes
from .data import Text
from .errors import Faults, ModelError, PlanError, SiteError, WeightsError
from .given import Given
from .measure import count, flops_per_token
from .method import AdapterMethod, BlockMethod, LayerMethod, Method, ModelMethod, SiteMethod, TensorMethod, TrainMethod
from .model import Model, emptied, open, put, quiet, stored_bytes, unwrapped, weight_of
from .statistics import SAMPLE
from .training import refuse_other_vocabulary

# Memory: what the drivers hold, in copies. A method's own working copies are its `holds`.
PROGRAM = 380_000_000  # bytes of a process that has imported torch and transformers, where the system does not tell
FIRST_RUN = 30_000_000  # bytes that libraries take when a module first runs: code, and buffers of threads
PER_CHARACTER = 12  # bytes of text as tokens, while it is being cut into them
BATCH = 8  # sequences that run through a block at once (`Given.batches`)
GATHERED = 0.5  # of the square of the inputs: a second moment is kept as one half
SOLVING = 1.4  # squares of the widest input: what a solver factors and inverts beside it
SURVEYED = 1  # bytes for each value of a model, of those that are collected while a cut is looked for among all
AHEAD = 8  # slices that are computed while one is written
INSIDE = (4, 4)  # activations of a block that are alive at once, in values per token: of its width, of its inner width
SAVED = (10, 4)  # and those that training keeps of every block for the way back
LOGITS = 4  # float32 copies of the logits in a step of training: themselves, shifted, their softmax, a gradient
TEACHER = 7  # more of them with a teacher: its logits, their softmax, their exponent, masks, the ratio, its gradient
BLOCK_FLOATS = 5  # float32 copies of all activations while a block is scored: in and out, both scaled, their product
TRAINED = 4 * 4  # bytes for a trained weight: itself, its gradient and two averages, all float32
COMPANDED = 2 * 4 + 2 * (1 + 12 / 128)  # the same with averages in 8 bits, and three float32 numbers for each 128

# Time: three kinds of work, each with a rate of this machine.
ELEMENTS = 1e9  # values that work element by element goes through in a second, on one core
PASSES = (30, 10)  # such passes over the activations of a block: of its width, of its inner width
CHARACTERS = 1e6  # of text that are cut into tokens in a second
SOLVER = 2e9  # values of a weight, times its inputs, that a solver goes through in a second, column by column
CLASSES = (
    (2, "a second"), (30, "seconds"), (120, "a minute"), (1800, "minutes"), (7200, "an hour"), (100_000, "hours"),
    (float("inf"), "days"),
)  # fmt: skip


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
    strange = {number: words for number, step in enumerate(recipe.steps) if (words := walk.strange_patterns(step.method))}
    faults += [SiteError(f"step {number}: {word}") for number, words in strange.items() for word in words]
    if model is None:
        return Plan([], [])
    unordered, warnings = recipes.check_order(recipe, model)
    skeleton = emptied(model.module) if model.loaded else copy.deepcopy(stream.split_skeleton(model))  # steps change its config
    rows, form = [_row("input", skeleton, 0)], loads_with(skeleton)
    program = resident()
    streaming = not model.loaded
    for number, step in enumerate(recipe.steps):
        before = _row("", skeleton, 0)
        faults += [PlanError(text) for text in unordered.get(number, ())]
        if number in strange or number in unordered:
            continue
        zeros = None
        named = {key: step.given[key] for key in recipes.GIVEN if key in step.given}
        local = replace(given, **named, notes=[])
        memory = peak(skeleton, step.method, local, program, streaming)
        lasts = seconds(skeleton, step.method, local, before.flops_per_token, rate)
        streaming = True  # every step writes a folder, from which the next one reads
        with torch.no_grad(), faults.collected(f"step {number}: {step.method.name()}: "):
            if isinstance(step.method, TrainMethod) and "teacher" in named and (teacher := _opened(named["teacher"], model)):
                refuse_other_teacher(step.method, skeleton, teacher)
            skeleton, zeros = predict(skeleton, step.method, replace(given, **named))
        row = _row(step.method.name(), skeleton, zeros or 0.0)
        if zeros is None:  # what leaves the model takes its zeros along
            row.zeros = rows[-1].zeros * min(1.0, row.parameters / max(1, rows[-1].parameters))
        row.peak_bytes = memory
        row.time = time_class(lasts)
        row.notes = list(given.notes)
        given.notes.clear()
        if loads_with(skeleton) != form:
            form = loads_with(skeleton)
            row.notes.append(f"the result loads {form}")
        rows.append(row)
    return Plan(rows, warnings)


def _opened(name: Any, model: Model) -> Model | None:
    """The model that a step names; None where it cannot be opened, which is said where it is named."""
    with contextlib.suppress(ModelError, WeightsError):
        return model if name == recipes.INPUT else open(name)
    return None


def refuse_other_teacher(method: Method, module: nn.Module, teacher: Model) -> None:
    """Raise ModelError where the configs of a teacher and of an empty module tell of other vocabularies."""
    configs: list[Any] = [teacher.config, getattr(unwrapped(module), "config", None)]
    told = [each.get_text_config() for each in configs if hasattr(each, "get_text_config")]
    sizes = [each.vocab_size for each in told if hasattr(each, "vocab_size")]
    if len(sizes) == 2:
        refuse_other_vocabulary(method.name(), *sizes)


def loads_with(module: nn.Module) -> str:
    """What reads a model, once it is saved."""
    stored = {name for name, text in loading.described(module).items() if text["kind"] != loading.EXPERTS}
    if not stored and not sharing.shared(module):
        return "in plain transformers"
    stated = loading.quantization_config(module) or {}
    return (
        "after `import modelwright`" if stated["quant_method"] == loading.METHOD else f"in plain transformers with {stated['quant_method']}"
    )


def predict(module: nn.Module, method: Method, given: Given) -> tuple[nn.Module, float | None]:
    """The empty module after a method, and the zeros expected in it (None: those before, but for what is gone)."""
    if isinstance(method, SiteMethod):
        expected: float | None = None
        sites = walk.everything(module) if method.every else anatomy_of(module).sites(module)
        chosen = walk.choose(module, sites, method, given.notes)
        for site, local in walk.settled(module, chosen, walk.divide(module, chosen, method)):
            weight = weight_of(module, site)
            if weight is None:
                continue
            if "zeros" in (promised := local.promise()):
                expected = (expected or 0.0) + promised["zeros"] * weight.numel()
            if (weight.ndim == 2 or method.whole) and not site.stack and not method.every:
                result = local.planned(weight)
                if not isinstance(result, Tensor):
                    put(module, site, result.to("meta"))
        return module, expected
    if isinstance(method, BlockMethod):
        path = anatomy_of(module).blocks(module)
        if path is not None:
            removal.remove_blocks(module, method.guess(len(list(module.get_submodule(path).children()))))
    elif isinstance(method, TrainMethod):
        step, zeros = method.first(), None
        if step is not None:
            module, zeros = predict(module, step, given)
        module = method.planned(module, 0)
        split_experts(module)
        return module, zeros
    elif isinstance(method, AdapterMethod):
        import peft

        with quiet(), torch.random.fork_rng():
            bare: Any = module
            torch.manual_seed(given.rng().initial_seed())  # draws what the step will draw
            module = peft.get_peft_model(bare, walk.adapted(module, method), low_cpu_mem_usage=True)
    elif isinstance(method, ModelMethod):
        module = method.planned(module, len(given.donors))
        split_experts(module)
    return module, None


@dataclass
class Shape:
    """The sizes of a model and of the text that runs through it, on which memory and time depend."""

    size: int  # bytes of everything stored
    block: int  # of the largest block
    outside: int  # of what lies outside the blocks, without the head
    bytes: int  # of a value
    width: int
    inner: int
    blocks: int
    vocabulary: int
    longest: int  # tokens that the model takes at once
    characters: int  # of the text
    tokens: int  # that calibrate
    length: int  # of a sequence of them

    @classmethod
    def of(cls, module: nn.Module, given: Given) -> Shape:
        """Read off an empty module."""
        base = unwrapped(module)
        anatomy = anatomy_of(base)
        path = anatomy.blocks(base)
        blocks = [stored_bytes(part) for part in base.get_submodule(path).children()] if path else []
        size = stored_bytes(base)
        sites = anatomy.sites(base)
        head = sum(_weight_bytes(base, site) for site in sites if site.role == "head")
        config = getattr(base, "config", None)
        config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
        width = getattr(config, "hidden_size", None) or max((_inputs(base, site) for site in sites), default=1)
        inner = max((_inputs(base, site) for site in sites if site.role in ("mlp.down", "experts.down")), default=4 * width)
        longest = getattr(config, "max_position_embeddings", None) or given.length
        length = min(given.length, longest)
        characters = sum(map(len, given.data.documents)) if isinstance(given.data, Text) else 0
        value = next((value.element_size() for value in base.parameters() if value.is_floating_point()), 4)
        return cls(
            size=size, block=max(blocks, default=size), outside=size - sum(blocks) - head, bytes=value, width=width, inner=inner,
            blocks=max(len(blocks), 1), vocabulary=getattr(config, "vocab_size", None) or 1, longest=longest, characters=characters,
            tokens=min(given.samples, max(characters // length, 1)) * length, length=length,
        )  # fmt: skip


def time_class(lasts: float) -> str:
    """A number of seconds in words."""
    return next(name for limit, name in CLASSES if lasts < limit)


def peak(module: nn.Module, method: Method, given: Given, program: int, streaming: bool = True) -> int:
    """The resident memory that a step on this empty module is expected to reach, in bytes.

    program: what the process holds before. streaming: the model lies on disk, in files that a driver can read in parts.
    """
    shape = Shape.of(module, given)
    places = _places(module, method)
    streams = streaming and isinstance(method, (TensorMethod, LayerMethod, BlockMethod)) and not hasattr(module, "peft_config")
    if isinstance(method, LayerMethod) and any(site.depth is None for site, _ in places):
        streams = False
    program += sum(nbytes for library, nbytes in method.loads.items() if library not in sys.modules)
    held = program + (0 if streams else shape.size)
    largest = max((value.numel() for _, value in places), default=0)
    if isinstance(method, TensorMethod):
        others = len(given.donors) + (given.base is not None)
        if method.in_parts and streams and largest * shape.bytes > stream.LARGE:
            largest = SLICE * AHEAD
        if not streams:
            held += others * shape.size
        surveyed = SURVEYED * sum(value.numel() for _, value in places) if method.surveying() else 0
        ahead = shape.bytes * largest if streams and not method.in_parts else 0  # the next tensor, read while this one is worked on
        return held + ahead + largest * (shape.bytes * (1 + others) + 4 * others) + int(4 * method.holds * largest) + surveyed
    if isinstance(method, AdapterMethod):
        return program + (0 if streaming else shape.size)  # the weights stay in their files, mapped and not touched
    if isinstance(method, ModelMethod):
        return held + shape.size * (len(given.donors) + 1)
    held += FIRST_RUN + PER_CHARACTER * shape.characters
    states = shape.tokens * shape.width
    batch = BATCH * shape.length
    running = batch * shape.bytes * (INSIDE[0] * shape.width + INSIDE[1] * shape.inner)
    if isinstance(method, LayerMethod):
        moments = solving = 0
        if "moment" in method.gathers:
            widths = _inputs_once(places)
            moments = int(4 * GATHERED * sum(widths))
            solving = int(4 * SOLVING * max(widths, default=0))
        if "sample" in method.gathers:
            moments += 4 * min(2 * SAMPLE, shape.tokens) * sum(math.isqrt(square) for square in _inputs_once(places))
        gathering = running // 2 + 4 * batch * max(shape.width, shape.inner) * 2
        work = max(running, gathering, solving + int(4 * method.holds * largest))
        return held + 2 * states * shape.bytes + max(shape.outside if streams else 0, (shape.block if streams else 0) + moments + work)
    if isinstance(method, BlockMethod):
        scoring = states * (2 * shape.bytes + 4 * BLOCK_FLOATS)
        entered = states * shape.bytes if not method.last else shape.tokens // shape.length * shape.width * shape.bytes
        return held + 2 * states * shape.bytes + method.span * entered + (shape.block if streams else 0) + max(running, scoring)
    assert isinstance(method, TrainMethod), method
    return held + _training(module, method, shape, given)


def _training(module: nn.Module, method: TrainMethod, shape: Shape, given: Given) -> int:
    """Bytes of a training step beside the model as it is stored."""
    parameters = [value for value in module.parameters() if value.is_floating_point()]
    trained = sum(value.numel() for value in parameters if value.requires_grad)
    frozen = sum(value.numel() for value in parameters if not value.requires_grad)
    masks = sum(value.numel() for value in parameters if value.requires_grad and value.ndim > 1)
    tokens = method.batch // method.accumulation * min(method.length, shape.longest)
    activations = tokens * shape.blocks * (SAVED[0] * shape.width + SAVED[1] * shape.inner)
    teacher = "teacher" in method.needs()
    logits = tokens * shape.vocabulary * (LOGITS + (TEACHER if teacher else 0))
    steps = method.tokens // (method.batch * method.length)
    saving = 12 * trained if 0 < method.save_every <= steps else 0  # a checkpoint is put together in memory
    each = COMPANDED if method.optimizer == "coat" else TRAINED
    float32 = 4 * frozen + int(each * trained) - sum(value.numel() * value.element_size() for value in parameters)
    return float32 + masks + 4 * activations + 4 * logits + saving + (shape.size if teacher else 0)


def resident() -> int:
    """What this process holds now, in bytes; `PROGRAM` where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
    return PROGRAM


def _places(module: nn.Module, method: Method) -> list[tuple[Site, Tensor]]:
    """The sites that a method works on, with their empty weights [out, in]."""
    if not isinstance(method, SiteMethod):
        return []
    sites = walk.everything(module) if method.every else anatomy_of(module).sites(module)
    with contextlib.suppress(SiteError):
        found = [(site, weight_of(module, site)) for site, _ in walk.choose(module, sites, method)]
        return [(site, weight[0] if site.stack else weight) for site, weight in found if weight is not None]
    return []


def _inputs_once(places: list[tuple[Site, Tensor]]) -> list[int]:
    """The sizes of the second moments of one block, one for the matrices that share their inputs."""
    shared = {"attn.k": "attn.q", "attn.v": "attn.q", "mlp.up": "mlp.gate", "experts.up": "experts.gate"}
    first = min((site.depth for site, _ in places if site.depth is not None), default=None)
    moments = {
        shared.get(site.role, site.role) if not site.role.startswith("experts") else site.name: weight[0].numel() ** 2
        for site, weight in places
        if site.depth == first
    }
    return list(moments.values())


def _inputs(module: nn.Module, site: Site) -> int:
    weight = weight_of(module, site)
    if weight is None:
        return int(getattr(module.get_submodule(site.module), "in_features", 1))
    return weight[0].numel() if not site.stack else weight.shape[-1]


def _weight_bytes(module: nn.Module, site: Site) -> int:
    weight = weight_of(module, site)
    return stored_bytes(module.get_submodule(site.module)) if weight is None else weight.numel() * weight.element_size()


def seconds(module: nn.Module, method: Method, given: Given, flops_per_token: int, rate: Callable[[torch.dtype], float]) -> float:
    """How long a step on this empty module takes, roughly: matrix products, work element by element, solvers.

    rate: float operations per second of matrix products in a dtype.
    """
    shape = Shape.of(module, given)
    values = sum(weight.numel() for _, weight in _places(module, method)) or shape.size // shape.bytes
    kind = next((value.dtype for value in unwrapped(module).parameters() if value.is_floating_point()), torch.float32)
    scores = 2 * shape.length * shape.width * shape.blocks  # of attention, for a token, half of them masked
    elements = shape.blocks * (PASSES[0] * shape.width + PASSES[1] * shape.inner)
    text = shape.characters / CHARACTERS
    token = (flops_per_token + scores) / rate(kind) + elements / ELEMENTS  # once through the model
    if isinstance(method, TrainMethod):
        full = (flops_per_token + scores) / rate(torch.float32) + (elements + LOGITS * shape.vocabulary) / ELEMENTS
        return text + method.tokens * (3 * full + (token if "teacher" in method.needs() else 0))
    if isinstance(method, BlockMethod):
        return text + shape.tokens * (token + BLOCK_FLOATS * shape.blocks * shape.width / ELEMENTS)
    if isinstance(method, ModelMethod) and "calibration" in method.needs():
        text += method.passes(shape.blocks) * shape.tokens * token
    places = _places(module, method)
    own = (text if isinstance(method, ModelMethod) else 0) + 3 * getattr(method, "holds", 1) * values * (1 + len(given.donors)) / ELEMENTS
    if getattr(method, "solves", False):
        own += sum(weight.numel() * min(len(weight), weight[0].numel()) for _, weight in places) / SOLVER
    if isinstance(method, LayerMethod):
        moments = sum(_inputs_once(places)) * shape.blocks * 2 * shape.tokens if "moment" in method.gathers else 0
        own += text + (2 + bool(method.surveys()) + method.reruns()) * shape.tokens * token + moments / rate(torch.float32)
    return own


@functools.cache
def rate(kind: torch.dtype) -> float:
    """Float operations per second of a matrix product on this machine, from one that takes some milliseconds."""
    size = 512
    square = torch.ones(size, size, dtype=kind)
    spent = []
    for _ in range(3):
        started = time.perf_counter()
        square @ square
        spent.append(time.perf_counter() - started)
    return 2 * size**3 / min(spent)


def _row(step: str, module: nn.Module, zeros: float) -> Row:
    base = unwrapped(module)
    return Row(step, count(base)[0], zeros, stored_bytes(module), flops_per_token(base))
