"""Steps that meet a model with an adapter of ours: what they can do with it, and the sentence where they cannot."""

import pytest
import torch
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core import adapters
from modelwright.core.errors import ModelError
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.hydra import Hydra
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.adapt.parallel import Parallel
from modelwright.methods.adapt.ssf import Ssf
from modelwright.methods.adapt.svfit import Svfit
from modelwright.methods.adapt.triadapt import Triadapt
from modelwright.methods.prune.dsee_heads import DseeHeads


def adapted(method):
    model = mw.apply(mw.open(tiny()), method)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.module.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=random))
    return model


def test_low_rank_updates_of_ours_are_read_as_lora_and_attach_as_lora():
    model = adapted(Hydra(parallel=3, sequential=0, scale=2.0, where="attn.{q,v}"))
    updates, whole = adapters.read(model)
    assert whole == {}
    assert len(updates) == 8
    assert {update.rank for update in updates.values()} == {3}
    assert torch.allclose(outputs(adapters.attach(tiny(), updates, whole)), outputs(model.module), atol=1e-5)


@pytest.mark.parametrize("method", [Ssf(), Hydra(), Parallel(inner=4)])
def test_other_adapters_cannot_be_read(method):
    with pytest.raises(ModelError, match=r"only low-rank updates of linears and embeddings can be read; \d+ of its layers are otherwise"):
        adapters.read(adapted(method))


@pytest.mark.parametrize("method", [Hydra(), Ssf(), Parallel(inner=4)])
def test_heads_do_not_leave_an_adapter_that_is_more_than_low_rank(method):
    model = adapted(method)
    before = outputs(model.module)
    with pytest.raises(ModelError, match=r"Fold it with adapt\.fold"):
        mw.apply(model, DseeHeads(share=0.5))
    assert torch.equal(outputs(model.module), before)


def test_heads_leave_low_rank_adapters_and_a_folded_one():
    for method in (Lora(rank=2), Triadapt(rank=2), Svfit(rank=2)):
        assert outputs(mw.apply(adapted(method), DseeHeads(share=0.5)).module).isfinite().all()
    model = mw.apply(adapted(Hydra()), Fold())
    assert outputs(model.module).isfinite().all()
