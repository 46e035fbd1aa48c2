"""The merge methods against mergekit's on the same float32 checkpoints: how far the results lie apart.

python benchmarks/merge_agreement.py --peer-python PATH       # PATH: a Python with mergekit; by default this one

Both read the same files. mergekit computes in float32, or, in the rows that say so, in float64; random masks are drawn by
Modelwright and given to both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _run

ROUNDING = 2.0**-22  # times a tensor's largest value: what a few roundings to float32 make


@dataclass
class Case:
    """One merge, said twice; the peer's donors have their own parameters."""

    method: str
    settings: dict[str, Any]
    donors: list[str]
    peer: str
    parameters: dict[str, Any] = field(default_factory=dict)
    each: list[dict[str, Any]] = field(default_factory=list)
    based: bool = True  # the peer is given the base model
    first: bool = False  # and as the first of its models
    dtype: str = "float32"  # what the peer computes in


def peers(name: str, *values: Any, **more: Any) -> list[dict[str, Any]]:
    """A parameter that differs by donor, and others that do not."""
    return [{name: value, **more} for value in values]


TWO, WEIGHTS = ["first", "second"], [1.0, 0.5]
L1 = {"weights": WEIGHTS, "keep": 0.5, "rescale": "l1"}
CASES = {
    "linear": Case("linear", {"weights": [1.0, 3.0]}, TWO, "linear", {}, peers("weight", 1, 3), based=False),
    "task arithmetic": Case(
        "task_arithmetic", {"weights": WEIGHTS, "scale": 0.9}, TWO, "task_arithmetic", {"lambda": 0.9}, peers("weight", *WEIGHTS)
    ),
    "TIES": Case("ties", {"weights": WEIGHTS, "keep": 0.3}, TWO, "ties", {}, peers("weight", *WEIGHTS, density=0.3)),
    "breadcrumbs": Case(
        "breadcrumbs", {"weights": WEIGHTS, "keep": 0.9, "top": 0.01}, TWO, "breadcrumbs", {},
        peers("weight", *WEIGHTS, density=0.9, gamma=0.01),
    ),
    "breadcrumbs, small top": Case(
        "breadcrumbs", {"weights": WEIGHTS, "keep": 0.9, "top": 0.001}, TWO, "breadcrumbs", {},
        peers("weight", *WEIGHTS, density=0.9, gamma=0.001),
    ),
    "breadcrumbs, consensus": Case(
        "breadcrumbs", {"weights": WEIGHTS, "keep": 0.9, "top": 0.01, "consensus": True}, TWO, "breadcrumbs_ties", {},
        peers("weight", *WEIGHTS, density=0.9, gamma=0.01),
    ),
    "TIES, rescaled": Case(
        "ties", {"weights": WEIGHTS, "keep": 0.3, "rescale": "l1"}, TWO, "ties", {"rescale": True}, peers("weight", *WEIGHTS, density=0.3)
    ),
    "breadcrumbs, rescaled": Case(
        "breadcrumbs", {"weights": WEIGHTS, "keep": 0.9, "top": 0.01, "rescale": "l1"}, TWO, "breadcrumbs", {"rescale": True},
        peers("weight", *WEIGHTS, density=0.9, gamma=0.01),
    ),
    "breadcrumbs, consensus, rescaled": Case(
        "breadcrumbs", {"weights": WEIGHTS, "keep": 0.9, "top": 0.01, "consensus": True, "rescale": "l1"}, TWO, "breadcrumbs_ties",
        {"rescale": True}, peers("weight", *WEIGHTS, density=0.9, gamma=0.01),
    ),
    "RAM": Case("ram", {"threshold": 1e-3}, TWO, "ram", {"epsilon": 1e-3}, [{}] * 2, first=True),
    "RAM+": Case(
        "ram", {"threshold": 1e-3, "boost": 0.5, "most": 0.9}, TWO, "ramplus_tl", {"epsilon": 1e-3, "r": 0.5, "alpha": 0.9}, [{}] * 2,
        first=True,
    ),
    "DARE": Case("dare", L1, TWO, "dare_linear", {}, peers("weight", *WEIGHTS, density=0.5)),
    "DARE, consensus": Case("dare", {**L1, "consensus": True}, TWO, "dare_ties", {}, peers("weight", *WEIGHTS, density=0.5)),
    "DELLA": Case("della", L1, TWO, "della", {}, peers("weight", *WEIGHTS, density=0.5, epsilon=0.15)),
    "DELLA, no consensus": Case(
        "della", {**L1, "consensus": False, "normalize": False}, TWO, "della_linear", {"normalize": False},
        peers("weight", *WEIGHTS, density=0.5, epsilon=0.15),
    ),
    "SLERP": Case("slerp", {"t": 0.3}, ["other"], "slerp", {"t": 0.3}, [{}], first=True),
    "SLERP, nearly parallel": Case("slerp", {"t": 0.3}, ["near"], "slerp", {"t": 0.3}, [{}], first=True),
    "NuSLERP": Case("nuslerp", {"weights": [1.0, 3.0]}, ["first", "other"], "nuslerp", {}, peers("weight", 1, 3), based=False),
    "NuSLERP, by row": Case(
        "nuslerp", {"weights": [1.0, 3.0], "by_row": True}, ["first", "other"], "nuslerp", {"nuslerp_flatten": False},
        peers("weight", 1, 3), based=False,
    ),
    "NuSLERP, by column": Case(
        "nuslerp", {"weights": [1.0, 3.0], "by_column": True}, ["first", "other"], "nuslerp",
        {"nuslerp_flatten": False, "nuslerp_row_wise": True}, peers("weight", 1, 3), based=False,
    ),
    "NuSLERP, by column, from base": Case(
        "nuslerp", {"weights": [1.0, 3.0], "by_column": True, "from_base": True}, TWO, "nuslerp",
        {"nuslerp_flatten": False, "nuslerp_row_wise": True}, peers("weight", 1, 3),
    ),
    "NuSLERP, from base": Case("nuslerp", {"weights": [1.0, 3.0], "from_base": True}, TWO, "nuslerp", {}, peers("weight", 1, 3)),
    "multi-SLERP": Case("multislerp", {"weights": [1.0, 3.0]}, ["first", "other"], "multislerp", {}, peers("weight", 1, 3), based=False),
    "multi-SLERP, from base": Case("multislerp", {"weights": [1.0, 3.0], "from_base": True}, TWO, "multislerp", {}, peers("weight", 1, 3)),
    "multi-SLERP, weights as they are": Case(
        "multislerp", {"weights": [1.0, 0.7], "normalize": False}, ["first", "other"], "multislerp", {"normalize_weights": False},
        peers("weight", 1, 0.7), based=False,
    ),
    "Karcher mean": Case("karcher", {}, ["first", "second", "other"], "karcher", {}, [{}] * 3, based=False),
    "Model Stock": Case("model_stock", {}, TWO, "model_stock", {}, [{}] * 2, first=True),
    "Model Stock, by row": Case("model_stock", {"by_row": True}, TWO, "model_stock", {"filter_wise": True}, [{}] * 2, first=True),
    "SCE": Case("sce", {}, ["first", "other"], "sce", {}, [{}] * 2),
    "SCE, a part": Case("sce", {"keep": 0.3}, ["first", "other"], "sce", {"select_topk": 0.3}, [{}] * 2),
    "SCE, small changes": Case("sce", {}, TWO, "sce", {}, [{}] * 2),
    "passthrough": Case("passthrough", {"scale": 0.5}, ["first"], "passthrough", {}, [{"scale": 0.5}], based=False),
    "NearSwap": Case("nearswap", {"t": 5e-4}, ["first"], "nearswap", {"t": 5e-4}, [{}], first=True),
    "Arcee Fusion": Case("arcee_fusion", {}, ["other"], "arcee_fusion", {}, [{}], first=True),
    "Arcee Fusion, small changes": Case("arcee_fusion", {}, ["first"], "arcee_fusion", {}, [{}], first=True),
}  # fmt: skip

WIDE = ("multi-SLERP", "multi-SLERP, weights as they are", "multi-SLERP, from base", "Karcher mean", "Model Stock", "Arcee Fusion",
        "Arcee Fusion, small changes")  # fmt: skip
CASES |= {f"{name}; float64": replace(CASES[name], dtype="float64") for name in WIDE}


PROMPTS = [["write a function", "sort the list"], ["tell me a story"], ["anything at all"]]
EXPERTS = [{"source_model": name, "positive_prompts": prompts} for name, prompts in zip(TWO, PROMPTS, strict=False)]
GIVEN = {"base_model": "base", "gate_mode": "cheap_embed", "dtype": "float32"}
SHARED = {"source_model": "base", "positive_prompts": PROMPTS[2], "residual_scale": 0.5}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixture, Mixtral": {**GIVEN, "experts": EXPERTS},
    "mixture, Mixtral, scaled": {**GIVEN, "experts": [{**EXPERTS[0], "residual_scale": 0.7}, EXPERTS[1]]},
    "mixture, Qwen, shared expert": {**GIVEN, "experts": EXPERTS, "shared_experts": [SHARED], "architecture": "qwen"},
}


def recipe(case: Case, work: Path) -> dict[str, Any]:
    """The merge for mergekit; JSON is YAML."""
    models = [{"model": str(work / name), "parameters": values} for name, values in zip(case.donors, case.each, strict=True)]
    if case.first:
        models.insert(0, {"model": str(work / "base")})
    based = {"base_model": str(work / "base")} if case.based else {}
    return {
        "merge_method": case.peer,
        "models": models,
        "parameters": case.parameters,
        "dtype": case.dtype,
        "out_dtype": "float32",
        **based,
    }


def mixture(name: str, work: str) -> dict[str, Any]:
    """The configuration of a mixture, for both."""
    found = json.loads(json.dumps(MIXTURES[name]))
    for entry in (*found["experts"], *found.get("shared_experts", ())):
        entry["source_model"] = f"{work}/{entry['source_model']}"
    return found | {"base_model": f"{work}/base"}


def digest(values: Any) -> str:
    """A hash of a float32 tensor's bits."""
    import hashlib

    return hashlib.sha256(values.detach().float().contiguous().view(-1).numpy().tobytes()).hexdigest()


def with_letters(folder: str) -> None:
    """Give a model a tokenizer of single characters."""
    from modelwright.core.contract import letters

    letters().save_pretrained(folder)


def ours(work: str, names: list[str]) -> None:
    """Merge with Modelwright, and write the masks of random methods down, by the hash of the change that they are for."""
    import torch

    import modelwright as mw
    from modelwright.core.find import find
    from modelwright.maths import slices
    from modelwright.methods.merge import dare, della

    drop = dare.dropped
    for name in names:
        if name in MIXTURES:
            mw.merge(mixture(name, work), save=f"{work}/ours-{name}", overwrite=True)
            continue
        case, masks = CASES[name], {}

        def recorded(values: Any, keep: Any, seed: int, masks: dict[str, Any] = masks) -> Any:
            kept, parts, last = drop(values, keep, seed), {}, {}

            def noted(at: slice) -> Any:
                parts[at.start], last[at.start] = kept(at), values(at)
                if len(parts[at.start]) < slices.SLICE or at.stop % slices.SLICE == 0:
                    joined = [torch.cat([found[start] for start in sorted(found)]) for found in (parts, last)]
                    masks[digest(joined[1])] = joined[0] != 0
                return parts[at.start].clone()

            return noted

        dare.dropped = della.dropped = recorded
        donors = [f"{work}/{donor}" for donor in case.donors]
        method = find(f"merge.{case.method}").build(case.settings)
        mw.apply(f"{work}/base", method, donors=donors, save=f"{work}/ours-{name}", overwrite=True)
        torch.save(masks, f"{work}/masks-{name}.pt")


def theirs(work: str, names: list[str]) -> None:
    """Merge with mergekit; where it draws a mask, it is given ours."""
    import mergekit.sparsify as sparsify
    import torch
    from mergekit.scripts.moe import main as mixed
    from mergekit.scripts.run_yaml import main

    draws, now = [sparsify.bernoulli, sparsify.della_magprune], []

    def watched(draw: Any) -> Any:
        def called(tensor: Any, *arguments: Any, **named: Any) -> Any:
            now[:] = [digest(tensor)]
            return draw(tensor, *arguments, **named)

        return called

    sparsify.bernoulli, sparsify.della_magprune = map(watched, draws)
    for name in names:
        if name in MIXTURES:
            (Path(work) / f"{name}.yaml").write_text(json.dumps(mixture(name, work)))
            mixed([f"{work}/{name}.yaml", f"{work}/theirs-{name}"], standalone_mode=False)
            continue
        masks = torch.load(f"{work}/masks-{name}.pt")
        torch.bernoulli = lambda odds, masks=masks: masks[now[0]].view(odds.shape).to(odds.dtype)
        torch.manual_seed(0)  # Arcee Fusion samples quantiles of large tensors
        (Path(work) / f"{name}.yaml").write_text(json.dumps(recipe(CASES[name], Path(work))))
        main([f"{work}/{name}.yaml", f"{work}/theirs-{name}"], standalone_mode=False)


def tensors(work: str, name: str) -> Iterator[tuple[str, Any, Any, Any]]:
    """Name, ours, theirs and the model's of every tensor, in float64."""
    from transformers import AutoModelForCausalLM

    from modelwright.core.weights import Checkpoint

    if name in MIXTURES:  # stored under other names; the change is the whole
        one, other = (AutoModelForCausalLM.from_pretrained(f"{work}/{who}-{name}").state_dict() for who in ("ours", "theirs"))
        assert set(one) == set(other), set(one) ^ set(other)
        for tensor, values in one.items():
            yield tensor, values.double(), other[tensor].double(), 0 * values.double()
        return
    one, other, base = Checkpoint(f"{work}/ours-{name}"), Checkpoint(f"{work}/theirs-{name}"), Checkpoint(f"{work}/base")
    assert set(one) == set(other), set(one) ^ set(other)
    for tensor in one:
        yield tensor, *(found.read(tensor).double() for found in (one, other, base))


def compare(work: str, names: list[str]) -> list[dict[str, Any]]:
    """A row for every method: the largest difference, the root mean square one over that of the change from the model,
    and how many values, and in how many tensors, differ by more than rounding."""
    rows = []
    for name in names:
        largest = apart = change = 0.0
        values = beyond = places = 0
        where = ""
        for tensor, a, b, c in tensors(work, name):
            gap = (a - b).abs()
            far = gap > ROUNDING * max(float(found.abs().max()) for found in (a, b, c))
            if float(gap.max()) > largest:
                largest, where = float(gap.max()), tensor
            values, beyond, places = values + gap.numel(), beyond + int(far.sum()), places + bool(far.any())
            apart, change = apart + float(gap.square().sum()), change + float((a - c).square().sum())
        rows.append({
            "method": name, "largest difference": largest, "of the change": (apart / max(change, 1e-300)) ** 0.5,
            "beyond rounding": beyond / values, "tensors": places,
        })  # fmt: skip
        print(name, rows[-1], where if places else "", file=sys.stderr)
    return rows


def main() -> None:
    """Make the models, merge with both, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with mergekit")
    parser.add_argument("--methods", nargs="+", default=[*CASES, *MIXTURES], choices=[*CASES, *MIXTURES])
    parser.add_argument("--work", help="where the models go; by default a temporary folder")
    parser.add_argument("--name", default="merge-agreement", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="agreement-", dir=asked.work))
    try:
        config = _run.subject("_models:config_of", gigabytes=0.007).returned
        starts = {"base": None, "tuned": "base", "first": "tuned", "second": "tuned", "near": "base", "other": None}
        for seed, (name, start) in enumerate(starts.items()):
            base = start and str(work / start)
            _run.subject("_models:random_llama", folder=str(work / name), config=config, seed=seed, base=base, dtype="float32", norms=0.01)
        _run.subject("merge_agreement:with_letters", folder=str(work / "base"))
        _run.subject("merge_agreement:ours", work=str(work), names=asked.methods)
        _run.subject("merge_agreement:theirs", python=asked.peer_python, work=str(work), names=asked.methods)
        rows = _run.subject("merge_agreement:compare", work=str(work), names=asked.methods).returned
    finally:
        shutil.rmtree(work)
    _run.save(
        asked.name, "Merges by Modelwright and by mergekit, both in float32",
        "python benchmarks/merge_agreement.py --peer-python PATH", rows, peer=asked.peer_python,
    )  # fmt: skip


if __name__ == "__main__":
    main()
