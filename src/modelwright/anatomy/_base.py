"""What a family says of its models, and what follows from it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from modelwright.core.errors import LayoutError, SiteError

STAGES = (
    ("attn.q", "attn.k", "attn.v", "attn.qkv"),
    ("attn.o",),
    ("attn.cross_q", "attn.cross_k", "attn.cross_v"),
    ("attn.cross_o",),
    ("router", "router.shared", "mlp.gate", "mlp.up", "mlp.gate_up", "experts.gate", "experts.up", "experts.gate_up"),
    ("mlp.down", "experts.down"),
)
KINDS = ("mlp", "heads", "residual", "experts", "channels", "stages")
READS = {role for stage in (STAGES[0], STAGES[2], STAGES[4]) for role in stage}  # multiply the residual stream
WRITES = {"attn.o", "attn.cross_o", "mlp.down", "experts.down"}  # add to the residual stream


class Part(NamedTuple):
    """Rows [start, stop) of a fused weight's output dimension that do the work of `role`."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Site:
    """One weight that methods can work on."""

    name: str  # of the parameter in the module: "model.layers.3.self_attn.q_proj.weight"
    module: str  # "model.layers.3.self_attn.q_proj"
    role: str  # "attn.q"
    depth: int | None  # index of its block; None outside the blocks
    depths: int  # number of blocks in its stack, 0 outside the blocks
    transposed: bool = False  # stored [in, out]
    stack: int = 0  # 0 for a matrix; n for a tensor [n, out, in] of n experts
    parts: tuple[Part, ...] = ()  # of a fused weight, in the order of its rows

    @property
    def place(self) -> str:
        """What the weight is, in words that a module and its files share where their names differ."""
        *way, owner, leaf = ["", "", *self.name.split(".")]
        numbers = [part for part in way if part.isdigit()]
        shared = self.role in ("norm", "linear", "conv", "parameter", "router", "embed")
        return "/".join([self.role, *numbers, owner if shared else "", leaf])


class Span(NamedTuple):
    """Where the units of one kind lie in one tensor: unit i is [start + i·width, start + (i+1)·width) of `dim`."""

    name: str
    dim: int
    width: int = 1
    start: int = 0
    output: bool = False  # the side whose zeros silence the unit


class Slice(NamedTuple):
    """A part [start, stop) of a tensor along `dim`."""

    name: str
    dim: int
    start: int
    stop: int
    output: bool


@dataclass(frozen=True)
class Group:
    """Slices that must leave a model together."""

    kind: str
    depth: int | None
    index: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Units:
    """`count` units of a kind that share their tensors: the neurons of one block, the channels of a model."""

    kind: str  # one of KINDS
    depth: int | None  # None when the units run through all blocks
    count: int
    spans: tuple[Span, ...]
    scope: str = ""  # the dotted path that the units belong to: a block, a stack, or "" for the model
    size: str = ""  # the config's name for their number
    buffers: tuple[Span, ...] = ()  # what is no parameter and leaves too, such as running means

    def group(self, index: int) -> Group:
        """Unit `index` as slices."""
        slices = []
        for span in self.spans:
            start = span.start + index * span.width
            slices.append(Slice(span.name, span.dim, start, start + span.width, span.output))
        return Group(self.kind, self.depth, index, tuple(slices))

    def rows(self, span: Span, tensor: Any) -> Any:
        """The span's part of its tensor (or of anything of its shape), as [count, the unit's entries]."""
        part = tensor.narrow(span.dim, span.start, self.count * span.width)
        return part.movedim(span.dim, 0).reshape(self.count, -1)


class Branch(NamedTuple):
    """An attention or MLP with its own way around: what a block adds to the residual stream in one step."""

    kind: str  # "attn" or "mlp"
    depth: int
    module: str  # the dotted path of what gives the sum that is added
    norms: tuple[str, ...]  # of the norms that serve it alone

    def __str__(self) -> str:
        return f"{self.kind} {self.depth}"


def turned_at(module: Any) -> str:
    """Where the channels of the residual stream get another basis between blocks, "" where they do not."""
    return next((path for path, child in module.named_modules() if getattr(child, "turns_stream", False)), "")


def refuse_turned(module: Any) -> None:
    """Raise SiteError where blocks, or parts of them, cannot be measured or leave by themselves, since the stream is turned between."""
    if turned := turned_at(module):
        raise SiteError(f"blocks and their parts cannot leave where {turned} turns the channels between them: remove them first")


class Anatomy:
    """A family: patterns of names, and the few facts that names do not tell.

    In a pattern `N` stands for the index of the block, `E` for that of an expert, `*` for a part of one name. A pattern
    matches a whole name up to `.weight` or `.bias`, with anything before it: checkpoints of base models lack prefixes.
    The weights inside a layer that stands for a matrix, a factor or an adapter's base, have the role of that matrix.
    """

    name: ClassVar[str]
    types: ClassVar[tuple[str, ...]] = ()  # config.model_type
    roles: ClassVar[dict[str, str]] = {}  # pattern → role, the names in modules and those on disk alike
    stacks: ClassVar[dict[str, str]] = {"layers": "num_hidden_layers"}  # end of a stack's path → the config's count
    ties: ClassVar[tuple[tuple[str, ...], ...]] = (("model.embed_tokens.weight", "lm_head.weight"),)
    mlp_size: ClassVar[str] = "intermediate_size"
    norm_offset: ClassVar[float] = 0.0  # norms multiply by offset + weight
    norm_eps: ClassVar[str] = "rms_norm_eps"
    norms_write: ClassVar[bool] = False  # norms stand behind attentions and MLPs, so that their outputs join the stream
    why_not: ClassVar[dict[str, str]] = {}  # kinds of units that cannot leave this family exactly → reason

    def role(self, name: str) -> tuple[str, int | None] | None:
        """The role and depth of a tensor, from its name in a module or on disk; None for an unknown name.

        A bias has the role of its module; so have the two factors of a matrix, and what an adapter stands beside.
        """
        for pattern, role in _compiled(type(self)):  # type: ignore[arg-type]
            if found := pattern.fullmatch(name):
                depth = found.groupdict().get("depth")
                return role, None if depth is None else int(depth)
        return None

    def stack_paths(self, module: Any) -> list[str]:
        """Dotted paths of the lists of blocks."""
        from torch import nn

        lists = (path for path, child in module.named_modules() if isinstance(child, nn.ModuleList) and len(child))
        return [path for path in lists if any(f".{path}".endswith(f".{end}") for end in self.stacks)]

    def blocks(self, module: Any) -> str | None:
        """Dotted path of the list of blocks; None when there is not exactly one."""
        found = self.stack_paths(module)
        return found[0] if len(found) == 1 else None

    def sites(self, module: Any) -> list[Site]:
        """All weight matrices in model order. A tied weight is one site, under its first name."""
        depths = {path: len(module.get_submodule(path)) for path in self.stack_paths(module)}
        found = []
        for name, weight in module.named_parameters():
            known = self.role(name)
            if known is None or weight.ndim < 2 or (weight.ndim > 2 and weight.numel() == weight.shape[-1]):
                continue
            owner = name.removesuffix(".weight") if name.endswith(".weight") else name.rpartition(".")[0]
            role, depth = known
            stack = next((path for path in depths if depth is not None and name.startswith(path + ".")), None)
            site = Site(
                name=name,
                module=owner,
                role=role,
                depth=depth,
                depths=depths.get(stack or "", 0),
                transposed=type(module.get_submodule(owner)).__name__ == "Conv1D",
                stack=weight.shape[0] if role.startswith("experts.") and weight.ndim == 3 else 0,
            )
            found.append(dataclasses.replace(site, parts=self.parts(module, site, weight.shape)))
        return found

    def parts(self, module: Any, site: Site, shape: Sequence[int]) -> tuple[Part, ...]:
        """The rows of a fused weight by role; none for a factor of one."""
        if site.module.endswith((".a", ".b")):
            return ()
        out = shape[-1] if site.transposed else shape[-2]
        if site.role.endswith(".gate_up"):
            word = site.role.split(".")[0]
            return Part(f"{word}.gate", 0, out // 2), Part(f"{word}.up", out // 2, out)
        if site.role == "attn.qkv":
            repeat = getattr(module.get_submodule(self.owner(site)), "num_key_value_groups", 1)
            pair = out // (repeat + 2)
            key, value = out - 2 * pair, out - pair
            return Part("attn.q", 0, key), Part("attn.k", key, value), Part("attn.v", value, out)
        return ()

    def stages(self, roles: Iterable[str]) -> list[list[str]]:
        """`roles` in the order in which a block's weights see inputs; those of one stage see theirs together."""
        roles = list(dict.fromkeys(roles))
        known = [[role for role in stage if role in roles] for stage in STAGES]
        other = [[role] for role in roles if not any(role in stage for stage in STAGES)]
        return [stage for stage in known if stage] + other

    def tied(self, model: Any) -> list[tuple[str, ...]]:
        """Names that share storage: as the module has them, or as a config promises."""
        if hasattr(model, "named_parameters"):
            names: dict[int, list[str]] = {}
            for name, weight in model.named_parameters(remove_duplicate=False):
                names.setdefault(id(weight), []).append(name)
            return [tuple(same) for same in names.values() if len(same) > 1]
        values = model if isinstance(model, dict) else vars(model)
        return list(self.ties) if values.get("tie_word_embeddings") else []

    # Units that structured removal can take out

    def units(self, module: Any, kind: str) -> list[Units]:
        """The units of a kind, one entry for each set of tensors that share them.

        "mlp": neurons, an entry per block. "heads": key-value heads with their query heads, an entry per attention.
        "residual": channels, one entry. "experts": an entry per block. In models without a family "channels" between two
        convolutions or linears, and "stages", whose channels join in sums.

        Raises: SiteError when the model has none, or when taking them out cannot keep the rest as it was.
        """
        if kind not in KINDS:
            raise SiteError(f"{kind!r} is no kind of unit; kinds are {', '.join(KINDS)}")
        if kind in self.why_not:
            raise LayoutError(f"{self.name} models cannot lose {kind}: {self.why_not[kind]}")
        if kind == "residual" and (turned := turned_at(module)):
            raise SiteError(f"residual channels leave all places alike, and {turned} turns them: remove all that shall go at once")
        for path, child in module.named_modules() if kind == "residual" else ():
            if (self.role(path) or ("",))[0] == "embed" and hasattr(child, "kind"):  # of the package's own
                raise SiteError(
                    f"channels leave whole tables, and {path} is a {type(child).__name__}: remove first, then share or factor it"
                )
        for first, *others in self.tied(module):
            depths = {(self.role(name) or ("", None))[1] for name in (first, *others)}
            if depths - {None}:
                raise SiteError(f"{kind} leave each block by itself, and {first} is also {others[0]}: remove first, then share")
        whole = {site.module for site in self.sites(module) if not site.module.endswith((".a", ".b"))}
        for path, child in module.named_modules():
            if path not in whole and (self.role(path) or ("",))[0] in READS | WRITES:
                raise SiteError(
                    f"{kind} leave whole matrices, and {path} is a {type(child).__name__}: remove first, "
                    "then factor, prune to a sparse layout, pack or adapt"
                )
        found = getattr(self, f"_{kind}")(module)
        if not found:
            split = kind == "experts" and any(site.role.startswith("experts.") for site in self.sites(module))
            what_to_do = "; its experts are split, fuse them first" if split else ""
            others = [each for each in KINDS if each not in self.why_not and getattr(self, f"_{each}")(module)]
            what_to_do = what_to_do or (f"; it has {', '.join(others)}" if others else "")
            raise LayoutError(f"this {self.name} model has no {kind} to remove{what_to_do}")
        return found

    def groups(self, module: Any, kind: str | None = None) -> Iterator[Group]:
        """Every group of slices that must leave together, of one kind or of all that the model has."""
        for each in [kind] if kind else KINDS:
            try:
                found = self.units(module, each)
            except SiteError:
                if kind:
                    raise
                continue
            for units in found:
                yield from map(units.group, range(units.count))

    def branches(self, module: Any) -> list[Branch]:
        """The attentions and MLPs of the blocks, in the order of the blocks; those that are gone already are not among them.

        A block's norms are in the order of their use, so that the first half belongs to its attention; a single one serves both.

        Raises: SiteError where they are not modules of their own in one row of blocks, or add to the stream themselves.
        """
        refuse_turned(module)
        path = self.blocks(module)
        if path is None:
            raise LayoutError(f"attentions and MLPs leave a single row of blocks; this {self.name} model has no single row of them")
        found = []
        for depth, block in enumerate(module.get_submodule(path)):
            prefix = f"{path}.{depth}."
            roles = {name: (self.role(prefix + name) or ("",))[0] for name, _ in (*block.named_modules(), *block.named_parameters())}
            norms = [prefix + name for name, _ in block.named_children() if roles[name] == "norm"]
            halves = {"attn": norms[: len(norms) // 2], "mlp": norms[len(norms) // 2 :]}
            for kind, words in (("attn", ("attn",)), ("mlp", ("mlp", "experts", "router"))):
                inside = [name for name, role in roles.items() if role.split(".")[0] in words]
                owners = {name.split(".")[0] for name in inside}
                whole = len(owners) == 1 and not owners & set(inside)
                within = [name for name, role in roles.items() if role == "norm" and name.split(".")[0] in owners]
                adds = [name for name in within if is_residual_norm(f"{name}.")]
                if inside and (not whole or adds):
                    raise LayoutError(f"the {kind} of {prefix[:-1]} is laid out otherwise than as one module whose output is added")
                if inside:
                    found.append(Branch(kind, depth, prefix + owners.pop(), tuple(halves[kind]) if len(norms) > 1 else ()))
        return found

    def ways(self, module: Any) -> dict[int, list[tuple[str, str]]]:
        """By depth, of each attention and MLP the paths inside its block of the norm before it and of itself, in the order of use.

        Raises: SiteError as `branches`, or where a block does not add part(norm(x)) to x.
        """
        path, found = self.blocks(module), dict[int, list[tuple[str, str]]]()
        for branch in self.branches(module):
            if self.norms_write or len(branch.norms) != 1:
                raise LayoutError(f"the {branch.kind} of block {branch.depth} is laid out otherwise than with one norm before it")
            inside = len(f"{path}.{branch.depth}.")
            found.setdefault(branch.depth, []).append((branch.norms[0][inside:], branch.module[inside:]))
        return found

    def _owners(self, module: Any, roles: str) -> dict[str, list[Site]]:
        """The sites of a role's first word by the module that holds them all: an attention, an MLP."""
        found: dict[str, list[Site]] = {}
        for site in self.sites(module):
            if site.role.startswith(roles):
                found.setdefault(self.owner(site), []).append(site)
        return found

    def owner(self, site: Site) -> str:
        """The module that holds a site together with the others of its MLP or attention."""
        return site.module.removesuffix(".base_layer").rpartition(".")[0]

    def _mlp(self, module: Any) -> list[Units]:
        shapes = {name: weight.shape for name, weight in module.named_parameters()}
        found = []
        for owner, sites in self._owners(module, "mlp.").items():
            down = next(site for site in sites if site.role == "mlp.down")
            count = shapes[down.name][input_dim(down)]
            spans = [Span(down.name, input_dim(down), output=True)]
            for site in sites:
                if site is not down:
                    spans += _rows(shapes, site, 1, [part.start for part in site.parts] or [0])
            found.append(Units("mlp", down.depth, count, tuple(spans), owner, self.mlp_size))
        return found

    def _heads(self, module: Any) -> list[Units]:
        return [self._attention(module, owner, sites) for owner, sites in self._owners(module, "attn.").items()]

    def _attention(self, module: Any, owner: str, sites: list[Site]) -> Units:
        shapes = {name: weight.shape for name, weight in module.named_parameters()}
        by_role = {site.role.replace("cross_", ""): site for site in sites}
        width, out = head_width(module.get_submodule(owner)), by_role["attn.o"]
        query = shapes[out.name][input_dim(out)] // width
        if "attn.qkv" in by_role:
            fused = by_role["attn.qkv"]
            count = _length(fused, "attn.k") // width
            spans = self._fused(shapes, fused, query // count, width)
        else:
            count = shapes[by_role["attn.k"].name][0] // width
            spans = _rows(shapes, by_role["attn.q"], query // count * width, [0])
            spans += _rows(shapes, by_role["attn.k"], width, [0]) + _rows(shapes, by_role["attn.v"], width, [0])
        spans.append(Span(out.name, input_dim(out), query // count * width, output=True))
        return Units("heads", out.depth, count, tuple(spans), owner, "num_key_value_heads")

    def _fused(self, shapes: dict[str, Any], site: Site, repeat: int, width: int) -> list[Span]:
        """Rows of a fused attention weight that stores all queries, then all keys, then all values."""
        query, key, value = site.parts
        rows = _rows(shapes, site, repeat * width, [query.start])
        return rows + _rows(shapes, site, width, [key.start, value.start])

    def _residual(self, module: Any) -> list[Units]:
        shapes = {name: weight.shape for name, weight in module.named_parameters()}
        spans, sites = [], {site.name: site for site in self.sites(module)}
        for name in shapes:
            role = (self.role(name) or ("",))[0]
            if name in sites:
                site = sites[name]
                if role == "embed":
                    spans.append(Span(name, 1, output=True))
                elif role in WRITES:
                    spans.append(Span(name, output_dim(site), output=True))
                elif role in READS or role == "head":
                    spans.append(Span(name, input_dim(site)))
            elif role in WRITES or (role == "norm" and is_residual_norm(name)):
                spans.append(Span(name, 0, output=role != "norm"))
        count = next(shapes[span.name][span.dim] for span in spans)
        return [Units("residual", None, count, tuple(spans), "", "hidden_size")]

    def _experts(self, module: Any) -> list[Units]:
        found: dict[int | None, list[Site]] = {}
        for site in self.sites(module):
            if site.stack or site.role == "router":
                found.setdefault(site.depth, []).append(site)
        found = {depth: sites for depth, sites in found.items() if any(site.stack for site in sites)}
        return [
            Units(
                "experts",
                depth,
                max(site.stack for site in sites),
                tuple(Span(site.name, 0, output=site.role == "experts.down") for site in sites),
                next(site.module for site in sites if site.stack).rpartition(".")[0],
                "num_experts",
            )
            for depth, sites in found.items()
        ]

    def _channels(self, module: Any) -> list[Units]:
        return []

    _stages = _channels

    # What a family adjusts by hand when parts leave

    def blocks_left(self, module: Any, stack: str, kept: list[int], before: list[Any]) -> None:
        """Set right what the blocks `kept` know of their place among `before`, just before the others leave."""

    def channels_left(self, module: Any, ratio: float) -> set[str]:
        """Set right what depends on the width, once `ratio` times as large; names the norms to leave as they are."""
        return set()


def head_width(attention: Any) -> int:
    """The width of one head, as the attention module has it."""
    for name in ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim"):
        if hasattr(attention, name):
            return getattr(attention, name)
    raise SiteError(f"{type(attention).__name__} does not tell the width of its heads")


def input_dim(site: Site) -> int:
    """The dimension of a matrix, or of a stack of matrices, that its inputs run along."""
    return 0 if site.transposed else 2 if site.stack else 1


def output_dim(site: Site) -> int:
    """The dimension that the outputs run along."""
    return 1 if site.transposed or site.stack else 0


def is_residual_norm(name: str) -> bool:
    """Whether a norm runs over the channels of the residual stream, not over a head."""
    return not re.search(r"\.[qk]_norm\.|\.[qk]_layernorm\.", name)


def _rows(shapes: dict[str, Any], site: Site, width: int, starts: list[int]) -> list[Span]:
    """Output rows of a weight, and of its bias when it has one."""
    bias = f"{site.module}.bias"
    names = [(site.name, output_dim(site))] + ([(bias, 0)] if bias in shapes else [])
    return [Span(name, dim, width, start) for name, dim in names for start in starts]


def _length(site: Site, role: str) -> int:
    return sum(part.stop - part.start for part in site.parts if part.role == role)


@functools.cache
def _compiled(family: Any) -> list[tuple[re.Pattern[str], str]]:
    tokens = {"N": r"(?P<depth>\d+)", "E": r"\d+"}
    made = []
    for pattern, role in family.roles.items():
        words = [tokens.get(word) or re.escape(word).replace(r"\*", "[^.]*") for word in pattern.split(".")]
        inside = r"(?:\.(?:base_layer|a|b))?(?:\.(?:weight|bias|gamma|beta))?"
        made.append((re.compile(r"(?:.+\.)?" + r"\.".join(words) + inside), role))
    return made
