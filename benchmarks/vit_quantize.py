"""Accuracy of a small ViT against the bits of its weights and inputs, quantised by every method.

    python benchmarks/vit_quantize.py                            # 3 minutes
    python benchmarks/vit_quantize.py --steps 60 --name dry      # a dry run

The ViT is trained on stripes behind noise until it gives most new images their class. `unlike channels` is the accuracy of the same
function with its norms' channels given other ranges and middles, as large ViTs have them, and the matrices behind them made to fit: what
rounds each channel for itself loses nothing by that. Patch embedding and head stay as they are.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import _frontier
import _run

NOISE = 3.0
POINTS: list[tuple[str, list[dict[str, Any]]]] = [
    ("rtn", [{"bits": bits, "group": 32} for bits in (2, 3, 4, 8)]),
    ("gptq", [{"bits": bits, "group": 32} for bits in (2, 3, 4)]),
    ("awq", [{"bits": bits, "group": 32} for bits in (2, 3, 4)]),
    ("hqq", [{"bits": bits, "group": 32} for bits in (2, 3, 4)]),
    ("nf4", [{"group": 32}]),
    *((name, [{"bits": bits, "inputs": bits} for bits in (3, 4, 6, 8)]) for name in ("smoothquant", "mergequant", "repq_vit")),
]


def main() -> None:
    """Train, quantise, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of training, 64 images each")
    parser.add_argument("--images", type=int, default=4096, help="that accuracy is measured on")
    parser.add_argument("--name", default="vit-quantize", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()

    import _vit

    import modelwright as mw
    from modelwright.core.labels import stripes
    from modelwright.small import vit

    plain = vit(asked.steps, NOISE)
    uneven = copy.deepcopy(plain)
    _vit.uneven(uneven)
    data = [{"pixel_values": part} for part in stripes(128, 7, NOISE).images.split(16)]

    def accuracy(module: Any) -> float:
        return _vit.accuracy(module, asked.images, noise=NOISE)

    rows = [{"method": "original", "weights, bits": 32, "inputs, bits": 32, "bits per weight, stored": 32.0,
             "accuracy": accuracy(plain), "accuracy, unlike channels": accuracy(uneven)}]  # fmt: skip
    for name, points in POINTS:
        for settings in points:
            method = mw.find(f"quantize.{name}").build(settings)
            text = data if method.level != "tensor" else None
            one, two = (mw.apply(copy.deepcopy(module), method, data=text) for module in (plain, uneven))
            rows.append({
                "method": method.name(), "weights, bits": settings.get("bits", 4), "inputs, bits": settings.get("inputs", 32),
                "bits per weight, stored": _frontier.stored_bits(one), "accuracy": accuracy(one),
                "accuracy, unlike channels": accuracy(two),
            })  # fmt: skip
    command = f"python benchmarks/vit_quantize.py --steps {asked.steps} --images {asked.images}"
    _run.save(asked.name, "A ViT, quantised", command, rows)


if __name__ == "__main__":
    main()
