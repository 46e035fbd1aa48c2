"""Whatever a method takes out, what is left computes as the model did with those units silenced, on every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import image, net
from tiny import CAUSAL, outputs, tiny, tiny_inputs

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.core import find
from modelwright.core.contract import letters
from modelwright.core.errors import LayoutError
from modelwright.core.model import Model
from modelwright.methods.prune import _units
from modelwright.methods.prune._units import UnitPruner

KINDS = ["llama", "qwen3", "gemma", "gpt2", "gpt_neox", "mixtral", "bert", "vit", "resnet"]
SETTINGS = {
    "prune.adapt_pruner": {"steps": 4},
    "prune.llm_pruner": {"spare_first": 1, "spare_last": 1},
    "prune.precropping": {"keep": 0.6, "scope": "model"},
    "prune.prunenet": {"episodes": 2},
}
HOMES = {"prune.reap": ["mixtral"], "prune.precropping": ["resnet"]}  # by default all but the last
METHODS = [name for name in find.names() if name in HOMES or issubclass(find.find(name), UnitPruner)]
PLACES = [(name, kind) for name in METHODS for kind in HOMES.get(name, KINDS[:-1])]


def silenced(module, kind, kept):
    """A copy with zeros on the output side of all units of a kind but those that are kept."""
    module = copy.deepcopy(module)
    tensors = dict(module.named_parameters())
    for units, rows in zip(anatomy_of(module).units(module, kind), kept, strict=True):
        gone = torch.tensor([n for n in range(units.count) if n not in set(rows)], dtype=torch.long)
        for span in units.spans:
            if span.output:
                places = span.start + (gone[:, None] * span.width + torch.arange(span.width)).flatten()
                tensors[span.name].data.index_fill_(span.dim, places, 0)
    return module


@pytest.mark.parametrize(("name", "kind"), [*PLACES, ("prune.llm_pruner", "resnet")])
def test_what_is_taken_out_was_silenced(name, kind, monkeypatch) -> None:
    module = net("resnet") if kind == "resnet" else tiny(kind)
    batches = [{"x": image(seed)} if kind == "resnet" else tiny_inputs(module, seed) for seed in range(3)]
    for batch in batches:
        if "llm_pruner" in name or "adapt" in name:  # which take a loss
            batch |= {"labels": torch.tensor([0, 1])} if kind in ("vit", "resnet") else {}
    shown = (lambda module: module(image())) if kind == "resnet" else outputs
    remove, apart = _units.remove_units, {}

    def removed(module, what, kept, **how):
        expected = shown(silenced(module, what, kept))
        done = remove(module, what, kept, **how)
        apart[what] = max(apart.get(what, 0.0), float((shown(module) - expected).detach().abs().max()))
        return done

    monkeypatch.setattr(_units, "remove_units", removed)
    cls, settings = find.find(name), SETTINGS.get(name, {})
    if kind == "resnet" and name != "prune.precropping":
        settings = settings | {"units": ("channels",), "spare_first": 0, "spare_last": 0}
    model = Model(name=kind, module=module, tokenizer=letters() if kind in CAUSAL else None)
    if "adapters" in cls.wants:
        mw.apply(model, find.find("adapt.lora")(rank=2))
    if (name, kind) == ("prune.prunenet", "mixtral"):  # which takes neurons, and these are all in experts
        with pytest.raises(LayoutError, match="has no mlp to remove"):
            mw.apply(model, cls(**settings), data=batches)
        return
    mw.apply(model, cls(**settings), data=batches)
    assert apart
    assert all(gap < 1e-5 for what, gap in apart.items() if what != "experts"), apart  # a silenced expert would still be chosen
