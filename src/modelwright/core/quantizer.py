"""The registered quantizer: after `import modelwright`, plain `from_pretrained` reads models stored in our own ways."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import sharing
from .loading import METHOD, holds_codes, install


class ModelwrightConfig(QuantizationConfigMixin):
    """What `config.json` says of a model.

    `modules`: module name -> description of the layer that stands there (see `modelwright.blocks`). `ties`: alias -> name of
    the tensor that is stored (see `sharing`).
    """

    def __init__(self, modules: dict[str, dict[str, Any]] | None = None, ties: dict[str, str] | None = None, **others: Any):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.modules = modules or {}
        self.ties = ties or {}
        self.dequantize = False


class ModelwrightQuantizer(HfQuantizer):
    """Puts the described layers into the empty model before its weights are read, and ties what is shared."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        stated: Any = self.quantization_config
        install(model, stated.modules)
        sharing.leave_out(model, stated.ties)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        stated: Any = self.quantization_config
        sharing.tie(model, stated.ties)
        if not holds_codes(stated.modules):
            model.is_quantized = False  # type: ignore[assignment]  # smaller, but all of floats: it trains and changes dtype as any other

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        """What `save_pretrained` writes: shared tensors once."""
        return sharing.written(model), {}

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know `quant_method: modelwright`; safe to call again."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(ModelwrightConfig)
        register_quantizer(METHOD)(ModelwrightQuantizer)


register()
