"""The training loop: every method that trains calls `train` with an objective of its own.

The batch of a step and all randomness in it are pure functions of the seed and the step's number, so a run that was
killed and resumed from its checkpoint ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.blocks._stored import Stored
from modelwright.core.companded_adamw import CompandedAdamW
from modelwright.core.errors import DataError, ModelError, SettingError, WeightsError, refuse

CHECKPOINT = "training.safetensors"

Parts = dict[str, Tensor]
Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Parts]]
Report = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings of a training run. Fractions are 0 to 1; `tokens` counts every token that is seen, repeats too."""

    tokens: int = 1_000_000
    batch: int = 16  # sequences in one step, over all its parts
    length: int = 256  # tokens in a sequence
    learning_rate: float = 1e-3  # the highest
    warmup: float = 0.05  # of the steps, linear from zero
    decay: float = 1.0  # of the steps, the last, in which the learning rate falls; it is level before
    floor: float = 0.1  # of the learning rate, where the cosine ends
    weight_decay: float = 0.1  # of matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # the largest norm of the gradient; 0 for none
    accumulation: int = 1  # parts that a step's batch is computed in, to save memory
    optimizer: str = "adamw"  # or "coat", adamw with states of 8 bits, or "muon", for matrices inside the blocks, with adamw for the rest
    precision: str = "float32"  # or "bfloat16", for the products; weights and sums stay float32
    save_every: int = 0  # steps between checkpoints; 0 for none
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        wrong = [
            f"`{name}` is {value}; it must be {rule}."
            for name, value, rule, right in [
                ("tokens", self.tokens, "at least 1", self.tokens >= 1),
                ("batch", self.batch, "at least 1", self.batch >= 1),
                ("length", self.length, "at least 2", self.length >= 2),
                ("learning_rate", self.learning_rate, "above 0", self.learning_rate > 0),
                ("warmup", self.warmup, "from 0 to 1", 0 <= self.warmup <= 1),
                ("decay", self.decay, "from 0 to 1", 0 <= self.decay <= 1),
                ("floor", self.floor, "from 0 to 1", 0 <= self.floor <= 1),
                ("weight_decay", self.weight_decay, "at least 0", self.weight_decay >= 0),
                ("betas", self.betas, "two numbers from 0 to below 1", _betas(self.betas)),
                ("clip", self.clip, "at least 0", self.clip >= 0),
                ("accumulation", self.accumulation, "a divisor of `batch`", _divides(self.accumulation, self.batch)),
                ("optimizer", self.optimizer, "adamw, coat or muon", self.optimizer in ("adamw", "coat", "muon")),
                ("precision", self.precision, "float32 or bfloat16", self.precision in ("float32", "bfloat16")),
                ("save_every", self.save_every, "at least 0", self.save_every >= 0),
            ]
            if not right
        ]
        refuse(SettingError, wrong)

    @property
    def steps(self) -> int:
        """The optimizer steps that `tokens` come to, rounded up."""
        return math.ceil(self.tokens / (self.batch * self.length))


def refuse_other_vocabulary(name: str, teacher: int, own: int) -> None:
    """Raise ModelError where a method of this name compares predictions over so many tokens with others over another number."""
    if teacher != own:
        sizes = f"the teacher's vocabulary has {teacher:,} tokens and the model's {own:,}"
        raise ModelError(f"{name}: {sizes}. Give a teacher with the model's own tokenizer.")


def next_token(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Parts]:
    """The usual objective: mean cross-entropy in nats of each token that follows another.

    `ids` and `mask` are [batch, length]; targets where `mask` is false do not count.
    """
    loss = cross_entropy(model(input_ids=ids).logits, ids, mask)
    return loss, {"loss": loss.detach()}


def cross_entropy(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy in nats, a scalar, of `logits` [batch, length, vocabulary] with the token after each.

    `ids` and `mask` are [batch, length]; targets where `mask` is false do not count.
    """
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


class Course:
    """What a method does in the course of a run, beside its loss; by default nothing. Steps count from 0.

    Tensors of its own that decide the run's bits are named by `state`, and put back by `resume`. `optimizers` are the run's, from before
    `start` on: parameters that come later join them in groups of their own, and states of those that rest may be dropped.
    """

    optimizers: Sequence[torch.optim.Optimizer] = ()

    def own_optimizers(self, settings: Training) -> list[torch.optim.Optimizer]:
        """Optimizers for parameters that the run's are not to move."""
        return []

    def start(self) -> None:
        """The run begins, or goes on from a checkpoint; the weights are float32."""

    def begin(self, step: int) -> None:
        """A step begins: the model may be changed before its gradient is taken."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss of each part of a step's batch, a scalar; None for nothing."""
        return None

    def gradient(self, step: int) -> None:
        """The step's gradient is whole; it is clipped next, and then used."""

    def update(self, step: int) -> None:
        """The optimizer has changed the weights; the gradients are still there."""

    def finish(self) -> None:
        """All steps are done; the weights are still float32."""

    def leave(self) -> None:
        """The run is over or broken off: what was attached to the model goes."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the model."""
        return {}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave: by default into the same tensors. The model's values are loaded after it."""
        for name, value in self.state().items():
            value.copy_(state[name])


class Zeros(Course):
    """Holds entries of matrices at exactly 0: those that are so at the start of a run."""

    def __init__(self, weights: Iterable[Tensor]):
        self._weights = [weight for weight in weights if weight.requires_grad and weight.ndim > 1]
        self._kept: list[tuple[Tensor, Tensor]] = []

    def start(self) -> None:
        self.find()

    def find(self) -> None:
        """Hold what is 0 now, except in matrices of nothing else, which is how an adapter begins."""
        self._kept = [(weight, weight.detach() != 0) for weight in self._weights if weight.detach().any()]

    def gradient(self, step: int) -> None:
        """Held entries have no gradient, so that they count in no norm and gather no momentum."""
        for weight, mask in self._kept:
            if weight.grad is not None:
                weight.grad.mul_(mask)

    def update(self, step: int) -> None:
        """Held entries are 0 whatever an optimizer did."""
        with torch.no_grad():
            for weight, mask in self._kept:
                weight.mul_(mask)


class Together(Course):
    """Several courses of one run, in their order."""

    def __init__(self, courses: Sequence[Course]):
        self.courses = courses

    def own_optimizers(self, settings: Training) -> list[torch.optim.Optimizer]:
        return [optimizer for course in self.courses for optimizer in course.own_optimizers(settings)]

    def start(self) -> None:
        for course in self.courses:
            course.optimizers = self.optimizers
            course.start()

    def begin(self, step: int) -> None:
        for course in self.courses:
            course.begin(step)

    def penalty(self) -> Tensor | None:
        found = [value for course in self.courses if (value := course.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    def gradient(self, step: int) -> None:
        for course in self.courses:
            course.gradient(step)

    def update(self, step: int) -> None:
        for course in self.courses:
            course.update(step)

    def finish(self) -> None:
        for course in self.courses:
            course.finish()

    def leave(self) -> None:
        for course in self.courses:
            course.leave()

    def state(self) -> dict[str, Tensor]:
        return {f"{number}.{name}": value for number, course in enumerate(self.courses) for name, value in course.state().items()}

    def resume(self, state: dict[str, Tensor]) -> None:
        for number, course in enumerate(self.courses):
            course.optimizers = self.optimizers
            start = f"{number}."
            course.resume({name.removeprefix(start): value for name, value in state.items() if name.startswith(start)})


def train(
    model: nn.Module,
    ids: Tensor,
    settings: Training,
    loss: Loss = next_token,
    *,
    keep_zeros: bool = False,
    course: Course | None = None,
    folder: str | Path | None = None,
    report: Report | None = None,
) -> dict[str, float]:
    """Train `model` in place on the token row `ids` [n]; gives the parts of the last step's loss.

    Only parameters that require a gradient change. The work is done in float32 whatever the weights' type is, and
    they go back to their own type at the end; so do the modes of the modules. `loss(model, ids, mask)` gives a scalar
    and named parts to report. With `keep_zeros`, entries of matrices that are exactly 0 at the start stay so, except
    in a matrix of nothing else, which is how an adapter begins; `course` does other things instead.
    With `folder` and `settings.save_every`, checkpoints go to `folder`, and a call with the same arguments continues
    from the one that is there. `report(step, total, parts)` is called after each step.

    Raises DataError for too few tokens, ModelError when nothing can be trained, WeightsError when the loss is not
    finite or a checkpoint is broken or of another run.
    """
    course = course or Zeros(model.parameters() if keep_zeros else ())
    try:
        return _train(model, ids, settings, loss, course, keep_zeros, folder, report)
    finally:
        course.leave()


def _train(
    model: nn.Module, ids: Tensor, settings: Training, loss: Loss, course: Course, keep_zeros: bool, folder: str | Path | None,
    report: Report | None,
) -> dict[str, float]:  # fmt: skip
    first_trained = next((value for value in model.parameters() if value.requires_grad), None)
    if first_trained is None:
        raise ModelError("The model was to be trained, but none of its parameters requires a gradient.")
    device = first_trained.device
    order = Order(len(ids), settings)
    optimizers = course.own_optimizers(settings)
    taken = {id(value) for optimizer in optimizers for group in optimizer.param_groups for value in group["params"]}
    course.optimizers = optimizers = [*make_optimizers(model, settings, taken), *optimizers]
    file = Path(folder) / CHECKPOINT if folder is not None else None
    run = _run(settings, keep_zeros, ids) if file is not None else {}
    parts: dict[str, float] = {}
    devices = [device] if device.type == "cuda" else []
    modes = {module: module.training for module in model.modules()}
    model.zero_grad(set_to_none=True)
    kinds = _to_float32(model)
    try:
        model.train()
        first = load(file, model, optimizers, run, course) if file is not None and file.exists() else 0
        course.start()
        for step in range(first, settings.steps):
            course.begin(step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, settings)
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(_mix(settings.seed, step))
                parts = _gradients(model, order.batch(ids, step).to(device), settings, loss, course)
            course.gradient(step)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
            if not all(math.isfinite(part) for part in [*parts.values(), float(norm)]):
                raise WeightsError(
                    f"The loss or its gradient is not finite at step {step + 1} of {settings.steps} ({parts}). "
                    f"Lower the learning rate ({settings.learning_rate:g}), or check the weights for NaN."
                )
            for optimizer in optimizers:
                optimizer.step()
            course.update(step)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            done = step + 1
            if file is not None and settings.save_every and done % settings.save_every == 0:
                save(file, model, optimizers, run, done, course)
            if report is not None:
                report(done, settings.steps, parts)
        course.finish()
    finally:
        model.zero_grad(set_to_none=True)
        for value, kind in kinds:
            value.data = value.data.to(kind)
        for module, mode in modes.items():
            module.training = mode
    return parts


def learning_rate(step: int, settings: Training) -> float:
    """The rate at `step` (from 0): linear warmup, level, and over the last `decay` half a cosine down to `floor` of the highest."""
    warm = round(settings.warmup * settings.steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    fall = max(warm, settings.steps - round(settings.decay * settings.steps))
    along = max(0, step - fall) / max(1, settings.steps - 1 - fall)
    return settings.learning_rate * (settings.floor + (1 - settings.floor) * 0.5 * (1 + math.cos(math.pi * along)))


class Order:
    """Which windows of a row of tokens make up each step: a new permutation and a new offset in every epoch."""

    def __init__(self, count: int, settings: Training) -> None:
        """For a row of `count` tokens; raises DataError when it is shorter than one window."""
        self.settings = settings
        self.length = settings.length
        self.windows = max(1, (count - self.length + 1) // self.length)
        self.offsets = min(self.length, count - self.windows * self.length + 1)
        if count < self.length:
            raise DataError(f"The text has {count:,} tokens; one sequence needs {self.length:,}. Give more text.")

    def starts(self, step: int) -> list[int]:
        """The first positions of the windows of `step` (from 0), a pure function of the seed and the step."""
        first = step * self.settings.batch
        starts: list[int] = []
        for index in range(first, first + self.settings.batch):
            epoch, place = divmod(index, self.windows)
            offset, permutation = self._epoch(epoch)
            starts.append(offset + self.length * permutation[place])
        return starts

    def batch(self, ids: Tensor, step: int) -> Tensor:
        """The token ids of `step`, long [batch, length]."""
        return torch.stack([ids[start : start + self.length] for start in self.starts(step)])

    def _epoch(self, epoch: int) -> tuple[int, list[int]]:
        if getattr(self, "_known", (None,))[0] != epoch:
            rng = torch.Generator().manual_seed(_mix(self.settings.seed, epoch))
            offset = int(torch.randint(self.offsets, (), generator=rng))
            self._known = (epoch, offset, torch.randperm(self.windows, generator=rng).tolist())
        return self._known[1:]


def make_optimizers(model: nn.Module, settings: Training, without: Container[int] = ()) -> list[torch.optim.Optimizer]:
    """AdamW for all trained parameters, or AdamW with states of 8 bits, or Muon for the matrices of linear layers and AdamW for the others.

    without: the ids of parameters that others move. Matrices decay, vectors do not. Muon's update is scaled to the size of AdamW's, so
    one learning rate fits both.
    Raises SettingError when this torch has no Muon.
    """
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside |= {id(head.weight)} if head is not None else set()
    hidden: list[Tensor] = []
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    for value in model.parameters():
        if not value.requires_grad or id(value) in without:
            continue
        if settings.optimizer == "muon" and value.ndim == 2 and id(value) not in outside:
            hidden.append(value)
        else:
            (matrices if value.ndim > 1 else vectors).append(value)
    decays = [(matrices, settings.weight_decay), (vectors, 0.0)]
    groups = [{"params": params, "weight_decay": decay} for params, decay in decays if params]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        if not hasattr(torch.optim, "Muon"):
            raise SettingError(f"The optimizer muon needs torch 2.9 or newer; this is {torch.__version__}. Use adamw.")
        muon = torch.optim.Muon(hidden, settings.learning_rate, settings.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    if settings.optimizer == "coat":
        optimizers.append(CompandedAdamW(groups, settings.learning_rate, settings.betas))
    elif groups:
        optimizers.append(torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True))
    return optimizers


def save(
    file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], run: dict[str, Any], step: int, course: Course | None = None
) -> None:
    """Write weights, optimizer states, a course's state and `step` to one safetensors file, beside it first and renamed when whole.

    `run` is what a run must share to go on from here: plain values by name.
    """
    tensors = {f"model.{name}": value.detach() for name, value in _state(model)}
    tensors |= {f"course.{name}": value.detach() for name, value in (course.state() if course else {}).items()}
    numbers: dict[str, Any] = {}
    for place, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                name = f"optimizer.{place}.{index}.{key}"
                if isinstance(value, Tensor):
                    tensors[name] = value
                else:
                    numbers[name] = value
    record = {"step": step, "run": run, "numbers": numbers}
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, beside, {"record": json.dumps(record)})
    with open(beside, "rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(beside, file)
    if os.name == "posix":
        above = os.open(file.parent, os.O_RDONLY)
        os.fsync(above)
        os.close(above)


def load(file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], run: dict[str, Any], course: Course | None = None) -> int:
    """Put a checkpoint of `save` into the model, the optimizers and the course; gives the number of steps that are done.

    Raises WeightsError when the file is broken, or was written by another `run` or for another model.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            record = json.loads(stored.metadata()["record"])
            before = record["run"]
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"The checkpoint {file} cannot be read ({error}). Delete it to start again.") from error
    changed = [name for name, value in run.items() if before.get(name) != value]
    if not changed and course is not None:
        course.resume({name.removeprefix("course."): value for name, value in tensors.items() if name.startswith("course.")})
    ours = {name: (value.shape, value.dtype) for name, value in _state(model)}
    theirs = {name[6:]: (v.shape, v.dtype) for name, v in tensors.items() if name.startswith("model.")}
    changed += ["model"] if ours != theirs else []
    if changed:
        raise WeightsError(f"The checkpoint {file} belongs to a run with another {', '.join(changed)}. Delete it or use another folder.")
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for name, value in {**tensors, **record["numbers"]}.items():
        if name.startswith("optimizer."):
            _, place, index, key = name.split(".", 3)
            states[int(place)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        for name, value in _state(model):
            value.copy_(tensors[f"model.{name}"])
    return record["step"]


def _gradients(model: nn.Module, batch: Tensor, settings: Training, loss: Loss, course: Course) -> dict[str, float]:
    """Accumulate the gradient of one step; gives the mean of each part of the loss."""
    total: dict[str, float] = {}
    for rows in batch.chunk(settings.accumulation):
        mask = torch.ones_like(rows, dtype=torch.bool)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            value, parts = loss(model, rows, mask)
            if (penalty := course.penalty()) is not None:
                value, parts = value + penalty, {**parts, "penalty": penalty.detach()}
        (value / settings.accumulation).backward()
        for name, part in {**parts, "total": value.detach()}.items():
            total[name] = total.get(name, 0.0) + float(part) / settings.accumulation
    return total


def _to_float32(model: nn.Module) -> list[tuple[Tensor, torch.dtype]]:
    """Turn floating-point parameters and buffers into float32, but those of packed formats; gives those that changed and what they were."""
    changed = []
    exact = {id(layer._buffers[name]) for layer in model.modules() if isinstance(layer, Stored) for name in layer.exact}
    for value in [*model.parameters(), *model.buffers()]:
        if value.is_floating_point() and value.dtype != torch.float32 and id(value) not in exact:
            changed.append((value, value.dtype))
            value.data = value.data.float()
    return changed


def _state(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name, each once however many names it has."""
    return [*model.named_parameters(), *model.named_buffers()]


def _run(settings: Training, keep_zeros: bool, ids: Tensor) -> dict[str, Any]:
    """What decides a run's bits, besides the model and the objective, as JSON gives it back."""
    data = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()
    run = {**asdict(settings), "keep_zeros": keep_zeros, "data": data}
    del run["save_every"]
    return json.loads(json.dumps(run))


def _mix(seed: int, index: int) -> int:
    """A seed for the `index`-th stream of `seed`; neighbours do not overlap."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63


def _betas(betas: tuple[float, ...]) -> bool:
    return len(betas) == 2 and all(0 <= beta < 1 for beta in betas)


def _divides(part: int, whole: int) -> bool:
    return part >= 1 and whole % part == 0
