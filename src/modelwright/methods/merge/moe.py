"""Make a mixture of experts of dense models: one expert of each donor's MLPs, routed by prompts or at random.

Source: arcee-ai/mergekit, moe (Mixtral layout); there is no paper. Attention, norms, embeddings and head are the model's. The
row of a router for an expert, at unit length, is the mean over its `prompts` of the last token's state as it enters the
block (`gates: hidden`), or of the embeddings of all their tokens (`cheap_embed`), less the same of the prompts `against` it.
`random` draws rows from N(0, 1), `uniform_random` from ±1/√width; both are for training on.
Differs: the default is `random`, which needs no prompts; no noise is added to experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.core.data import fits
from modelwright.core.errors import NeedError, SettingError, SiteError
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, empty_module, unwrapped
from modelwright.core.passage import fill
from modelwright.core.settings import count
from modelwright.core.stream import revive
from modelwright.core.walk import refuse_other_shapes, refuse_stored

SOUND = 5.0  # condition number from which the rows of a router are too alike
Prompts = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Moe(ModelMethod):
    """Replace every MLP of a Llama or Mistral by the donors' MLPs as experts, with a router before them: a Mixtral."""

    status: ClassVar[str] = "checked"
    takes: ClassVar[tuple[int, int | None]] = (2, None)
    causal: ClassVar[bool] = True
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})

    experts_per_token: int = count(2)  # experts that a token is sent to
    gates: Literal["hidden", "cheap_embed", "random", "uniform_random"] = "random"  # what the routers' rows are made of
    prompts: Prompts | None = None  # a list for each donor, of what it is to be chosen for
    against: Prompts | None = None  # a list for each donor, of what it is not to be chosen for

    def planned(self, module: Any, donors: int) -> Any:
        return empty_module(mixtral(module, donors, self.experts_per_token))

    def problems(self) -> list[str]:
        made = self.gates in ("hidden", "cheap_embed")
        if made and not (self.prompts and all(self.prompts)):
            return [f"gates: {self.gates} needs prompts, one or more for each donor, such as [[write code], [tell a story]]."]
        return (
            [] if made or not (self.prompts or self.against) else [f"gates: {self.gates} reads no prompts. Choose hidden or cheap_embed."]
        )

    @torch.no_grad()
    def model(self, model: Model, donors: Sequence[Model], rng: torch.Generator, notes: list[str]) -> Model:
        for what, lists in (("prompts", self.prompts), ("against", self.against)):
            if lists is not None and len(lists) != len(donors):
                raise SettingError(f"{self.name()}: {len(lists)} lists of {what} for {len(donors)} donors. Give one for each donor.")
        if self.experts_per_token > len(donors):
            raise SettingError(f"{self.name()}: {self.experts_per_token} experts per token, of {len(donors)} donors. Ask for fewer.")
        base, sources = unwrapped(model.module), [unwrapped(donor.module) for donor in donors]
        refuse_stored([model, *donors])
        config = mixtral(base, len(donors), self.experts_per_token)
        shapes = [{name: tuple(value.shape) for name, value in each.named_parameters() if ".mlp." in name} for each in (base, *sources)]
        refuse_other_shapes(shapes[0], [(donor.name, one) for donor, one in zip(donors, shapes[1:], strict=True)])
        routers = self.routers(model, len(donors), rng)
        unsound = [
            f"{depth} ({number:.1f})" for depth, one in enumerate(routers) if (number := float(torch.linalg.cond(one.double()))) > SOUND
        ]
        if unsound:
            notes.append(
                f"{self.name()}: the routers' rows are nearly alike in blocks {', '.join(unsound)} (condition number above {SOUND:g}), "
                "so experts will be chosen badly. Give prompts that differ more."
            )

        def read(name: str) -> Tensor:
            block, _, part = name.rpartition(".mlp.")
            if part == "gate.weight":
                return routers[int(block.rpartition(".")[2])].to(base.get_input_embeddings().weight)  # type: ignore[operator]
            if part == "experts.gate_up_proj":
                return torch.stack([torch.cat([_mlp(one, block, "gate"), _mlp(one, block, "up")]) for one in sources])
            if part == "experts.down_proj":
                return torch.stack([_mlp(one, block, "down") for one in sources])
            return base.get_parameter(name).data

        made: Any = empty_module(config)
        fill(made, [name for name, _ in made.named_parameters()], read)
        assert not revive(made, config), "a Mixtral's buffers come from its config alone"
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
            toward -= torch.stack([self.states(model, lists) if lists else torch.zeros_like(toward[:, 0]) for lists in self.against], 1)
        return list(nn.functional.normalize(toward, dim=-1))

    def states(self, model: Model, prompts: Sequence[str]) -> Tensor:
        """What stands for prompts at each block [blocks, width], float32."""
        base: Any = unwrapped(model.module)
        if model.tokenizer is None:
            raise NeedError(f"{self.name()} reads prompts, and {model.name} has no tokenizer. Copy tokenizer.json beside its weights.")
        rows = [torch.tensor([model.tokenizer(text)["input_ids"]], device=base.device) for text in prompts]
        fits(max(int(row.max()) for row in rows), base.config.vocab_size)
        if self.gates == "cheap_embed":
            tokens = base.get_input_embeddings()(torch.cat(rows, 1))[0].float()
            return tokens.mean(0).expand(base.config.num_hidden_layers, -1).cpu().clone()
        entering = [base(input_ids=row, use_cache=False, output_hidden_states=True).hidden_states[:-1] for row in rows]
        return torch.stack([torch.stack([state[0, -1].float() for state in one]) for one in entering]).mean(0).cpu()


def mixtral(base: Any, experts: int, chosen: int) -> Any:
    """The config of a mixture of dense blocks like those of `base`.

    Raises:
        SiteError: they are not of Llama's or Mistral's layout without biases.
    """
    from transformers import MixtralConfig

    config, own = getattr(base, "config", None), MixtralConfig()
    kind = getattr(config, "model_type", type(base).__name__)
    biased = [name for name, _ in base.named_parameters() if name.endswith(".bias")]
    if kind not in ("llama", "mistral") or biased:
        found = f"it has biases, first {biased[0]}" if kind in ("llama", "mistral") else f"it is a {kind}"
        raise SiteError(f"merge.moe makes a Mixtral of Llama or Mistral models; this one is laid out otherwise: {found}.")
    shared = {key: getattr(config, key) for key in own.to_dict() if hasattr(config, key) and key not in ("model_type", "architectures")}
    return MixtralConfig(**shared, num_local_experts=experts, num_experts_per_tok=chosen, architectures=["MixtralForCausalLM"])


def _mlp(module: nn.Module, block: str, part: str) -> Tensor:
    return module.get_parameter(f"{block}.mlp.{part}_proj.weight").data
