"""The graph of a network as calls of C kernels, with a place for each value; and the texts of the three files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import resources
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelwright.core.errors import ModelError

from .operations import FUNCTIONS, OPERATIONS, PLAIN, POINTWISE, SAME, SAME_LAYERS
from .values import Call, Node, Value, number_in_c, shape_of

NEEDS = {"lstm": ("sigmoid", "affine"), "gru": ("sigmoid", "affine"), "rnn_tanh": ("affine",)}  # what kernels call
NETWORK = """\
/* {{ macs }} multiplications with weights, {{ flash }} bytes of constants, {{ ram }} bytes of static memory */
#include <math.h>
#include <stddef.h>
#include "parameters.h"
#include "network.h"

{% for name, body in functions %}static inline float {{ name }}(float x) { return {{ body }}; }
{% endfor %}
{% for kernel in kernels %}{{ kernel }}
{% endfor %}{% if arena %}static float between[{{ arena }}];

{% endif %}void network(const float *input, float *output)
{
{% for line in lines %}    {{ line }}
{% endfor %}}
"""
HEADER = """\
#ifndef NETWORK_H
#define NETWORK_H

#define NETWORK_INPUTS {{ inputs }} /* {{ input_shape }} */
#define NETWORK_OUTPUTS {{ outputs }} /* {{ output_shape }} */

void network(const float *input, float *output);

#endif
"""
PARAMETERS = """\
#include <stdint.h>

typedef {{ weight }} weight;

{% for line in arrays %}{{ line }}
{% endfor %}"""


class Writer:
    """Goes through the graph: a call for each operation, an array for each parameter; then a place for each value."""

    def __init__(self, graph: fx.GraphModule, weights: str):
        self.graph, self.weights = graph, weights
        self.layers = dict(graph.named_modules())
        self.values: dict[fx.Node, Value] = {}
        self.calls: list[Call] = []
        self.arrays: list[str] = []
        self.names: dict[int, tuple[str, str]] = {}  # of parameters that are written, by identity
        self.kept: list[Tensor] = []  # those that are computed here, so that no other takes their identity
        self.kernels: list[str] = []
        self.functions: dict[str, str] = {}
        self.unknown: list[str] = []
        self.flash = self.macs = self.arena = 0

    def write(self) -> None:
        """Fill in everything, or raise with all operations that are not known."""
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.input = node
                if self.values:
                    self.unknown.append(f"more than one input, {node.name}")
                self.values[node] = Value(math.prod(shape_of(node)), "input")
            elif node.op == "output":
                self._finish(node)
            else:
                self._operation(node)
        if self.unknown:
            raise ModelError(f"This cannot be written as C: {'; '.join(dict.fromkeys(self.unknown))}.")
        self._place()

    def files(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(name, template, values) of each file."""
        kernels = [(resources.files("modelwright.c_code") / "kernels" / f"{name}.c").read_text("utf-8") for name in self.kernels]
        one, two = shape_of(self.input), shape_of(self.output)
        yield "network.c", NETWORK, {
            "macs": f"{self.macs:,}", "flash": f"{self.flash:,}", "ram": f"{4 * self.arena:,}", "arena": self.arena, "kernels": kernels,
            "functions": [(name, body) for name, body in self.functions.items() if body],
            "lines": [call.statement() for call in self.calls],
        }  # fmt: skip
        yield "network.h", HEADER, {
            "inputs": math.prod(one), "input_shape": list(one), "outputs": math.prod(two), "output_shape": list(two),
        }  # fmt: skip
        yield "parameters.h", PARAMETERS, {"weight": "int8_t" if self.weights == "int8" else "float", "arrays": self.arrays}

    # Operations

    def _operation(self, node: Node) -> None:
        """Write one operation; one that is not known is remembered, and those after it are looked at too."""
        if not node.users or not isinstance(node.meta.get("tensor_meta"), tuple):
            return  # nobody reads it, or it is a number, such as a size, which the shapes of tensors already hold
        layer = self.layers[str(node.target)] if node.op == "call_module" else None
        kind: Any = FUNCTIONS.get(node.target, node.target) if layer is None else type(layer)
        if isinstance(layer, SAME_LAYERS) or kind in SAME:
            self.values[node] = self.read(node)
            return
        odd = [key for key, plain in PLAIN.get(kind, {}).items() if layer is not None and getattr(layer, key) != plain]
        if kind in POINTWISE and not odd:
            self.pointwise(node, *POINTWISE[kind])
        elif node.op == "get_attr" or kind not in OPERATIONS or not OPERATIONS[kind](self, node, layer):
            self.unknown.append(f"{node.name}: {layer if layer is not None else getattr(kind, '__name__', kind)}")
            self.values[node] = Value(0)

    def read(self, node: Node, number: int = 0) -> Value:
        """What an operation is given as its argument of this number."""
        return self.values[node.args[number]]

    def kernel(self, name: str) -> None:
        """Have a kernel written, and what it calls before it."""
        for other in NEEDS.get(name, ()):
            self.kernel(other) if other in NEEDS or other == "affine" else self.functions.setdefault(other, POINTWISE[nn.Sigmoid][1])
        if name not in self.kernels:
            self.kernels.append(name)

    def call(self, node: Node, name: str, *arguments: Any, scratch: int = 0) -> None:
        """A call of a kernel: from {x} to {out}, with arguments."""
        self.kernel(name)
        work = Value(scratch) if scratch else None
        text = ", ".join(map(str, ("{x}", "{out}", *arguments, *(["{scratch}"] if work else []))))
        self.values[node] = Value(math.prod(shape_of(node)))
        self.calls.append(Call(f"{name}({text});", {"x": self.read(node)}, self.values[node], work))

    def pointwise(self, node: Node, name: str, body: str) -> None:
        """A function of each value alone."""
        self.functions.setdefault(name, body)
        self.combined(node, f"{name}({{x}}[i])", {"x": self.read(node)})

    def combined(self, node: Node, expression: str, reads: dict[str, Value]) -> None:
        """An expression in C of the values at one place."""
        count = math.prod(shape_of(node))
        self.values[node] = Value(count)
        text = f"for (int i = 0; i < {count}; i++) ({{out}})[i] = {expression};"
        self.calls.append(Call(text, reads, self.values[node], inplace=True))

    def parameter(self, tensor: Tensor | None, *, matrix: bool = False) -> tuple[str, str]:
        """The names in C of an array and of the scales of its rows; NULL where there are none."""
        if tensor is None:
            return "NULL", "NULL"
        if id(tensor) not in self.names:
            whole, name, scales = matrix and self.weights == "int8", f"p{len(self.arrays)}", "NULL"
            values = tensor.detach().float().cpu()
            if not values.isfinite().all():
                self.unknown.append("weights that are NaN or infinite")
                return "NULL", "NULL"
            if whole:
                rows = values.flatten(1)
                scale = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
                values, scales = (rows / scale[:, None]).round(), f"{name}_scale"
                self._array(scales, "float", scale)
            self._array(name, "weight" if matrix else "float", values, whole)
            self.names[id(tensor)] = name, scales
        return self.names[id(tensor)]

    def _array(self, name: str, kind: str, values: Tensor, whole: bool = False) -> None:
        flat = values.flatten().tolist()
        self.flash += len(flat) * (1 if whole else 4)
        texts = [str(int(value)) for value in flat] if whole else [number_in_c(value) for value in flat]
        rows = [", ".join(texts[start : start + 12]) for start in range(0, len(texts), 12)]
        self.arrays.append(f"static const {kind} {name}[{len(flat)}] = {{\n    " + ",\n    ".join(rows) + "};")

    # Places

    def _finish(self, node: Node) -> None:
        """The last operation's value is the output."""
        if not isinstance(node.args[0], fx.Node) or node.args[0] not in self.values:
            self.unknown.append("an output that is not one tensor")
            return
        self.output = node.args[0]
        if self.values[self.output].place:  # the input itself
            self.combined(self.output, "{x}[i]", {"x": self.values[self.output]})
        self.values[self.output].place = "output"

    def _place(self) -> None:
        """Give each value the first gap in the static array that is free as long as it is needed."""
        ends: dict[Value, int] = {}
        for number, call in enumerate(self.calls):
            ends |= dict.fromkeys([*call.reads.values(), call.gives, *([call.scratch] if call.scratch else [])], number)
        live: dict[Value, int] = {}
        for number, call in enumerate(self.calls):
            first = call.reads.get("x")
            if call.inplace and not call.gives.place and first in live and ends[first] == number and first.count == call.gives.count:
                live[call.gives] = live.pop(first)  # takes its place over
                call.gives.place = first.place
            for value in (call.gives, call.scratch):
                if value is not None and not value.place:
                    start = 0
                    for other in sorted(live, key=live.__getitem__):
                        if start + value.count <= live[other]:
                            break
                        start = max(start, live[other] + other.count)
                    live[value], value.place = start, f"(between + {start})" if start else "between"
                    self.arena = max(self.arena, start + value.count)
            live = {value: start for value, start in live.items() if ends[value] > number}
