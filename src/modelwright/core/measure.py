"""What a model is and does: everything stored, work per token, speed, memory, energy, and how well it predicts text."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.anatomy import anatomy_of
from modelwright.blocks._stored import Described, Stored

from . import data as texts
from . import evaluate, sharing, stream
from .errors import DataError, NeedError, SettingError
from .model import Model, open, stored_bytes, unwrapped
from .passage import fill
from .progress import track
from .weights import Checkpoint

# Sizes


def sizes(model: Model) -> dict[str, Any]:
    """Parameters, zeros, bytes on disk and in memory, bits per weight and FLOPs per token.

    `parameters` counts the weights that the model stands for: a packed matrix counts as the dense one, two factors as
    their own entries. `bits_per_weight` is everything stored, scales and masks too, over the parameters.
    """
    disk = disk_bytes(model.folder) if model.folder is not None and not model.changed else None
    if model.checkpoint is not None and (skeleton := streamable_skeleton(model)) is not None:
        module = whole = skeleton
        parameters, zeros = count_on_disk(model.checkpoint, skeleton)
    else:
        whole = model.module if model.loaded else open(str(model.folder), trust_remote_code=model.trust_remote_code).module
        module = unwrapped(whole)
        parameters, zeros = count(module)
    memory = stored_bytes(whole)
    return {
        "parameters": parameters,
        "zeros": zeros,
        "bytes_disk": disk,
        "bytes_memory": memory,
        "bits_per_weight": 8 * memory / max(parameters, 1),
        "flops_per_token": flops_per_token(module),
    }


def count(module: nn.Module) -> tuple[int, int]:
    """(weights that the module stands for, those of them that are zero); shared tensors count once."""
    total = zeros = 0
    seen: set[int] = set()
    for layer in module.modules():
        if isinstance(layer, Stored) and layer.stands_for_dense:
            own = {id(value) for name, value in (*layer.named_parameters(), *layer.named_buffers()) if name != "bias"}
            if own <= seen:
                continue
            seen |= own
            total += layer.weights()
            zeros += layer.weights() - layer.nonzeros()
    for value in module.parameters():
        if id(value) not in seen:
            seen.add(id(value))
            total += value.numel()
            zeros += 0 if value.is_meta else value.numel() - int(torch.count_nonzero(value))
    return total, zeros


def streamable_skeleton(model: Model) -> nn.Module | None:
    """The empty module of a model on disk whose files name what the module names; None for others."""
    if model.folder is None or (model.folder / "adapter_config.json").is_file():
        return None
    skeleton = stream.split_skeleton(model)
    return None if None in stream.disk_names(Checkpoint(model.folder), skeleton).values() else skeleton


def count_on_disk(checkpoint: Checkpoint, skeleton: nn.Module) -> tuple[int, int]:
    """As `count`, with one layer's tensors in memory at a time; the skeleton is empty again afterwards."""
    names = stream.disk_names(checkpoint, skeleton)
    total = zeros = 0
    done: set[str] = set()
    for path, layer in skeleton.named_modules():
        if isinstance(layer, Stored) and layer.stands_for_dense:
            own = [f"{path}.{leaf}" for leaf in layer.state_dict()]
            fill(skeleton, own, lambda name: checkpoint.read(names[name] or name))
            total += layer.weights()
            zeros += layer.weights() - layer.nonzeros()
            layer.to("meta")
            done |= {names[name] or name for name in own if not name.endswith(".bias")}
    for name, _ in skeleton.named_parameters():
        file_name = names[name] or name
        if file_name not in done:
            done.add(file_name)
            tensor = checkpoint.read(file_name)
            total += tensor.numel()
            zeros += tensor.numel() - int(torch.count_nonzero(tensor))
    return total, zeros


def disk_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder, headers included."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def flops_per_token(module: nn.Module) -> int:
    """Multiplications and additions of the matrices for one token, two per weight; attention scores are left out.

    Zeros cost what other weights cost; experts count by the share that is used, and a shared matrix at each of its places.
    """
    config = getattr(module, "config", None)
    experts = next((getattr(config, name) for name in ("num_experts", "num_local_experts") if getattr(config, name, None)), 1)
    used = getattr(config, "num_experts_per_tok", experts) / experts
    total, places = 0.0, sharing.uses(module)
    for site in anatomy_of(module).sites(module):
        if site.role in ("embed", "position") or isinstance(module.get_submodule(site.module), Stored):
            continue
        share = (used if site.role.startswith("experts") else 1.0) * (places[site.name] or 1)
        total += 2 * share * module.get_parameter(site.name).numel()
    for name, layer in module.named_modules():
        if isinstance(layer, Stored) and not hasattr(layer, "num_embeddings"):
            total += (used if ".experts." in name else 1.0) * 2 * layer.work()
        if isinstance(layer, Described) and not isinstance(layer, Stored):
            total += sum(2 * value.numel() for value in layer.parameters() if value.ndim == 2)
    tied = getattr(module, "_tied_weights_keys", None) and getattr(config, "tie_word_embeddings", False)
    whole: Any = module
    if tied and whole.get_output_embeddings() is not None:
        total += 2 * whole.get_input_embeddings().weight.numel()
    return int(total)


# Peak memory and energy


@dataclass
class Meter:
    """Filled when the block ends."""

    bytes: int = 0


@contextlib.contextmanager
def peak_memory() -> Iterator[Meter]:
    """The largest resident memory of this process while the block runs, in bytes; 0 where the system does not tell.

    What the process holds when the block begins counts; what was freed before it, and the high-water mark until then, do not.
    """
    meter = Meter()
    stream._give_back()
    reset = Path("/proc/self/clear_refs")
    with contextlib.suppress(OSError):
        reset.write_text("5")
    try:
        yield meter
    finally:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    meter.bytes = int(line.split()[1]) * 1024


class Energy:
    """Joules between the start and `joules`, where the machine counts them.

    Of work on the processor, its packages' by the counters of the system (RAPL). Of work on an accelerator, the
    accelerator's by its own counter, which the package codecarbon reads where it is installed (the extra `energy`), and the
    packages' where they can be read. Only counters are used: codecarbon's tracker reads the same ones of the processor,
    and where there are none it guesses from the processor's name and the memory's size, which is no measurement.
    """

    folder = Path("/sys/class/powercap")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.counters = [path for path in sorted(self.folder.glob("intel-rapl:?/energy_uj")) if os.access(path, os.R_OK)]
        first = self._read()
        # Some processors show one package's counter once for each of its dies: alike to the joule.
        self.counters = [
            path for place, path in enumerate(self.counters) if all(abs(first[place] - other) > 1e6 for other in first[:place])
        ]
        self.before = self._read()
        self.spent = accelerator_joules(self.device)

    def _read(self) -> list[int]:
        return [int(path.read_text()) for path in self.counters]

    def joules(self) -> float | None:
        """None where no counter can be read."""
        used = [after - before for before, after in zip(self.before, self._read(), strict=True)]
        processor = sum(used) / 1e6 if used and min(used) >= 0 else None  # a counter that began again tells nothing
        if self.device.type == "cpu":
            return processor
        now = accelerator_joules(self.device)
        if now is None or self.spent is None or now < self.spent:
            return None
        return now - self.spent + (processor or 0.0)


def accelerator_joules(device: torch.device) -> float | None:
    """What an accelerator has used since its driver started, by its own counter; None where nothing reads it."""
    if device.type != "cuda":
        return None
    logger = logging.getLogger("codecarbon")
    before, logger.disabled = logger.disabled, True  # it would write to the terminal
    try:
        from codecarbon.core.gpu import AllGPUDevices

        own = str(torch.cuda.get_device_properties(device).uuid)
        found = [row for row in AllGPUDevices().get_gpu_details() if str(row["uuid"]).removeprefix("GPU-") == own.removeprefix("GPU-")]
        return float(found[0]["total_energy_consumption"]) / 1000
    except Exception:  # not installed, no driver, or a card without a counter: whatever it is, the energy is unknown
        return None
    finally:
        logger.disabled = before


# Quality


@torch.no_grad()
def window_losses(module: nn.Module, ids: Tensor, length: int, batch: int = 8) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood in nats and number of predicted tokens, per window of `length` tokens.

    Windows overlap by one token, so that every token of ids [n] but the first is predicted exactly once.
    """
    starts = range(0, len(ids) - 1, length - 1)
    rows = [ids[start : start + length] for start in starts]
    losses, counts = [], []
    device = next(module.parameters()).device
    for begin in range(0, len(rows), batch):
        part = rows[begin : begin + batch]
        padded = nn.utils.rnn.pad_sequence(part, batch_first=True).to(device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True).to(device)
        logits = module(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.transpose(1, 2), padded[:, 1:], reduction="none") * mask[:, 1:]
        losses.append(loss.sum(1).double().cpu())
        counts.append(mask[:, 1:].sum(1).cpu())
    return torch.cat(losses), torch.cat(counts)


def quality(model: Model, text: texts.Text, length: int = 512, most_tokens: int | None = None) -> dict[str, Any]:
    """Perplexity per token and bits per byte on a text, with a 95 % interval over windows; None for its ends where there is one window.

    Every byte of the text counts in bits per byte; the marks between documents cost bits but count no bytes. "text" says
    what was read.
    """
    if model.tokenizer is None:
        raise NeedError(
            f"{model.name} has no tokenizer, so its perplexity on text cannot be measured. Copy tokenizer.json beside its weights."
        )
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    ids = texts.tokens(text, model.tokenizer, needed=64, vocabulary=config.vocab_size)
    size, part = sum(len(document.encode()) for document in text.documents), f"all of {text.source}"
    if most_tokens is not None and len(ids) > most_tokens:
        ids, part = ids[:most_tokens], f"the first {most_tokens:,} tokens of {text.source}"
        size = len(model.tokenizer.decode(ids, skip_special_tokens=True).encode())
    losses, counts = window_losses(model.module, ids, texts.within(model.config, length))
    tokens = int(counts.sum())
    mean = float(losses.sum()) / tokens
    if not math.isfinite(mean):
        raise DataError(f"{model.name}: its loss on the text is not finite; its weights are broken.")
    rates = losses / counts.clamp(min=1)
    weights = counts / counts.sum()
    spread = float((weights.square() * (rates - mean).square()).sum().sqrt())
    known = len(rates) > 1
    return {
        "perplexity": math.exp(min(mean, 700)),
        "perplexity_low": math.exp(max(mean - 1.96 * spread, 0)) if known else None,
        "perplexity_high": math.exp(min(mean + 1.96 * spread, 700)) if known else None,
        "bits_per_byte": float(losses.sum()) / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
        "text": part,
    }


# Speed


@torch.no_grad()
def speed(model: Model, prompt: int = 256, new: int = 32, repeats: int = 3) -> dict[str, Any]:
    """Prefill and decode tokens per second at batch 1, the median of `repeats`, and joules per token if known."""
    module, config = model.module, model.config
    ids = torch.randint(0, config.vocab_size, (1, texts.within(config, prompt + new) - new), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(module.parameters()).device)
    prefill, decode = [], []
    energy = Energy(ids.device)

    def now() -> float:
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(repeats):
        started = now()
        out = module(input_ids=ids, use_cache=True)
        prefill.append(ids.shape[1] / (now() - started))
        token = out.logits[:, -1:].argmax(-1)
        started = now()
        for _ in range(new):
            out = module(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        decode.append(new / (now() - started))
    joules = energy.joules()
    return {
        "prefill_tokens_per_second": sorted(prefill)[repeats // 2],
        "decode_tokens_per_second": sorted(decode)[repeats // 2],
        "joules_per_token": None if joules is None else joules / (repeats * (ids.shape[1] + new)),
    }


def continuation(model: Model, prompt: str, new: int = 40) -> str:
    """What the model writes after a prompt, taking the likeliest token each time."""
    ids = model.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        out = None
        for _ in range(new):
            out = model.module(input_ids=ids, use_cache=False)
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
    return model.tokenizer.decode(ids[0], skip_special_tokens=True)


# All of it


def measure(
    *targets: Any, data: Any = "corpus", tasks: Sequence[str] = (), most_tokens: int | None = None, timed: bool = True,
    preset: str | None = None, questions: str | Path | None = None, truths: str | Path | None = None, pairs: str | Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure models side by side: sizes, quality on held-out text, speed, peak memory; a row each.

    data: text that none of the models has been fitted to: all of it is read; of "corpus", the held-out part. The row says which.
    tasks: names of lm-eval tasks; needs the package lm-eval.
    preset: "quantization" compares each model with the first, its original: how far its predictions are from that one's, and scores on the
        files `questions`, `truths` and `pairs` that are given, whose form `core.evaluate` says. The original is in memory beside each.
    """
    read = {"asked": questions, "truths": truths, "biases": pairs}
    if preset is not None:
        evaluate.check_preset(preset, targets)
    elif any(read.values()):
        raise SettingError("Questions, truths and pairs belong to a preset. Add preset: quantization.")
    files = {key: (evaluate.pairs if key == "biases" else evaluate.questions)(file) for key, file in read.items() if file is not None}
    text = texts.read(data)
    held = text.split()[1] if text.held else text
    rows = []
    for target in track(targets, "measure"):
        model = open(target)
        row: dict[str, Any] = {"model": model.name}
        with peak_memory() as memory:
            row |= sizes(model)
            if hasattr(model.config, "vocab_size") and model.tokenizer is not None and _speaks(model):
                row |= quality(model, held, most_tokens=most_tokens)
                row |= speed(model) if timed else {}
        row["peak_memory"] = memory.bytes
        if model is not target and not tasks:
            model.forget()
        row |= task_scores(model, tasks) if tasks else {}
        rows.append(row)
    if preset is not None:
        original = open(targets[0])
        for row, target in zip(rows, track(targets, "compare"), strict=True):
            model = original if target is targets[0] else open(target)
            row |= evaluate.compared(original, model, held, most_tokens, 512, **files)
            if model is not target and model is not original:
                model.forget()
    return rows


def _speaks(model: Model) -> bool:
    return "logits" in getattr(type(unwrapped(model.module)), "__doc__", "") or hasattr(unwrapped(model.module), "lm_head") or (
        getattr(unwrapped(model.module), "get_output_embeddings", lambda: None)() is not None
    )  # fmt: skip


def task_scores(model: Model, tasks: Sequence[str]) -> dict[str, float]:
    """Scores of lm-eval tasks, as "task/metric".

    Raises:
        NeedError: lm-eval is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise NeedError("Tasks need the package lm-eval, which is not installed. Run `pip install lm-eval`.") from None
    found = simple_evaluate(model=HFLM(pretrained=model.module, tokenizer=model.tokenizer), tasks=list(tasks))
    return {
        f"{task}/{metric}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }
