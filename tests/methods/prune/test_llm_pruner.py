import pytest
import torch
from calibration import batches, lettered
from nets import image, net
from tiny import outputs, tiny

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.core.errors import SiteError
from modelwright.core.gradients import gradient_moments
from modelwright.core.model import Model
from modelwright.methods.prune._units import per_member
from modelwright.methods.prune.llm_pruner import LlmPruner
from modelwright.methods.train import Train


def scored(module, **settings):
    method = LlmPruner(spare_first=0, spare_last=0, **settings)
    found = method.found(module)
    return found, method.scores(module, found, method.look(Model(name="", module=module), found, batches(module)))


def test_members_by_hand():
    # Two units of two channels in one matrix, and of one channel in another.
    parts = [torch.tensor([[[1.0, -2.0], [3.0, 4.0]], [[0.0, 1.0], [-1.0, -1.0]]]), torch.tensor([[[5.0]], [[-2.0]]])]
    # Summed over a channel and then in size: |-1| + |7| = 8, |1| + |-2| = 3; 5 and 2.
    for members, expected in (("sum", [13.0, 5.0]), ("mean", [6.5, 2.5]), ("max", [8.0, 3.0]), ("prod", [40.0, 6.0])):
        assert LlmPruner(members=members).reduced(parts).tolist() == expected


def test_the_moments_of_gradients_are_those_of_the_rows():
    module = tiny("llama")
    rows = [batches(module)[0]["input_ids"][:1], batches(module)[0]["input_ids"][1:2]]
    mean, square = gradient_moments(Model(name="", module=module), [{"input_ids": torch.cat(rows)}])
    found = []
    for row in rows:
        module.zero_grad()
        module(input_ids=row, labels=row).loss.backward()
        found.append(module.lm_head.weight.grad.clone())
    assert torch.allclose(mean["lm_head.weight"], (found[0] + found[1]) / 2, atol=1e-6)
    assert torch.allclose(square["lm_head.weight"], (found[0] ** 2 + found[1] ** 2) / 2, atol=1e-8)


@pytest.mark.parametrize("effect", ["first", "second", "mix", "channel"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_units_that_do_nothing_score_0_and_go_first(effect, name):
    module = tiny(name)
    for kind, dead in (("mlp", [3, 50]), ("heads", [1])):
        for units in anatomy_of(module).units(module, kind):
            for span in units.spans:
                if span.output:
                    for unit in dead:
                        module.get_parameter(span.name).data.narrow(span.dim, span.start + unit * span.width, span.width).zero_()
    found, scores = scored(module, effect=effect)
    for units, score in zip(found, scores, strict=True):
        dead = [3, 50] if units.kind == "mlp" else [1]
        assert score[dead].tolist() == [0.0] * len(dead)
        assert (score > 0).sum() == units.count - len(dead)
    before = outputs(module)
    mw.apply(module, LlmPruner(spare_first=0, spare_last=0, share=2 / 160, units=("mlp",), effect=effect), data=batches(module))
    assert torch.allclose(outputs(module), before, atol=1e-5)


def test_a_key_value_head_is_scored_with_the_query_heads_that_leave_with_it():
    module = tiny("llama")  # 8 query heads of width 8 and 4 key-value heads: heads 2j and 2j + 1 read head j
    found, _ = scored(module, units=("heads",))
    ones = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    for head in range(8):
        ones["model.layers.0.self_attn.q_proj.weight"][head * 8 : head * 8 + 8] = head
    query = next(part for span, part in zip(found[0].spans, per_member(found[0], ones), strict=True) if span.name.endswith("q_proj.weight"))
    assert query.mean((1, 2)).tolist() == [0.5, 2.5, 4.5, 6.5]


def test_spared_blocks_stay_whole_and_the_count_is_the_formulas():
    module = tiny("llama")
    before = sum(value.numel() for value in module.parameters())
    mw.apply(module, LlmPruner(share=0.25, spare_first=1, spare_last=1), data=batches(module))
    assert [block.mlp.up_proj.out_features for block in module.model.layers] == [160, 120, 120, 160]
    assert [block.self_attn.k_proj.out_features for block in module.model.layers] == [32, 24, 24, 32]
    gone = 2 * (40 * 3 * 64 + (2 + 2 * 2) * 8 * 64)  # of two blocks: neurons of three rows, a head with two of queries
    assert sum(value.numel() for value in module.parameters()) == before - gone


def test_more_blocks_spared_than_there_are_is_said():
    with pytest.raises(SiteError, match=r"of 4 blocks all are spared \(spare_first=4, spare_last=2\)"):
        mw.apply(tiny("llama"), LlmPruner(), data=batches(tiny("llama")))


def test_a_pruned_model_trains_on_and_keeps_its_sizes(tmp_path):
    model = lettered()
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    mw.apply(model, LlmPruner(share=0.25, spare_first=1, spare_last=1), data=text, samples=4, length=16)
    shapes = {name: value.shape for name, value in model.module.named_parameters()}
    before = outputs(model.module)
    mw.apply(model, Train(tokens=512, batch=4, length=16), data=text)
    assert not torch.equal(outputs(model.module), before)
    assert {name: value.shape for name, value in model.module.named_parameters()} == shapes


def test_channels_of_a_convolutional_network_leave_by_the_loss_of_its_classes():
    module, before = net("resnet"), net("resnet")
    batches = [{"x": image(seed), "labels": torch.tensor([seed, 1])} for seed in range(3)]
    module.blocks[1].bn1.bias.data += 1.0  # so that all others say something
    module.blocks[1].conv1.weight.data[3] = 0.0  # a channel that says nothing: its norm gives a constant, which also goes
    module.blocks[1].bn1.weight.data[3] = module.blocks[1].bn1.bias.data[3] = 0.0
    before.load_state_dict(module.state_dict())
    mw.apply(module, LlmPruner(units=("channels",), share=0.125, spare_first=0, spare_last=0), data=batches)
    assert [block.conv1.out_channels for block in module.blocks] == [7, 7, 14, 14]
    assert torch.equal(module.blocks[1].conv1.weight, before.blocks[1].conv1.weight[[0, 1, 2, 4, 5, 6, 7]])
