"""Merge as a configuration of mergekit says: from disk to disk, tensor by tensor, each a slice at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modelwright.anatomy import Site
from modelwright.core import hub, model, stream
from modelwright.core.errors import Faults, FiniteError, RecipeError, SiteError, WeightsError
from modelwright.core.files import alone, place_of, refuse_existing, refuse_inputs
from modelwright.core.given import Given
from modelwright.core.method import TensorMethod
from modelwright.core.model import RECORD, Model, tokenizer_files
from modelwright.core.progress import track
from modelwright.core.weights import HUB_FILES, Checkpoint, Writer, check_finite
from modelwright.maths.slices import Entries, Sliced, Values, flat
from modelwright.maths.task_vectors import wide
from modelwright.methods.merge.linear import Linear

from . import table, tokens
from .experts import assemble, prepared
from .plan import Input, Made, Piece, Plan, Planner
from .schema import Config, Experts, Reference, read

DROPPED = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
MARKER = ".modelwright-steps"  # in the folder of steps: what lies there may be removed


def merge(
    config: str | Path | Mapping[str, Any],
    *,
    save: str | Path,
    overwrite: bool = False,
    as_mergekit: bool = False,
    seed: int = 0,
) -> Model:
    """Merge models as a configuration of mergekit says.

    config: a YAML file, YAML text, or a mapping. save: the folder to write.
    as_mergekit: compute in the configuration's `dtype`, with the sums of sizes that DARE has there, so that the
        numbers are mergekit's; random masks are our own.
    seed: decides the masks of DARE and DELLA.

    Returns the merged model; what the user should know is in `history[-1]["notes"]`.
    Raises a subclass of ModelwrightError with all that is wrong, before anything is written; but for NaN that always comes out in the
    result, which ends the merge and leaves nothing.
    """
    documents = read(config)
    named = [Path(one.path) for document in documents if isinstance(document, Config) for one in document.references]
    refuse_inputs(save, [folder for folder in named if folder.is_dir()])
    refuse_existing(save, overwrite=overwrite)
    final = place_of(save)
    with _steps(final) as between:
        experts = [document for document in documents if isinstance(document, Experts)]
        if experts and experts != documents[-1:]:
            raise RecipeError("A mixture of experts (`experts:`) is the final document, the one without a name.")
        places = Places(between)
        plans = _plans([document for document in documents if isinstance(document, Config)], places, as_mergekit=as_mergekit)
        earlier = {str(plan.config.name): plan.result for plan in plans}
        made = [prepared(document, earlier, places) for document in experts]
        refuse_inputs(save, places.sources)  # those of the hub and adapters too
        stream._steady_memory()
        _check_values(places, None if made else _hidden(plans))
        try:
            for number, plan in enumerate(plans if experts else plans[:-1]):
                folder = between / f"document-{number}"
                write(plan, folder, seed=seed)
                _reopen(plans, str(plan.config.name), folder)
                places.merged[str(plan.config.name)] = folder
            if made:
                assemble(made[0], places, final, seed=seed, overwrite=overwrite)
            else:
                write(plans[-1], final, seed=seed, overwrite=overwrite)
        except (FiniteError, SiteError):  # such as scores without an order
            _check_values(places)  # which says where it comes from, if from one of the models
            raise
        return model.open(final)


@contextlib.contextmanager
def _steps(final: Path) -> Iterator[Path]:
    """The folder beside the result for what is made on the way; what a killed process left there is removed first.

    Raises:
        RecipeError: something else has its name.
    """
    with alone(final) as folder:
        if any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise RecipeError(f"{folder} is where a merge keeps its steps, but holds something else. Move it, or save elsewhere.")
        _empty(folder)
        (folder / MARKER).touch()
        try:
            yield folder
        finally:
            _empty(folder)


def _empty(folder: Path) -> None:
    """Remove what lies in a folder of steps, the marker last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MARKER):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Places:
    """Where models lie on disk: results of earlier documents by their name, and all others, each adapter merged in once.

    `sources` are the folders of the user's that are read.
    """

    def __init__(self, between: Path):
        self.between = between
        self.merged: dict[str, Path] = {}
        self.opened: dict[Reference, Path] = {}
        self.sources: list[Path] = []

    def __call__(self, reference: Reference) -> Path:
        """The folder of a model; with an adapter, the one into which it was merged."""
        if reference.path in self.merged and reference.adapter is None:
            return self.merged[reference.path]
        if reference not in self.opened:
            from modelwright.starter import path

            folder = path() if reference.path == "starter" else Checkpoint(reference.path, reference.revision).path
            self.sources.append(folder)
            if reference.adapter is not None:
                adapter = _adapter(reference)
                self.sources.append(adapter)
                folded = model.Folded(model.open(folder), adapter)  # its own folder goes with it
                folder = self.between / f"adapter-{len(self.opened)}"
                shutil.move(folded.folder, folder)
            self.opened[reference] = folder
        return self.opened[reference]


def _plans(documents: list[Config], places: Places, *, as_mergekit: bool) -> list[Plan]:
    """The plan of every document; later ones may name earlier ones. All that is wrong is said at once."""
    faults, plans, opened = Faults(), [], dict[Reference, Input]()
    promised: dict[str, Input] = {}
    names = [document.name for document in documents if document.name]
    for document in documents:
        place = f"{document.name}: " if document.name else ""
        models, local = {}, Faults()
        for reference in document.references:
            if reference.path in names and reference.path not in promised and not Path(reference.path).exists():
                local.append(RecipeError(f"{reference.path} is merged in a later document, or could not be planned. Put it before."))
                continue
            with local.collected():
                if reference.path in promised and reference.adapter is None:
                    models[reference] = promised[reference.path]
                else:
                    if reference not in opened:
                        opened[reference] = Input.open(str(reference), places(reference))
                    models[reference] = opened[reference]
        if not local:
            plan = Planner(document, models, local, as_mergekit=as_mergekit).plan(tokens.plan)
            if plan:
                plans.append(plan)
                if document.name:
                    promised[document.name] = plan.as_input(document.name)
        else:
            with local.collected():
                table.entry_of(document.method)
        faults += [type(error)(place + text) for error in local for text in error.reasons]
    faults.refuse()
    return plans


def _adapter(reference: Reference) -> Path:
    name = str(reference.adapter)
    place = Path(os.path.expanduser(name))
    if not place.is_dir():
        place = hub.fetch(name, HUB_FILES, what=f"{reference}: an adapter", error=WeightsError, revision=reference.adapter_revision)
    if not (place / "adapter_config.json").is_file():
        raise WeightsError(f"{reference}: {reference.adapter} has no adapter_config.json. After the + stands a peft adapter.")
    return place


def _check_values(places: Places, only: Mapping[Path, Container[str]] | None = None) -> None:
    """Refuse NaN and infinity in any model, by name; only: in these tensors of the models in folders, and in no others."""
    faults = Faults()
    folders = list(dict.fromkeys(places.opened.values()))
    for folder in track([folder for folder in folders if only is None or folder in only], "check"):
        with faults.collected():
            check_finite(Checkpoint(folder), only=None if only is None else only[folder])
    faults.refuse()


def _hidden(plans: Sequence[Plan]) -> dict[Path, set[str]]:
    """The tensors, by the folders of their models, whose NaN and infinity need not come out in the result, where they are always seen."""
    found = defaultdict[Path, set[str]](set)
    for plan in plans:
        for made in plan.tensors:
            if _copied(plan, made) or not getattr(made.method, "carries", True):
                for piece in filter(None, (made.base, *made.donors)):
                    if piece.model.folder is not None and piece.model.checkpoint is not None:
                        found[piece.model.folder].add(piece.name)
    return found


def _reopen(plans: list[Plan], name: str, folder: Path) -> None:
    """Give the plans that name a merged model its files."""
    for plan in plans:
        for reference, found in plan.models.items():
            if reference.path == name and found.checkpoint is None:
                found.folder, found.checkpoint = folder, Checkpoint(folder)


# Tensors


def write(plan: Plan, folder: Path, *, seed: int, overwrite: bool = False) -> None:
    """Write the result of a plan."""
    given = Given(seed=seed)
    with torch.no_grad(), Writer(folder, overwrite=overwrite) as out:
        for made in track(plan.tensors, plan.config.method):
            stream._give_back()
            source = _copied(plan, made)
            if source:
                assert source.model.checkpoint is not None
                out.copy(made.name, source.model.checkpoint, source.name)
            else:
                out.add(made.name, _tensor(plan, made, given))
        _write_beside(plan, out, seed)


def _copied(plan: Plan, made: Made) -> Piece | None:
    """The tensor that is taken byte for byte; None where there is something to compute."""
    first, *others = made.donors or (made.base,)
    assert first is not None
    alone = made.method is None or not others and made.base is None and _is_average(made.method)
    words = plan.vocabulary
    kept = not (words and words.holds(made.name, made.role)) and first.model.tensors[first.name] == (made.shape, made.dtype)
    return first if alone and kept else None


def _is_average(method: TensorMethod) -> bool:
    """Whether a method gives back its only donor."""
    return isinstance(method, Linear) and (method.normalize or method.weights == (1.0,))


def _tensor(plan: Plan, made: Made, given: Given) -> Sliced:
    """A tensor of the result, computed as it is written."""
    working = getattr(torch, plan.config.dtype) if plan.as_mergekit and plan.config.dtype else None

    def read(piece: Piece) -> Entries:
        found = _entries(plan, made, piece)
        return Sliced(tuple(found.shape), working, flat(found)) if working else found

    donors = [read(piece) for piece in made.donors]
    if made.method is None:
        return Sliced(made.shape, made.dtype, flat(donors[0]))
    base = read(made.base) if made.base else donors[0]
    method: Any = made.method
    extras: dict[str, Any] = {}
    if "rng" in method.needs():
        depths = max(plan.template.stacks.values(), default=0)
        known = plan.template.anatomy.role(made.name) or ("linear", None)
        extras["rng"] = given.rng(Site(made.name, made.name.rpartition(".")[0], known[0], known[1], depths).place)
    if "survey" in method.needs():
        extras["survey"] = method.survey(base, donors)
    if plan.as_mergekit and method.on_changes:
        start, shape, dtype = flat(base), tuple(base.shape), base.dtype

        def change(donor: Values) -> Sliced:
            """What a donor adds to the base, rounded to the base's dtype."""
            return Sliced(shape, dtype, lambda at: donor(at).to(dtype) - start(at))

        zeros = Sliced(shape, wide(base), lambda at: torch.zeros(at.stop - at.start))
        added = method.tensor(zeros, [change(flat(donor)) for donor in donors], **extras)
        return Sliced(made.shape, made.dtype, lambda at: start(at) + added.values(at).to(dtype))
    result = method.tensor(base, donors, **extras)
    if plan.as_mergekit and working:
        return Sliced(made.shape, made.dtype, lambda at: result.values(at).to(working))
    return replace(result, dtype=made.dtype)


def _entries(plan: Plan, made: Made, piece: Piece) -> Entries:
    """A model's tensor as the method sees it: with its rows in the result's order, or cut to the rows that are merged."""
    words = plan.vocabulary
    if words and words.holds(made.name, made.role):
        return words.permuted(piece.model, piece.name, stored)
    found = stored(piece.model, piece.name)
    return found if tuple(found.shape) == made.shape else Sliced(made.shape, found.dtype, flat(found))  # its first rows


def stored(source: Input, name: str) -> Entries:
    """A tensor of a model: small ones in memory, others on disk."""
    assert source.checkpoint is not None
    return source.checkpoint.on_disk(name) if source.checkpoint.nbytes(name) > stream.LARGE else source.checkpoint.read(name)


# Beside the tensors


def _write_beside(plan: Plan, out: Writer, seed: int) -> None:
    """Config, tokenizer, the configuration itself and the record."""
    config, words = plan.result, plan.vocabulary
    source = words.source if words else _tokenizer_source(plan)
    if source is not plan.template:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if key in source.config:
                config[key] = source.config[key]
    out.write_json("config.json", config)
    assert plan.template.folder is not None
    if (plan.template.folder / "generation_config.json").is_file():
        out.copy_file(plan.template.folder / "generation_config.json")
    for file in tokenizer_files(source.folder) if source.folder else []:
        if not (words and file.name in DROPPED):
            out.copy_file(file)
    if words:
        out.write_json("tokenizer.json", words.tokenizer)
    elif source.tokenizer is not None:
        out.write_json("tokenizer.json", source.tokenizer)
    template = tokens.chat_template(plan.config, plan.models)
    if template is not None:
        (out.partial / "chat_template.jinja").write_text(template, "utf-8")
        file = out.partial / "tokenizer_config.json"
        if file.is_file():
            stated = json.loads(file.read_text("utf-8"))
            out.write_json(file.name, {key: value for key, value in stated.items() if key != "chat_template"})
    (out.partial / "mergekit_config.yml").write_text(plan.config.text, "utf-8")
    settings = {"config": "mergekit_config.yml", "as_mergekit": plan.as_mergekit}
    step = {"method": f"merge.{plan.config.method}", "settings": settings, "seed": seed, "notes": list(dict.fromkeys(plan.notes))}
    out.write_json(RECORD, {"steps": [step], "marks": ["float"]})


def _tokenizer_source(plan: Plan) -> Input:
    """The model whose tokenizer is copied."""
    asked = plan.config.vocabulary
    return plan.models[asked.source] if asked and isinstance(asked.source, Reference) else plan.template
