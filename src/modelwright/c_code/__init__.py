"""A small network as C that needs nothing but a compiler: for microcontrollers.

    import modelwright as mw

    mw.export_c(network, example=torch.zeros(1, 3, 32, 32), folder="network/")

Three files: `parameters.h` with constant arrays, `network.h` with one function, and `network.c`, C99 without heap: what lies
between layers has its place in one static array, which values take over from one another as they come and go. Weights
are float32, or int8 with a scale for each output; sums are float32.

Aguasvivas Manzano et al. 2019, arXiv:1911.03848 (nn4mc), whose generated network is the idea, in torch's order of weights and gates.
Differs: memory is static and not from the heap; any graph of the known operations, not a chain alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from modelwright.blocks._stored import Stored
from modelwright.core.errors import ModelError, SettingError
from modelwright.core.files import whole_folder, write_text

from .writer import Writer


@dataclass(frozen=True)
class Exported:
    """What was written, and what it takes."""

    folder: Path
    flash: int  # bytes of constants
    ram: int  # bytes of static memory, beside the input and the output
    macs: int  # multiplications with weights, for one input


def export_c(
    module: nn.Module, example: Tensor, folder: str | Path, *, weights: Literal["float32", "int8"] = "float32", overwrite: bool = False
) -> Exported:
    """Write a network as C.

    module: of layers and operations that are known here: linear, convolution, LSTM, GRU, tanh RNN, embedding, norms, pooling, softmax,
    activations, sums and products, slices, transposition, padding, concatenation. example: one input with a batch of 1, of any values:
    the C code takes inputs of its shape, as floats in torch's order. weights: how matrices and kernels are stored.

    Raises ModelError, before anything is written, naming every operation that is not known, SettingError for an unfit example.
    """
    if weights not in ("float32", "int8"):
        raise SettingError(f"weights are float32 or int8; got {weights!r}.")
    if not isinstance(example, Tensor) or not example.ndim or len(example) != 1:
        raise SettingError(
            f"example is one input with a batch of 1; got {getattr(example, 'shape', example)}. Add or cut the first dimension."
        )
    writer = Writer(_traced(_plain(module), example), weights)
    with torch.no_grad():
        writer.write()
    out = Path(folder)
    with whole_folder(out, overwrite=overwrite) as beside:
        for name, template, values in writer.files():
            write_text(beside / name, jinja2.Template(template, keep_trailing_newline=True, trim_blocks=False).render(values))
    return Exported(out, writer.flash, 4 * writer.arena, writer.macs)


def _plain(module: nn.Module) -> nn.Module:
    """The network as layers that can be followed; raises ModelError, with what to do, where it is of another kind."""
    if not isinstance(module, nn.Module):
        raise ModelError(f"export_c writes a torch module; got a {type(module).__name__}. Of a model of Modelwright, give its .module.")
    if hasattr(module, "config"):
        raise ModelError(f"{type(module).__name__} is a model of transformers, which is not written as C: networks of torch layers are.")
    stored = [name for name, layer in module.named_modules() if isinstance(layer, Stored)]
    if stored:
        kind = type(module.get_submodule(stored[0])).__name__
        raise ModelError(f'{stored[0]} is a {kind}. Give the network before it was stored so; weights="int8" stores whole numbers.')
    return nn.Sequential(module) if type(module).__module__.startswith("torch.nn.") else module


def _traced(module: nn.Module, example: Tensor) -> fx.GraphModule:
    """The module's operations, each with the shape of what it gives."""
    modes = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            module(example)
    except Exception as error:  # whatever its layers say of the example
        _set_modes(modes)
        raise SettingError(f"{type(module).__name__} takes no input of shape {list(example.shape)}: {error}") from error
    try:
        graph = fx.symbolic_trace(module)
        with torch.no_grad():
            ShapeProp(graph).propagate(example)
    except Exception as error:  # whatever a module's own code does under tracing
        raise ModelError(f"{type(module).__name__} cannot be followed operation by operation: {error}") from error
    finally:
        _set_modes(modes)
    return graph


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    """Let each layer train or not, as it did."""
    for layer, training in modes.items():
        layer.training = training
