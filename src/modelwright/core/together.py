"""Walk through several models of one architecture at once, each on text of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from modelwright.anatomy import Site
from modelwright.maths.task_vectors import average

from . import kinds
from .errors import LayoutError, SiteError
from .given import Batch
from .model import Model, unwrapped, weight_of
from .passage import Resident, gather
from .progress import track
from .statistics import Statistics
from .walk import split_experts

ROLES = ("attn", "mlp", "experts", "linear")  # of the matrices that are walked


class Shared(NamedTuple):
    """Matrices that are given the same inputs in every donor, such as those of queries, keys and values."""

    sites: list[Site]
    weights: list[list[Tensor]]  # of each site [out, in], one for each donor
    statistics: list[Statistics]  # of the inputs, one for each donor


def same_tensors(model: Model, donors: Sequence[Model]) -> None:
    """Raise ModelError unless all models are dense and have the same tensors in the same shapes."""
    kinds.refuse_stored([model, *donors])

    def shapes(one: Model) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in unwrapped(one.module).named_parameters()}

    kinds.refuse_other_shapes(shapes(model), [(donor.name, shapes(donor)) for donor in donors])


def set_average(model: Model, donors: Sequence[Model], weights: Sequence[float]) -> None:
    """Make every float parameter of the model the weighted mean of the donors'."""
    sources = [dict(unwrapped(donor.module).named_parameters()) for donor in donors]
    for name, value in unwrapped(model.module).named_parameters():
        if value.is_floating_point():
            value.data.copy_(average([source[name].data for source in sources], weights, dtype=value.dtype).whole())


def inputs_of_layers(
    model: Model, donors: Sequence[Model], calibration: Sequence[Sequence[Batch]], gathers: Sequence[str], *, onward: str
) -> Iterator[Shared]:
    """The matrices of the blocks, first block to last, with the statistics of their inputs in each donor.

    calibration: batches for each donor. onward: what carries the activations from block to block: the "donor" itself,
    or the "model", whose matrices the caller changes before asking for the next; then every donor's block is
    given what leaves the changed ones before it.

    Raises SiteError when inputs are not finite, or when "model" is asked for and there is no single row of blocks.
    """
    own = Resident(model)
    modules = [unwrapped(donor.module) for donor in donors]
    walks = [Resident(model if onward == "model" else donor) for donor in donors]
    for way, batches in zip(walks, calibration, strict=True):
        if not batches:
            raise SiteError(f"{way.model.name} was given no calibration batch.")
        way.masks = [batch.get("attention_mask") for batch in batches]
    if own.path is None:
        if onward == "model":
            raise LayoutError(f"Activations cannot pass through the merged blocks: {model.name} has no single row of them.")
        with _split([own.module, *modules]):
            sites = [site for site in own.anatomy.sites(own.module) if _is_linear(own.module, site)]
            found = [
                gather(way, sites, gathers, functools.partial(map, way.forward, batches))
                for way, batches in zip(walks, calibration, strict=True)
            ]
            yield from _shared(sites, modules, found)
        return
    for way, batches in zip(walks, calibration, strict=True):
        way.enter(batches)
    for depth in track(range(own.depths), "layers"):
        with _split([own.module, *modules], f"{own.path}.{depth}."):
            sites = [site for site in own.anatomy.sites(own.module) if site.depth == depth and _is_linear(own.module, site)]
            blocks = [module.get_submodule(f"{own.path}.{depth}") for module in modules]
            found = []
            for way, block in zip(walks, blocks, strict=True):
                with way.standing({depth: block}):
                    found.append(gather(way, sites, gathers, functools.partial(way.run_block, depth), stop=True))
            yield from _shared(sites, modules, found)
            for way, block in zip(walks, blocks, strict=True):
                if depth + 1 < own.depths:
                    with way.standing({depth: own.stack[depth] if onward == "model" else block}):
                        way.states = list(way.run_block(depth))


def _shared(sites: Sequence[Site], modules: Sequence[nn.Module], found: Sequence[dict[str, Statistics]]) -> Iterator[Shared]:
    groups: dict[tuple[int, ...], list[Site]] = {}
    for site in sites:
        groups.setdefault(tuple(id(one[site.name]) for one in found), []).append(site)
    for group in groups.values():
        statistics = [one[group[0].name] for one in found]
        if not all(one.finite() for one in statistics):
            raise SiteError(f"{group[0].name}: its inputs are NaN or infinite on the calibration data. Give other text, or sound models.")
        yield Shared(group, [[_dense(module, site) for module in modules] for site in group], statistics)


def _dense(module: nn.Module, site: Site) -> Tensor:
    weight = weight_of(module, site)
    assert weight is not None, f"{site.name} is stored otherwise than dense"
    return weight


def _is_linear(module: nn.Module, site: Site) -> bool:
    return site.role.partition(".")[0] in ROLES and type(module.get_submodule(site.module)).__name__ in ("Linear", "Conv1D")


@contextlib.contextmanager
def _split(modules: Sequence[nn.Module], inside: str = "") -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(split_experts(module, inside))
        yield
