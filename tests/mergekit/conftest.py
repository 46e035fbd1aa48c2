"""Small models on disk to be merged, and the merge of a configuration given as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from standin import stand_in, starter  # noqa: F401
from tiny import tiny

import modelwright as mw
from modelwright.core.contract import letters
from modelwright.core.model import Model
from modelwright.core.weights import Checkpoint


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny Llamas by name: a, b and c of four blocks; tied ties its head; tall has more rows."""
    root = tmp_path_factory.mktemp("models")
    kinds = {"a": {}, "b": {}, "c": {}, "tied": {"tie_word_embeddings": True}, "tall": {"vocab_size": 105}}
    found = {}
    for seed, (name, overrides) in enumerate(kinds.items(), 1):
        found[name] = Model(name=name, module=tiny("llama", seed=seed, **overrides), tokenizer=letters()).save(root / name)
    for seed in (1, 2):
        found[f"t5-{seed}"] = Model(name="t5", module=tiny("t5", seed=seed)).save(root / f"t5-{seed}")
    windows = tiny("qwen2", seed=7, layer_types=LAYER_TYPES, use_sliding_window=True, sliding_window=8)
    found["qwen2"] = Model(name="qwen2", module=windows).save(root / "qwen2")
    return found


LAYER_TYPES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


@pytest.fixture
def merge(folders, tmp_path, monkeypatch):
    """Merge a configuration whose models are named as in `folders`: the checkpoint, with `.model` beside it."""
    monkeypatch.chdir(next(iter(folders.values())).parent)

    def run(text: str, save: str = "out", **options) -> Checkpoint:
        model = mw.merge(text + "\n", save=tmp_path / save, **options)
        merged = Checkpoint(tmp_path / save)
        merged.model = model
        merged.notes = model.history[-1]["notes"]
        return merged

    return run


@pytest.fixture
def read(folders):
    """A tensor of one of the `folders`."""
    return lambda name, tensor: Checkpoint(folders[name]).read(tensor)
