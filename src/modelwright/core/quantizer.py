"""The registered quantizer: after `import modelwright`, plain `from_pretrained` reads models stored in our own ways."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .loading import METHOD, install


class ModelwrightConfig(QuantizationConfigMixin):
    """`modules`: module name -> description of the layer that stands there (see `modelwright.blocks`)."""

    def __init__(self, modules: dict[str, dict[str, Any]] | None = None, **others: Any):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.modules = modules or {}
        self.dequantize = False


class ModelwrightQuantizer(HfQuantizer):
    """Puts the described layers into the empty model before its weights are read."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        install(model, self.quantization_config.modules)  # type: ignore[attr-defined]

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
