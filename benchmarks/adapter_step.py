"""What a training step of each adapter takes beside peft's LoRA: time and memory, forward, backward and the optimizer's step.

    python benchmarks/adapter_step.py                              # all adapters
    python benchmarks/adapter_step.py --methods adapt.hydra ...    # LoRA and these

A random Llama in float32 is made in each subject's own process, and adapted in all matrices of its blocks. The setting that decides
how many numbers train is chosen so that they come nearest to LoRA's of rank 8. Ratios are to LoRA's medians; memory is the
most that the process held beyond what it held with the frozen model alone. What an adapter does in the course of a run (grow, move its
places) is not in a step; SVFit, LoLDU and SSF have no number to choose, and train fewer.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Iterable
from typing import Any

import _run

SIZES = dict(hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=12, vocab_size=8192)
LORA = ("adapt.lora", {"rank": 8})
RANKS = range(1, 17)
KNOBS: dict[str, tuple[tuple[str, ...], Iterable[Any]]] = {  # of each method, the settings that decide how many numbers train, and values
    "adapt.hydra": (("parallel", "sequential"), RANKS), "adapt.triadapt": (("rank", "first_rank"), RANKS),
    "adapt.pst": (("rank",), RANKS), "adapt.dsee": (("rank",), RANKS), "adapt.petalface": (("rank",), RANKS),
    "adapt.apet": (("parameters",), (1_600_000, 1_640_000)), "adapt.intrinsic": (("dimension",), (16_700,)),
    "adapt.spiel": (("trained",), (0.016, 0.0165, 0.017)), "adapt.compacter": (("reduction",), (1, 2, 4, 8, 16, 32)),
    "adapt.mosa": (("inner",), range(1, 33)), "adapt.diffscaler": (("inner",), range(1, 33)),
    "adapt.series": (("inner",), range(1, 33)), "adapt.parallel": (("inner",), range(1, 33)),
    "adapt.svfit": ((), ()), "adapt.loldu": ((), ()), "adapt.ssf": ((), ()),
    "adapt.dora": (("rank",), RANKS), "adapt.miss": (("rank",), (4, 8, 12, 16, 24, 32)), "adapt.loha": (("rank",), RANKS),
    "adapt.lokr": (("rank",), RANKS), "adapt.gralora": (("rank",), range(2, 17, 2)), "adapt.hira": (("rank",), RANKS),
    "adapt.delora": (("rank",), RANKS),
}  # fmt: skip


def chosen(name: str, layers: int) -> dict[str, Any]:
    """The settings with which as many numbers train as LoRA's, as nearly as the knob allows."""
    if name == LORA[0]:
        return LORA[1]
    names, values = KNOBS[name]
    tried = [dict.fromkeys(names, value) for value in values] or [{}]
    if len(tried) == 1:
        return tried[0]
    wanted = trained(*LORA, layers)
    return min(tried, key=lambda settings: abs(trained(name, settings, layers) - wanted))


def trained(name: str, settings: dict[str, Any], layers: int) -> int:
    """How many numbers train, counted on an empty model."""
    from modelwright.core import plan
    from modelwright.core.find import find
    from modelwright.core.given import Given
    from modelwright.core.model import empty_module

    module, _ = plan.predict(empty_module(config(layers)), find(name)(**settings), Given())
    return sum(value.numel() for value in module.parameters() if value.requires_grad)


def config(layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES, num_hidden_layers=layers, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])


def steps(name: str, settings: dict[str, Any], layers: int, tokens: int, count: int) -> dict[str, Any]:
    """Seconds of each step, bytes held beyond the frozen model at most, and how many numbers train."""
    import torch
    from transformers import LlamaForCausalLM

    import modelwright as mw
    from modelwright.core.find import find
    from modelwright.core.measure import peak_memory
    from modelwright.core.training import Training, make_optimizers, next_token

    torch.manual_seed(0)
    model = mw.Model(name="random", module=LlamaForCausalLM(config(layers)))
    ids = torch.randint(SIZES["vocab_size"], (1, tokens))
    mask = torch.ones_like(ids, dtype=torch.bool)
    from modelwright.core.plan import resident

    before = resident()
    module: Any = mw.apply(model, find(name)(**settings)).module.train()
    optimizers = make_optimizers(module, Training())
    seconds = []
    with peak_memory() as memory:
        for _ in range(count):
            started = time.perf_counter()
            next_token(module, ids, mask)[0].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - started)
    numbers = sum(value.numel() for value in module.parameters() if value.requires_grad)
    return {"seconds": seconds[2:], "bytes": memory.bytes - before, "trained": numbers, "settings": settings}


def main() -> None:
    """Run all in turn, print and save the table."""
    from modelwright.core.find import names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name in names() if name in KNOBS]
    parser.add_argument("--methods", nargs="+", default=known, choices=known)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="adapter-step", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()
    subjects = {}
    for name in (LORA[0], *asked.methods):
        settings = _run.subject("adapter_step:chosen", name=name, layers=asked.layers).returned
        subjects[name] = functools.partial(
            _run.subject, "adapter_step:steps", name=name, settings=settings, layers=asked.layers, tokens=asked.tokens, count=asked.steps
        )
    found = _run.alternate(subjects, asked.rounds)
    middle = {name: statistics.median(second for run in runs for second in run.returned["seconds"]) for name, runs in found.items()}
    held = {name: statistics.median(run.returned["bytes"] for run in runs) for name, runs in found.items()}
    rows = [
        {
            "method": name, "settings": ", ".join(f"{key} {value}" for key, value in runs[0].returned["settings"].items()),
            "trained": runs[0].returned["trained"], "step seconds": middle[name], "ratio": middle[name] / middle[LORA[0]],
            "MB beyond the model": held[name] / 1e6, "memory ratio": held[name] / held[LORA[0]],
        }
        for name, runs in found.items()
    ]  # fmt: skip
    parameters = _run.subject("adapter_step:size", layers=asked.layers).returned
    _run.save(
        asked.name, f"Steps of {asked.tokens} tokens on a random Llama of {parameters / 1e6:.0f} M parameters in float32",
        f"python benchmarks/adapter_step.py --methods {' '.join(asked.methods)} --layers {asked.layers} --tokens {asked.tokens} "
        f"--steps {asked.steps} --rounds {asked.rounds}",
        rows,
    )  # fmt: skip


def size(layers: int) -> int:
    """Parameters of the model."""
    from modelwright.core.model import empty_module

    return sum(value.numel() for value in empty_module(config(layers)).parameters())


if __name__ == "__main__":
    main()
