"""How much faster a model reads and writes once blocks, heads and neurons, or channels are gone, beside the FLOPs that went.

python benchmarks/pruned_speed.py
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import _run

SIZES = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16, vocab_size=8192)
LENGTH, SAMPLES = 64, 8


def main() -> None:
    """Prune a random Llama in each direction, measure all in turn, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--name", default="pruned-speed", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import modelwright as mw
    from modelwright.core.find import find
    from modelwright.core.measure import flops_per_token, speed

    steps: dict[str, dict[str, Any]] = {
        "prune.shortgpt": {"blocks": asked.layers // 2}, "prune.llm_pruner": {"share": 0.5, "spare_first": 0, "spare_last": 0},
        "prune.slicegpt": {"keep": 0.5},
    }  # fmt: skip
    ids = torch.randint(SIZES["vocab_size"], (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    config = LlamaConfig(**SIZES, num_hidden_layers=asked.layers, max_position_embeddings=1024)
    torch.manual_seed(0)
    original = LlamaForCausalLM(config).eval()
    models = {"original": mw.Model(name="original", module=original)}
    for name, settings in steps.items():
        model = mw.Model(name=name, module=copy.deepcopy(original))
        models[name] = mw.apply(model, find(name).build(settings), data=[{"input_ids": row} for row in ids.split(2)])
    rounds = [{name: speed(model, repeats=1) for name, model in models.items()} for _ in range(asked.repeats)]
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        keys = ("prefill_tokens_per_second", "decode_tokens_per_second")
        middle = {key: sorted(found[name][key] for found in rounds)[asked.repeats // 2] for key in keys}
        first = rows[0] if rows else None
        flops = flops_per_token(model.module)
        rows.append({
            "model": name, "parameters": sum(value.numel() for value in model.module.parameters()), "flops per token": flops,
            "prefill tokens/s": middle["prefill_tokens_per_second"], "decode tokens/s": middle["decode_tokens_per_second"],
            "flops gone ×": first["flops per token"] / flops if first else 1.0,
            "prefill ×": middle["prefill_tokens_per_second"] / first["prefill tokens/s"] if first else 1.0,
            "decode ×": middle["decode_tokens_per_second"] / first["decode tokens/s"] if first else 1.0,
        })  # fmt: skip
    _run.save(
        asked.name, f"A random Llama of width {SIZES['hidden_size']} with {asked.layers} blocks, before and after pruning, float32",
        f"python benchmarks/pruned_speed.py --layers {asked.layers} --repeats {asked.repeats}", rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
