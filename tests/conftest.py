"""What tests share: a small model with a tokenizer on disk, and text that it knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from killing import TEXT

from modelwright.core.contract import letters
from modelwright.core.model import Model
from modelwright.core.tiny import tiny


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    """No test leaves torch another number of threads, with which later ones would sum in another order."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A folder with a tiny Llama and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("small") / "llama"
    Model(name="llama", module=tiny("llama"), tokenizer=letters()).save(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Text that the tokenizer knows."""
    file = tmp_path_factory.mktemp("text") / "letters.txt"
    file.write_text(TEXT)
    return file
