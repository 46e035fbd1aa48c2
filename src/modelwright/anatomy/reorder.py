"""Which inputs of a matrix may trade places for free: those that other matrices of its block make, one row for each.

The inputs of the last matrix of an MLP are its neurons: the rows of gate and up go with them. Inside a head, the inputs of
the last matrix of an attention are the rows of v, which all query heads of a key-value head share. All other
inputs are channels of the residual stream, and moving them would cost a step at run time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from modelwright.anatomy import anatomy_of
from modelwright.core.errors import SiteError

from ._base import Site, head_width, input_dim, output_dim


class Movable(NamedTuple):
    """A matrix whose inputs may trade places within runs."""

    site: Site
    inputs: Tensor  # [runs, copies, width]: the places of its inputs; the copies of a run move alike
    makers: tuple[tuple[str, int, Tensor], ...]  # tensor, dimension and places [runs, width] of what makes them

    def moved(self, order: Tensor) -> Tensor:
        """For each input [in] the place that it is taken from, when runs are put in this order [runs, width]."""
        taken = torch.arange(self.inputs.numel())
        taken[self.inputs.flatten()] = self.inputs.gather(2, order.cpu()[:, None].expand_as(self.inputs)).flatten()
        return taken


def movable(module: Any) -> dict[str, Movable]:
    """Every such matrix, by the name of its weight; works on empty modules too. Experts, and what several blocks share, are left out."""
    anatomy = anatomy_of(module)
    several = {name for same in anatomy.tied(module) for name in same}
    shapes = {name: value.shape for name, value in module.named_parameters() if name not in several}
    found = {}

    def rows(site: Site, places: Tensor) -> list[tuple[str, int, Tensor]]:
        bias = f"{site.module}.bias"
        return [(site.name, output_dim(site), places)] + ([(bias, 0, places)] if bias in shapes else [])

    for owner, sites in {**anatomy._owners(module, "mlp."), **anatomy._owners(module, "attn.")}.items():
        roles = {site.role.replace("cross_", ""): site for site in sites}
        last = roles.get("mlp.down") or roles.get("attn.o")
        if last is None or last.name not in shapes or len(shapes[last.name]) != 2:
            continue
        inputs = shapes[last.name][input_dim(last)]
        if last.role == "mlp.down":
            places, width = torch.arange(inputs).view(1, 1, -1), inputs
            made = [(site, torch.arange(start, start + inputs)[None]) for site in sites if site is not last
                    for start in ([part.start for part in site.parts] or [0])]  # fmt: skip
        else:
            try:
                width = head_width(module.get_submodule(owner))
            except SiteError:
                continue
            value = roles.get("attn.v") or roles.get("attn.qkv")
            if value is None:
                continue
            parts = [part for part in value.parts if part.role == "attn.v"]
            every = [torch.arange(part.start, part.stop) for part in parts] or [torch.arange(shapes[value.name][output_dim(value)])]
            made = [(value, torch.cat(every).view(-1, width))]
            places = torch.arange(inputs).view(len(made[0][1]), -1, width)
        if all(site.name in shapes and shapes[site.name][output_dim(site)] > int(rows_.max()) for site, rows_ in made):
            found[last.name] = Movable(last, places, tuple(each for site, rows_ in made for each in rows(site, rows_)))
    return found


def reorder(module: Any, where: Movable, order: Tensor) -> Tensor:
    """Put the inputs of a matrix in this order [runs, width], in place, and what makes them; the outputs stay as they are.

    Returns where each input [in] came from.
    """
    taken = where.moved(order)
    with torch.no_grad():
        weight, dim = module.get_parameter(where.site.name).data, input_dim(where.site)
        weight.copy_(weight.index_select(dim, taken.to(weight.device)))
        for name, dim, places in where.makers:
            made = module.get_parameter(name).data
            old = made.index_select(dim, places.gather(1, order.cpu()).flatten().to(made.device))
            made.index_copy_(dim, places.flatten().to(made.device), old)
    return taken


def turn(module: Any, where: Movable, rotation: Tensor) -> None:
    """Give the inputs of each run the basis of the columns of `rotation` [width, width], orthogonal, and what makes them, in place."""
    with torch.no_grad():
        weight, dim = module.get_parameter(where.site.name).data, input_dim(where.site)
        _turned(weight, dim, where.inputs.reshape(-1, where.inputs.shape[2]), rotation)
        for name, dim, places in where.makers:
            _turned(module.get_parameter(name).data, dim, places, rotation)


def _turned(tensor: Tensor, dim: int, places: Tensor, rotation: Tensor) -> None:
    """Multiply each run of places [runs, width] along a dimension by a matrix [width, width] from the right, in place."""
    flat = places.flatten().to(tensor.device)
    runs = tensor.index_select(dim, flat).movedim(dim, -1).double().unflatten(-1, places.shape)
    new = (runs @ rotation.to(tensor.device)).flatten(-2).movedim(-1, dim)
    tensor.index_copy_(dim, flat, new.to(tensor.dtype))
