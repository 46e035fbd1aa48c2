"""What every method must keep, checked: `modelwright check prune.wanda`, and the suite in tests/contract.

A check is a function `check_...`; its name says the promise. Those that take a `Case` run on small random models of
four architectures. A method's file holds its small settings (`small`) and its known failures with reasons (`fails`),
which are strict: a failure that no longer fails is a failure, and so is one that ends in another error. A known failure is
an assertion of the check itself, or a ModelwrightError with the words of the reason in its text.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import copy
import dataclasses
import functools
import inspect
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.blocks._part import sizes_of
from modelwright.blocks._stored import Stored
from modelwright.blocks.experts import split_experts

from . import data as texts
from . import describe, find, plan, recipe, stream, tiny, walk
from .errors import LayoutError, MethodError, ModelwrightError, NeedError, SettingError
from .files import write_json
from .given import Given
from .method import (
    DRIVEN,
    MARKS,
    STATUSES,
    AdapterMethod,
    BlockMethod,
    LayerAdapter,
    LayerMethod,
    Method,
    SiteMethod,
    TensorMethod,
    TrainMethod,
    fields_of,
    setting_texts,
)  # fmt: skip
from .model import Model, emptied, stored_bytes, unwrapped, weight_of

KINDS = ("llama", "gpt2", "qwen3_moe", "vit")
ENOUGH = {  # checks that each kind of model would answer alike -> the kinds that they are made on
    "same_seed_gives_same_bits": ("llama", "vit"), "skipped_blocks_stay": ("llama", "gpt2"),
}  # fmt: skip
LLAMA_ONLY = ("ties_survive", "odd_shapes_work", "zeros_stay_while_the_mark_does")  # checks that are written for it
CONFIGS: dict[str, dict[str, Any]] = {"qwen3_moe": {"num_experts": 4}}
LETTERS = "".join(map(chr, range(32, 126)))


@dataclass(frozen=True)
class Result:
    """How one check of one method ended: "passed", "failed", "known" (fails, as its file says) or "skipped"."""

    check: str
    outcome: str
    reason: str = ""

    def plain(self) -> dict[str, str]:
        return dataclasses.asdict(self)


class NotApplicable(Exception):
    """The check says nothing of this method on this model; the text says why."""


@dataclass(frozen=True)
class Applied:
    """A model from a folder after a method, and what was there before: its state, the other models' states, and the data's tensors."""

    model: Model
    before: dict[str, Tensor]
    given: Given
    others: list[dict[str, Tensor]]
    data: Any


@dataclass(frozen=True)
class Case:
    """A method and the kind of model that it is checked on."""

    cls: type[Method]
    kind: str

    def method(self, on: Model | None = None, **settings: Any) -> Method:
        """The method with its small settings, and with trained adapters of the model that it is to be on, if it goes by such."""
        own = {"sources": sources(unwrapped((on or self.model()).module))} if hasattr(self.cls, "sources") else {}
        return self.cls(**{**self.cls.small, **own, **settings})

    def model(self, seed: int = 0, *, dtype: torch.dtype = torch.float32, wants: Set[str] | None = None, **config: Any) -> Model:
        """A small random model, with adapters, packed, or with layers that round, if the method, or `wants`, asks for that."""
        module = tiny.tiny(self.kind, seed=seed, **CONFIGS.get(self.kind, {}) | config).to(dtype)
        model = Model(name=self.kind, module=module, tokenizer=letters())
        wants = self.cls.wants if wants is None else wants
        if "packed" in wants:
            walk.change(model, find.find("quantize.rtn").build({"group": 32}), Given())
        if "rounding" in wants:
            walk.change(model, find.find("quantize.fairy2i")(), Given())
        if "adapters" in wants:
            walk.change(model, find.find("adapt.lora").build({"rank": 2}), Given())
            generator = torch.Generator().manual_seed(seed)
            for name, value in model.module.named_parameters():
                if "lora_B" in name:
                    value.data.copy_(0.1 * torch.randn(value.shape, generator=generator))
        return model

    def given(self, **others: Any) -> Given:
        """Everything that the method needs."""
        trains = issubclass(self.cls, TrainMethod)
        data: Any = texts.read([LETTERS * 30]) if trains else [tiny.tiny_inputs(tiny.tiny(self.kind), seed) for seed in range(3)]
        needs = self.cls.needs()
        made: dict[str, Any] = {"data": data, "samples": 8, "length": 64}  # of other texts that a method reads
        if "donors" in needs:
            made["donors"] = self.donors((5, 6))
        if "teacher" in needs:
            made["teacher"] = self.model(seed=0)
        if "base" in needs:
            made["base"] = self.model(seed=7)
        return Given(**(made | others))

    def donors(self, seeds: Iterable[int], **config: Any) -> list[Model]:
        """Small random models for the method to take in, no more than it takes."""
        made = [self.model(seed=seed, wants=self.cls.donors_want, **config) for seed in seeds]
        return made[: self.cls.takes[1]]

    def applied(self, method: Method | None = None, model: Model | None = None, given: Given | None = None) -> Model:
        """A model after the method. Raises NotApplicable where the architecture has no place for it."""
        if self.cls.causal and self.kind not in tiny.CAUSAL:
            raise NotApplicable(f"{self.kind} predicts no tokens")
        try:
            return walk.change(model or self.model(), method or self.method(model), given or self.given())
        except LayoutError as error:
            raise NotApplicable(str(error)) from None


@functools.lru_cache(maxsize=1)
def once(case: Case) -> Applied:
    """The method with its small settings on the small model, made once for all checks that only look at it."""
    model, given = case.model(), case.given()
    with contextlib.ExitStack() as made_here:
        if "adapters" not in case.cls.wants:
            model = reopened(model, Path(made_here.enter_context(tempfile.TemporaryDirectory())))
        texted = isinstance(given.data, texts.Text)
        before, others, data = state(model), _others(given), None if texted else copy.deepcopy(given.data)
        made = Applied(case.applied(model=model, given=given), before, given, others, data)
        weakref.finalize(made, made_here.pop_all().close)
    return made


def sources(module: nn.Module) -> tuple[str, ...]:
    """Folders of two small LoRA adapters, of all linear layers in the blocks of a module; the same for modules of the same sizes."""
    sizes = {site.module: sizes_of(module.get_submodule(site.module)) for site in anatomy_of(module).sites(module)
             if site.role.startswith(("attn", "mlp")) and not site.stack}  # fmt: skip
    return _sources(tuple(sizes.items()))


@functools.cache
def _sources(sizes: tuple[tuple[str, tuple[int, int]], ...]) -> tuple[str, ...]:
    folders = []
    for seed in range(2):
        folder = tempfile.TemporaryDirectory()
        atexit.register(folder.cleanup)
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for path, (rows, columns) in sizes:
            tensors[f"base_model.model.{path}.lora_A.weight"] = 0.2 * torch.randn(2, columns, generator=generator)
            tensors[f"base_model.model.{path}.lora_B.weight"] = 0.2 * torch.randn(rows, 2, generator=generator)
        save_file(tensors, Path(folder.name) / "adapter_model.safetensors")
        stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [path for path, _ in sizes]}
        write_json(Path(folder.name) / "adapter_config.json", stated)
        folders.append(folder.name)
    return tuple(folders)


def letters() -> Any:
    """A tokenizer of single characters for the small models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0, **{letter: number for number, letter in enumerate(LETTERS, 1)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", clean_up_tokenization_spaces=False)


def check(method: str | type[Method], kinds: tuple[str, ...] = KINDS) -> list[Result]:
    """Run every check on a method, on every kind of model where it applies.

    method: its name, `path/file.py:Class`, or the class.

    Raises:
        MethodError: there is no such method or file; one that cannot be imported is a failing check.
    """
    try:
        cls = find.find(method) if isinstance(method, str) else method
    except MethodError as error:
        if isinstance(method, str) and not find.exists(method):
            raise
        return [Result("imports", "failed", str(error))]
    return [run(cls, name, kind) for name, kind in checks(kinds)]


def checks(kinds: tuple[str, ...] = KINDS) -> Iterator[tuple[str, str]]:
    """(name, kind of model) of every check, kind by kind; the kind is "" for those that look at the record alone."""
    for kind in ("", *kinds):
        for name, function in globals().items():
            if name.startswith("check_") and ("case" in inspect.signature(function).parameters) == bool(kind):
                yield name.removeprefix("check_"), kind


def kinds_of(cls: type[Method], name: str) -> tuple[str, ...]:
    """The kinds of model that a check of a method is made on."""
    own = cls.checked_on or KINDS
    if name in LLAMA_ONLY:
        return ("llama",) if "llama" in own else ()
    return tuple(kind for kind in own if kind in ENOUGH.get(name, own)) or own


def run(cls: type[Method], name: str, kind: str) -> Result:
    """Run one check."""
    label = f"{name} [{kind}]" if kind else name
    if kind and kind not in (made_on := kinds_of(cls, name)) and label not in cls.fails:  # known failures are looked at wherever they are
        return Result(label, "skipped", f"checked on {', '.join(made_on) or 'none of its kinds'}")
    function: Callable[[Any], None] = globals()[f"check_{name}"]
    expected = cls.fails.get(label) or cls.fails.get(name)
    try:
        torch.manual_seed(0)
        function(Case(cls, kind) if kind else cls)
    except NotApplicable as error:
        return Result(label, "skipped", str(error))
    except Exception as error:  # any error of a method under check is a finding, not a crash of the checker
        if expected and _is_known(error, expected):
            return Result(label, "known", expected)
        own = isinstance(error, (AssertionError, ModelwrightError)) and str(error)
        found = str(error) if own else f"{type(error).__name__}: {error}"
        return Result(label, "failed", f"{found} (the method's file expects: {expected})" if expected else found)
    if expected:
        return Result(label, "failed", f"it passes, but the method's file says that it fails: {expected}")
    return Result(label, "passed")


def _is_known(error: Exception, reason: str) -> bool:
    """Whether a check failed as the method's file says, and not because something else is broken."""
    if isinstance(error, AssertionError):
        return traceback.extract_tb(error.__traceback__)[-1].filename == __file__
    return isinstance(error, ModelwrightError) and reason.lower() in str(error).lower()


# The record


def check_file_holds_one_class_named_like_it(cls: type[Method]) -> None:
    stem = Path(inspect.getfile(cls)).stem
    assert cls.__name__.lower() == stem.replace("_", ""), f"{stem}.py holds {cls.__name__}"


def check_page_is_complete(cls: type[Method]) -> None:
    text = find.page(cls.name()).text
    assert text.partition("\n")[0].endswith("."), "the file's first line is a sentence"
    assert len(text.splitlines()) > 2, "the file's docstring names the source"
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("), "the class has a docstring to choose by"
    assert cls.status in STATUSES, cls.status
    lacking = [name for name, comment in setting_texts(cls).items() if not comment]
    assert not lacking, f"settings without a comment beside them: {lacking}"
    assert describe.page(cls.name())


def check_marks_are_known(cls: type[Method]) -> None:
    strange = (cls.wants | cls.suffices | cls.leaves | cls.drops) - set(MARKS)
    assert not strange, f"unknown marks {strange}"


def check_numbers_have_ranges(cls: type[Method]) -> None:
    from .settings import _options

    bare = [field.name for field, kind in fields_of(cls) if {int, float} & set(_options(kind)) and "range" not in field.metadata]
    assert not bare, f"numbers without a range: {bare}"


def check_yaml_gives_the_method_back(cls: type[Method]) -> None:
    method = cls(**cls.small)
    given = {need: (["a", "b"] if need == "donors" else "$input") for need in cls.needs() if need in recipe.GIVEN}
    made = recipe.Recipe(steps=(recipe.Step(method, given),), data="corpus")
    assert recipe.read(made.yaml()) == made
    assert eval(repr(method), {cls.__name__: cls}) == method


def check_bad_values_are_refused(cls: type[Method]) -> None:
    for field, _ in fields_of(cls):
        limits = field.metadata.get("range")
        bad: list[Any] = [object()]
        bad += [*limits.outside(), float("nan"), "many"] if limits else []
        for value in bad:
            try:
                cls(**{**cls.small, field.name: value})
            except SettingError as error:
                assert field.name in str(error) and cls.name() in str(error), error
            else:
                raise AssertionError(f"{field.name}={value!r} is taken")
    try:
        cls.build({"no_such_setting": 1})
    except SettingError as error:
        assert "no_such_setting" in str(error)
    else:
        raise AssertionError("an unknown setting is taken")


def check_missing_needs_are_named(cls: type[Method]) -> None:
    for need in set(cls.needs()) - DRIVEN:
        sentences = Given().lacking(cls)
        assert any(cls.name() in text for text in sentences), f"{need} is missing and nothing says so"
    if set(cls.needs()) - DRIVEN:
        try:
            walk.change(Case(cls, "llama").model(), cls(**cls.small), Given())
        except NeedError:
            return
        raise AssertionError("work starts without what the method needs")


def check_code_is_short(cls: type[Method]) -> None:
    tree = ast.parse(Path(inspect.getfile(cls)).read_text("utf-8"))
    lines = {node.lineno for node in ast.walk(tree) if hasattr(node, "lineno")}
    assert len(lines) <= 120, f"{len(lines)} lines of code; move mathematics to maths/"


# Behaviour on models


def check_same_seed_gives_same_bits(case: Case) -> None:
    assert same(state(once(case).model), state(case.applied()))


def check_neutral_settings_change_no_output(case: Case) -> None:
    if case.cls.neutral is None:
        raise NotApplicable("no settings of this method are neutral")
    before = tiny.outputs(case.model().module)
    after = tiny.outputs(case.applied(case.method(**case.cls.neutral)).module)
    assert torch.equal(before, after), f"outputs moved by {(before - after).abs().max():.2e}"


def check_defaults_do_something(case: Case) -> None:
    made = once(case)
    assert not same(made.before, state(made.model)), "nothing in the model changed"


def check_what_is_given_stays_as_it_is(case: Case) -> None:
    made = once(case)
    assert all(same(one, two) for one, two in zip(made.others, _others(made.given), strict=True)), "a donor or the teacher changed"
    after: Any = made.given.data
    if made.data is not None:
        assert all(torch.equal(one[key], two[key]) for one, two in zip(made.data, after, strict=True) for key in one), "the data changed"


def check_only_chosen_sites_change(case: Case) -> None:
    if not issubclass(case.cls, (SiteMethod, AdapterMethod)):
        raise NotApplicable("the method works on the whole model")
    model = case.model()
    role = next(site.role for site in model.sites() if site.role.startswith("attn"))
    chosen = {site.module for site in model.sites() if site.role == role}
    before = {name: value.clone() for name, value in unwrapped(model.module).state_dict().items()}
    after = unwrapped(case.applied(case.method(model, where=role), model).module).state_dict()
    after = {name.replace(".original_module", ""): value for name, value in after.items()}  # beside a copy that trains
    moved = [name for name, value in before.items() if not inside(name, chosen) and not equal(after.get(name), value)]
    assert not moved, f"where={role!r} also changed {moved[:3]}"


def check_skipped_blocks_stay(case: Case) -> None:
    if not issubclass(case.cls, SiteMethod):
        raise NotApplicable("the method works on the whole model")
    model = case.model()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    after = case.applied(case.method(skip="block 0"), model).module.state_dict()
    first = {name for name in before if (model.anatomy.role(name) or ("", None))[1] == 0}
    moved = [name for name in first if not equal(after.get(name), before[name])]
    assert not moved, f"skip='block 0' still changed {moved[:3]}"


def check_ties_survive(case: Case) -> None:
    given = case.given()
    given.donors = case.donors(range(3, 3 + len(given.donors)), tie_word_embeddings=True)
    given.base = given.base and case.model(seed=7, tie_word_embeddings=True)
    module = case.applied(model=case.model(tie_word_embeddings=True), given=given).module
    base: Any = unwrapped(module)
    head, embedding = (layer.state_dict(keep_vars=True) for layer in (base.lm_head, base.model.embed_tokens))
    assert all(head.get(name) is value for name, value in embedding.items()), "head and embedding came apart"


def check_dtype_is_kept(case: Case) -> None:
    model = case.model(dtype=torch.bfloat16)
    given = case.given()
    for other in (*given.donors, given.teacher, given.base):
        if other is not None:
            other.module.to(torch.bfloat16)
    case.applied(model=model, given=as_dtype(given, torch.bfloat16))
    module = unwrapped(model.module)
    exact = {f"{path}.{name}" for path, layer in module.named_modules() if isinstance(layer, Stored) for name in layer.exact}
    if issubclass(case.cls, LayerAdapter):
        inputs = tiny.tiny_inputs(unwrapped(model.module))
        inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
        assert tiny.outputs(model.module, inputs).isfinite().all()  # whatever the part's own dtype is
    added: set[str] = set()  # by adapters, which are in float32 whatever the base is
    if "adapters" in case.cls.leaves | case.cls.wants:
        plain = case.model(wants=frozenset()).module.state_dict()
        added = {name for name in module.state_dict() if name.replace(".base_layer", "") not in plain}
    wrong = [name for name, value in module.state_dict().items()
             if value.is_floating_point() and value.dtype != torch.bfloat16 and name not in added | exact]  # fmt: skip
    assert not wrong, f"{wrong[:3]} left bfloat16"


def check_zeros_stay_while_the_mark_does(case: Case) -> None:
    if "sparse" in case.cls.leaves:
        raise NotApplicable("the method makes zeros of its own")
    if "float" not in case.cls.wants or "adapters" in case.cls.wants:
        raise NotApplicable("the method starts from other models than pruned ones")
    if issubclass(case.cls, AdapterMethod) and not case.cls.changes_base:
        raise NotApplicable("the method leaves the weights as they are")
    model = case.model()
    walk.change(model, find.find("prune.magnitude")(), Given())
    zeros = {name: weight == 0 for name, weight in matrices(model).items() if not weight.all()}
    method = case.method(model)
    made = case.applied(method, model)
    assert ("sparse" in made.marks) == ("sparse" not in method.lost())
    if "sparse" in made.marks:
        after = matrices(made)
        kept = {name: after[name] for name, gone in zeros.items() if name in after and after[name].shape == gone.shape}
        assert kept, "no matrix is left as it was"
        filled = [name for name, weight in kept.items() if weight[zeros[name]].any()]
        assert not filled, f"zeros of {filled[:3]} were filled in, and the model is said to be sparse"


def check_odd_shapes_work(case: Case) -> None:
    odd: dict[str, Any] = {
        "hidden_size": 72,
        "intermediate_size": 88,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
    }
    given = case.given()
    for need in ("teacher", "base"):
        if getattr(given, need) is not None:
            setattr(given, need, case.model(**odd))
    given.donors = case.donors(range(3, 3 + len(given.donors)), **odd)
    outputs = tiny.outputs(case.applied(model=case.model(**odd), given=given).module)
    assert outputs.isfinite().all()


def check_promise_is_kept(case: Case) -> None:
    method = case.method()
    promised = method.promise()
    if not promised or not isinstance(method, SiteMethod):
        raise NotApplicable("the method promises nothing that can be counted")
    model = case.model()
    module = unwrapped(model.module)
    with walk.split_experts(module):
        chosen = [site for site, _ in walk.choose(module, anatomy_of(module).sites(module), method)]
    case.applied(method, model)
    with walk.split_experts(module):
        for key, value in promised.items():
            if key == "zeros":
                weights = [weight_of(module, site) for site in chosen]
                share = sum(int((weight == 0).sum()) for weight in weights if weight is not None) / sum(
                    weight.numel() for weight in weights if weight is not None
                )
                assert abs(share - value) < 0.01, f"promised {value} zeros, found {share:.4f}"
            if key == "bits":
                found = {module.get_submodule(site.module).describe()["bits"] for site in chosen}  # type: ignore[operator]
                assert found == {value}, f"promised {value} bits, found {found}"


def check_streamed_equals_in_memory(case: Case) -> None:
    if not issubclass(case.cls, (TensorMethod, LayerMethod, BlockMethod)):
        raise NotApplicable("the method needs the whole model")
    with tempfile.TemporaryDirectory() as folder:
        given = case.given()
        given.donors = [reopened(donor, Path(folder) / f"donor{number}") for number, donor in enumerate(given.donors)]
        disk = reopened(case.model(), Path(folder) / "in")
        if not stream.possible(disk, case.method()):
            raise NotApplicable("this architecture's files are not laid out as its module")
        made = once(case)
        streamed = stream.write(disk, case.method(), given, Path(folder) / "out")
        assert same(state(streamed), state(made.model))


def check_saved_equals_loaded(case: Case) -> None:
    if "adapters" in case.cls.wants:
        raise NotApplicable("checked in the method's own test")
    model = once(case).model
    with tempfile.TemporaryDirectory() as folder:
        before = tiny.outputs(model.module)
        model.save(Path(folder) / "out")
        loaded = walk.open(Path(folder) / "out")
        assert loaded.marks == model.marks, f"marks {model.marks} came back as {loaded.marks}"
        after = tiny.outputs(loaded.module)
        assert torch.allclose(before, after, atol=1e-5), f"outputs moved by {(before - after).abs().max():.2e}"


def check_bytes_are_as_predicted(case: Case) -> None:
    if issubclass(case.cls, TrainMethod) and case.cls.planned is TrainMethod.planned or "adapters" in case.cls.wants:
        raise NotApplicable("the method stores what was stored before")
    empty = emptied(case.model().module)
    split_experts(empty)
    model = once(case).model
    with torch.no_grad():
        predicted, _ = plan.predict(empty, case.method(), case.given())
    found, expected = stored_bytes(model.module), stored_bytes(predicted)
    assert abs(found - expected) <= 0.01 * found, f"predicted {expected:,} bytes, stored {found:,}"


def check_step_is_recorded(case: Case) -> None:
    model = once(case).model
    assert model.history[-1]["method"] == case.cls.name()
    assert case.cls.leaves <= model.marks and not (case.cls.drops - case.cls.leaves) & model.marks


def check_gpu_equals_cpu(case: Case) -> None:
    if not torch.cuda.is_available():
        raise NotApplicable("no accelerator here")
    model = case.model()
    model.module.to("cuda")
    found = tiny.outputs(case.applied(model=model).module.cpu())
    assert torch.allclose(found, tiny.outputs(case.applied().module), atol=1e-2), "the accelerator gives other outputs"


# Helpers of the checks


def state(model: Model) -> dict[str, Tensor]:
    """All tensors that the model stores, experts apart, cloned."""
    module = copy.deepcopy(model.module)
    split_experts(unwrapped(module))
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def matrices(model: Model) -> dict[str, Tensor]:
    """The matrices of the linear layers of a model as they compute, without what adapters add."""
    found = {}
    for path, layer in unwrapped(model.module).named_modules():
        weight = layer.dense() if isinstance(layer, Stored) and hasattr(layer, "dense") else getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(layer, nn.Embedding):
            found[path.removesuffix(".base_layer")] = weight
    return found


def _others(given: Given) -> list[dict[str, Tensor]]:
    """The states of all models that a method takes in."""
    return [state(model) for model in (*given.donors, given.teacher, given.base) if model is not None]


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether two states have the same names and bits."""
    return one.keys() == two.keys() and all(equal(value, two[name]) for name, value in one.items())


def equal(one: Tensor | None, two: Tensor | None) -> bool:
    return one is not None and two is not None and one.dtype == two.dtype and torch.equal(one, two)


def inside(name: str, modules: set[str]) -> bool:
    return any(name.startswith(module + ".") for module in modules)


def as_dtype(given: Given, dtype: torch.dtype) -> Given:
    """The same data with its real numbers in another dtype."""
    if not isinstance(given.data, texts.Text):
        given.data = [
            {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()} for batch in given.data or []
        ]
    return given


def reopened(model: Model, folder: Path) -> Model:
    """The model from disk."""
    model.save(folder)
    opened = walk.open(folder)
    opened._tokenizer = model._tokenizer
    return opened
