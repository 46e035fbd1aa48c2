"""How fast a packed model decodes beside the same one in bfloat16, and what it holds in memory meanwhile.

    python benchmarks/packed_speed.py

A random Llama is saved in bfloat16 and, by `quantize.rtn`, in 4 and in 8 bits. Each round loads each of them in a process of its
own, `transformers` the first and Modelwright the others, and decodes at batch 1; ratios are of medians. Resident memory is that
of the process after decoding, libraries too. The layer is one of its MLP's.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import _models
import _run

SIZES = dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=16, num_key_value_heads=16, vocab_size=8192)
PROMPT = 32  # tokens


def make(folder: str, layers: int, group: int) -> dict[str, int]:
    """Save the model three times; the bytes of each."""
    import modelwright as mw
    from modelwright.core.find import find

    _models.random_llama(folder + "/16", SIZES | {"num_hidden_layers": layers})
    for bits in (4, 8):
        mw.apply(folder + "/16", find("quantize.rtn")(bits=bits, group=group), save=f"{folder}/{bits}")
    return {name: sum(file.stat().st_size for file in Path(folder, name).glob("*.safetensors")) for name in ("16", "8", "4")}


def decode(folder: str, bits: int, new: int) -> dict[str, Any]:
    """Tokens per second, seconds of one product of a layer, and resident bytes."""
    import torch
    from transformers import LlamaForCausalLM

    import modelwright as mw
    from modelwright.core.measure import speed
    from modelwright.core.plan import resident

    path = f"{folder}/{bits}"
    model = mw.Model(name=path, module=LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)) if bits == 16 else mw.open(path)
    module = model.module.eval()
    if bits != 16:
        assert type(module.model.layers[0].mlp.up_proj).__name__ == "PackedLinear"
    speed(model, PROMPT, 2, repeats=1)
    tokens = speed(model, PROMPT, new, repeats=3)["decode_tokens_per_second"]
    layer, inputs = module.model.layers[0].mlp.up_proj, torch.randn(1, 1, SIZES["hidden_size"], dtype=torch.bfloat16)
    seconds = []
    with torch.no_grad():
        for _ in range(50):
            started = time.perf_counter()
            layer(inputs)
            seconds.append(time.perf_counter() - started)
    return {"tokens": tokens, "layer": statistics.median(seconds), "resident": resident()}


def main() -> None:
    """Make the models, run all in turn, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="packed-speed", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stored = _run.subject("packed_speed:make", folder=folder, layers=asked.layers, group=asked.group).returned
        call = functools.partial(_run.subject, "packed_speed:decode", folder=folder, new=asked.tokens)
        found = _run.alternate({str(bits): functools.partial(call, bits=bits) for bits in (16, 8, 4)}, asked.rounds)
    rows: list[dict[str, Any]] = []
    for name, runs in found.items():
        middle = {key: statistics.median(run.returned[key] for run in runs) for key in ("tokens", "layer", "resident")}
        first = rows[0] if rows else None
        rows.append({
            "bits": int(name), "stored MB": _run.megabytes(stored[name]), "decode tokens/s": middle["tokens"],
            "decode ×": middle["tokens"] / first["decode tokens/s"] if first else 1.0,
            "layer µs": middle["layer"] * 1e6, "layer ×": first["layer µs"] / middle["layer"] / 1e6 if first else 1.0,
            "resident MB": _run.megabytes(middle["resident"]),
        })  # fmt: skip
    _run.save(
        asked.name, f"A random Llama of width {SIZES['hidden_size']} with {asked.layers} blocks, in groups of {asked.group}",
        f"python benchmarks/packed_speed.py --layers {asked.layers} --group {asked.group} --tokens {asked.tokens} --rounds {asked.rounds}",
        rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
