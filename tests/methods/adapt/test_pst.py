import pytest
import torch
from calibration import TEXT, lettered, normal, surprise
from killing import straight_and_resumed
from tiny import outputs, tiny
from torch import nn

import modelwright as mw
from modelwright.blocks._part import Layer
from modelwright.core import tuners
from modelwright.core.errors import SettingError
from modelwright.core.training import Training
from modelwright.maths.schedules import cubic
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.pst import Pst, Sparsening
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.train import Train

SHORT = Training(tokens=20 * 4 * 16, batch=4, length=16, learning_rate=1e-2, save_every=6)


def parts(model):
    return [layer.parts["default"] for layer in model.modules() if isinstance(layer, tuners.Bearer)]


def fill(part, seed=3):
    with torch.no_grad():
        for number, value in enumerate(part.parameters()):
            value.copy_(normal(*value.shape, seed=seed + number))


def of(weight, absent, **settings):
    layer, part = nn.Linear(weight.shape[1], weight.shape[0]), Pst(**settings).part(weight, None)
    layer.weight.data.copy_(weight)
    part.absent.fill_(absent)
    return layer, part


def test_a_case_by_hand():
    # |W| = [1 2; 3 4]. The row R = (4, 0) makes the scores [5 6; 3 4], so that of two that go, 3 and 4 do.
    weight = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    _, part = of(weight, 2)
    assert torch.equal(part.merged(weight, None)[0], torch.tensor([[0.0, 0.0], [3.0, -4.0]]))
    with torch.no_grad():
        part.score_rows.copy_(torch.tensor([4.0, 0.0]))
    assert torch.equal(part.merged(weight, None)[0], torch.tensor([[1.0, -2.0], [0.0, 0.0]]))


def test_it_is_the_function_of_the_paper():
    weight, x = normal(8, 6), normal(3, 6, seed=1)
    layer, part = of(weight, 20, rank=2, score_rank=3, scale=0.5, score_product=0.7, score_edges=0.3)
    fill(part)
    with torch.no_grad():
        whole = weight + 0.5 * part.up @ part.down
        score = whole.abs() + 0.7 * part.score_up @ part.score_down + 0.3 * (part.score_rows[:, None] + part.score_columns[None])
        masked = whole * (score > score.flatten().kthvalue(20).values)
        assert (masked == 0).sum() == 20
        assert torch.allclose(part(x, Layer.plain(layer)), x @ masked.T + layer.bias, atol=1e-5)
        assert torch.equal(part.merged(weight, layer.bias)[0], part.effective(weight))


def test_at_first_it_prunes_by_magnitude():
    weight = normal(8, 6)
    _, part = of(weight, 24)
    kept = part.merged(weight, None)[0]
    assert torch.equal(kept, Magnitude(sparsity=0.5).tensor(weight))
    assert torch.allclose(part.up.std(), torch.tensor(1.0), atol=0.3)


@pytest.mark.parametrize("absent", [0, 1, 7, 24, 47, 48])
def test_exactly_as_many_entries_go_as_are_to_even_of_equal_ones(absent):
    for weight in (normal(8, 6), torch.ones(8, 6)):
        assert (of(weight, absent)[1].merged(weight, None)[0] == 0).sum() == absent


def test_the_gradient_of_the_mask_is_that_of_the_scores_and_reaches_weights_both_ways():
    weight, x, gradient = normal(5, 4), normal(7, 4, seed=1), normal(7, 5, seed=2)
    layer, part = of(weight, 8, rank=2, score_rank=2)
    fill(part)
    part.train()
    part(x, Layer.plain(layer)).backward(gradient)
    of_weight, whole, mask = gradient.T @ x, part.whole(weight).detach(), part.effective(weight).detach() != 0
    of_score = of_weight * whole
    assert torch.allclose(part.score_up.grad, of_score @ part.score_down.detach().T, atol=1e-4)
    assert torch.allclose(part.score_rows.grad, of_score.sum(1), atol=1e-4)
    assert torch.allclose(part.score_columns.grad, of_score.sum(0), atol=1e-4)
    assert torch.allclose(part.up.grad, (of_weight * mask + of_score * whole.sign()) @ part.down.detach().T, atol=1e-4)


def test_parameters_are_counted_as_published():
    # r₁ (o + i) + r₂ (o + i) + o + i
    part = Pst(rank=3, score_rank=2).part(torch.zeros(9, 7), None)
    assert sum(value.numel() for value in part.parameters()) == 3 * 16 + 2 * 16 + 16


def test_sparsity_rises_by_a_cubic_curve_between_two_shares_of_the_run():
    part = Pst(sparsity=0.8).part(torch.zeros(100, 10), None)
    course, found = Sparsening([part], 100, 0.1, 0.7), []
    for step in range(100):
        course.begin(step)
        found.append(int(part.absent))
    assert found[:11] == [0] * 11
    assert found[40] == int(cubic(0.5, 0.0, 0.8) * 1000) == 700
    assert found[70:] == [800] * 30
    assert found == sorted(found)
    course.finish()
    assert int(part.absent) == 800


def test_the_mask_is_found_once_for_a_step():
    weight, x, masks = normal(5, 4), normal(3, 4), []
    layer, part = of(weight, 8)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    for _ in range(2):
        for _ in range(2):  # parts of a step's batch
            part(x, Layer.plain(layer)).square().sum().backward()
            masks.append(part._found[1])
        optimizer.step()
    assert masks[0] is masks[1]
    assert masks[2] is masks[3] is not masks[1]


def test_a_run_ends_at_the_sparsity_and_folds_to_what_it_computed():
    model = lettered()
    mw.apply(model, Pst(sparsity=0.5))
    assert torch.equal(outputs(model.module), outputs(tiny()))
    mw.apply(model, Train(tokens=SHORT.tokens, batch=4, length=16, learning_rate=1e-2), data=TEXT)
    assert surprise(model) < surprise(lettered())
    expected = outputs(model.module)
    mw.apply(model, Fold())
    assert torch.allclose(outputs(model.module), expected, atol=1e-5)
    for block in model.module.model.layers:
        for weight in (block.self_attn.q_proj.weight, block.mlp.down_proj.weight):
            assert (weight == 0).sum() == weight.numel() // 2
    assert torch.equal(model.module.model.layers[0].input_layernorm.weight, tiny().model.layers[0].input_layernorm.weight)


@pytest.mark.parametrize("last", [pytest.param(5, marks=pytest.mark.slow), 13])
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path, last):
    ids = torch.tensor(lettered().tokenizer(TEXT[0])["input_ids"])

    def made():
        module = mw.apply(lettered(), Pst(sparsity=0.5)).module
        return module, tuners.course_of(module, SHORT.steps, 0)

    straight, resumed = straight_and_resumed(made, ids, SHORT, tmp_path, last)
    one, other = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(outputs(straight.eval()), outputs(resumed.eval()))


def test_matrices_may_have_sparsities_of_their_own():
    model = mw.apply(mw.open(tiny()), Pst(sparsity={"attn.q": 0.3, "mlp": 0.8}))
    tuners.course_of(model.module, 10, 0).finish()
    shares = {float(part.absent / part.size) for part in parts(model.module)}
    assert sorted(round(share, 2) for share in shares) == [0.3, 0.8]


@pytest.mark.parametrize("dim", [0, 1])
def test_outputs_and_inputs_can_leave(dim):
    weight, index = normal(6, 5), torch.tensor([0, 2, 3])
    part = Pst().part(weight, None)
    fill(part)
    expected = part.merged(weight, None)[0].index_select(dim, index)
    part.select(dim, index)
    assert torch.allclose(part.merged(weight.index_select(dim, index), None)[0], expected, atol=1e-6)
    assert part.size == 3 * (6 if dim else 5)


def test_bad_settings_are_refused():
    for settings in ({"sparsity": 1.5}, {"rank": 0}, {"begin": 0.8, "end": 0.5}):
        with pytest.raises(SettingError, match=next(iter(settings))):
            Pst(**settings)


def test_the_mask_is_found_anew_when_the_weight_under_it_changes():
    weight = normal(6, 5)
    part = Pst().part(weight, None)
    part.absent.fill_(15)
    before = part.merged(weight, None)[0] == 0
    weight.copy_(weight.flip(0))
    assert torch.equal(part.merged(weight, None)[0] == 0, before.flip(0))  # at first S is |W|
