"""Small quantised models to write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import tiny

import modelwright as mw
from modelwright.core.contract import letters
from modelwright.core.model import Model


@pytest.fixture
def quantised() -> Callable[..., Model]:
    """A small model after a method; its rows have 128, 256 or 64 weights."""

    def make(method, kind: str = "llama", dtype: torch.dtype = torch.float16, **config) -> Model:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 97, "num_hidden_layers": 2}
        made = tiny(kind, **(sizes | config)).to(dtype)
        return mw.apply(Model(name=kind, module=made, tokenizer=letters()), method)

    return make
