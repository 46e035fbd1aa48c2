"""Find the shape of a small student by a genetic search, and put a fresh one in the model's place: Compressor.

Shi, Yang, Xu, Kang, He, Lo 2022, arXiv:2208.07120 (ASE). Genes are heads, width, inner width and depth. What is greatest is
GFLOPs - 4·|wanted - parameters|/10⁶, the work on a sequence less the megabytes that are missed. The student is then taught on
text without labels: put `distill.recover` with `teacher: $input`, `temperature: 10`, `learning_rate: 1e-4` and `warmup: 0.1`
behind it.
Differs: the student is a Llama with the model's own tokenizer, since tokens are what distillation compares, so that the
vocabulary is no gene. The inner width of every candidate is the one nearest below the wanted size, and where none is small
enough it loses blocks, and then width, so that the result is within one step of that size. Heads divide the width. Looking a
token up is no work. The search draws from a fixed seed, so that a plan knows its result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from modelwright.core.errors import ModelError, PlanError
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, unwrapped
from modelwright.core.settings import count, fraction
from modelwright.maths.genetic import evolved

if TYPE_CHECKING:
    from transformers import LlamaConfig

HEADS, WIDTHS, INNER, DEPTHS = (1, 2, 4, 8, 16), range(16, 769, 16), range(32, 3041, 32), range(1, 13)


class Shape(NamedTuple):
    """The sizes of a Llama."""

    heads: int
    width: int
    inner: int
    depth: int

    def parameters(self, vocabulary: int, tied: bool) -> int:
        """What a Llama of this shape has: embedding, head, and in each block four square matrices, three of the MLP and two norms."""
        block = 4 * self.width**2 + 3 * self.width * self.inner + 2 * self.width
        return (1 if tied else 2) * vocabulary * self.width + self.depth * block + self.width

    def flops(self, vocabulary: int, length: int) -> int:
        """Float operations for a sequence: two for each entry of a matrix, and the products of attention."""
        matrices = self.depth * (4 * self.width**2 + 3 * self.width * self.inner) + vocabulary * self.width
        return length * (2 * matrices + 4 * self.depth * length * self.width)


@dataclass(frozen=True, kw_only=True)
class Compressor(ModelMethod):
    """Replace the model by a fresh Llama with `keep` of its parameters, in the shape that does the most work; then distil."""

    status: ClassVar[str] = "checked"
    causal: ClassVar[bool] = True
    wants: ClassVar[frozenset[str]] = frozenset()
    leaves: ClassVar[frozenset[str]] = frozenset({"float"})
    drops: ClassVar[frozenset[str]] = frozenset({"sparse", "low-rank", "packed", "adapters"})
    small = dict(population=8, generations=4)

    keep: float = fraction(0.1, low=1e-6)  # of the model's parameters
    population: int = count(50, low=2)  # shapes that live at once
    generations: int = count(100, low=0)  # rounds in which the shapes have children
    crossover: float = fraction(0.6)  # of pairs whose children are of both; of the others each changes by itself
    length: int = count(512, unit="tokens")  # of the sequence whose work counts

    def model(self, model: Model, rng: torch.Generator, notes: list[str]) -> Model:
        from transformers import LlamaForCausalLM

        module = unwrapped(model.module)
        shape, config = self.searched(module)
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(1 << 48, (), generator=rng)))
            student: Any = LlamaForCausalLM(config)
        like = next(value for value in module.parameters() if value.is_floating_point())
        model.module = student.to(like.device, like.dtype).eval()
        made = sum(value.numel() for value in student.parameters())
        notes.append(f"{self.name()}: {', '.join(f'{name} {value}' for name, value in shape._asdict().items())}; {made:,} parameters")
        return model

    def planned(self, module: Any, donors: int) -> Any:
        from transformers import LlamaForCausalLM

        _, config = self.searched(unwrapped(module))
        with torch.device("meta"):
            student: Any = LlamaForCausalLM(config)
        return student.to(next(value.dtype for value in module.parameters() if value.is_floating_point()))

    def searched(self, module: Any) -> tuple[Shape, LlamaConfig]:
        """The best shape for a model's vocabulary and size, and its config.

        Raises:
            ModelError: the model has no vocabulary.
            PlanError: no shape of the space has that size.
        """
        from transformers import LlamaConfig

        own: Any = getattr(module, "config", None)
        if not getattr(own, "vocab_size", None):
            raise ModelError(f"{self.name()}: a {type(module).__name__} has no vocabulary, and the student is a language model. Give one.")
        vocabulary, tied = own.vocab_size, bool(own.tie_word_embeddings)
        wanted = int(self.keep * sum(value.numel() for value in module.parameters()))
        least, most = (Shape(1, each[0][0], each[1][0], each[2][0]).parameters(vocabulary, tied)
                       for each in ((WIDTHS, INNER, DEPTHS), (WIDTHS[::-1], INNER[::-1], DEPTHS[::-1])))  # fmt: skip
        if not least <= wanted <= most:
            sizes = f"shapes with this vocabulary have {least:,} to {most:,} parameters"
            raise PlanError(f"{self.name()}: keep={self.keep} asks for {wanted:,}, and {sizes}. Choose another keep.")

        def settled(genes: tuple[int, ...]) -> tuple[int, ...]:
            heads, width, _, depth = genes
            while Shape(1, width, INNER[0], depth).parameters(vocabulary, tied) > wanted:
                width, depth = (width, depth - 1) if depth > 1 else (width - WIDTHS.step, depth)
            heads = max(each for each in HEADS if each <= heads and width % (2 * each) == 0)
            room = wanted - Shape(heads, width, 0, depth).parameters(vocabulary, tied)
            inner = room // (3 * width * depth) // INNER.step * INNER.step
            return heads, width, min(max(inner, INNER[0]), INNER[-1]), depth

        def fitness(genes: tuple[int, ...]) -> float:
            shape = Shape(*genes)
            return shape.flops(vocabulary, self.length) / 1e9 - 4e-6 * abs(wanted - shape.parameters(vocabulary, tied))

        rng = torch.Generator().manual_seed(0)
        best, _ = evolved((HEADS, WIDTHS, INNER, DEPTHS), fitness, settled, self.population, self.generations, self.crossover, rng)
        shape = Shape(*best)
        ids: Any = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        longest: Any = getattr(own, "max_position_embeddings", None) or getattr(own, "n_positions", 2048)
        return shape, LlamaConfig(
            vocab_size=vocabulary, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads, num_key_value_heads=shape.heads, head_dim=shape.width // shape.heads,
            max_position_embeddings=longest, tie_word_embeddings=tied, **ids,
        )  # fmt: skip
