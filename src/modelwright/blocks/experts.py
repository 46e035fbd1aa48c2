"""Experts as single linears, so that each can be hooked, pruned, factored or quantised by itself."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import nn

from modelwright.blocks._stored import Described


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) · up(x))."""

    def __init__(self, gate: Any, up: Any, down: Any, act: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate, up, down, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, width] → [tokens, width]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SplitExperts(nn.ModuleList):
    """The function of a fused experts module of transformers, with a linear for each expert and matrix.

    In place of `mlp.experts` its weights are `mlp.experts.{i}.{gate,up,down}_proj.weight`, the names that Qwen-MoE and
    OLMoE have on disk; Mixtral has others, so fuse before `save_pretrained`. Each expert runs on the tokens that are
    routed to it, and not at all when there are none.
    """

    def __init__(self, experts: list[Expert], shell: nn.Module) -> None:
        super().__init__(experts)
        self._shell = (shell,)  # the fused module without its weights; in a tuple, so that it is no child

    @classmethod
    def from_fused(cls, module: Any) -> Self:
        """Split a module with `gate_up_proj` [experts, 2·inner, width] and `down_proj` [experts, width, inner]."""
        if not is_fused(module):
            raise TypeError(f"{type(module).__name__} is no fused experts module")
        experts = []
        for gate_up, down in zip(module.gate_up_proj, module.down_proj, strict=True):
            gate, up = gate_up.chunk(2)
            gate, up, down = (_linear(part, module.down_proj.requires_grad) for part in (gate, up, down))
            experts.append(Expert(gate, up, down, module.act_fn))
        shell = copy.copy(module)
        shell._parameters = dict.fromkeys(module._parameters)
        return cls(experts, shell).train(module.training)

    def to_fused(self) -> Any:
        """The fused module, with the same bits.

        Raises: TypeError when an expert's layer no longer is a plain linear.
        """
        experts: list[Any] = list(self)
        layers = [layer for one in experts for layer in (one.gate_proj, one.up_proj, one.down_proj)]
        if strange := next((layer for layer in layers if type(layer) is not nn.Linear), None):
            raise TypeError(f"an expert holds a {type(strange).__name__}, which no fused module can hold; keep it split")
        fused = copy.copy(self._shell[0])
        gate_up = torch.stack([torch.cat([one.gate_proj.weight, one.up_proj.weight]) for one in experts])
        down = torch.stack([one.down_proj.weight for one in experts])
        trains = experts[0].down_proj.weight.requires_grad
        fused._parameters = {
            "gate_up_proj": nn.Parameter(gate_up.detach(), requires_grad=trains),
            "down_proj": nn.Parameter(down.detach(), requires_grad=trains),
        }
        return fused.train(self.training)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [tokens, width], both others [tokens, chosen experts] → [tokens, width]."""
        total = torch.zeros_like(hidden_states)
        for n in top_k_index.unique().tolist():
            if n >= len(self):  # the index that says "no expert"
                continue
            token, place = torch.where(top_k_index == n)
            expert: Any = self[n]
            out = expert(hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total


def is_fused(module: Any) -> bool:
    """Whether this is a fused experts module that `SplitExperts` can stand for: gated, [out, in], without biases."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return names == {"gate_up_proj", "down_proj"} and hasattr(module, "act_fn") and module.down_proj.ndim == 3


def split_experts(model: nn.Module, inside: str = "") -> list[str]:
    """Split all fused experts of a model whose paths begin with `inside`, in place; returns their paths."""
    paths = [path for path, child in model.named_modules() if path.startswith(inside) and is_fused(child)]
    for path in paths:
        model.set_submodule(path, SplitExperts.from_fused(model.get_submodule(path)))
    return paths


def fuse_experts(model: nn.Module) -> None:
    """Put all experts that were split back into their stacks, in place, but where some are stored otherwise than dense."""
    for path, child in list(model.named_modules()):
        if isinstance(child, SplitExperts) and not any(isinstance(inner, Described) for inner in child.modules()):
            model.set_submodule(path, child.to_fused())


def _linear(weight: torch.Tensor, trains: bool) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=trains)
    return made
