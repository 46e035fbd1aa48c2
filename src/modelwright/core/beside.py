"""Low-rank updates that train beside frozen matrices of a model, whose names and layers stay as they are.

For methods that train updates and put them into the weights themselves; adapters that are kept are those of peft.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site

from .errors import SiteError

NAME = "beside"  # of the part that a layer bears


class Update(nn.Module):
    """What is added to a layer's outputs: scale · B A x, with `up` B [out, rank] at zero first and `down` A [rank, in]."""

    def __init__(self, rows: int, columns: int, rank: int, scale: float, dropout: float, device: torch.device):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(rows, rank, device=device))
        self.down = nn.Parameter(torch.empty(rank, columns).uniform_(-(columns**-0.5), columns**-0.5).to(device))
        self.scale, self.dropout = scale, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (self.dropout(x) @ self.down.to(x.dtype).T @ self.up.to(x.dtype).T)

    def change(self) -> Tensor:
        """scale · B A [out, in]."""
        return self.scale * (self.up @ self.down)


class Beside:
    """Updates beside matrices of a module, all of whose own parameters are frozen until `remove`.

    updates: by the sites' names. The layers bear them as parts, so that they train, and are in checkpoints.
    """

    def __init__(self, module: nn.Module, sites: Iterable[Site], *, rank: int, alpha: float, dropout: float, seed: int):
        """Attach to those of the sites that are linear layers, with random numbers from the seed.

        Raises:
            SiteError: none of them is.
        """
        parameters = dict(module.named_parameters())
        layers = {site: module.get_submodule(site.module) for site in sites if not site.stack}
        self.layers = {site: layer for site, layer in layers.items() if isinstance(layer, nn.Linear) or site.transposed}
        if not self.layers:
            raise SiteError("The model has no linear layers in its blocks, beside which updates could train.")
        self._trained = [value for value in parameters.values() if value.requires_grad]
        for value in self._trained:
            value.requires_grad_(False)
        self.updates: dict[str, Update] = {}
        self._handles = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for site, layer in self.layers.items():
                weight = parameters[site.name]
                rows, columns = reversed(weight.shape) if site.transposed else weight.shape
                update = self.updates[site.name] = Update(rows, columns, rank, alpha / rank, dropout, weight.device)
                layer.add_module(NAME, update.train(layer.training))
                self._handles.append(layer.register_forward_hook(_add))

    @torch.no_grad()
    def fold(self) -> None:
        """Put the updates into the weights."""
        for site, layer in self.layers.items():
            change = self.updates[site.name].change()
            layer.get_parameter("weight").add_(change.T if site.transposed else change)

    def remove(self) -> None:
        """Take the updates away, and let train what trained before; a second time does nothing."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers.values():
            layer._modules.pop(NAME, None)
        for value in self._trained:
            value.requires_grad_(True)
        self._handles, self._trained = [], []


def _add(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return out + getattr(layer, NAME)(args[0])
