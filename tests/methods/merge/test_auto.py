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


def test_a_base_counts_as_strong_from_that_number_of_parameters_on():
    count = sum(value.numel() for value in tiny().parameters())
    for strong, words in ((count, "at least"), (count + 1, "fewer than")):
        chosen = merged_as(Auto(strong=strong))
        plain = merged_as(Linear() if words == "at least" else Ties())
        assert all(torch.equal(value, plain.module.get_parameter(name)) for name, value in chosen.module.named_parameters())
        assert f"merge.auto: {count:,} parameters are {words} {strong:,}" in chosen.history[-1]["notes"][0]
    assert Auto().strong == 24_000_000_000


def test_weights_are_handed_on():
    chosen, plain = merged_as(Auto(strong=1000, weights=[1, 3])), merged_as(Linear(weights=[1, 3]))
    assert all(torch.equal(value, plain.module.get_parameter(name)) for name, value in chosen.module.named_parameters())
