"""mergekit's methods and parameters as ours: which class, which settings."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from modelwright.core import find
from modelwright.core.errors import MethodError, nearest
from modelwright.methods.merge._mechanism import PointWise

REQUIRED: Any = object()


@dataclass(frozen=True)
class Entry:
    """A method of mergekit.

    name: of our method. base: whether it is "needed", "used" when given, or "unused". donors: how many it takes, the
    base not counted unless it is unused. each: parameter of every model -> (our setting with a value for each, its
    default). once: parameter of the tensor -> (our setting, its default). fixed: settings that it always has.
    without: parameter that changes nothing here -> why.
    """

    name: str
    base: str = "needed"
    donors: tuple[int, int | None] = (1, None)
    each: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    once: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        return [*self.each, *self.once]


def vectors(name: str, each: Mapping[str, tuple[str, Any]] | None = None, *, normalize: bool = False, **once: tuple[str, Any]) -> Entry:
    """A method that adds task vectors: consensus follows from its name."""
    shared = {"normalize": ("normalize", normalize), "lambda": ("scale", 1.0)}
    fixed = {"consensus": True} if name.endswith("_ties") else {"consensus": False} if name.endswith("_linear") else {}
    ours = name.removesuffix("_ties").removesuffix("_linear")
    if name == "della":
        fixed = {"consensus": True}
    return Entry(f"merge.{ours}", each={**WEIGHT, **(each or {})}, once={**shared, **once}, fixed=fixed)


WEIGHT = {"weight": ("weights", REQUIRED)}
DENSITY = {"density": ("keep_each", 1.0)}
GAMMA = {"gamma": ("top_each", 0.01)}
EPSILON = {"epsilon": ("spread_each", 0.15)}
SHARES = {"density", "gamma", "epsilon"}
METHODS: dict[str, Entry] = {
    "linear": Entry("merge.linear", "unused", each=WEIGHT, once={"normalize": ("normalize", True)}),
    "task_arithmetic": replace(vectors("task_arithmetic"), without={"rescale": "nothing is dropped, so there is nothing to make up for"}),
    "ties": vectors("ties", DENSITY, normalize=True, rescale=("rescale", False)),
    "dare_linear": vectors("dare_linear", DENSITY, rescale=("rescale", True)),
    "dare_ties": vectors("dare_ties", DENSITY, rescale=("rescale", True)),
    "della": vectors("della", {**DENSITY, **EPSILON}, normalize=True, rescale=("rescale", True)),
    "della_linear": vectors("della_linear", {**DENSITY, **EPSILON}, rescale=("rescale", True)),
    "breadcrumbs": vectors("breadcrumbs", {**DENSITY, **GAMMA}, rescale=("rescale", False)),
    "breadcrumbs_ties": vectors("breadcrumbs_ties", {**DENSITY, **GAMMA}, rescale=("rescale", False)),
    "passthrough": Entry("merge.linear", "unused", (1, 1), each={"scale": ("weights", 1.0)}, fixed={"normalize": False}),
    "slerp": Entry("merge.slerp", donors=(1, 1), once={"t": ("t", REQUIRED)}),
    "nuslerp": Entry(
        "merge.nuslerp", "used", (2, 2), each=WEIGHT, once={"nuslerp_flatten": ("flatten", True), "nuslerp_row_wise": ("columns", False)}
    ),
    "multislerp": Entry(
        "merge.multislerp", "used", (1, None), each=WEIGHT, once={"normalize_weights": ("normalize", True)},
        without={"eps": "vectors are divided by their lengths as they are, and those of length 0 stay 0"},
    ),
    "karcher": Entry("merge.karcher", "unused", (2, None), once={"max_iter": ("iterations", 10), "tol": ("tolerance", 1e-5)}),
    "model_stock": Entry("merge.model_stock", donors=(2, None), once={"filter_wise": ("by_row", False)}),
    "sce": Entry("merge.sce", once={"select_topk": ("keep", 1.0)}),
    "nearswap": Entry("merge.nearswap", donors=(1, 1), once={"t": ("t", REQUIRED)}),
    "arcee_fusion": Entry("merge.arcee_fusion", donors=(1, 1)),
    "ram": Entry("merge.ram", once={"epsilon": ("threshold", 1e-5)}),
    "ramplus_tl": Entry(
        "merge.ram", once={"epsilon": ("threshold", 1e-5), "r": ("boost", 0.1), "alpha": ("most", 0.2)}, fixed={"scope": "tensor"}
    ),
}  # fmt: skip
PLAIN = {"int8_mask", "lazy_unpickle"}  # change memory or speed alone
EVERY = {name for entry in METHODS.values() for name in (*entry.parameters, *entry.without)} | PLAIN


def entry_of(name: str) -> Entry:
    """What stands behind a `merge_method`.

    Raises:
        MethodError: unknown.
    """
    if name not in METHODS:
        raise MethodError(f"merge_method {name!r} is unknown.{nearest(name, METHODS)} Known are {', '.join(METHODS)}.")
    return METHODS[name]


def truth(name: str, value: Any) -> bool:
    """A parameter that is on or off."""
    if isinstance(value, str):
        raise MethodError(f"{name} must be true or false; got {value!r}.")
    return bool(value)


def settings(method: str, each: Mapping[str, list[Any]], once: Mapping[str, Any], *, based: bool, as_mergekit: bool) -> dict[str, Any]:
    """Our settings for a tensor from mergekit's resolved parameters; `based`: whether the method is given a base.

    Raises:
        MethodError: a parameter has a value that our method has nothing for.
    """
    entry = METHODS[method]
    for theirs in SHARES & set(each):
        if any(isinstance(value, str) or not 0 <= value <= 1 for value in each[theirs]):
            raise MethodError(f"{theirs} must be a number from 0 to 1; got {', '.join(map(str, each[theirs]))}.")
    found: dict[str, Any] = {ours: tuple(each[theirs]) for theirs, (ours, _) in entry.each.items()}
    for theirs, (ours, _) in entry.once.items():
        value = once[theirs]
        if ours in ("normalize", "rescale", "by_row", "flatten", "columns"):
            value = truth(theirs, value)
        found[ours] = value
    if "rescale" in found:
        published = "inverse" if entry.name == "merge.dare" and not as_mergekit else "l1"
        found["rescale"] = published if found["rescale"] else "none"
    if method == "nuslerp":
        flatten, columns = found.pop("flatten"), found.pop("columns")
        found |= {"by_row": not flatten and not columns, "by_column": not flatten and columns}
    if method in ("nuslerp", "multislerp"):
        found["from_base"] = based
    if method == "multislerp" and len(found["weights"]) == 1:
        found["weights"] = (1.0,)  # one model comes back as it is, whatever its weight
    return {**entry.fixed, **found}


@functools.lru_cache(maxsize=4096)
def made(name: str, stated: tuple[tuple[str, Any], ...]) -> PointWise:
    """Our method with these settings."""
    return ours(name).build(dict(stated))


def ours(name: str) -> type[PointWise]:
    """Our method of this name."""
    cls = find.find(name)
    assert issubclass(cls, PointWise), cls
    return cls
