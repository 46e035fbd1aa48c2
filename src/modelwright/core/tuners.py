"""Our adapters, at home in peft: for `get_peft_model`, `PeftModel.from_pretrained` and all else they are like its own.

A method that is a `LayerAdapter` has a type in peft of its own name, such as "HYDRA" for `adapt.hydra`, with a config of its settings.
Each layer that it adapts is wrapped in a `Bearer`, which holds one part for each adapter. Importing this module, which
happens when peft is imported after modelwright, registers them all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import peft
import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers, check_adapters_to_merge
from peft.utils import PeftType
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn
from transformers import TrainerCallback

from modelwright.anatomy import removal
from modelwright.blocks._part import Layer, Part, dense_of, kept_as, sizes_of, transposed
from modelwright.blocks._stored import Stored
from modelwright.maths.low_rank import from_orthogonal

from . import find
from .errors import ModelError
from .method import LayerAdapter
from .model import unwrapped
from .training import Course, Together

Made = TypeVar("Made", bound=nn.Module)
GAINS = "A layer without a bias gains one. Plain transformers may leave it out on loading the merged model: fold with adapt.fold."
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of AdaLoRA's allocator, by the names of parameters
SEEN = 8  # values of each adapted weight that tell one base from another


@dataclasses.dataclass
class TunerConfig(PeftConfig):
    """The config of one of our adapters: which layers, and the method's settings, which are fields of the same names."""

    target_modules: Any = dataclasses.field(default=None, metadata={"help": "names of layers, a pattern, or 'all-linear'"})
    exclude_modules: Any = dataclasses.field(default=None, metadata={"help": "names of layers, or a pattern, to leave alone"})
    layers_to_transform: Any = dataclasses.field(default=None, metadata={"help": "indices of blocks"})
    layers_pattern: Any = dataclasses.field(default=None, metadata={"help": "the name of the list of blocks"})
    modules_to_save: Any = dataclasses.field(default=None, metadata={"help": "modules that train and are saved whole"})
    by_layer: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict, metadata={"help": "settings of layers that differ"})
    base_seen: list[float] | None = dataclasses.field(default=None, metadata={"help": "some of the weights that it was made on"})
    stored: bool = dataclasses.field(default=False, metadata={"help": "its values are in a file, so that none are made"})

    method_class: ClassVar[type[LayerAdapter]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = getattr(PeftType, type_name(self.method_class))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        self.method("")

    def method(self, path: str) -> LayerAdapter:
        """The method with its settings for the layer at a path.

        Raises:
            SettingError: they are none of its.
        """
        names = [field.name for field in own_fields(self.method_class)]
        return self.method_class(**{name: getattr(self, name) for name in names} | self.by_layer.get(path, {}))

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"stored": True}


class Bearer(nn.Module, BaseTunerLayer):
    """A layer with a part for each adapter on it; the active ones stand on each other, in their order."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.out_features, self.in_features = sizes_of(self.get_base_layer())
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self._before: list[tuple[Tensor, Tensor | None]] = []

    @property
    def parts(self) -> Mapping[str, Part]:
        """By the names of adapters."""
        return cast(Mapping[str, Part], getattr(self, self.adapter_layer_names[0]))

    def update_layer(self, adapter_name: str, part: Part, inference_mode: bool = False) -> None:
        """Bear one more part."""
        cast(nn.ModuleDict, self.parts)[adapter_name] = part.train(self.get_base_layer().training)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        if named.pop("adapter_names", None) is not None:
            raise ValueError(f"{type(self).__name__} takes one adapter for a whole batch. Call set_adapter, and run the batches apart.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        layer = Layer.plain(self.base_layer, *others, **named)
        if not self.disable_adapters and not self.merged:
            for name in self.active_adapters:
                layer = layer.under(whole(self.parts[name], name)) if name in self.parts else layer
        return layer(x)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put parts into the weight and the bias, which are kept aside to be put back by `unmerge`.

        A layer without a bias may gain one, of which the model's config does not know: a warning says so.

        Raises:
            ValueError: a part cannot be, the layer is packed, or with `safe_merge` a value would not be finite.
        """
        base = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names) or ():
            if name not in self.parts:
                continue
            if isinstance(base, Stored):
                raise ModelError("An update cannot go into a packed weight, which would be rounded anew. Use quantize.dequantize first.")
            part = whole(self.parts[name], name)
            if not part.mergeable:
                raise ValueError(f"{type(part).__name__} is no change of a weight. Keep the adapter {name!r} beside the model.")
            weight, bias = part.merged(*dense_of(base))
            if safe_merge and not all(value.isfinite().all() for value in (weight, bias) if value is not None):
                raise ValueError(f"NaN or infinity in the merged weights: the adapter {name!r} is broken.")
            own = cast(Any, base)
            self._before.append((own.weight.data, None if getattr(own, "bias", None) is None else own.bias.data))
            if bias is not None and self._before[-1][1] is None:
                warnings.warn(GAINS, stacklevel=2)
                removal.mark_bias(own)
            self._set(kept_as(base, weight).to(own.weight.dtype), bias)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weight and the bias that were there before, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.merged_adapters.pop()
            self._set(*self._before.pop())

    def _set(self, weight: Tensor, bias: Tensor | None) -> None:
        base = cast(Any, self.get_base_layer())
        base.weight.data = weight.contiguous()
        if bias is None and getattr(base, "bias", None) is not None:
            removal.mark_bias(base, changed=False)
        if bias is None or getattr(base, "bias", None) is None:
            base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        else:
            base.bias.data = bias

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, as the layer keeps it; float32."""
        base = self.get_base_layer()
        weight, bias = (None if value is None else value.float() for value in dense_of(base))
        assert weight is not None
        change = self.parts[adapter].merged(weight, bias)[0] - weight
        return change.T if transposed(base) else change

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a change of this linear layer's weight, and of nothing else."""
        part, base = self.parts[adapter_name], self.get_base_layer()
        if not part.mergeable or not isinstance(base, nn.Linear):
            return False
        moved = part.merged(*dense_of(base))[1]
        return moved is None if base.bias is None else moved is not None and torch.equal(moved, base.bias)


class Tuner(BaseTuner):
    """Wraps the layers that a config names."""

    tuner_layer_cls: type[Bearer]
    target_module_mapping: dict[str, Any] = {}

    def _create_and_replace(self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str,
                            parameter_name: str | None = None) -> None:  # fmt: skip
        config: TunerConfig = peft_config
        bearer = target if isinstance(target, self.tuner_layer_cls) else self.tuner_layer_cls(target)
        base, method = bearer.get_base_layer(), config.method(current_key)
        if why := out_of_reach(base, method) or method.unfit(sizes_of(base)):
            raise ModelError(f"{method.name()}: {current_key} {why}.")
        weight, bias = (None if value is None else value.detach() for value in dense_of(base))
        assert weight is not None
        if config.stored:  # shapes alone: the values come from a file
            part = empty(lambda: method.part(weight.to("meta"), None if bias is None else bias.to("meta")), weight.device)
            part.hollow = bool(part.state_dict())
        else:
            with torch.device(weight.device):
                part = method.part(weight, bias)
            method.fill(part, current_key)
        if self.uses_shared_state:
            part.join(self.shared[adapter_name])
        bearer.update_layer(adapter_name, part, inference_mode=config.inference_mode)
        if bearer is not target:
            if adapter_name not in self.active_adapters:
                bearer.requires_grad_(False)
            self._replace_module(parent, target_name, bearer, target)

    @property
    def shared(self) -> nn.ModuleDict:
        """What all layers' parts have in common, by the names of adapters."""
        return cast(nn.ModuleDict, getattr(self, f"{self.prefix}shared"))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *others: Any, **told: Any) -> None:
        config = cast(TunerConfig, self.peft_config[adapter_name])
        config = cast(TunerConfig, _maybe_include_all_linear_layers(self._prepare_adapter_config(config, {}), model))
        inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        named = {
            path: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            for path, module in model.named_modules()
            if path and not path.startswith(inside) and self._check_target_module_exists(config, path) is True
        }
        layers = list(named.values())
        found = seen_of(layers, model)
        if config.base_seen is None:
            config.base_seen = found
        elif found is not None and not alike(found, config.base_seen):
            raise ModelError(
                f"This {type_name(config.method_class)} adapter was made on other weights than the model's. Load it on "
                f"{config.base_model_name_or_path or 'the model that it was trained on'}, unchanged."
            )
        if not config.stored:
            places = {path: (config.method(path), *shape_of(layer)) for path, layer in named.items()}
            for path, own in config.method("").divided(places).items():
                config.by_layer[path] = config.by_layer.get(path, {}) | dict(own)
        if self.uses_shared_state:
            self._share(config, adapter_name, layers)
        super().inject_adapter(model, adapter_name, *others, **told)
        config.stored = False  # another adapter of this config begins anew

    def _share(self, config: TunerConfig, adapter_name: str, layers: Sequence[nn.Module]) -> None:
        """Make what an adapter's parts have in common."""
        if not hasattr(self, f"{self.prefix}shared"):
            setattr(self, f"{self.prefix}shared", nn.ModuleDict())
        sizes, method = [sizes_of(layer) for layer in layers], config.method("")
        device = next((value.device for layer in layers for value in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
        if config.stored:
            made = empty(lambda: method.shared(sizes), device)
        else:
            with torch.device(device):
                made = method.shared(sizes)
        self.shared[adapter_name] = made.train(any(layer.training for layer in layers))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for held in ("parts", "shared"):  # peft's own looks for the name before the last word alone
            if f"{cls.prefix}{held}.{adapter_name}." in key:
                return key.replace(f"{cls.prefix}{held}.{adapter_name}.", f"{cls.prefix}{held}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Also of tensors that parts will only have once they have made room for what is loaded."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        held = f"{cls.prefix}parts."
        return {
            key if f"{held}{adapter_name}." in key else key.replace(held, f"{held}{adapter_name}."): value for key, value in found.items()
        }

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        for name, shared in self.shared.items() if self.uses_shared_state else ():
            shared.requires_grad_(name in self.active_adapters and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if self.uses_shared_state:
            del self.shared[adapter_name]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config


def whole(part: Part, name: str) -> Part:
    """A part whose values are there.

    Raises:
        ModelError: they are not: its config came from a file, and its values did not.
    """
    if part.hollow:
        raise ModelError(
            f"The values of the adapter {name!r} were not loaded. Load it with PeftModel.from_pretrained; or, for a new one with these "
            "settings, set `stored = False` on its config first."
        )
    return part


def shape_of(layer: Any) -> tuple[tuple[int, ...], bool]:
    """The shape of a layer's weight, and whether it has a bias."""
    shape = sizes_of(layer) if isinstance(layer, Stored) else dense_of(layer)[0].shape
    return tuple(shape), getattr(layer, "bias", None) is not None


def out_of_reach(layer: Any, method: LayerAdapter) -> str:
    """Why a method cannot stand on a layer of this kind, as the end of a sentence; "" if it can."""
    if isinstance(layer, nn.modules.conv._ConvNd) and not method.on_convolutions:
        return "is a convolution, and it stands on linear layers alone. Leave it out"
    if isinstance(layer, nn.modules.conv._ConvNd) and (layer.transposed or layer.groups > 1 and not method.grouped):
        return f"is a convolution {'that is transposed' if layer.transposed else f'in {layer.groups} groups'}. Leave it out"
    return ""


def empty(make: Callable[[], Made], device: torch.device) -> Made:
    """A module of the right shapes, whose values are not there yet."""
    with torch.device("meta"):
        made = make()
    return made.to_empty(device=device)


def seen_of(layers: Sequence[Any], model: nn.Module) -> list[float] | None:
    """What tells the weights of a model's layers from others: of each its sizes and some values, to four digits.

    None where they are no longer, or not yet, what they were: packed, empty, or with adapters put into them.
    """
    if any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in model.modules()):
        return None
    found: list[float] = []
    for layer in layers:
        if isinstance(layer, Stored) or layer.weight.is_meta:
            return None
        weight = dense_of(layer)[0].detach()
        values = weight.flatten()[:: max(1, weight.numel() // SEEN)][:SEEN]
        found += [*map(float, weight.shape), *(float(f"{value:.4g}") for value in values.float().tolist())]
    return found


def alike(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether what was seen of two models is the same, up to the rounding of 16 bits."""
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=2**-8, abs_tol=1e-6) for a, b in zip(one, other, strict=True))


def course_of(model: nn.Module, steps: int, seed: int) -> Course | None:
    """What our active adapters on a model do in the course of a run of so many optimizer steps; None where there are none that do."""
    courses = []
    for name in cast(Any, model).active_adapters if hasattr(model, "peft_config") else ():
        config = cast(Any, model).peft_config.get(name)
        if isinstance(config, TunerConfig):
            layers = {path: layer for path, layer in unwrapped(model).named_modules() if isinstance(layer, Bearer) and name in layer.parts}
            courses.append(config.method("").course({path: layer.parts[name] for path, layer in layers.items()}, steps, seed))
        elif isinstance(config, peft.AdaLoraConfig):
            courses.append(Allocation(model, name, steps))
    found = [course for course in courses if course is not None]
    return Together(found) if found else None


class Allocation(Course):
    """Moves AdaLoRA's ranks in the course of a run, whose length the config does not know when it is made."""

    def __init__(self, model: Any, adapter: str, steps: int):
        self.tuner, self.config = model.base_model, model.peft_config[adapter]
        share = steps / self.config.total_step
        self.config.tinit, self.config.tfinal = round(self.config.tinit * share), round(self.config.tfinal * share)
        self.config.total_step = steps
        self.tuner.rankallocator.set_total_step(steps)
        self.factors = [value for path, value in model.named_parameters() if adapter in path and ("lora_A" in path or "lora_B" in path)]

    def penalty(self) -> Tensor | None:
        """How far P and Q are from orthogonal, on average, as peft has it for losses that a model computes itself."""
        apart = [from_orthogonal(value if value.shape[0] < value.shape[1] else value.T) for value in self.factors]
        return self.config.orth_reg_weight * torch.stack(apart).mean()

    def update(self, step: int) -> None:
        self.tuner.update_and_allocate(step)

    def state(self) -> dict[str, Tensor]:
        averages = {f"{kind}.{name}": value for kind in AVERAGES for name, value in getattr(self.tuner.rankallocator, kind).items()}
        return averages | {f"pattern.{name}": torch.tensor(kept) for name, kept in (self.config.rank_pattern or {}).items()}

    def resume(self, state: dict[str, Tensor]) -> None:
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind == "pattern":
                self.config.rank_pattern = (self.config.rank_pattern or {}) | {name: value.tolist()}
            else:
                getattr(self.tuner.rankallocator, kind)[name] = value.to(self.factors[0].device)


class StepEvents(TrainerCallback):
    """Lets our adapters that act in the course of a run do so in transformers' `Trainer`: `Trainer(..., callbacks=[StepEvents()])`."""

    course: Course | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        self.course = course_of(model, state.max_steps, args.seed)
        if self.course is not None:
            self.course.optimizers = [getattr(optimizer, "optimizer", optimizer)]
            self.course.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.course is not None:
            self.course.begin(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.course is not None:
            self.course.gradient(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.course is not None:
            self.course.update(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.course is not None:
            self.course.finish()
            self.course.leave()


def type_name(method: type[LayerAdapter]) -> str:
    """The name of the method's type in peft."""
    return method.name().rpartition(".")[2].upper()


def own_fields(method: type[LayerAdapter]) -> list[dataclasses.Field[Any]]:
    """The method's settings, without the choice of layers."""
    return [field for field in dataclasses.fields(method) if field.name not in ("where", "skip")]


@functools.cache
def config_class(method: type[LayerAdapter]) -> type[TunerConfig]:
    """The class of the method's configs."""
    fields = [(field.name, Any, dataclasses.field(default=field.default)) for field in own_fields(method)]
    made = dataclasses.make_dataclass(f"{method.__name__}Config", fields, bases=(TunerConfig,), namespace={"method_class": method})
    made.__module__ = __name__
    return cast(type[TunerConfig], made)


def config_of(layers: Mapping[str, LayerAdapter]) -> TunerConfig:
    """The config for layers, by their paths, with the method's settings for each."""
    first = next(iter(layers.values()))
    names = [field.name for field in own_fields(type(first))]
    own = {name: getattr(first, name) for name in names}
    by_layer = {path: {name: getattr(one, name) for name in names if getattr(one, name) != own[name]} for path, one in layers.items()}
    return config_class(type(first))(
        **own, target_modules=list(layers), by_layer={path: given for path, given in by_layer.items() if given}
    )


def register(method: type[LayerAdapter]) -> None:
    """Make a method known to peft. A second time does nothing.

    Raises:
        KeyError: peft has a method of this name.
    """
    name = type_name(method)
    if name in PeftType.__members__:
        if getattr(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[name]), "method_class", None) is method:
            return
        raise KeyError(f"peft has a method {name} of its own, so that {method.name()} must be called otherwise.")
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    prefix = f"{name.lower()}_"
    bearer = type(f"{method.__name__}Layer", (Bearer,), {"adapter_layer_names": (f"{prefix}parts",), "__module__": __name__})
    own = {"prefix": prefix, "tuner_layer_cls": bearer, "uses_shared_state": method.shared is not LayerAdapter.shared}
    tuner = type(f"{method.__name__}Model", (Tuner,), own | {"__module__": __name__})
    register_peft_method(name=name.lower(), config_cls=config_class(method), model_cls=tuner, prefix=prefix)


def register_all() -> None:
    """Make all our adapters known to peft."""
    for name in find.names():
        if name.startswith("adapt.") and issubclass(found := find.find(name), LayerAdapter):
            register(found)


register_all()
