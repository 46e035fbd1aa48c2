"""The mixtures of experts of transformers that dense blocks fit into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modelwright.core.errors import LayoutError, SettingError
from modelwright.core.kinds import refuse_other_shapes

SOUND = 5.0  # condition number from which the rows of a router are too alike
QWEN = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}


@dataclass(frozen=True)
class Layout:
    """A kind of mixture: its config's and its model's class, the dense models that it is made of, and its keys."""

    config: str
    model: str
    kinds: tuple[str, ...]
    count: str  # key of the number of experts
    shared: bool = False  # every block has one expert that sees every token
    biased: tuple[str, ...] = ()  # linears that always have a bias
    keys: Mapping[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "mixtral": Layout("MixtralConfig", "MixtralForCausalLM", ("llama", "mistral"), "num_local_experts"),
    "qwen": Layout(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", ("llama", "mistral", "qwen2"), "num_experts", True, ("q_proj", "k_proj", "v_proj"), QWEN
    ),
    "qwen3": Layout("Qwen3MoeConfig", "Qwen3MoeForCausalLM", ("qwen3",), "num_experts", keys=QWEN),
}  # fmt: skip


def mixture(base: Any, experts: int, chosen: int, *, shared: int = 0, architecture: str | None = None) -> Any:
    """The config of a mixture of `experts` dense blocks like those of `base`, of which each token sees `chosen`.

    shared: further experts that every token sees, 0 or 1. architecture: of `LAYOUTS`; by default the one that fits.

    Raises:
        SettingError: a token cannot see more experts than there are.
        SiteError: no layout, or not the one that is asked for, takes such blocks.
    """
    import transformers

    if chosen > experts:
        besides = " besides the shared one" * shared
        raise SettingError(f"merge.moe: {chosen} experts per token, of {experts} donors{besides}. Ask for fewer.")

    config: Any = getattr(base, "config", None)
    kind = getattr(config, "model_type", type(base).__name__)
    fitting = [name for name, one in LAYOUTS.items() if kind in one.kinds and one.shared == bool(shared)]
    wanted = architecture or next(iter(fitting), "")
    if wanted not in fitting:
        told = "; ".join(f"{name}: {', '.join(one.kinds)}{', with a shared expert' * one.shared}" for name, one in LAYOUTS.items())
        how = (
            f"it is a {kind}, {'with' if shared else 'without'} a shared expert{f', and {architecture} is asked for' * bool(architecture)}"
        )
        raise LayoutError(f"merge.moe makes mixtures of some kinds of models ({told}); this one is laid out otherwise: {how}.")
    layout = LAYOUTS[wanted]
    strange = [name for name, _ in base.named_parameters() if name.endswith(".bias") and name.split(".")[-2] not in layout.biased]
    if strange:
        raise LayoutError(
            f"merge.moe: a {wanted} has no place for biases; this model is laid out otherwise: it has biases, first {strange[0]}."
        )
    own = getattr(transformers, layout.config)
    keys = {key: getattr(config, key) for key in own().to_dict() if hasattr(config, key) and key not in ("model_type", "architectures")}
    if getattr(config, "head_dim", None):
        keys["head_dim"] = config.head_dim
    window = getattr(config, "sliding_window", None)
    if window and "use_sliding_window" in own().to_dict():
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        if wanted == "qwen3" and "full_attention" in kinds:
            raise LayoutError(
                "merge.moe: a qwen3 has one window for all blocks; this model is laid out otherwise: only some of its blocks have one."
            )
        keys |= {"use_sliding_window": True, "layer_types": kinds}
    inner = {
        key: config.intermediate_size for key in ("moe_intermediate_size", "shared_expert_intermediate_size") if key in own().to_dict()
    }
    stated = {layout.count: experts, "num_experts_per_tok": chosen, "architectures": [layout.model]}
    return own(**{**keys, **inner, **layout.keys, **stated})


def refuse_other_experts(base: Any, names: Sequence[str], donors: Sequence[Any]) -> None:
    """Raise ModelError when the MLPs of a donor, a module that may be empty, have other shapes than those of the base."""
    own, *others = [
        {name: tuple(value.shape) for name, value in each.named_parameters() if ".mlp." in name} for each in (base, *donors)
    ]  # fmt: skip
    refuse_other_shapes(own, list(zip(names, others, strict=True)))


def unsound(routers: Sequence[Tensor]) -> list[str]:
    """A sentence about routers [experts, width] whose rows are nearly alike, if there are any."""
    found = [f"{depth} ({number:.1f})" for depth, one in enumerate(routers) if (number := float(torch.linalg.cond(one.double()))) > SOUND]
    alike = f"the routers' rows are nearly alike in blocks {', '.join(found)} (condition number above {SOUND:g}), "
    return [alike + "so experts will be chosen badly. Give prompts that differ more."] if found else []
