"""Save and load models whose layers are stored in other ways than as one dense matrix.

What has a scheme in compressed-tensors (symmetric packed integers, floats of 4 and 8 bits) is written as such a checkpoint where it
stands in plain linear layers, and plain transformers reads it. Everything else (two factors, bit masks, packed embeddings,
mixtures, modules of other sizes than the config's, what stands for parts that are gone, tensors that several places share) is
written for the `modelwright` quantizer (see `quantizer`), so that `import modelwright` then `from_pretrained` loads it. The tensors
in the file are the same either way; only `quantization_config` differs.
"""

from __future__ import annotations

import copy
import operator
import re
from typing import Any

import torch
from torch import nn

from modelwright import blocks
from modelwright.blocks._stored import Described, Guest, Stored
from modelwright.blocks.experts import SplitExperts, is_fused

from . import sharing
from .errors import ModelError

METHOD = "modelwright"
EXPERTS = "split_experts"  # experts with matrices of their own, where the architecture has them in one tensor
PACKED = {  # kinds of layers that store codes
    "packed", "embedding", "levels", "float8", "static", "planes", "bit_stack", "coded", "coded_embedding",
}  # fmt: skip
RESIZED = "resized"  # a module of the architecture, of other sizes than the config's


def install(module: nn.Module, descriptions: dict[str, dict[str, Any]]) -> None:
    """Replace the named submodules by empty layers of the described kinds, outer ones first; guests join their hosts."""
    for name in sorted(descriptions, key=lambda name: name.count(".")):
        if issubclass(blocks.class_of(descriptions[name]), Guest):
            _seat(module, name, descriptions[name])
            continue
        old = module.get_submodule(name)
        if descriptions[name]["kind"] == EXPERTS:
            if is_fused(old):
                module.set_submodule(name, SplitExperts.from_fused(old))
            continue
        if descriptions[name]["kind"] == RESIZED:
            _resize(old, descriptions[name], next(module.parameters()))
            continue
        weight = getattr(old, "weight", None)
        dtype = weight.dtype if weight is not None else next(module.parameters()).dtype
        device = weight.device if weight is not None else torch.device("meta")
        layer = blocks.build(descriptions[name], dtype=dtype, device=device)
        layer.replaces = type(old).__name__
        if isinstance(layer, Stored) and isinstance(old, nn.Linear):
            sizes = [(one.out_features, one.in_features, one.bias is None) for one in (old, layer)]
            layer.other_sizes = sizes[0] != sizes[1]
        module.set_submodule(name, layer)
        sharing.release(module, name)


def _seat(module: nn.Module, name: str, description: dict[str, Any]) -> None:
    """Build a guest and let it join its host."""
    path, _, leaf = name.rpartition(".")
    host = module.get_submodule(path)
    like = next(value for value in (*host.parameters(), *module.parameters()) if value.is_floating_point())
    guest = blocks.build(description, dtype=like.dtype, device=like.device)
    assert isinstance(guest, Guest)
    guest.join(host, leaf)
    guest.settle(module)


def _resize(layer: Any, description: dict[str, Any], like: torch.Tensor) -> None:
    """Give a module empty parameters of the described shapes, and the numbers that it then knows of itself."""
    for name, shape in description["parameters"].items():
        known = getattr(layer, name, None)
        like = like if known is None else known
        empty = torch.empty(shape, dtype=like.dtype, device=like.device)
        setattr(layer, name, empty if name in layer._buffers else nn.Parameter(empty))
    if any(name.startswith("config.") for name in description["numbers"]):
        layer.config = copy.copy(layer.config)
    for name, value in description["numbers"].items():
        setattr(layer.config if name.startswith("config.") else layer, name.removeprefix("config."), value)
    layer.resized = [*description["parameters"], *description["numbers"]]


def _sizes(layer: Any) -> dict[str, Any]:
    """What of a module differs from what the config makes: it is named in its `resized`."""
    parameters = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    resized: list[str] = layer.resized
    return {
        "kind": RESIZED,
        "parameters": {name: list(parameters[name].shape) for name in resized if name in parameters},
        "numbers": {name: operator.attrgetter(name)(layer) for name in resized if name not in parameters},
    }


def described(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Module name -> description, for every layer that is stored in a way of ours."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, SplitExperts):
            found[name] = {"kind": EXPERTS}
        if isinstance(layer, Described):
            found[name] = layer.describe()
        elif hasattr(layer, "resized"):
            found[name] = _sizes(layer)
    return found


def holds_codes(descriptions: dict[str, dict[str, Any]]) -> bool:
    """Whether some layer stores codes, which nothing can train."""
    return any(text["kind"] in PACKED or text.get("packed") is True for text in descriptions.values())


def quantization_config(module: nn.Module) -> dict[str, Any] | None:
    """What `config.json` must say for this model to load; None for a model of dense layers that share nothing."""
    descriptions, ties = described(module), sharing.shared(module)
    if not descriptions and not ties:
        return None
    layers = {name: module.get_submodule(name) for name in descriptions}
    plain = {name: layer for name, layer in layers.items() if isinstance(layer, Stored) and layer.replaces == "Linear"}
    schemes = {name: layer.scheme() for name, layer in plain.items() if not layer.other_sizes}
    if ties or len(schemes) < len(layers) or None in schemes.values():
        return {"quant_method": METHOD, "modules": descriptions} | ({"ties": ties} if ties else {})
    alike: list[tuple[dict[str, Any] | None, list[str]]] = []
    for name, scheme in schemes.items():
        names = next((names for known, names in alike if known == scheme), None)
        names.append(name) if names is not None else alike.append((scheme, [name]))
    no_rounding = {"input_activations": None, "output_activations": None}
    groups = {
        f"group_{number}": {"targets": ["Linear"] if len(alike) == 1 else names, **no_rounding, **scheme}
        for number, (scheme, names) in enumerate(alike)
        if scheme
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)],
    }


def translated(config: dict[str, Any], module: nn.Module) -> dict[str, dict[str, Any]]:
    """The descriptions of the packed layers of a `compressed-tensors` checkpoint, so that they stay packed.

    Raises:
        ModelError: a format that cannot be kept packed here.
    """
    descriptions: dict[str, dict[str, Any]] = {}

    def chosen(name: str, layer: nn.Module, patterns: list[str]) -> bool:
        return any(
            re.match(pattern[3:], name) if pattern.startswith("re:") else pattern in (name, type(layer).__name__) for pattern in patterns
        )

    sparsity = config.get("sparsity_config") or {}
    stated = [key for key in ("transform_config", "kv_cache_scheme") if config.get(key)]
    stated += ["sparsity_config"] if sparsity.get("format", "dense") != "dense" else []
    stated += ["output_activations" for scheme in config["config_groups"].values() if scheme.get("output_activations")]
    stated += ["actorder" for scheme in config["config_groups"].values() if scheme["weights"].get("actorder") in (True, "group")]
    if stated:
        raise ModelError(
            f"A compressed-tensors checkpoint with {stated[0]} cannot be opened yet: it computes what our layers do not. Open the "
            "unquantised model, or load it with transformers and pass the module instead."
        )
    for scheme in config["config_groups"].values():
        form, weights = scheme.get("format") or config.get("format"), scheme["weights"]
        inputs = scheme.get("input_activations") or {}
        known = {"type": "int", "dynamic": True, "strategy": "token", "symmetric": True}
        if inputs and (form != "pack-quantized" or known.items() - inputs.items()):
            raise ModelError(
                f"A compressed-tensors checkpoint of format {form} that rounds inputs otherwise than token by token to integers cannot be "
                "opened yet. Load it with transformers and pass the module instead."
            )
        extra = {"inputs": inputs["num_bits"]} if inputs else {}
        for name, layer in module.named_modules():
            if not isinstance(layer, nn.Linear) or chosen(name, layer, config.get("ignore") or []):
                continue
            if chosen(name, layer, scheme["targets"]):
                sizes = {"out_features": layer.out_features, "in_features": layer.in_features, "bias": layer.bias is not None}
                descriptions[name] = sizes | _of_scheme(form, weights) | extra
    return descriptions


def _of_scheme(form: str | None, weights: dict[str, Any]) -> dict[str, Any]:
    """The kind and settings of a layer whose weight compressed-tensors stores so."""
    group = weights.get("group_size") if "group" in weights["strategy"] else None
    if form == "pack-quantized" and weights["type"] == "int":
        return {"kind": "packed", "bits": weights["num_bits"], "group": group, "symmetric": weights.get("symmetric", True)}
    four = {"nvfp4-pack-quantized": "e4m3", "mxfp4-pack-quantized": "e8m0"}
    if form in four:
        return {"kind": "levels", "levels": "e2m1", "bits": 4, "group": group, "scales": four[form]}
    scopes = {"channel": "row", "tensor": "tensor", "block": "tile"}
    if form == "float-quantized" and weights["strategy"] in scopes and weights.get("block_structure") in (None, [128, 128]):
        return {"kind": "float8", "scope": scopes[weights["strategy"]]}
    raise ModelError(
        f"A compressed-tensors checkpoint of format {form} ({weights['strategy']}) cannot be opened yet; pack-quantized integers and "
        "floats of 4 and 8 bits can. Load it with transformers and pass the module instead."
    )
