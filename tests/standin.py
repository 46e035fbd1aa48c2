"""A small stand-in for the starter model and its text, so that what reads them can be tested in a second."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@functools.cache
def documents() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Some topics of Python's own help: (training documents, held-out documents)."""
    from pydoc_data import topics

    found = [text.strip() for _, text in sorted(topics.topics.items()) if 1_000 < len(text) < 20_000]
    return tuple(found[:40]), tuple(found[40:44])


def write(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A random Llama of four blocks with a tokenizer for the topics, saved as a checkpoint."""
    from modelwright.core.data import Text
    from modelwright.starter import new

    stated = {"new": "llama", "config": CONFIG, "tokenizer": {"vocabulary": 400}, "dtype": str(dtype).removeprefix("torch.")}
    return new.model(stated, Text(documents()[0], "topics"), seed).save(folder)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in for the starter model."""
    return write(tmp_path_factory.mktemp("standin") / "starter")


@pytest.fixture
def starter(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inside the test, "starter" is the stand-in and "corpus" are the topics."""
    monkeypatch.setattr("modelwright.starter.path", lambda: stand_in)
    monkeypatch.setattr("modelwright.starter.corpus_text", documents)
    monkeypatch.setattr("modelwright.core.data.corpus_text", documents)
    return stand_in


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """The topics in one text file."""
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(documents()[0]), "utf-8")
    return file
