"""The channels of any network of convolutions and linears, found by following its graph.

torch.fx writes down what calls what. A set of channels begins where a convolution or linear gives them, goes through whatever
works on each by itself (norms over a batch, activations, pooling, depthwise convolutions), and ends where another
multiplies them. Sums make one set of two; concatenations carry several. What is not known mixes all, so that
its channels stay. Where a model cannot be traced as a whole, its parts are, each with fixed ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx, nn

from ._base import Span, Units

EACH = {  # functions and methods that work on each channel by itself
    "relu", "relu_", "relu6", "leaky_relu", "silu", "gelu", "elu", "mish", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh",
    "softplus", "dropout", "contiguous", "clone", "neg", "abs", "clamp", "square", "sqrt", "float", "to", "detach",
}  # fmt: skip
PLACES = {"dropout2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate"}  # the same, over places
MIXING = (nn.GLU, nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.PReLU)  # activations that do not
MODULES, OVER_PLACES = ("activation", "dropout"), ("pooling", "upsampling")  # files of torch.nn whose other modules do
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
SUMS, PRODUCTS = {"add", "iadd", "add_", "sub", "isub"}, {"mul", "imul", "mul_"}
MULTIPLIES = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(eq=False)
class Wire:
    """Channels that leave together, and where they are."""

    count: int
    spans: list[Span] = field(default_factory=list)
    buffers: list[Span] = field(default_factory=list)
    made: list[str] = field(default_factory=list)  # paths of what gives them
    fixed: bool = False
    summed: bool = False  # joins others of its kind in a sum
    into: Wire | None = None

    def now(self) -> Wire:
        """The set that this one has become part of."""
        return self if self.into is None else self.into.now()

    def join(self, other: Wire) -> None:
        one, two = self.now(), other.now()
        if one is two:
            return
        for name in ("spans", "buffers", "made"):
            getattr(one, name).extend(getattr(two, name))
        one.fixed, one.summed, two.into = one.fixed or two.fixed, one.summed or two.summed, one


class Carried(NamedTuple):
    """What a value has along its channels: runs of wires."""

    wires: tuple[Wire, ...]
    flat: bool  # channels are the last dimension, and not the second
    spread: bool = False  # the places of each channel stand one after the other there

    def fix(self) -> None:
        for wire in self.wires:
            wire.now().fixed = True

    @property
    def sizes(self) -> list[int]:
        return [wire.count for wire in self.wires]


def channels_of(module: nn.Module, kind: str) -> list[Units]:
    """The channels that can leave, in the order of what gives them: "channels" of no sum, "stages" that join in sums."""
    names: dict[int, list[str]] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    tied = {name for same in names.values() if len(same) > 1 for name in same}
    place = {path: number for number, (path, _) in enumerate(module.named_modules())}
    found = []
    for wire in _wires(module, ""):
        free = not wire.fixed and wire.count > 1 and wire.made and not {span.name for span in wire.spans} & tied
        if free and wire.summed == (kind == "stages") and any(span.output for span in wire.spans):
            spans, buffers = (tuple(dict.fromkeys(each)) for each in (wire.spans, wire.buffers))
            found.append(Units(kind, None, wire.count, spans, min(wire.made, key=place.__getitem__), "", buffers))
    return sorted(found, key=lambda units: place[units.scope])


def _wires(module: nn.Module, path: str) -> list[Wire]:
    """The sets of channels of a module; of its parts, where torch.fx cannot trace it."""
    try:
        graph = _Tracer().trace(module)
    except Exception:  # whatever code does that torch.fx cannot follow
        return [wire for name, child in module.named_children() for wire in _wires(child, f"{path}{name}.")]
    return _Follower(module, path).followed(graph)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or m.__module__.startswith("modelwright.blocks")


class _Follower:
    """One walk along a graph."""

    def __init__(self, module: nn.Module, path: str):
        self.module, self.path = module, path
        self.wires: list[Wire] = []
        self.carried: dict[fx.Node, Carried] = {}
        self.first: dict[str, tuple[Carried | None, Carried | None]] = {}  # what a module was given and gave the first time

    def followed(self, graph: fx.Graph) -> list[Wire]:
        for node in graph.nodes:
            given = [self.carried[one] for one in node.all_input_nodes if one in self.carried]
            step = {"call_module": self.of_module, "call_function": self.of_function, "call_method": self.of_function}.get(node.op)
            found = step(node, given) if step else None
            if found is None:
                for each in given:
                    each.fix()
            else:
                self.carried[node] = found
        return list(dict.fromkeys(wire.now() for wire in self.wires))

    def of_module(self, node: fx.Node, given: Sequence[Carried]) -> Carried | None:
        """What a module gives; None for one that mixes what it is given."""
        name = str(node.target)
        child, own, path = self.module.get_submodule(name), given[0] if given else None, f"{self.path}{name}"
        if isinstance(child, MULTIPLIES):
            if name in self.first:
                return self.again(name, own)
            self.first[name] = own, (found := self.multiplied(child, path, own))
            return found
        if own is None:
            return None
        if isinstance(child, NORMS):
            if own.spread or child.num_features != sum(own.sizes):
                return None
            start = 0
            for wire, count in zip(own.wires, own.sizes, strict=True):
                self.span(wire, child, path, 0, start)
                start += count
            return own
        if isinstance(child, nn.Identity):
            return own
        if isinstance(child, nn.Flatten):
            return self.flattened(own) if child.start_dim == 1 else None
        files = MODULES if own.flat else MODULES + OVER_PLACES
        known = type(child).__module__.startswith("torch.nn.") and type(child).__module__.rpartition(".")[2] in files
        return own if known and not isinstance(child, MIXING) else None

    def flattened(self, own: Carried) -> Carried:
        return own if own.flat else Carried(own.wires, True, True)

    def again(self, name: str, own: Carried | None) -> Carried | None:
        """A module that is called a second time: its ends are those of the first."""
        before, after = self.first[name]
        for each in (before, own):
            if each is not None and (before is None or own is None or before.sizes != own.sizes):
                each.fix()
        if before is not None and own is not None and before.sizes == own.sizes:
            for one, two in zip(before.wires, own.wires, strict=True):
                one.join(two)
        return after

    def multiplied(self, child: Any, path: str, own: Carried | None) -> Carried:
        """The channels that a convolution or linear gives; those that it is given end there."""
        linear = isinstance(child, nn.Linear)
        count, groups = (child.out_features, 1) if linear else (child.out_channels, child.groups)
        backward = bool(getattr(child, "transposed", False))
        if own is not None and groups > 1 and groups == child.in_channels == count and len(own.wires) == 1:
            self.span(own.wires[0], child, path, 0, 0)
            return own
        wire = Wire(count, made=[path])
        self.wires.append(wire)
        self.span(wire, child, path, 1 if backward else 0, 0)
        wire.fixed = groups > 1
        if own is not None:
            width, rest = divmod(child.in_features if linear else child.in_channels, sum(own.sizes))
            if own.flat is not linear or rest or groups > 1 or width != 1 and not own.spread:
                own.fix()
            start = 0
            for each in own.wires:
                each.now().spans.append(Span(f"{path}.weight", 0 if backward else 1, width, start, True))
                start += each.count * width
        return Carried((wire,), linear)

    def span(self, wire: Wire, child: nn.Module, path: str, dim: int, start: int) -> None:
        """Note a module's tensors with an entry for each channel, the weight along `dim`."""
        for held, into in ((child._parameters, wire.now().spans), (child._buffers, wire.now().buffers)):
            for name, value in held.items():
                if value is not None and value.ndim:
                    into.append(Span(f"{path}.{name}", dim if name == "weight" else 0, 1, start))

    def of_function(self, node: fx.Node, given: Sequence[Carried]) -> Carried | None:
        """What a function or method gives; None for one that mixes what it is given."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if not given:
            return None
        own, args = given[0], node.args
        if name in SUMS | PRODUCTS:
            return self.together(node, given, name in SUMS)
        if name in (EACH if own.flat else EACH | PLACES) and len(given) == 1:
            return own
        if name in ("size", "getattr", "dim"):
            return Carried((), own.flat)
        if name in ("cat", "concat"):
            parts = list(args[0]) if isinstance(args[0], (list, tuple)) else []
            along = node.kwargs.get("dim", args[1] if len(args) > 1 else 0) == (-1 if own.flat else 1)
            whole = all(part in self.carried for part in parts) and len({each.flat for each in given}) == 1
            whole = whole and not any(each.spread for each in given)
            return Carried(tuple(wire for part in parts for wire in self.carried[part].wires), own.flat) if whole and along else None
        if name == "flatten":
            return self.flattened(own) if (args[1:2] or (node.kwargs.get("start_dim"),))[0] == 1 else None
        if name == "mean" and not own.flat:
            dims = node.kwargs.get("dim", args[1] if len(args) > 1 else None)
            spatial = isinstance(dims, (list, tuple)) and sorted(dims) in ([2, 3], [-2, -1])
            return Carried(own.wires, not node.kwargs.get("keepdim", len(args) > 2 and args[2])) if spatial else None
        if name in ("view", "reshape") and len(args) == 3 and args[2] == -1 and not own.flat:
            return self.flattened(own)
        if name == "getitem" and not own.flat and isinstance(args[1], tuple) and all(part == slice(None) for part in args[1][:2]):
            return own if all(isinstance(part, slice) for part in args[1]) else None
        return None

    def together(self, node: fx.Node, given: Sequence[Carried], summed: bool) -> Carried | None:
        """A sum or a product: both sides have the same channels from then on."""
        own, numbers = given[0], sum(isinstance(each, (int, float)) for each in node.args)
        if numbers and len(given) == 1:
            return own
        known = [one for one in node.args if isinstance(one, fx.Node) and one in self.carried]
        if len(known) != 2 or len(node.args) != 2:
            return None
        one, two = (self.carried[each] for each in known)
        if one.sizes != two.sizes or one.flat != two.flat or one.spread or two.spread or not one.sizes:
            return None
        for first, second in zip(one.wires, two.wires, strict=True):
            first.join(second)
            first.now().summed |= summed
        return one
