import pytest
import torch
from calibration import batches
from tiny import outputs, tiny

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.core.model import Model
from modelwright.core.passage import similarities_of_blocks
from modelwright.methods.prune.adapt_pruner import AdaptPruner, importances
from modelwright.methods.prune.llm_pruner import LlmPruner


def counts(module, kind):
    return [units.count for units in anatomy_of(module).units(module, kind)]


def test_importances_by_hand():
    # Cosines .9, .5, .7: minus them -.9, -.5, -.7, whose mean is -.7: -.2, .2, 0 over .2.
    assert list(importances([0.9, 0.5, 0.7], [0, 1, 2]).values()) == pytest.approx([-1, 1, 0])
    assert importances([0.9, 0.5, 0.7], [0, 2]) == pytest.approx({0: -1, 2: 1})
    assert list(importances([0.4, 0.4], [0, 1]).values()) == [0, 0]
    assert sum(importances([0.1, 0.5, 0.2, 0.9], [0, 1, 2, 3]).values()) == pytest.approx(0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_similarities_are_those_of_the_hidden_states(name):
    module = tiny(name)
    data = batches(module)
    found = similarities_of_blocks(Model(name="", module=module), data)
    sums, tokens = torch.zeros(len(found)), 0
    states = []
    stack = module.get_submodule(anatomy_of(module).blocks(module))
    handles = [block.register_forward_hook(lambda _, args, out: states.append((args[0], out[0] if isinstance(out, tuple) else out)))
               for block in stack]  # fmt: skip
    with torch.no_grad():
        for batch in data:
            states.clear()
            module(**batch)
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            sums += torch.stack([torch.cosine_similarity(one[mask], two[mask], dim=-1).sum() for one, two in states])
            tokens += int(mask.sum())
    for handle in handles:
        handle.remove()
    assert found == pytest.approx((sums / tokens).tolist(), abs=1e-5)


def test_without_amplitude_all_blocks_lose_the_same():
    module = tiny("llama")
    mw.apply(module, AdaptPruner(share=0.25, steps=4, amplitude=0.0, units=("mlp",)), data=batches(module))
    assert counts(module, "mlp") == [120] * 4


def test_in_one_step_without_amplitude_it_is_llm_pruner():
    ours, theirs = tiny("llama"), tiny("llama")
    mw.apply(ours, AdaptPruner(share=0.999, steps=4, amplitude=0.0, units=("mlp",)), data=batches(ours))
    assert counts(ours, "mlp") == [1] * 4  # floor(160 · 0.01)
    ours = tiny("llama")
    mw.apply(ours, AdaptPruner(share=0.25, steps=4, amplitude=0.0, units=("mlp",)), data=batches(ours))
    mw.apply(theirs, LlmPruner(share=0.25, spare_first=0, spare_last=0, units=("mlp",)), data=batches(theirs))
    assert torch.allclose(outputs(ours), outputs(theirs), atol=1e-6)


def test_blocks_that_turn_their_input_more_lose_less(tmp_path):
    module = tiny("llama")
    with torch.no_grad():
        for depth, block in enumerate(module.model.layers):
            for layer in (block.mlp.down_proj, block.self_attn.o_proj):
                layer.weight.mul_(3.0 if depth == 2 else 0.2)
    similarities = similarities_of_blocks(Model(name="", module=module), batches(module))
    assert min(similarities) == similarities[2]
    before = sum(value.numel() for value in module.parameters())
    costs = {kind: sum(counts(module, kind)) for kind in ("mlp", "heads")}
    model = mw.apply(Model(name="llama", module=module), AdaptPruner(share=0.3, steps=20, amplitude=0.03), data=batches(module))
    assert max(counts(module, "mlp")) == counts(module, "mlp")[2] > 140
    prunable = costs["mlp"] * 3 * 64 + costs["heads"] * 6 * 8 * 64
    gone = before - sum(value.numel() for value in module.parameters())
    assert 0.3 * prunable - 3 * 64 < gone <= 0.3 * prunable  # to the last neuron
    model.save(tmp_path / "out")
    assert torch.equal(outputs(type(module).from_pretrained(tmp_path / "out").eval()), outputs(module))
