"""Any module that no family knows: its linears, convolutions and embeddings.

Its units are the channels between convolutions and linears, as far as its graph can be followed (`_channels`). Which
neurons, heads or experts belong together, only a family can say.
"""

from __future__ import annotations

from typing import Any

from ._base import Anatomy, Units


class GenericAnatomy(Anatomy):
    """Roles by the type of each module; the last linear is the head."""

    name = "generic"
    roles = {"linear": "linear", "conv": "conv", "parameter": "parameter"}  # roles that it adds; it uses no patterns
    ties = ()
    why_not = dict.fromkeys(("mlp", "heads", "residual", "experts"), "no family says which slices of their tensors belong together")

    def __init__(self, module: Any = None) -> None:
        self.known: dict[str, tuple[str, int | None]] = {}
        self.stack: str | None = None
        if module is None:
            return
        from torch import nn

        convolutions = (nn.modules.conv._ConvNd,)
        self.stack = _longest_stack(module)
        linears = []
        for path, child in module.named_modules():
            for name, _ in child.named_parameters(recurse=False):
                if isinstance(child, nn.Linear) or type(child).__name__ == "Conv1D":
                    role = "linear"
                    linears.append(path)
                elif isinstance(child, convolutions):
                    role = "conv"
                elif isinstance(child, nn.Embedding):
                    role = "embed"
                elif "norm" in type(child).__name__.lower():
                    role = "norm"
                else:
                    role = "parameter"
                whole = f"{path}.{name}" if path else name
                self.known[whole] = role, self._depth(whole)
        if linears and len({name.rpartition(".")[0] for name, (role, _) in self.known.items() if role != "norm"}) > 1:
            for name in (f"{linears[-1]}.weight", f"{linears[-1]}.bias"):
                if name in self.known and self._depth(name) is None:
                    self.known[name] = "head", None

    def _depth(self, name: str) -> int | None:
        if self.stack is None or not name.startswith(self.stack + "."):
            return None
        return int(name[len(self.stack) + 1 :].split(".")[0])

    def role(self, name: str) -> tuple[str, int | None] | None:
        """The role and depth of a parameter of the module."""
        return self.known.get(name)

    def _channels(self, module: Any) -> list[Units]:
        from ._channels import channels_of

        return channels_of(module, "channels")

    def _stages(self, module: Any) -> list[Units]:
        from ._channels import channels_of

        return channels_of(module, "stages")

    def stack_paths(self, module: Any) -> list[str]:
        """The list of blocks, when there is one."""
        return [] if self.stack is None else [self.stack]


def _longest_stack(module: Any) -> str | None:
    """Path of the longest list of two or more blocks of one type; the first of equals.

    A `Sequential` runs in order; of a `ModuleList` that is assumed, and whoever runs it block by block checks it.
    Lists of experts or of heads are taken for what they are.
    """
    from torch import nn

    best, length = None, 1
    for path, child in module.named_modules():
        if not path or not isinstance(child, (nn.Sequential, nn.ModuleList)):
            continue
        alike = len({type(block) for block in child}) == 1 and any(True for _ in child[0].children())
        beside = isinstance(child, nn.ModuleList) and path.rpartition(".")[2] in ("experts", "heads", "branches")
        if alike and not beside and len(child) > length:
            best, length = path, len(child)
    return best
