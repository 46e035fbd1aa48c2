"""The small models live in the package, where `modelwright check` needs them too."""

from modelwright.core.tiny import CAUSAL, MODELS, MODULES, outputs, tiny, tiny_inputs

__all__ = ["CAUSAL", "MODELS", "MODULES", "outputs", "tiny", "tiny_inputs"]
