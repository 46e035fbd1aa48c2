"""What a method is: a frozen dataclass whose fields are its settings and which writes one verb.

The base class says at which level the method works, and so which driver of `core.walk` runs it:

| base class     | verb                                         | the driver                                         |
|----------------|----------------------------------------------|----------------------------------------------------|
| `TensorMethod` | `tensor(weight, ...)` -> weight or layer     | streams tensors; the module is never built         |
| `LayerMethod`  | `layer(weight, statistics, ...)` -> the same | one block in memory; gathers statistics on the way |
| `BlockMethod`  | `block(before, after)` -> score; `keep(...)` | one block in memory; removes whole blocks          |
| `ModelMethod`  | `model(model, ...)` -> model                 | hands over the whole model                         |
| `AdapterMethod`| `adapter(layers, roles)` -> a peft config    | freezes, attaches, saves as a peft adapter         |
| `LayerAdapter` | `part(weight, bias)` -> a part of `blocks`   | the same, as a type of ours in peft                |
| `TrainMethod`  | `loss(module, ids, mask, ...)` -> scalar     | the training loop                                  |

What a method needs is read from its verb's parameters after the first ones; the names come from `NEEDS`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import tokenize
import typing
from abc import ABC
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

from .errors import SettingError, refuse
from .settings import ByRole, at_depth, check, count, fraction, number, unknown_setting

NEEDS: dict[str, str] = {
    "statistics": "calibration text; the recipe gives none. Add `data:`",
    "calibration": "calibration text; the recipe gives none. Add `data:`",
    "train": "training text; the recipe gives none. Add `data:`",
    "donors": "donors: the models to merge. Add `donors: [folder, ...]` to the step",
    "base": "a base model. Add `base:` to the step",
    "teacher": "a teacher. Add `teacher: $input` or a model to the step",
    "gradients": "calibration text for gradients; the recipe gives none. Add `data:`",
    "tokenizer": "a tokenizer; the model's folder has none",
    "requests": "edit requests. Add `requests:` to the step",
    "rng": "a random generator",
    "seed": "the seed of the step",
    "survey": "what `survey` found over all tensors",
    "notes": "a list for sentences that the user should read",
    "details": "a list for what only the record keeps, sentences or rows of numbers",
}
DRIVEN = frozenset({"rng", "seed", "survey", "notes", "details"})  # needs that the driver meets by itself
MARKS = ("float", "sparse", "low-rank", "packed", "rounding", "adapters")
STATUSES = ("sketch", "checked", "reproduced")
Places = str | tuple[str, ...] | None
Verb = Callable[..., Any]  # which a method writes, with parameters for what it needs


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """The root of all methods."""

    level: ClassVar[str] = ""
    verb: ClassVar[str] = ""
    subjects: ClassVar[int] = 1  # parameters of the verb that the driver's loop gives, before the needs
    by_place: ClassVar[bool] = False  # numbers may be lists over depth and maps by role
    takes: ClassVar[tuple[int, int | None]] = (1, None)  # the least and the greatest number of donors
    alike: ClassVar[bool] = False  # donors must be of the model's architecture, tensor by tensor, and count once
    changes_base: ClassVar[bool] = False  # of a model that bears an adapter, the weights that it stands beside
    base_apart: ClassVar[bool] = False  # merges what donors changed in the model, so that it is no donor of its own

    status: ClassVar[str] = "sketch"
    causal: ClassVar[bool] = False  # needs a model that predicts the next token
    neutral: ClassVar[Mapping[str, Any] | None] = None  # settings under which no output may change
    wants: ClassVar[frozenset[str]] = frozenset({"float"})  # marks that the model must carry
    suffices: ClassVar[frozenset[str]] = frozenset()  # marks of which one does in the place of float
    leaves: ClassVar[frozenset[str]] = frozenset()  # marks that it carries afterwards
    drops: ClassVar[frozenset[str]] = frozenset()  # marks that it carries no longer, whatever the settings
    donors_want: ClassVar[frozenset[str]] = frozenset()  # marks that every donor must carry
    small: ClassVar[Mapping[str, Any]] = {}  # settings that suit the contract's tiny models
    checked_on: ClassVar[tuple[str, ...]] = ()  # of the contract's models, where others would say nothing new; by default all
    loads: ClassVar[Mapping[str, int]] = {}  # library that the verb imports when it is first called -> its bytes in memory, for the plan
    fails: ClassVar[Mapping[str, str]] = {}  # contract check -> why it cannot hold; strict
    _outside_name: ClassVar[str] = ""  # of one that is not among the package's files

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        assert "__init__" not in cls.__dict__, f"{cls.__name__} is a dataclass; it writes no __init__"
        cls.__repr__ = Method.__repr__  # type: ignore[method-assign]  # so that `dataclass` writes none

    def __new__(cls, *_: Any, **settings: Any) -> Self:
        """Refuse what is no setting by a sentence, before `__init__` does.

        Raises:
            SettingError: with the nearest name.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        refuse(SettingError, [unknown_setting(cls.name(), key, known) for key in settings if key not in known])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        problems = []
        for field, kind in fields_of(type(self)):
            try:
                value = check(self.name(), field, kind, getattr(self, field.name), self.by_place)
                object.__setattr__(self, field.name, value)
            except SettingError as error:
                problems.append(str(error))
        refuse(SettingError, problems)
        refuse(SettingError, [f"{self.name()}: {problem}" for problem in self.problems()])

    def problems(self) -> list[str]:
        """What is wrong with the settings taken together, each a sentence; for methods to extend."""
        return []

    def unfit_for(self, donors: int) -> list[str]:
        """Why the settings do not go with so many donors, each a sentence; for methods to extend."""
        return []

    def remarks(self) -> list[str]:
        """What the user should know of these settings before the result is used; for methods to extend."""
        return []

    def promise(self) -> dict[str, float]:
        """Measurable effects on the chosen sites, such as `{"zeros": 0.5}`; compared after every run."""
        return {}

    def gained(self) -> frozenset[str]:
        """The marks that a model carries after the method with these settings; for methods to extend."""
        return self.leaves

    def lost(self) -> frozenset[str]:
        """The marks that it carries no longer; for methods to extend."""
        return self.drops

    # The record, read from the class.

    @classmethod
    def name(cls) -> str:
        """The path that is the method's name, such as "prune.wanda"."""
        return cls._outside_name or cls.__module__.removeprefix("modelwright.methods.")

    @classmethod
    def needs(cls) -> tuple[str, ...]:
        """What the method must be given, from the closed list `NEEDS`."""
        parameters = list(inspect.signature(getattr(cls, cls.verb)).parameters)[1 + cls.subjects :]
        unknown = [name for name in parameters if name not in NEEDS]
        assert not unknown, f"{cls.name()}: {cls.verb} asks for {unknown}, which is not in the closed list of needs"
        return tuple(parameters)

    @classmethod
    def reads_text(cls) -> bool:
        """Whether it looks at text, as calibration or to train on."""
        return bool({"statistics", "calibration", "gradients", "train"} & set(cls.needs()))

    @classmethod
    def lacks(cls, marks: Set[str]) -> list[str]:
        """The marks that it wants and that are not among these."""
        return sorted(cls.wants - marks - (frozenset({"float"}) if cls.suffices & marks else frozenset()))

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Self:
        """The method with these settings, all unknown keys and bad values said at once."""
        known = [field.name for field, _ in fields_of(cls)]
        strange = [unknown_setting(cls.name(), key, known) for key in settings if key not in known]
        try:
            made = cls(**{key: value for key, value in settings.items() if key in known})
        except SettingError as error:
            reasons = [*strange, *error.reasons]
            raise SettingError("\n".join(reasons), reasons) from None
        refuse(SettingError, strange)
        return made

    def settings(self) -> dict[str, Any]:
        """The settings that differ from the defaults, as plain values for YAML."""
        return {
            field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self) if getattr(self, field.name) != field.default
        }

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({given})"


class Place(NamedTuple):
    """A weight among all that a method works on; experts of a block that are alike are one place each."""

    role: str
    depth: int | None
    shape: tuple[int, int]  # [out, in], with the kernels of a convolution among the inputs


@dataclass(frozen=True, kw_only=True)
class Placed(Method):
    """A method that works on weights that are chosen by their roles, each with settings of its own."""

    by_place: ClassVar[bool] = True
    sites: ClassVar[tuple[str, ...]]  # roles taken without `where`

    where: Places = None  # roles to work on, such as "mlp.*" or "attn.{q,v}"; by default the matrices of the blocks
    skip: Places = None  # roles to leave alone

    def unfit(self, shape: tuple[int, ...]) -> str:
        """Why a weight of this shape [out, in] cannot take the method, as the end of a sentence; "" if it can."""
        return ""

    def otherwise(self, shape: tuple[int, ...]) -> str:
        """What happens to a weight of this shape [out, in] otherwise than the settings say, as the end of a sentence; "" if nothing."""
        return ""

    def at(self, role: str, depth: int | None, depths: int) -> Self | None:
        """The method with its settings for one place; None where a map by role leaves the place alone."""
        return _resolved(self, role, depth, depths)


@dataclass(frozen=True, kw_only=True)
class SiteMethod(Placed):
    """A method that works weight by weight."""

    changes_base: ClassVar[bool] = True
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "experts", "linear", "conv")  # roles taken without `where`
    every: ClassVar[bool] = False  # takes every float tensor: norms, biases and embeddings too
    whole: ClassVar[bool] = False  # takes convolutions as they are, [out, in, side, ...], and not as [out, rest]
    holds: ClassVar[float] = 3  # float32 copies of a weight that the verb has in memory at once, for the plan
    solves: ClassVar[bool] = False  # the verb's work grows with a weight's values times its inputs, for the plan

    def planned(self, weight: Any) -> Any:
        """What the verb would return for this empty weight [out, in], for sizes before any work."""
        return weight

    def divided(self, places: Sequence[Place], surveyed: Any) -> dict[Place, dict[str, Any]]:
        """Settings that places get of their own, such as a share of one budget, once all chosen places are known.

        surveyed: what `survey` of a `LayerMethod` kept of each block, by depth; None where nothing was looked at.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class TensorMethod(SiteMethod):
    """Needs the weights alone: `tensor(weight [out, in], ...)` returns a tensor or a layer of `blocks`."""

    level: ClassVar[str] = "tensor"
    in_parts: ClassVar[bool] = False  # only reads slices of its flattened inputs: they may be `core.weights.OnDisk`
    verb: ClassVar[str] = "tensor"
    tensor: ClassVar[Verb]

    def surveying(self) -> bool:
        """Whether the survey reads all tensors; by default where the verb asks for one, for methods to narrow."""
        return "survey" in self.needs()

    def survey(self, weight: Any, donors: list[Any]) -> Any:
        """What the verb must know of all tensors before the first, for methods whose verb asks for `survey`.

        weight, donors: all chosen tensors of the model and of each donor, as one vector each (`maths.slices.Joined`).
        """
        raise AssertionError(f"{self.name()} asks for a survey and writes none")


class Rescales:
    """Can scale and move the inputs of matrices that share them, where what makes the inputs is changed to make up for it."""

    def rescale(self, kind: str, readers: Sequence[tuple[Self, Any]], statistics: Any, harm: Callable[[Sequence[Any]], float]) -> Any:
        """What to multiply the inputs of matrices by that share them, before the verb is called, [in] above 0; None to leave them.

        kind: what makes the inputs: a "norm", or the matrix "value" or "up". readers: of each matrix the method with its settings, and
        the weight [out, in]. harm: of weights in their place, the mean square by which what the matrices are part of (the attention,
        the MLP, the matrix) then misses its outputs.
        """
        raise AssertionError(f"{type(self).__name__} wants to scale inputs and writes no rescale")

    def recentre(self, statistics: Any) -> Any:
        """What to take from the inputs of matrices that share them [in], before `rescale`, where a norm's bias makes that free; or None."""
        return None


@dataclass(frozen=True, kw_only=True)
class LayerMethod(SiteMethod, Rescales):
    """Needs a weight's inputs: `layer(weight [out, in], statistics, ...)` returns a tensor or a layer of `blocks`."""

    level: ClassVar[str] = "layer"
    verb: ClassVar[str] = "layer"
    layer: ClassVar[Verb]
    gathers: ClassVar[tuple[str, ...]] = ()  # of `core.statistics`: "norm", "mean", "moment", ...

    stages: bool = False  # gather anew for q k v, o, gate up and down in turn, with what came before already changed

    def arranges(self) -> bool:
        """Whether `arrange` is asked for the matrices whose inputs may trade places; by default it is not."""
        return False

    def arrange(self, weight: Any, statistics: Any, inputs: Any) -> Any:
        """An order of a weight's inputs that suits the verb better, before it is called; None to leave them as they are.

        inputs: [runs, copies, width], the columns that may trade places in each run, which move alike in all of its
        copies. Returned is the place [runs, width] in the run that each column is taken from.
        """
        raise AssertionError(f"{self.name()} wants to move inputs and writes no arrange")

    def rescales(self) -> bool:
        """Whether `rescale` is asked for matrices whose inputs can be scaled for free; by default it is not."""
        return False

    def reruns(self) -> float:
        """How often every block also runs on the whole text to try things; the plan counts them."""
        return 0

    def surveys(self) -> tuple[str, ...]:
        """The statistics with which `survey` looks at every block of the unchanged model first; by default it does not."""
        return ()

    def survey(self, block: Sequence[tuple[Any, Any]]) -> Any:
        """What to remember of one block, for `divided`: its chosen weights [out, in] that saw text, with their statistics."""
        raise AssertionError(f"{self.name()} asks for a survey and writes none")


@dataclass(frozen=True, kw_only=True)
class BlockMethod(Method):
    """Scores whole blocks by what enters and leaves: `block(before, after)`, both [tokens, width], then `keep`."""

    level: ClassVar[str] = "block"
    verb: ClassVar[str] = "block"
    block: ClassVar[Verb]
    subjects: ClassVar[int] = 2

    @property
    def span(self) -> int:
        """How many blocks one score is of, for methods that score runs of them: `before` enters the first, `after` leaves the last."""
        return 1

    @property
    def last(self) -> bool:
        """Whether `before` and `after` are of the last token of each sequence alone."""
        return False

    @classmethod
    def needs(cls) -> tuple[str, ...]:
        return ("calibration", *super().needs())

    def keep(self, scores: list[float]) -> list[int]:
        """The indices of the blocks that stay, by the scores of every run of `span` blocks, by its first."""
        raise AssertionError("a BlockMethod writes keep")

    def guess(self, depths: int) -> list[int]:
        """The indices of the blocks of so many that would go, did their scores rise with the depth: as many as will go."""
        kept = self.keep([float(depth) for depth in range(depths - min(self.span, depths) + 1)])
        return [depth for depth in range(depths) if depth not in kept]


@dataclass(frozen=True, kw_only=True)
class ModelMethod(Method):
    """Works on the whole model: `model(model, ...)` changes it in place and returns it."""

    level: ClassVar[str] = "model"
    verb: ClassVar[str] = "model"
    model: ClassVar[Verb]
    reads: ClassVar[tuple[str, ...]] = ()  # settings that name texts: `calibration` is then batches of the data and of each of these

    def planned(self, module: Any, donors: int) -> Any:
        """The empty module as it will be, for sizes before any work; with so many donors."""
        return module

    def passes(self, blocks: int) -> float:
        """How often the calibration text runs through a model of so many blocks, for the plan."""
        return 2


class Chooses(Protocol):
    """Whatever works on weights that `where` and `skip` choose."""

    sites: ClassVar[tuple[str, ...]]  # roles taken without `where`

    @property
    def where(self) -> Places:
        """Roles to work on."""

    @property
    def skip(self) -> Places:
        """Roles to leave alone."""

    @classmethod
    def name(cls) -> str:
        """The method's name."""
        ...


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(Placed):
    """Attaches trainable parts to a frozen model: `adapter(layers, roles)` returns the peft config for layers.

    layers: path -> the method with its settings for that layer. roles: path -> what the layer is.
    """

    level: ClassVar[str] = "adapter"
    verb: ClassVar[str] = "adapter"
    subjects: ClassVar[int] = 2
    adapter: ClassVar[Verb]
    leaves: ClassVar[frozenset[str]] = frozenset({"adapters"})
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "linear", "conv")
    on_norms: ClassVar[bool] = False  # can stand on norms too
    sized_by: ClassVar[tuple[str, ...]] = ()  # settings that decide how many numbers train, where there are such

    def whole(self) -> tuple[str, ...]:
        """Roles of the modules that train themselves, as copies that are saved with the adapter; for methods to extend."""
        return ()

    @classmethod
    def sized(cls, size: int) -> dict[str, Any]:
        """The settings with which the method is of a size, from 1 on; for methods to extend where these are not the size itself."""
        return dict.fromkeys(cls.sized_by, size)

    def grown(self) -> Self:
        """The method with as many numbers as will ever train, for one that begins with fewer."""
        return self

    def attached(self, layers: Mapping[str, tuple[Self, Any]], gradients: Mapping[str, Any]) -> None:
        """Change what was attached, and the weights beside it, for methods that need `gradients`; by the paths of layers.

        layers: the method with its settings, and peft's layer. gradients: of the loss by each weight [out, in, ...], float32, the mean
        over the calibration text.
        """


@dataclass(frozen=True, kw_only=True)
class LayerAdapter(AdapterMethod):
    """Attaches a part of ours to each layer: `part(weight [out, in, ...], bias [out] or None)` returns one of `blocks._part.Part`.

    Random numbers are torch's, tensors without a device are the weight's. Weight and bias are not to be changed, and may be empty.
    """

    verb: ClassVar[str] = "part"
    checked_on: ClassVar[tuple[str, ...]] = ("llama", "vit")  # experts are not adapted, and GPT-2's layers are in the adapters' own tests
    part: ClassVar[Verb]
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "linear")
    on_convolutions: ClassVar[bool] = False  # can stand on convolutions
    grouped: ClassVar[bool] = False  # also on those in groups

    def fill(self, part: Any, path: str) -> None:
        """Put into a new part what is known of the layer at this path of the model; by default nothing."""

    def divided(self, layers: Mapping[str, tuple[Self, tuple[int, ...], bool]]) -> Mapping[str, Mapping[str, Any]]:
        """Settings that layers get of their own, by their paths, once all are known: such as a share of one budget, or what is drawn.

        layers: path -> the method with its settings for that layer, the shape of its weight, and whether it has a bias.
        """
        return {}

    def shared(self, sizes: Sequence[tuple[int, int]]) -> Any:
        """What the parts of all layers, of these sizes (out, in), have in common: a module that `Part.join` gives each of them."""
        raise AssertionError(f"{self.name()} shares nothing")

    def course(self, parts: Mapping[str, Any], steps: int, seed: int) -> Any:
        """What happens to the parts, by the paths of their layers, in the course of a run (`core.training.Course`); None for nothing."""
        return None

    def adapter(self, layers: Mapping[str, Self], roles: Mapping[str, str]) -> Any:
        from .tuners import config_of

        return config_of(layers)


@dataclass(frozen=True, kw_only=True)
class TrainMethod(Method):
    """Trains all parameters that may change: `loss(module, ids, mask, ...)` returns a scalar and its named parts."""

    level: ClassVar[str] = "train"
    causal: ClassVar[bool] = True
    verb: ClassVar[str] = "loss"
    loss: ClassVar[Verb]
    subjects: ClassVar[int] = 3

    tokens: int = count(1_000_000, unit="tokens")  # seen in all, repeats too
    batch: int = count(16, unit="sequences")  # in one step
    length: int = count(256, low=2, unit="tokens")  # in a sequence, at most what the model allows
    learning_rate: float = number(1e-3, low=0)  # the highest
    warmup: float = fraction(0.05)  # of the steps, linear from zero
    decay: float = fraction(1.0)  # of the steps, the last, in which the learning rate falls; it is level before
    floor: float = fraction(0.1)  # of the learning rate, where the cosine ends
    weight_decay: float = number(0.1, low=0)  # of matrices only
    clip: float = number(1.0, low=0)  # the largest norm of the gradient; 0 for none
    accumulation: int = count(1)  # parts that a step's batch is computed in, to save memory
    optimizer: Literal["adamw", "coat", "muon"] = "adamw"  # coat: states in 8 bits; muon: for matrices in the blocks, adamw for the rest
    precision: Literal["float32", "bfloat16"] = "float32"  # of the products; weights and sums stay float32
    save_every: int = count(100, low=0, unit="steps")  # between checkpoints, from which a killed run goes on

    def first(self) -> Method | None:
        """A step on weights that is taken before the training, for methods that train what they have changed."""
        return None

    @classmethod
    def needs(cls) -> tuple[str, ...]:
        return ("train", *super().needs())

    def course(self, module: Any, settings: Any, notes: list[str]) -> Any:
        """What happens in the course of the run (`core.training.Course`); None to hold entries that are 0 at its start.

        settings: of the run (`core.training.Training`), with its steps and its seed.
        """
        return None

    def planned(self, module: Any, donors: int) -> Any:
        """The empty module as it will be, for sizes before any work; after the step that `first` gives."""
        return module


def fields_of(cls: type[Method]) -> list[tuple[dataclasses.Field, Any]]:
    """The settings of a method with their types."""
    hints = _hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def setting_texts(cls: type[Method]) -> dict[str, str]:
    """The comment beside each setting, read from the source of the class and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not (isinstance(base, type) and issubclass(base, Method)):
            continue
        source = inspect.getsource(base)
        comments = {
            token.start[0]: token.string.lstrip("# ").strip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        tree = ast.parse(inspect.cleandoc("if 1:\n" + source) if source[:1].isspace() else source)
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                texts[node.target.id] = comments.get(node.end_lineno or node.lineno, "")
    return {field.name: texts.get(field.name, "") for field in dataclasses.fields(cls)}


def plain(value: Any) -> Any:
    """A setting as lists, dicts and scalars."""
    if isinstance(value, ByRole):
        return {role: plain(inner) for role, inner in value.items()}
    if isinstance(value, tuple):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


@functools.lru_cache(maxsize=65536)
def _resolved(method: Any, role: str, depth: int | None, depths: int) -> Any:
    from modelwright.anatomy import matches

    changes = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, ByRole):
            key = next((key for key in value if key != "*" and matches(role, depth, key)), "*" if "*" in value else None)
            if key is None:
                return None
            value = changes[field.name] = value[key]
        if isinstance(value, tuple) and field.name not in ("where", "skip") and "range" in field.metadata:
            changes[field.name] = at_depth(value, depth, depths)
    return dataclasses.replace(method, **changes) if changes else method
