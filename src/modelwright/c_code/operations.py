"""What operations of torch are in C: functions of each value, looks at the same values, and calls of kernels."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .values import Call, Node, Value, number_in_c, shape_of

if TYPE_CHECKING:
    from .writer import Writer

POINTWISE: dict[Any, tuple[str, str]] = {  # what works on each value alone: its name in C, and its body
    nn.ReLU: ("relu", "x > 0.0f ? x : 0.0f"),
    nn.ReLU6: ("relu6", "x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x"),
    nn.Tanh: ("tanhf", ""),
    nn.Sigmoid: ("sigmoid", "1.0f / (1.0f + expf(-x))"),
    nn.SiLU: ("silu", "x / (1.0f + expf(-x))"),
    nn.GELU: ("gelu", "0.5f * x * (1.0f + erff(x * 0.70710678f))"),
    nn.Softplus: ("softplus", "x > 20.0f ? x : log1pf(expf(x))"),
    nn.Hardtanh: ("hardtanh", "x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x"),
}
PLAIN: dict[Any, dict[str, Any]] = {  # settings of these with which they are what stands above; others are refused
    nn.GELU: {"approximate": "none"}, nn.Softplus: {"beta": 1.0, "threshold": 20.0}, nn.Hardtanh: {"min_val": -1.0, "max_val": 1.0},
}  # fmt: skip
FUNCTIONS: dict[Any, Any] = {  # functions and methods of tensors, as the layers that do the same
    F.relu: nn.ReLU, torch.relu: nn.ReLU, "relu": nn.ReLU, F.relu6: nn.ReLU6, torch.tanh: nn.Tanh, "tanh": nn.Tanh,
    torch.sigmoid: nn.Sigmoid, "sigmoid": nn.Sigmoid, F.silu: nn.SiLU,
}  # fmt: skip
SAME = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", torch.flatten, torch.squeeze, torch.unsqueeze, torch.reshape}
SAME_LAYERS = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


# Operations: each writes its calls and says whether it could


def _linear(writer: Writer, node: Node, layer: Any) -> bool:
    rows = math.prod(shape_of(node)) // layer.out_features
    weight, scale = writer.parameter(layer.weight, matrix=True)
    writer.macs += rows * layer.weight.numel()
    writer.call(node, "affine", rows, layer.in_features, layer.out_features, weight, scale, writer.parameter(layer.bias)[0])
    return True


def _planes(node: Node) -> tuple[int, int, int]:
    """Channels, height and width of what a node gives; of one dimension, a height of 1."""
    shape = shape_of(node)
    return (shape[0], 1, shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])


def _windows(layer: Any, dimensions: int, *names: str) -> list[int]:
    """The settings of windows, rows before columns; in one dimension, of windows of one row."""
    found: list[int] = []
    for name in names:
        value = getattr(layer, name)
        along = (value,) * dimensions if isinstance(value, int) else tuple(value)
        found += along if dimensions == 2 else (0 if name == "padding" else 1, along[0])
    return found


def _convolution(writer: Writer, node: Node, layer: Any) -> bool:
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return False
    settings = _windows(layer, layer.weight.ndim - 2, "kernel_size", "stride", "padding", "dilation")
    weight, scale = writer.parameter(layer.weight, matrix=True)
    sizes = (*_planes(node.args[0]), *_planes(node))
    writer.macs += sizes[4] * sizes[5] * layer.weight.numel()
    writer.call(node, "convolution", *sizes, *settings, layer.groups, weight, scale, writer.parameter(layer.bias)[0])
    return True


def _pool(name: str, dimensions: int, *settings: str) -> Any:
    def operation(writer: Writer, node: Node, layer: Any) -> bool:
        if layer.ceil_mode or getattr(layer, "return_indices", False) or not getattr(layer, "count_include_pad", True):
            return False
        if getattr(layer, "divisor_override", None):
            return False
        sizes = (*_planes(node.args[0]), *_planes(node)[1:])
        writer.call(node, name, *sizes, *_windows(layer, dimensions, "kernel_size", "stride", "padding", *settings))
        return True

    return operation


def _mean(writer: Writer, node: Node, layer: Any) -> bool:
    """Of the last dimensions, whichever they are."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if layer is not None:
        kept = 1
        if any(size != 1 for size in after[kept:]):
            return False
    else:
        stated = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = sorted(dim % (len(before) + 1) for dim in ([stated] if isinstance(stated, int) else stated or [0]))
        kept = len(before) - len(dims)
        if dims != list(range(kept + 1, len(before) + 1)):
            return False
    writer.call(node, "mean", math.prod(before[:kept]), math.prod(before[kept:]))
    return True


def _batch_norm(writer: Writer, node: Node, layer: Any) -> bool:
    if layer.running_mean is None:
        return False
    factor = (layer.running_var + layer.eps).rsqrt() * (1 if layer.weight is None else layer.weight)
    shift = (0 if layer.bias is None else layer.bias) - layer.running_mean * factor
    shape = shape_of(node)
    writer.kept += (factor, shift)
    writer.call(node, "channels", shape[0], math.prod(shape[1:]), writer.parameter(factor)[0], writer.parameter(shift)[0])
    return True


def _layer_norm(writer: Writer, node: Node, layer: Any) -> bool:
    width = math.prod(layer.normalized_shape)
    names = (writer.parameter(layer.weight)[0], writer.parameter(layer.bias)[0])
    writer.call(node, "layer_norm", math.prod(shape_of(node)) // width, width, f"{layer.eps:.9g}f", *names)
    return True


def _softmax(writer: Writer, node: Node, layer: Any) -> bool:
    shape, dim = shape_of(node), layer.dim if layer is not None else node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if dim not in (-1, len(shape)):
        return False
    writer.call(node, "softmax", math.prod(shape[:-1]), shape[-1])
    return True


def _embedding(writer: Writer, node: Node, layer: Any) -> bool:
    if layer.max_norm is not None:
        return False
    count = math.prod(shape_of(node)) // layer.embedding_dim
    writer.call(node, "embedding", count, layer.num_embeddings, layer.embedding_dim, *writer.parameter(layer.weight, matrix=True))
    return True


def _recurrent(name: str, scratch: int) -> Any:
    def operation(writer: Writer, node: Node, layer: Any) -> bool:
        if layer.bidirectional or getattr(layer, "proj_size", 0) or len(node.args) > 1 or getattr(layer, "nonlinearity", "tanh") != "tanh":
            return False
        if not layer.batch_first:
            return False  # the first dimension, which is the batch here, would be time
        steps = shape_of(node)[0]
        for number in range(layer.num_layers):
            inputs = layer.input_size if number == 0 else layer.hidden_size
            arguments: list[str] = []
            for which in ("ih", "hh"):
                matrix = getattr(layer, f"weight_{which}_l{number}")
                arguments += writer.parameter(matrix, matrix=True)
                arguments.append(writer.parameter(getattr(layer, f"bias_{which}_l{number}") if layer.bias else None)[0])
                writer.macs += steps * matrix.numel()
            before = writer.values[node] if number else writer.read(node)
            writer.call(node, name, steps, inputs, layer.hidden_size, *arguments, scratch=scratch * layer.hidden_size)
            writer.calls[-1].reads["x"] = before
        return True

    return operation


def _item(writer: Writer, node: Node, layer: Any) -> bool:
    """Of a recurrent layer's results the first; of a tensor a slice."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.op == "call_module" and isinstance(writer.layers[str(source.target)], nn.RNNBase):
        writer.values[node] = writer.values[source]
        return bool(node.args[1] == 0)
    return _view(writer, node, layer)


def _strides(sizes: Sequence[int]) -> list[int]:
    return list(torch.empty(tuple(sizes), device="meta").stride())


def _rearranged(sizes: Sequence[int], start: int, steps: Sequence[int], begin: int, strides: Sequence[int], source: str = "x") -> str:
    """A call that moves an array from one layout to another."""
    fill = 4 - len(sizes)
    lists = [
        f"(const int[]){{{{{', '.join(map(str, [*[one] * fill, *values]))}}}}}" for one, values in ((1, sizes), (0, steps), (0, strides))
    ]
    return f"rearrange({{{source}}} + {start}, {{out}} + {begin}, {', '.join(lists)});"


def _view(writer: Writer, node: Node, layer: Any) -> bool:
    """What looks at the same values in another order: torch itself says in which, on numbered places."""
    source, *others = node.args
    assert isinstance(source, fx.Node)
    shape = shape_of(node)
    if len(shape) > 4 or any(isinstance(arg, fx.Node) for arg in others):
        return False
    places = torch.arange(math.prod(shape_of(source))).reshape(1, *shape_of(source))
    seen = (
        getattr(places, node.target)(*others, **node.kwargs)
        if isinstance(node.target, str)
        else node.target(places, *others, **node.kwargs)
    )
    if seen.shape[0] != 1 or seen.untyped_storage().data_ptr() != places.untyped_storage().data_ptr():
        return False
    _moved(writer, node, [_rearranged(shape, seen.storage_offset(), seen.stride()[1:], 0, _strides(shape))], {"x": writer.values[source]})
    return True


def _pad(writer: Writer, node: Node, layer: Any) -> bool:
    """By one value all around."""
    stated = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
    before, shape = shape_of(node.args[0]), shape_of(node)
    edges = list(stated["pad"])
    if len(shape) > 4 or stated.get("mode", "constant") != "constant" or min(edges) < 0 or len(edges) > 2 * len(shape):
        return False
    strides = _strides(shape)
    begin = sum(low * stride for low, stride in zip(edges[::2], reversed(strides), strict=False))
    fill = f"for (int i = 0; i < {math.prod(shape)}; i++) ({{out}})[i] = {number_in_c(stated.get('value') or 0)};"
    _moved(writer, node, [fill, _rearranged(before, 0, _strides(before), begin, strides)], {"x": writer.read(node)})
    return True


def _concatenate(writer: Writer, node: Node, layer: Any) -> bool:
    parts, shape = node.args[0], shape_of(node)
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0) % (len(shape) + 1) - 1
    if dim < 0 or len(shape) > 4 or not all(isinstance(part, fx.Node) and part in writer.values for part in parts):
        return False
    strides, begin, calls, reads = _strides(shape), 0, [], {}
    for number, part in enumerate(parts):
        sizes = shape_of(part)
        calls.append(_rearranged(sizes, 0, _strides(sizes), begin, strides, f"x{number}"))
        reads[f"x{number}"] = writer.values[part]
        begin += sizes[dim] * strides[dim]
    _moved(writer, node, calls, reads)
    return True


def _moved(writer: Writer, node: Node, calls: list[str], reads: dict[str, Value]) -> None:
    writer.kernel("rearrange")
    writer.values[node] = Value(math.prod(shape_of(node)))
    writer.calls.append(Call("\n    ".join(calls), reads, writer.values[node]))


def _binary(sign: str) -> Any:
    def operation(writer: Writer, node: Node, layer: Any) -> bool:
        one, two = node.args[:2]
        if "alpha" in node.kwargs:
            return False
        tensors = [arg for arg in (one, two) if isinstance(arg, fx.Node) and arg in writer.values]
        if any(shape_of(arg) != shape_of(node) for arg in tensors) or any(
            isinstance(arg, fx.Node) and arg not in writer.values for arg in (one, two)
        ):
            return False
        texts, reads = [], {}
        for name, arg in zip("xz", (one, two), strict=True):
            if isinstance(arg, fx.Node):
                reads[name] = writer.values[arg]
                texts.append(f"({{{name}}})[i]")
            else:
                texts.append(number_in_c(arg))
        if "x" not in reads:
            reads = {"x": reads["z"]}
            texts[1] = "({x})[i]"
        writer.combined(node, f" {sign} ".join(texts), reads)
        return True

    return operation


OPERATIONS: dict[Any, Callable[[Writer, fx.Node, Any], bool]] = {
    nn.Linear: _linear, nn.Conv1d: _convolution, nn.Conv2d: _convolution, nn.Embedding: _embedding, nn.LayerNorm: _layer_norm,
    nn.BatchNorm1d: _batch_norm, nn.BatchNorm2d: _batch_norm, nn.Softmax: _softmax, F.softmax: _softmax, torch.softmax: _softmax,
    nn.LSTM: _recurrent("lstm", 10), nn.GRU: _recurrent("gru", 7), nn.RNN: _recurrent("rnn_tanh", 3),
    nn.MaxPool1d: _pool("pool_largest", 1, "dilation"), nn.MaxPool2d: _pool("pool_largest", 2, "dilation"),
    nn.AvgPool1d: _pool("pool_mean", 1), nn.AvgPool2d: _pool("pool_mean", 2),
    nn.AdaptiveAvgPool1d: _mean, nn.AdaptiveAvgPool2d: _mean, "mean": _mean, torch.mean: _mean,
    operator.add: _binary("+"), torch.add: _binary("+"), "add": _binary("+"), operator.iadd: _binary("+"),
    operator.sub: _binary("-"), torch.sub: _binary("-"), operator.mul: _binary("*"), torch.mul: _binary("*"), "mul": _binary("*"),
    operator.getitem: _item, "transpose": _view, "permute": _view, torch.transpose: _view, torch.permute: _view,
    F.pad: _pad, torch.cat: _concatenate,
}  # fmt: skip
