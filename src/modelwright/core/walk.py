"""The drivers: they own loops, streaming, hooks, seeds, progress and saving, so that a method is only its verb.

`apply` takes a method to a model. What is in memory is changed there; what lies on disk streams from its folder to
a new one where the method's level allows it: one tensor at a time, or one block with the activations that enter it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site, anatomy_of, matches, removal
from modelwright.anatomy import _folding as folding
from modelwright.anatomy import reorder as reordering
from modelwright.blocks import experts
from modelwright.blocks._part import transposed
from modelwright.blocks._stored import Stored
from modelwright.maths.slices import Joined, Sliced

from . import adapters, find, kinds, sharing, training
from . import data as texts
from .errors import DataError, LayoutError, MethodError, ModelError, PlanError, SiteError, refuse
from .files import alone, fresh_folder, place_of, refuse_existing, refuse_inputs
from .given import Batch, Given
from .gradients import mean_gradients
from .loading import PACKED
from .method import (
    AdapterMethod,
    BlockMethod,
    Chooses,
    LayerAdapter,
    LayerMethod,
    Method,
    ModelMethod,
    Place,
    Placed,
    SiteMethod,
    TensorMethod,
    TrainMethod,
)
from .model import Model, check_readable, emptied, open, put, quiet, tensor_of, unwrapped, weight_of, why_not_stored
from .passage import Resident, gather, last_real, real
from .progress import bar, track
from .settings import ByRole
from .statistics import Statistics

Chosen = list[tuple[Site, Any]]  # with the method's settings for that site
CHARACTERS = 16  # of a text read beside the data, for each token that is asked for
Result = Tensor | Sliced | Stored


def apply(
    target: str | Path | Model | nn.Module,
    method: Method | Sequence[Method],
    *,
    data: Any = None,
    donors: Any = (),
    base: Any = None,
    teacher: Any = None,
    seed: int = 0,
    samples: int = 128,
    length: int = 512,
    save: str | Path | None = None,
    overwrite: bool = False,
) -> Any:
    """Apply one method, or several in order.

    target: a folder, a hub name or "starter"; a `Model`; a transformers model or any `nn.Module`. A `Model` or module
        in memory is changed in place and returned.
    data: text for methods that need it (see `core.data.read`), or a list of batches of model inputs.
    donors, base, teacher: models, for methods that need them; donors are one model or a list.
    save: a folder to write. With it, a model on disk streams there and is never held whole, if the method allows.

    Returns the changed model: a `Model`, or the module if a module came in.
    Raises a subclass of ModelwrightError, before work starts, for whatever is missing or cannot be done.
    """
    model = open(target)
    given = Given(
        data=data if data is None or isinstance(data, (list, tuple)) and data and isinstance(data[0], dict) else texts.read(data),
        donors=[open(donor) for donor in ([donors] if isinstance(donors, (str, Path, Model, nn.Module)) else donors)],
        base=None if base is None else open(base),
        teacher=None if teacher is None else open(teacher),
        seed=seed, samples=samples, length=length,
    )  # fmt: skip
    methods = [method] if isinstance(method, (Method, str)) else list(method)
    for each in methods:
        if isinstance(each, str):
            cls = find.find(each)
            raise MethodError(
                f"apply takes methods, not their names: from {cls.__module__} import {cls.__name__}. mw.run takes a recipe with names."
            )
        if not isinstance(each, Method):
            raise MethodError(f"apply takes methods, such as Wanda(sparsity=0.5); got {each!r}. A recipe names methods by text: see run.")
    for checked in [model, *given.donors] if given.donors else []:
        check_readable(checked)
    for number, step in enumerate(methods):
        refuse(SiteError, strange_patterns(step))
        given.refuse_lacking(step)
        refuse(PlanError, doubled(step, None if number else model, given.donors))
    if save is not None:
        refuse_inputs(save, [folder for each in given.models(model) for folder in each.sources])
        refuse_existing(save, overwrite=overwrite)
    if save is not None and (len(methods) == 1 or model.checkpoint is not None):
        final = place_of(save)
        with alone(final) as steps, fresh_folder(steps / "between") as between:
            for number, step in enumerate(methods[:-1]):
                model = write(model, step, given, between / str(number))
            return write(model, methods[-1], given, final, overwrite=overwrite)
    for step in methods:
        change(model, step, given)
    if save is not None:
        model.save(save, overwrite=overwrite)
    return model.module if isinstance(target, nn.Module) else model


def write(model: Model, method: Method, given: Given, folder: Path, *, overwrite: bool = False) -> Model:
    """Apply a method and save to `folder`: streaming from disk to disk where that can be, in memory otherwise."""
    from . import stream

    if stream.possible(model, method, given.notes, [*given.donors, *([given.base] if given.base else [])]):
        return stream.write(model, method, given, folder, overwrite=overwrite)
    change(model, method, given).save(folder, overwrite=overwrite)
    return open(folder)


def change(model: Model, method: Method, given: Given) -> Model:
    """Apply a method to a model in memory, in place."""
    given.refuse_lacking(method)
    refuse_marks(model, method, given.donors)
    refuse_strangers(model, method, given)
    if isinstance(method, SiteMethod) and model.loaded:
        check_readable(model)  # or a matrix that is refused would leave those before it changed
    if isinstance(method, ModelMethod) and any(donor.loaded and model.loaded and donor.module is model.module for donor in given.donors):
        raise ModelError(f"{method.name()}: a donor is the model itself, which changes on the way. Open the donor separately.")
    with torch.no_grad() if method.level in ("tensor", "layer", "block") else contextlib.nullcontext():
        if isinstance(method, TensorMethod):
            _change_tensors(model, method, given)
        elif isinstance(method, LayerMethod):
            _change_layers(Resident(model, given.work), method, given)
        elif isinstance(method, BlockMethod):
            drop = _choose_blocks(Resident(model), method, given)
            removal.remove_blocks(model.module, drop)
        elif isinstance(method, AdapterMethod):
            _attach(model, method, given)
        elif isinstance(method, TrainMethod):
            _train(model, method, given)
        else:
            assert isinstance(method, ModelMethod), method
            model = method.model(model, **_given_whole(model, method, given))
    for one in dict.fromkeys(given.models(model)):
        if one.unread:
            lost = f"{len(one.unread)} tensors, first {one.unread[0]}, have no place in a model of its kind, and are left out"
            given.notes.append(f"{one.name}: {lost}")
    record(model, method, given)
    return model


def _given_whole(model: Model, method: ModelMethod, given: Given) -> dict[str, Any]:
    """What a verb that works on whole models asks for; `calibration`: batches for the model; for methods with `texts`, for each donor."""
    extras: dict[str, Callable[[], Any]] = {
        "rng": given.rng,
        "seed": lambda: given.seed,
        "teacher": lambda: given.teacher,
        "base": lambda: given.base,
        "donors": lambda: given.donors,
        "calibration": lambda: _calibration(model, method, given),
        "tokenizer": lambda: model.tokenizer,
        "notes": lambda: given.notes,
        "details": lambda: given.details,
    }
    return {need: extras[need]() for need in method.needs()}


def _calibration(model: Model, method: ModelMethod, given: Given) -> Any:
    if method.reads:
        enough = given.samples * given.length * CHARACTERS  # so that no text is cut into many more tokens than are asked for
        texts_of = [texts.read(getattr(method, name)).thinned(enough) for name in method.reads]
        return [given.batches(model), *(dataclasses.replace(given, data=text).batches(model) for text in texts_of)]
    return given.calibration(method, given.donors) if hasattr(method, "texts") else given.batches(model)


def record(model: Model, method: Method, given: Given) -> None:
    """Write the step into the model's history and set its marks."""
    model.marks, model.changed = (model.marks | method.gained()) - method.lost(), True
    model.rebased |= method.changes_base and "adapters" in model.marks
    step = {"method": method.name(), "settings": method.settings(), "seed": given.seed, "notes": list(given.notes)}
    model.history.append(step | ({"details": list(given.details)} if given.details else {}))


def refuse_marks(model: Model, method: Method, donors: Sequence[Model] = ()) -> None:
    """Raise when the model or a donor cannot take the method in its present form."""
    lacking = method.lacks(model.marks)
    if lacking:
        raise PlanError(
            f"{method.name()} wants a model that is {' and '.join(lacking)}; {model.name} is "
            f"{', '.join(sorted(model.marks)) or 'none of these'}. Put this step before the one that changed that."
        )
    strangers = [donor for donor in donors if method.donors_want - donor.marks]
    if strangers:
        raise PlanError(
            f"{method.name()} wants donors that are {' and '.join(sorted(method.donors_want))}; "
            f"{', '.join(donor.name for donor in strangers)}: {', '.join(sorted(strangers[0].marks)) or 'none of these'}. Name others."
        )


def refuse_strangers(model: Model, method: Method, given: Given) -> None:
    """Raise when donors cannot be merged into the model; what the user should know of them goes to the notes."""
    refuse(PlanError, doubled(method, model, given.donors))
    if "donors" in method.needs():
        given.notes += [f"{method.name()}: {remark}" for remark in method.remarks()]
    if method.alike:
        first, *others = (kinds.Kind.of(one) for one in dict.fromkeys((model, *given.donors, *([given.base] if given.base else []))))
        kinds.refuse_others(first, others)
        given.notes += kinds.differences(first, others)


def doubled(method: Method, model: Model | None, donors: Sequence[Model]) -> list[str]:
    """Sentences on donors that are listed twice, or that are the model itself where it adds nothing; None: not known yet.

    Experts of a mixture may be made of one donor.
    """

    def same(one: Model, two: Model) -> bool:
        places = [[folder.resolve() for folder in each.sources] for each in (one, two)]
        return one is two or bool(places[0]) and places[0] == places[1] and not one.changed and not two.changed

    found = []
    for number, donor in enumerate(donors):
        if method.alike and any(same(donor, other) for other in donors[:number]):
            found.append(f"{method.name()}: {donor.name} is listed more than once. Give it once, with the sum of its weights.")
        if model is not None and method.base_apart and same(donor, model):
            found.append(f"{method.name()}: {donor.name} is the model itself, which has changed nothing. Name the models made from it.")
    return list(dict.fromkeys(found))


# Which sites


def strange_patterns(method: Method) -> list[str]:
    """The words in `where`, `skip` and maps by role that name no part of any model, each with a sentence."""
    found = []
    for name, value in vars(method).items():
        patterns = [key for key in value if key != "*"] if isinstance(value, ByRole) else value if name in ("where", "skip") else None
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            try:
                matches("", None, pattern)
            except SiteError as error:
                found.append(f"{method.name()}: {name}: {error}")
    return found


def choose(module: nn.Module | None, sites: Sequence[Site], method: Chooses, notes: list[str] | None = None) -> Chosen:
    """The sites that `where`, `skip` and settings by role choose, each with the method's settings for it.

    module: where the sites' weights are, whose shapes must suit the method; None for a method that takes any shape.

    Raises:
        SiteError: nothing is chosen, or weights have shapes that the method cannot take.
    """
    every = isinstance(method, SiteMethod) and method.every
    where = method.where or (None if every else method.sites)
    chosen: Chosen = []
    left, unfit, otherwise = [], [], dict[str, list[str]]()
    for site in sites:
        if where and not matches(site, None, where) or method.skip and matches(site, None, method.skip):
            continue
        local = method.at(site.role, site.depth, site.depths) if isinstance(method, Placed) else method
        if local is None:
            left.append(site.module)
            continue
        if module is not None and isinstance(local, Placed) and (why := _unfit(module, site, local)):
            unfit.append(f"{site.name} {why}")
        if module is not None and notes is not None and isinstance(local, Placed) and (place := standing_of(module, site)):
            otherwise.setdefault(local.otherwise(place.shape), []).append(site.module)
        chosen.append((site, local))
    if unfit:
        raise SiteError(f"{method.name()}: {len(unfit)} weights cannot take it: {unfit[0]}.")
    if not chosen:
        roles = ", ".join(sorted({site.role for site in sites})) or "none"
        raise LayoutError(
            f"{method.name()}: where={method.where!r} skip={method.skip!r} chooses no weight. This model has the roles {roles}."
        )
    for pattern in method.where if isinstance(method.where, (list, tuple)) else ():
        if notes is not None and not any(matches(site, None, pattern) for site in sites):
            tied = "; where the head has the embedding's weight, it is `embed`" if matches("head", None, pattern) else ""
            notes.append(f"{method.name()}: {pattern!r} in where chooses no weight of this model{tied}")
    for what, modules in otherwise.items():
        if what and notes is not None:
            notes.append(f"{method.name()}: {len(modules)} weights {what}; first {modules[0]}")
    if left and notes is not None:
        notes.append(f"{method.name()} left {len(left)} weights alone, whose roles its maps do not name; first {left[0]}")
    return chosen


def standing_of(module: nn.Module, site: Site) -> Place | None:
    """Where a weight stands among those that a method works on; None for one that is stored otherwise."""
    weight = weight_of(module, site)
    if weight is None:
        return None
    shape = weight.shape[1:] if site.stack else weight.shape
    return Place(site.role, site.depth, (shape[0], shape[1:].numel()))


def divide(module: nn.Module, chosen: Chosen, method: SiteMethod, surveyed: Any = None) -> dict[Place, dict[str, Any]]:
    """The settings that a method gives each place, with all of them known; of a stack of experts each counts."""
    if type(method).divided is SiteMethod.divided:
        return {}
    places = [place for site, _ in chosen if (place := standing_of(module, site)) for _ in range(site.stack or 1)]
    return method.divided(places, surveyed)


def settled(module: nn.Module, chosen: Chosen, own: dict[Place, dict[str, Any]]) -> Chosen:
    """The sites with the settings of their own."""
    found = []
    for site, local in chosen:
        place = standing_of(module, site) if own else None
        found.append((site, dataclasses.replace(local, **own[place]) if place in own else local))
    return found


def _unfit(module: nn.Module, site: Site, local: Placed) -> str:
    """Why a site's weight cannot take a method, or its result cannot stand in its place; "" if they can."""
    weight = weight_of(module, site)
    if weight is None:
        return ""
    shape = tuple(weight.shape[1:] if site.stack else weight.shape)
    if 0 in shape:
        return f"has the shape {list(shape)}, without an entry. Leave it out with `skip`"
    if isinstance(local, LayerAdapter) and len(shape) > 2 and not local.on_convolutions:
        return "is a convolution's, and the method stands on linear layers alone. Leave it out with `skip`"
    if why := local.unfit(shape):
        return why
    if isinstance(local, SiteMethod) and (len(shape) == 2 or local.whole) and not site.stack and not local.every:
        return why_not_stored(module, site, local.planned(torch.empty(shape, device="meta")))
    return ""


# Tensor level


def everything(module: nn.Module) -> list[Site]:
    """Every float tensor that files hold as a site: norms with their running statistics, biases and embeddings too."""
    anatomy = anatomy_of(module)
    depths = max((site.depths for site in anatomy.sites(module)), default=0)
    return [
        Site(name, name.rpartition(".")[0], *(anatomy.role(name) or ("linear", None)), depths)
        for name, value in kinds.held(module).items()
        if value.is_floating_point()
    ]


def _change_tensors(model: Model, method: TensorMethod, given: Given) -> None:
    if method.every:  # by the files, as long as they are not read
        kinds.refuse_stored([model, *given.donors, *([given.base] if given.base else [])])
    module = unwrapped(model.module)
    donors = [unwrapped(open(donor).module) for donor in (*given.donors, *([given.base] if given.base else []))]
    with contextlib.ExitStack() as stack:
        for each in (module, *donors):
            stack.enter_context(split_experts(each))
        kinds.refuse_other_shapes(
            {name: tuple(value.shape) for name, value in kinds.held(module).items()},
            [(given_.name, {name: tuple(value.shape) for name, value in kinds.held(donor).items()})
             for given_, donor in zip((*given.donors, *([given.base] if given.base else [])), donors, strict=True)],
        )  # fmt: skip
        sites = everything(module) if method.every else anatomy_of(module).sites(module)
        chosen = []
        for site, local in choose(module, sites, method, given.notes):
            if weight_of(module, site) is None:
                given.notes.append(_left_out(method, module, site))
            else:
                chosen.append((site, local))
        chosen = settled(module, chosen, divide(module, chosen, method))

        def read(model: Model, site: Site) -> Tensor:
            found = tensor_of(unwrapped(model.module), site.name)
            return found.T if site.transposed else found

        surveyed = survey(method, given, lambda model: [read(model, site) for site, _ in chosen], model)
        for site, local in track(chosen, method.name()):
            weight = read(model, site)
            result = call(local, weight, site, needed(local, given, site, functools.partial(read, site=site), surveyed))
            put(module, site, result.whole() if isinstance(result, Sliced) else result)


def survey(method: TensorMethod, given: Given, read: Callable[[Model], Sequence[Any]], model: Model) -> Any:
    """What a method that asks for it finds over all tensors; `read` gives those of a model."""
    if not method.surveying():
        return None
    return method.survey(Joined(read(model)), [Joined(read(donor)) for donor in given.donors])


def call(local: Any, weight: Tensor, site: Site, extras: dict[str, Any]) -> Result:
    """Call a tensor verb: on a matrix, on each of a stack of them [n, out, in], or on a convolution as [out, rest] or whole."""
    if local.every or weight.ndim <= 2 or local.whole and not site.stack:
        return local.tensor(weight, **extras)
    if weight.ndim == 3 and site.stack:
        return torch.stack([_dense(local.tensor(part, **extras), site) for part in weight])
    return _dense(local.tensor(weight.flatten(1), **extras), site).view_as(weight)


def _dense(result: Result, site: Site) -> Tensor:
    if not isinstance(result, nn.Module):
        return result if isinstance(result, Tensor) else result.whole()
    raise SiteError(f"{site.name} is not a plain matrix, so it cannot become a stored layer. Leave it out with `skip: {site.role}`.")


def needed(local: Method, given: Given, site: Site, read: Callable[[Model], Tensor], surveyed: Any = None) -> dict[str, Any]:
    """What a tensor verb asks for beside the weight; `read` gives another model's tensor for the same site."""
    extras: dict[str, Any] = {}
    for need in local.needs():
        if need == "rng":
            extras[need] = given.rng(site.place)
        elif need == "donors":
            extras[need] = [read(donor) for donor in given.donors]
        elif need == "base":
            assert given.base is not None
            extras[need] = read(given.base)
        elif need == "survey":
            extras[need] = surveyed
        elif need == "notes":
            extras[need] = given.notes
    return extras


def _left_out(method: Method, module: nn.Module, site: Site) -> str:
    return f"{method.name()} left out {site.module}, which is stored as a {type(module.get_submodule(site.module)).__name__}"


# Experts


@contextlib.contextmanager
def split_experts(module: nn.Module, inside: str = "") -> Iterator[None]:
    """Give every expert matrices of its own; afterwards, put those that are still dense back into their stacks."""
    names = experts.split_experts(module, inside)
    try:
        yield
    finally:
        for name in names:
            layer = module.get_submodule(name)
            assert isinstance(layer, experts.SplitExperts)
            if not any(isinstance(part, Stored) for part in layer.modules()):
                module.set_submodule(name, layer.to_fused())


# Layer and block level


def _change_layers(walk: Resident, method: LayerMethod, given: Given) -> None:
    """Block after block: gather, change, run again with the changed weights, carry on."""
    batches = given.batches(walk.model)
    if not batches:
        raise SiteError(f"{method.name()} was given no calibration batch.")
    if walk.path is None:
        _change_layers_at_once(walk, method, given, batches)
        return
    notes = given.notes
    skeleton = emptied(walk.module)
    experts.split_experts(skeleton)
    every = choose(skeleton, walk.anatomy.sites(skeleton), method)  # refuse now what would choose nothing
    notes += sharing.remarks(method.name(), skeleton, [site.name for site, _ in every])
    own = divide(skeleton, every, method, surveyed := _survey_blocks(walk, method, batches))
    if surveyed is not None:
        notes.append(f"{method.name()} found in the unchanged blocks, first to last: {', '.join(f'{found:.4g}' for found in surveyed)}")
    free = reordering.movable(skeleton) if method.arranges() else {}
    foldable = folding.folds(skeleton) if method.rescales() else []
    if method.rescales() and not foldable:
        notes.append(f"{method.name()}: no inputs of {walk.model.name} can be scaled for free, so they stay as they are")
    walk.enter(batches)
    outside = [site for site in walk.anatomy.sites(walk.module) if site.depth is None and site.role == "head"]
    for depth in track(range(walk.depths), method.name()):
        inside = f"{walk.path}.{depth}"
        walk.load(depth)
        before = len(notes)
        with split_experts(walk.module, inside + "."):
            if not walk.restore(depth, notes):
                sites = [site for site in walk.anatomy.sites(walk.module) if site.depth == depth]
                chosen = dense_sites(walk.module, method, _chosen_or_none(walk.module, sites, method, notes), notes)
                chosen = settled(walk.module, chosen, own)
                groups = walk.anatomy.stages([site.role for site, _ in chosen]) if method.stages else [[s.role for s, _ in chosen]]
                for stage in groups:
                    now = [(site, local) for site, local in chosen if site.role in stage]
                    if now:
                        statistics = gather(
                            walk, [site for site, _ in now], method.gathers, functools.partial(walk.run_block, depth), stop=True
                        )
                        _reorder(walk.module, now, statistics, free, notes)
                        rescale(walk, now, statistics, [fold for fold in foldable if fold.depth == depth], notes)
                        _change_stage(walk.module, method, now, statistics, given)
                walk.keep(depth, notes[before:])
        if depth + 1 < walk.depths or _chosen_or_none(walk.module, outside, method, []):
            walk.states = list(walk.run_block(depth))
        walk.finish(depth)
    chosen = dense_sites(walk.module, method, _chosen_or_none(walk.module, outside, method, notes), notes)
    if chosen:
        walk.load_outside()
        statistics = gather(walk, [site for site, _ in chosen], method.gathers, lambda: _each(walk.tail, batches))
        walk.load_outside()
        _change_stage(walk.module, method, chosen, statistics, given)


def _survey_blocks(walk: Resident, method: LayerMethod, batches: Sequence[Batch]) -> list[Any] | None:
    """What a method that asks for it remembers of each block of the unchanged model, one block in memory at a time."""
    if not method.surveys():
        return None
    walk.enter(batches)
    found = []
    for depth in track(range(walk.depths), f"{method.name()}: survey"):
        walk.load(depth)
        with split_experts(walk.module, f"{walk.path}.{depth}."):
            sites = [site for site in walk.anatomy.sites(walk.module) if site.depth == depth]
            chosen = dense_sites(walk.module, method, _chosen_or_none(walk.module, sites, method, []), [])
            after: list[Tensor] = []
            statistics = gather(walk, [site for site, _ in chosen], method.surveys(), functools.partial(_collected, walk, depth, after))
            seen = []
            for site, _ in chosen:
                refuse_not_finite(site, statistics[site.name], method)
                weight = weight_of(walk.module, site)
                assert weight is not None
                if statistics[site.name].tokens:
                    seen.append((weight.flatten(1), statistics[site.name]))
            found.append(method.survey(seen))
        walk.states = after
        walk.finish(depth)
    return found


def _collected(walk: Resident, depth: int, after: list[Tensor]) -> Iterator[Tensor]:
    """Run a block, and put what leaves it into a list."""
    for out in walk.run_block(depth):
        after.append(out)
        yield out


def _each(run: Callable[[Sequence[Batch]], None], batches: Sequence[Batch]) -> Iterator[None]:
    run(batches)
    yield


def _change_layers_at_once(walk: Resident, method: LayerMethod, given: Given, batches: Sequence[Batch]) -> None:
    """For models without a single row of blocks: all statistics come from the unchanged model, a few sites at a time."""
    given.notes.append(f"{method.name()}: {walk.model.name} has no single row of blocks, so all statistics come from the unchanged model")
    walk.masks = [batch.get("attention_mask") for batch in batches]
    results: list[tuple[Site, Tensor | nn.Module]] = []
    with split_experts(walk.module):
        sites = [site for site in walk.anatomy.sites(walk.module) if site.role not in ("embed", "position")]
        chosen = dense_sites(walk.module, method, choose(walk.module, sites, method, given.notes), given.notes)
        if method.surveys():
            raise LayoutError(
                f"{method.name()} looks at one block after another first, but {walk.model.name} has no single row of them. "
                "Divide its work otherwise, such as with allocate: erk."
            )
        chosen = settled(walk.module, chosen, divide(walk.module, chosen, method))
        for start in track(range(0, len(chosen), 16), method.name()):
            part = chosen[start : start + 16]
            statistics = gather(walk, [site for site, _ in part], method.gathers, lambda: map(walk.forward, batches))
            results += [(site, _verb(walk.module, method, site, local, statistics[site.name], given)) for site, local in part]
        for site, result in results:
            put(walk.module, site, result)


def _chosen_or_none(module: nn.Module, sites: Sequence[Site], method: LayerMethod, notes: list[str]) -> Chosen:
    try:
        return choose(module, sites, method, notes)
    except SiteError:
        return []


def dense_sites(module: nn.Module, method: Method, chosen: Chosen, notes: list[str]) -> Chosen:
    kept = []
    for site, local in chosen:
        if weight_of(module, site) is None:
            notes.append(_left_out(method, module, site))
        else:
            kept.append((site, local))
    return kept


def _reorder(
    module: nn.Module, chosen: Chosen, statistics: dict[str, Statistics], free: dict[str, reordering.Movable], notes: list[str]
) -> None:
    """Let the method order inputs that may trade places for free, with the statistics of them."""
    for site, local in chosen:
        where = free.get(site.name)
        if where is None:
            continue
        parameters = dict(module.named_parameters())
        dense = all(name in parameters for name, _, _ in where.makers)
        order = local.arrange(weight_of(module, site), statistics[site.name], where.inputs) if dense else None
        if order is not None:
            statistics[site.name].reorder(reordering.reorder(module, where, order))
        else:
            why = f"runs of {where.inputs.shape[2]} inputs do not suit it" if dense else "what makes them is stored otherwise by now"
            notes.append(f"{local.name()} left the inputs of {site.module} where they are: {why}")


def rescale(walk: Resident, chosen: Chosen, statistics: dict[str, Statistics], folds: Sequence[folding.Fold], notes: list[str]) -> None:
    """Let the method scale inputs whose makers can be divided by as much; by the statistics of the matrix that saw the most tokens."""
    local = {site.name: method for site, method in chosen}
    for fold in folds:
        own = [site for site in fold.readers if site.name in local]
        if not own:
            continue
        dense, names = dict(walk.module.named_parameters()), [*(site.name for site in fold.readers), *(name for name, _, _ in fold.makers)]
        if lacking := [name for name in names if name not in dense]:
            notes.append(f"{local[own[0].name].name()} left the inputs of {own[0].module} as they are: {lacking[0]} is stored otherwise")
            continue
        seen = max((statistics[site.name] for site in own), key=lambda one: one.tokens)
        if seen.tokens == 0 or not seen.finite():
            continue  # said when it is worked on
        everywhere = list({id(statistics[site.name]): statistics[site.name] for site in own}.values())
        if folding.movable_mean(fold, dense) and (shift := local[own[0].name].recentre(seen)) is not None:
            folding.apply_shift(walk.module, fold, shift)
            for one in everywhere:
                one.recentre(shift)
        readers = [(local[site.name], weight_of(walk.module, site)) for site in own]
        factor = local[own[0].name].rescale(fold.kind, readers, seen, _harm(walk, fold, own))
        if factor is None:
            continue
        folding.apply_fold(walk.module, fold, factor)
        for one in everywhere:
            one.rescale(1 / factor)


def _harm(walk: Resident, fold: folding.Fold, sites: Sequence[Site]) -> Callable[[Sequence[Tensor]], float]:
    """How far the outputs of what matrices are part of are from what they were, with others in their place: a mean square."""
    scope = walk.module.get_submodule(fold.scope)
    calls: list[tuple[Any, Any, Tensor]] = []

    def first(out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    def remember(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        calls.append((args, kwargs, first(out)))

    def harm(weights: Sequence[Tensor]) -> float:
        if not calls:
            handle = scope.register_forward_hook(remember, with_kwargs=True)
            for _ in walk.run_block(fold.depth):
                pass
            handle.remove()
        held = [tensor for site in sites if (tensor := weight_of(walk.module, site)) is not None]
        before = [weight.clone() for weight in held]
        for weight, other in zip(held, weights, strict=True):
            weight.copy_(other)
        total, count = 0.0, 0
        for (args, kwargs, out), mask in zip(calls, walk.masks, strict=True):
            apart = real(first(scope(*args, **kwargs)).float().sub_(out.float()), mask).flatten()
            total, count = total + float(apart @ apart), count + apart.numel()
        for weight, other in zip(held, before, strict=True):
            weight.copy_(other)
        return total / max(count, 1)

    return harm


def _change_stage(module: nn.Module, method: LayerMethod, chosen: Chosen, statistics: dict[str, Statistics], given: Given) -> None:
    for site, local in chosen:
        put(module, site, _verb(module, method, site, local, statistics.pop(site.name), given))


def _verb(module: nn.Module, method: LayerMethod, site: Site, local: Any, statistics: Statistics, given: Given) -> Tensor | nn.Module:
    refuse_not_finite(site, statistics, method)
    if statistics.tokens == 0:
        given.notes.append(f"{method.name()}: {site.module} saw no calibration token; it was worked on as if all inputs were alike")
        statistics = alike(statistics, method.gathers)
    weight = weight_of(module, site)
    assert weight is not None
    extras = {need: given.rng(site.place) if need == "rng" else statistics for need in local.needs()}
    if weight.ndim == 4:
        return _dense(local.layer(weight.flatten(1), **extras), site).view_as(weight)
    return local.layer(weight, **extras)


def refuse_not_finite(site: Site, statistics: Statistics, method: Method) -> None:
    """Raise SiteError where what enters a matrix is NaN or infinite."""
    if not statistics.finite():
        raise SiteError(f"{site.name}: its inputs are NaN or infinite on the calibration data, so {method.name()} cannot weigh it.")


def alike(statistics: Statistics, gathers: Sequence[str]) -> Statistics:
    """The statistics of inputs that all have size one and no correlation: what an expert without tokens is given."""
    plain = Statistics(statistics.inputs, gathers)
    plain.add(torch.eye(statistics.inputs) * statistics.inputs**0.5)
    plain.rescaled = statistics.rescaled
    return plain


def _choose_blocks(walk: Resident, method: BlockMethod, given: Given) -> list[int]:
    """The indices of the blocks to remove."""
    if walk.path is None:
        raise LayoutError(f"{method.name()} removes whole blocks, but {walk.model.name} has no single row of them.")
    removal.remove_blocks(emptied(walk.module), method.guess(walk.depths))  # what cannot be is refused before the text runs
    walk.enter(given.batches(walk.model))
    scores, entered, seen = [], [], last_real if method.last else real
    for depth in track(range(walk.depths), method.name()):
        walk.load(depth)
        entered.append(torch.cat([seen(state, mask) for state, mask in zip(walk.states, walk.masks, strict=True)]))
        walk.states = list(walk.run_block(depth))
        if len(entered) == min(method.span, walk.depths):
            left = torch.cat([seen(state, mask) for state, mask in zip(walk.states, walk.masks, strict=True)])
            scores.append(float(method.block(entered.pop(0), left)))
        walk.finish(depth)
    kept = method.keep(scores)
    gone = [depth for depth in range(walk.depths) if depth not in kept]
    shown = ", ".join(f"{score:.4f}" for score in scores)
    what = "blocks" if method.span == 1 else f"runs of {method.span} blocks"
    given.notes.append(f"{method.name()}: blocks removed {gone} (from 0); scores of all {what} {shown}")
    return gone


# Adapters


def bearing_sites(module: nn.Module, norms: bool = False) -> list[Site]:
    """The weights that an adapter can stand beside: dense matrices, linears that store codes, and with `norms` the weights of norms."""
    anatomy = anatomy_of(module)
    found = anatomy.sites(module)
    depths = max((site.depths for site in found), default=0)
    for name, value in module.named_parameters() if norms else ():
        role, depth = anatomy.role(name) or ("", None)
        if role == "norm" and value.ndim == 1 and name.endswith(".weight"):
            found.append(Site(name, name.removesuffix(".weight"), role, depth, depths))
    for path, layer in module.named_modules():
        if isinstance(layer, Stored) and layer.kind in PACKED and layer.replaces in ("Linear", "Conv1D"):
            name = f"{path}.weight"
            found.append(Site(name, path, *(anatomy.role(name) or ("linear", None)), 0))
    return found


def adapted(module: nn.Module, method: AdapterMethod, notes: list[str] | None = None) -> Any:
    """The peft config with which a method adapts a module."""
    layers, roles = _layers(module, method, notes)
    config = method.adapter(layers, roles)
    if whole := method.whole():
        anatomy = anatomy_of(module)
        names = [name for name, _ in module.named_parameters() if (anatomy.role(name) or ("",))[0] in whole]
        config.modules_to_save = list(dict.fromkeys(name.rpartition(".")[0] for name in names)) or None
    return adapters.beside_stored(config)


def _layers(module: nn.Module, method: AdapterMethod, notes: list[str] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """The method with its settings for each layer that it adapts, and what the layer is, by their paths."""
    chosen = choose(module, bearing_sites(module, method.on_norms), method, notes)
    paths = {site: sharing.layers(module, [site.name]) for site, _ in chosen}
    return {path: local for site, local in chosen for path in paths[site]}, {path: site.role for site, _ in chosen for path in paths[site]}


def _attach(model: Model, method: AdapterMethod, given: Given) -> None:
    import peft

    module: Any = model.module
    config = adapted(module, method, given.notes)
    if rounding := [name for name, layer in module.named_modules() if isinstance(layer, Stored) and layer.rounds_inputs]:
        raise ModelError(f"{method.name()}: {rounding[0]} rounds its inputs, so that no gradient passes it. Round weights alone.")
    layers, _ = _layers(module, method)
    gradients = _layer_gradients(model, method, list(layers), given) if "gradients" in method.needs() else {}
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(given.rng().initial_seed())
        model.module = peft.get_peft_model(module, config)
        if gradients:
            method.attached({path: (local, module.get_submodule(path)) for path, local in layers.items()}, gradients)


def _layer_gradients(model: Model, method: AdapterMethod, paths: Sequence[str], given: Given) -> dict[str, Tensor]:
    """The mean gradient of each layer's weight [out, in, ...] over the calibration text, for a method that will change the weights."""
    module = unwrapped(model.module)
    places: dict[int, list[str]] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(value), []).append(name)
    layers = {path: module.get_submodule(path) for path in paths}
    for path, layer in layers.items():
        names = places.get(id(layer.weight), [])
        if isinstance(layer, nn.Embedding) or len(names) != 1:
            why = f"stands at {' and at '.join(names)}" if len(names) > 1 else "is no matrix that inputs are multiplied with"
            raise SiteError(f"{method.name()} changes the weight of {path}, which {why}. Leave it out with `skip`.")
    batches = given.batches(model)
    if not batches:
        raise DataError(f"{method.name()} was given no calibration batch.")
    found = mean_gradients(model, batches, names={f"{path}.weight" for path in paths})
    gradients = {path: found[f"{path}.weight"].T if transposed(layer) else found[f"{path}.weight"] for path, layer in layers.items()}
    if wrong := [path for path, gradient in gradients.items() if not gradient.isfinite().all()]:
        raise ModelError(f"{method.name()}: the gradient of {wrong[0]} is not finite. Look for NaN in it, or use a wider dtype.")
    return gradients


# Training


def _train(model: Model, method: TrainMethod, given: Given) -> None:
    shared = {name.name for name in dataclasses.fields(training.Training)} - {"seed", "length"}
    settings = training.Training(
        **{name: getattr(method, name) for name in shared if hasattr(method, name)},
        seed=given.seed, length=texts.within(model.config, method.length),
    )  # fmt: skip
    extras: dict[str, Any] = {}
    if "teacher" in method.needs():
        assert given.teacher is not None
        extras["teacher"] = unwrapped(given.teacher.module).eval()
        if extras["teacher"] is unwrapped(model.module):
            raise PlanError(f"{method.name()}: the teacher is the model itself. Open the teacher separately.")
    if (step := method.first()) is not None:
        assert isinstance(step, TensorMethod), step
        with torch.no_grad():
            _change_tensors(model, step, given)
    with bar(method.name(), settings.steps) as tick:
        training.train(
            model.module,
            given.ids(model),
            settings,
            lambda module, ids, mask: method.loss(module, ids, mask, **extras),
            keep_zeros=True,
            course=_course(model.module, method, settings, given.notes),
            folder=given.work,
            report=lambda step, total, parts: tick(note="  ".join(f"{name} {value:.4f}" for name, value in parts.items())),
        )
    model.module.eval()


def _course(module: nn.Module, method: TrainMethod, settings: training.Training, notes: list[str]) -> training.Course | None:
    """What happens in the course of a run: what the method says, and what the adapters on the model do."""
    own = method.course(unwrapped(module), settings, notes)
    if not hasattr(module, "peft_config"):
        return own
    from .tuners import course_of

    of_adapters = course_of(module, settings.steps, settings.seed)
    if of_adapters is None:
        return own
    return training.Together([own or training.Zeros(module.parameters()), of_adapters])
