import torch
from tiny import tiny

import modelwright as mw
from modelwright.methods.merge.auto import Auto
from modelwright.methods.merge.linear import Linear
from modelwright.methods.merge.ties import Ties


def merged_as(method):
    model = mw.open(tiny(seed=1))
    mw.apply(model, method, donors=[tiny(seed=5), tiny(seed=6)])
    return model


def test_a_weak_base_gets_ties_and_a_strong_one_the_average_and_it_says_why():
    for method, same, words in ((Auto(), Ties(), "fewer than"), (Auto(strong=1000), Linear(), "at least")):
        chosen, plain = merged_as(method), merged_as(same)
        for name, value in chosen.module.named_parameters():
            assert torch.equal(value, plain.module.get_parameter(name)), name
        (note,) = chosen.history[-1]["notes"]
        assert words in note


def test_weights_are_handed_on():
    chosen, plain = merged_as(Auto(strong=1000, weights=[1, 3])), merged_as(Linear(weights=[1, 3]))
    assert all(torch.equal(value, plain.module.get_parameter(name)) for name, value in chosen.module.named_parameters())
