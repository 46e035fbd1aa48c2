"""Make a mixture of experts of dense models: one expert of each donor's MLPs, routed by prompts or at random.

Source: arcee-ai/mergekit, moe; there is no paper. Llama and Mistral make a Mixtral, Qwen3 a Qwen3-MoE, and with a last donor
that is `shared`, so that every token goes to it, Llama, Mistral and Qwen2 make a Qwen2-MoE. Attention, norms, embeddings
and head are the model's. The row of a router for an expert, at unit length, is the mean over its `prompts` of the last
token's state as it enters the block (`gates: hidden`), or of the embeddings of all their tokens (`cheap_embed`), less the
same of the prompts `against` it.
`random` draws rows from N(0, 1), `uniform_random` from ±1/√width; both are for training on. What a shared expert says is
multiplied by the sigmoid of such a product; without prompts it counts whole: its row is 0 and its outputs are doubled.
`noise_each` is added to an expert's matrices before `residual_each` multiplies its outputs.
Differs: the default is `random`, which needs no prompts. An expert that counts whole is a DeepSeek in mergekit, which
transformers has no code for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.core.data import fits
from modelwright.core.errors import NeedError, SettingError
from modelwright.core.kinds import refuse_stored
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, empty_module, unwrapped
from modelwright.core.passage import fill
from modelwright.core.settings import count
from modelwright.core.stream import revive
from modelwright.methods.merge._mixture import mixture, refuse_other_experts, unsound

Prompts = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Moe(ModelMethod):
    """Replace every MLP of a Llama, Mistral or Qwen by the donors' MLPs as experts, with a router before them."""

    status: ClassVar[str] = "checked"
    takes: ClassVar[tuple[int, int | None]] = (2, None)
    causal: ClassVar[bool] = True
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})

    experts_per_token: int = count(2)  # experts that a token is sent to
    gates: Literal["hidden", "cheap_embed", "random", "uniform_random"] = "random"  # what the routers' rows are made of
    prompts: Prompts | None = None  # a list for each donor, of what it is to be chosen for
    against: Prompts | None = None  # a list for each donor, of what it is not to be chosen for
    shared: int = count(0, low=0, high=1)  # donors, the last, that every token goes to
    noise_each: tuple[float, ...] | None = None  # standard deviation of what is added to each donor's MLPs
    residual_each: tuple[float, ...] | None = None  # what the outputs of each donor's MLPs are multiplied by
    architecture: Literal["mixtral", "qwen", "qwen3"] | None = None  # of the mixture; by default the one that fits

    def planned(self, module: Any, donors: int) -> Any:
        return empty_module(self.config(module, donors))

    def config(self, module: Any, donors: int) -> Any:
        """The config of the mixture of so many donors.

        Raises:
            SettingError: settings that have a value for each donor have another number of them.
            and what `mixture` raises.
        """
        for what in ("lists of prompts", "lists of against", "noise_each", "residual_each"):
            one = getattr(self, what.removeprefix("lists of "))
            if one is not None and len(one) != donors:
                raise SettingError(f"{self.name()}: {len(one)} {what} for {donors} donors. Give one for each donor.")
        return mixture(module, donors - self.shared, self.experts_per_token, shared=self.shared, architecture=self.architecture)

    def problems(self) -> list[str]:
        made = self.gates in ("hidden", "cheap_embed")
        found = []
        if made and not (self.prompts and all(self.prompts[: len(self.prompts) - self.shared])):
            found.append(f"gates: {self.gates} needs prompts, one or more for each donor, such as [[write code], [tell a story]].")
        if not made and (self.prompts or self.against):
            found.append(f"gates: {self.gates} reads no prompts. Choose hidden or cheap_embed.")
        if not all(math.isfinite(one) and one >= 0 for one in self.noise_each or ()):
            found.append(f"noise_each are numbers of at least 0; got {list(self.noise_each or ())}.")
        if not all(math.isfinite(one) for one in self.residual_each or ()):
            found.append(f"residual_each are numbers; got {list(self.residual_each or ())}.")
        return found

    @torch.no_grad()
    def model(self, model: Model, donors: Sequence[Model], rng: torch.Generator, notes: list[str]) -> Model:
        experts = len(donors) - self.shared
        base, sources = unwrapped(model.module), [unwrapped(donor.module) for donor in donors]
        refuse_stored([model, *donors])
        config = self.config(base, len(donors))
        refuse_other_experts(base, [donor.name for donor in donors], sources)
        rows = self.routers(model, len(donors), rng)
        notes += [f"{self.name()}: {text}" for text in unsound([one[:experts] for one in rows])]

        def read(name: str) -> Tensor:
            block, _, part = name.rpartition(".mlp.")
            if part in ("gate.weight", "shared_expert_gate.weight"):
                row = rows[int(block.rpartition(".")[2])]
                return (row[:experts] if part == "gate.weight" else row[experts:]).to(base.get_input_embeddings().weight)  # type: ignore[operator]
            if part == "experts.gate_up_proj":
                return torch.stack([torch.cat([mlp(one, block, "gate"), mlp(one, block, "up")]) for one in range(experts)])
            if part == "experts.down_proj":
                return torch.stack([mlp(one, block, "down") for one in range(experts)])
            if part.startswith("shared_expert."):
                return mlp(experts, block, part.split(".")[1].removesuffix("_proj"))
            return own[name].data if name in own else base.get_input_embeddings().weight.new_zeros(wanted[name].shape)  # type: ignore[operator]

        def mlp(number: int, block: str, part: str) -> Tensor:
            name = f"{block}.mlp.{part}_proj.weight"
            weight = sources[number].get_parameter(name).data.clone()
            if self.noise_each and self.noise_each[number]:
                weight += self.noise_each[number] * torch.randn(weight.shape, generator=rng).to(weight)
            if part == "down":
                weight *= (self.residual_each[number] if self.residual_each else 1) * (2 if whole and number == experts else 1)
            return weight.to(own[name])

        whole = self.shared and not any(one[experts:].any() for one in rows)  # sigmoid 0 is ½
        made: Any = empty_module(config)
        own, wanted = dict(base.named_parameters()), dict(made.named_parameters())
        assert all(name in wanted for name in own if ".mlp." not in name), f"a {config.model_type} has no place for some weights"
        fill(made, list(wanted), read)
        assert not revive(made, config), "a mixture's buffers come from its config alone"
        made.tie_weights()
        model.module = made.eval()
        return model

    def routers(self, model: Model, experts: int, rng: torch.Generator) -> list[Tensor]:
        """The weight of each block's router [experts, width], float32."""
        base: Any = unwrapped(model.module)
        depths, width = base.config.num_hidden_layers, base.config.hidden_size
        if self.gates == "random":
            return [torch.randn(experts, width, generator=rng) for _ in range(depths)]
        if self.gates == "uniform_random":
            return [(2 * torch.rand(experts, width, generator=rng) - 1) / width**0.5 for _ in range(depths)]
        assert self.prompts is not None
        toward = torch.stack([self.states(model, lists) for lists in self.prompts], 1)
        if self.against is not None:
            toward -= torch.stack([self.states(model, lists) for lists in self.against], 1)
        return list(nn.functional.normalize(toward, dim=-1))

    def states(self, model: Model, prompts: Sequence[str]) -> Tensor:
        """What stands for prompts at each block [blocks, width], float32."""
        base: Any = unwrapped(model.module)
        if not prompts:
            return torch.zeros(base.config.num_hidden_layers, base.config.hidden_size)
        if model.tokenizer is None:
            raise NeedError(f"{self.name()} reads prompts, and {model.name} has no tokenizer. Copy tokenizer.json beside its weights.")
        rows = [torch.tensor([model.tokenizer(text)["input_ids"]], device=base.device) for text in prompts]
        fits(max(int(row.max()) for row in rows), base.config.vocab_size)
        if self.gates == "cheap_embed":
            tokens = base.get_input_embeddings()(torch.cat(rows, 1))[0].float()
            return tokens.mean(0).expand(base.config.num_hidden_layers, -1).cpu().clone()
        entering = [base(input_ids=row, use_cache=False, output_hidden_states=True).hidden_states[:-1] for row in rows]
        return torch.stack([torch.stack([state[0, -1].float() for state in one]) for one in entering]).mean(0).cpu()
