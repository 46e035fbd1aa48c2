"""Methods of one pass against llm-compressor, on one random Llama.

quantize.gptq and quantize.awq in 4 bits with groups of 128, awq with zero points; prune.sparsegpt 2:4; prune.wanda one half.

    python benchmarks/oneshot.py --peer-python PATH     # PATH: a Python with llmcompressor; by default this one
    python benchmarks/oneshot.py --layers 1 --samples 8 # a dry run

Times are of the work alone: llm-compressor's `oneshot` call, Modelwright's `apply` call, both on a model in memory.
The error is tr(ΔW H ΔWᵀ) over tr(W H Wᵀ), with H of the unchanged model on the calibration tokens for both; AWQ has none,
as what it scales is no longer the same weight. The error of outputs is of the logits there, squared, over theirs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _run

SIZES = dict(hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=2, vocab_size=8192)
LENGTH = 256
METHODS = ("gptq", "awq", "sparsegpt", "wanda")


def calibration(work: str, samples: int) -> None:
    """Write the token ids that both are given."""
    import torch
    from safetensors.torch import save_file

    ids = torch.randint(SIZES["vocab_size"], (samples, LENGTH), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, f"{work}/ids.safetensors")


def ours(method: str, work: str, save: str) -> tuple[float, float]:
    """Compress with Modelwright; returns the wall and processor seconds of the work alone."""
    from safetensors.torch import load_file

    import modelwright as mw
    from modelwright.methods.prune.sparsegpt import SparseGpt
    from modelwright.methods.prune.wanda import Wanda
    from modelwright.methods.quantize.awq import Awq
    from modelwright.methods.quantize.gptq import Gptq

    steps = {
        "gptq": Gptq(bits=4, group=128, order=True), "awq": Awq(bits=4, group=128, narrow=0.0),
        "sparsegpt": SparseGpt(pattern="2:4"), "wanda": Wanda(sparsity=0.5),
    }  # fmt: skip
    batches = [{"input_ids": row} for row in load_file(f"{work}/ids.safetensors")["ids"].split(8)]
    model = mw.open(f"{work}/model")
    _ = model.module
    started = time.perf_counter(), time.process_time()
    mw.apply(model, steps[method], data=batches)
    taken = time.perf_counter() - started[0], time.process_time() - started[1]
    model.save(save)
    return taken


def theirs(method: str, work: str, save: str) -> tuple[float, float]:
    """The same with llm-compressor, at its defaults; this runs in its environment."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    if not torch.cuda.is_available():  # its AWQ pins memory for an accelerator, and fails where there is none
        IntermediatesCache.pin_memory = lambda *_, **__: None
    ids = load_file(f"{work}/ids.safetensors")["ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)})
    linears: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}
    recipes = {
        "gptq": lambda: GPTQModifier(scheme="W4A16", **linears),
        "awq": lambda: [AWQModifier(), QuantizationModifier(scheme="W4A16_ASYM", **linears)],
        "sparsegpt": lambda: SparseGPTModifier(sparsity=0.5, mask_structure="2:4", **linears),
        "wanda": lambda: WandaPruningModifier(sparsity=0.5, **linears),
    }
    model = AutoModelForCausalLM.from_pretrained(f"{work}/model", dtype="auto")
    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))  # it asks for one, though the data are token ids
    started = time.perf_counter(), time.process_time()
    oneshot(
        model=model, dataset=data, recipe=recipes[method](), tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"),
        max_seq_length=ids.shape[1], num_calibration_samples=len(ids), shuffle_calibration_samples=False,
    )  # fmt: skip
    taken = time.perf_counter() - started[0], time.process_time() - started[1]
    model.save_pretrained(save)
    return taken


def errors(work: str, folders: list[str], scaled: bool) -> list[dict[str, float | None]]:
    """For each compressed model the relative error of outputs, of all layers together and of the worst, and the share of zeros.

    scaled: weights hold factors that others make up for, so that layers cannot be compared one by one.
    """
    import torch
    from safetensors.torch import load_file

    import modelwright as mw
    from modelwright.blocks._stored import Stored

    dense = mw.open(f"{work}/model").module
    layers = {name: layer for name, layer in dense.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"}
    moments = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}

    def gather(name: str) -> Any:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2).float()
            moments[name].addmm_(rows.T, rows)

        return hook

    for name, layer in layers.items():
        layer.register_forward_pre_hook(gather(name))
    rows = load_file(f"{work}/ids.safetensors")["ids"].split(8)
    with torch.no_grad():
        expected = [dense(input_ids=row).logits.float() for row in rows]
    found: list[dict[str, float | None]] = []
    for folder in folders:
        changed = mw.open(folder).module
        with torch.no_grad():
            gaps = [changed(input_ids=row).logits.float() - one for row, one in zip(rows, expected, strict=True)]
        outputs = sum(float(gap.square().sum()) for gap in gaps) / sum(float(one.square().sum()) for one in expected)
        lost = whole = worst = 0.0
        zeros = count = 0
        for name, layer in layers.items():
            other = changed.get_submodule(name)
            weight = (other.dense() if isinstance(other, Stored) else other.weight).detach().float()
            zeros += int((weight == 0).sum())
            count += weight.numel()
            before = layer.weight.detach().float()
            part, all_ = (float(((w @ moments[name]) * w).sum(dtype=torch.float64)) for w in (weight - before, before))
            lost, whole, worst = lost + part, whole + all_, max(worst, part / all_)
        layers_lost = {"error": None, "worst layer": None} if scaled else {"error": lost / whole, "worst layer": worst}
        found.append({**layers_lost, "error of outputs": outputs, "zeros": zeros / count})
    return found


def measured(work: Path, peer: str, methods: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for every method and subject."""
    rows = []
    for method in methods:
        saved = {name: work / f"{method}-{name}" for name in ("modelwright", "llm-compressor")}

        def go(place: str, name: str, python: str, method: str = method, saved: dict[str, Path] = saved) -> _run.Measured:
            shutil.rmtree(saved[name], ignore_errors=True)
            one = _run.subject(place, python=python, method=method, work=str(work), save=str(saved[name]))
            one.seconds, one.processor = one.returned
            return one

        found = _run.alternate(
            {
                "modelwright": lambda go=go: go("oneshot:ours", "modelwright", sys.executable),
                "llm-compressor": lambda go=go: go("oneshot:theirs", "llm-compressor", peer),
            },
            rounds,
        )
        folders = [str(folder) for folder in saved.values()]
        lost = _run.subject("oneshot:errors", work=str(work), folders=folders, scaled=method == "awq").returned
        for (name, times), error in zip(found.items(), lost, strict=True):
            rows.append({
                "method": method, "subject": name, "seconds": _run.middle(times),
                "peak MB": _run.megabytes(max(one.peak for one in times)),
                "ratio": _run.middle(times) / _run.middle(found["llm-compressor"]),
                "processor ratio": _run.middle(times, "processor") / _run.middle(found["llm-compressor"], "processor"), **error,
                "error ratio": error["error of outputs"] / lost[1]["error of outputs"],
            })  # fmt: skip
    return rows


def main() -> None:
    """Make the model, run all subjects, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with llmcompressor")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64, help=f"calibration sequences of {LENGTH} tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--work", help="where the models go; by default a temporary folder")
    parser.add_argument("--name", default="oneshot", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="oneshot-", dir=asked.work))
    try:
        _run.subject("_models:random_llama", folder=str(work / "model"), config=SIZES | {"num_hidden_layers": asked.layers})
        _run.subject("oneshot:calibration", work=str(work), samples=asked.samples)
        rows = measured(work, asked.peer_python, asked.methods, asked.rounds)
    finally:
        shutil.rmtree(work)
    _run.save(
        asked.name,
        f"One-shot compression of a random Llama, {asked.layers} layers of width 512, {asked.samples} × {LENGTH} calibration tokens",
        f"python benchmarks/oneshot.py --layers {asked.layers} --samples {asked.samples} --rounds {asked.rounds} --peer-python PATH",
        rows, peer=asked.peer_python,
    )  # fmt: skip


if __name__ == "__main__":
    main()
