import peft
import pytest
import torch
from calibration import TEXT, lettered, normal, surprise
from killing import straight_and_resumed
from tiny import outputs, tiny
from torch import nn

import modelwright as mw
from modelwright.blocks._part import Layer
from modelwright.core import tuners
from modelwright.core.errors import SettingError, SiteError
from modelwright.core.training import Training, train
from modelwright.methods.adapt.triadapt import Growth, Triadapt
from modelwright.methods.train import Train

SHORT = Training(tokens=40 * 4 * 16, batch=4, length=16, learning_rate=1e-2, save_every=7)
GROWS = dict(rank=4, every=5)


def parts(model):
    return [layer.parts["default"] for layer in model.modules() if isinstance(layer, tuners.Bearer)]


def fill(part, seed=3):
    with torch.no_grad():
        for number, value in enumerate(part.parameters()):
            value.copy_(normal(*value.shape, seed=seed + number))


def values(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_a_case_by_hand():
    # A piece of rank 1, then one of rank 2. C is 3 × 3; the first piece puts 2 + 3 = 5 at its corner, the second has the rows
    # [1 2 3; 4 5 6] at the bottom and the columns [1 2; 3 4; 5 6] at the right, which meet in [2 3; 5 6] + [3 4; 5 6].
    part = Triadapt(rank=4, alpha=4.0).part(torch.zeros(2, 2), None)
    part.update.grow(2)
    with torch.no_grad():
        for value, given in ((part.update.rows[0], [[2.0]]), (part.update.columns[0], [[3.0]]),
                             (part.update.rows[1], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
                             (part.update.columns[1], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])):  # fmt: skip
            value.copy_(torch.tensor(given))
    assert torch.equal(part.update.core(), torch.tensor([[5.0, 1.0, 2.0], [1.0, 5.0, 7.0], [4.0, 10.0, 12.0]]))


def test_with_one_piece_it_is_lora_with_a_matrix_between():
    weight, x = normal(6, 5), normal(3, 5, seed=1)
    layer, part = nn.Linear(5, 6), Triadapt(rank=8, first_rank=3, alpha=4.0).part(weight, None)
    layer.weight.data.copy_(weight)
    fill(part)
    up, down, core = part.update.ups[0], part.update.downs[0], part.update.rows[0] + part.update.columns[0]
    assert torch.allclose(part(x, Layer.plain(layer)), layer(x) + 0.5 * x @ down.T @ core.T @ up.T, atol=1e-5)


def test_it_begins_with_normal_factors_and_a_gradient_in_the_core():
    model = mw.apply(lettered(), Triadapt(first_rank=4))
    before = outputs(tiny())
    assert torch.equal(outputs(model.module), before)
    ends = torch.cat([value.flatten() for part in parts(model.module) for value in (*part.update.ups, *part.update.downs)])
    assert ends.std().item() == pytest.approx(0.02, rel=0.02)
    ids = torch.tensor([model.tokenizer(TEXT[0])["input_ids"][:64]])
    with torch.enable_grad():
        model.module(input_ids=ids, labels=ids).loss.backward()
    for part in parts(model.module):
        assert not part.update.core().any()
        assert part.update.rows[0].grad.abs().sum() > 0
        assert part.update.columns[0].grad.abs().sum() > 0


def test_parameters_are_counted_as_published():
    # R (in + out) + R² + Σ a²
    part = Triadapt(rank=6).part(torch.zeros(9, 7), None)
    part.update.grow(3)
    part.update.grow(2)
    assert sum(value.numel() for value in part.parameters()) == 6 * (9 + 7) + 36 + (1 + 9 + 4)


def test_a_new_piece_changes_no_output():
    weight, x = normal(6, 5), normal(3, 5, seed=1)
    part = Triadapt(rank=4).part(weight, None)
    fill(part)
    before = part.update(x)
    part.update.grow(2)
    assert torch.allclose(part.update(x), before, atol=1e-6)
    assert part.update.factors()[0].shape == (6, 3)


def test_ranks_grow_in_a_run_and_stop_at_their_sum():
    model = lettered()
    mw.apply(model, Triadapt(rank=4, every=2))
    found, ranks = parts(model.module), []
    ids = torch.tensor(model.tokenizer(TEXT[0])["input_ids"])
    course = tuners.course_of(model.module, SHORT.steps, 0)
    train(model.module, ids, SHORT, course=course, report=lambda *_: ranks.append(sum(sum(part.update.ranks) for part in found)))
    target = 4 * len(found)
    assert ranks[0] == len(found)
    assert ranks == sorted(ranks)
    assert target <= ranks[-1] < target + 2 * len(found)
    assert len(set(ranks)) > 3
    assert ranks[3] == len(found)  # of 40 steps the first 4 are without growth
    grown = [part for part in found if len(part.update.ranks) > 1]
    assert all(part.update.columns[1].any() and part.update.ups[1].any() for part in grown)  # what was added trains
    assert len({sum(part.update.ranks) for part in found}) > 1


def made(seed=0):
    model = lettered(seed=seed)
    mw.apply(model, Triadapt(**GROWS))
    return model.module, tuners.course_of(model.module, SHORT.steps, 0)


@pytest.mark.parametrize("last", [pytest.param(4, marks=pytest.mark.slow), 16, pytest.param(33, marks=pytest.mark.slow)])
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path, last):
    ids = torch.tensor(lettered().tokenizer(TEXT[0])["input_ids"])
    straight, resumed = straight_and_resumed(made, ids, SHORT, tmp_path, last)
    one, other = values(straight), values(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any("downs.1" in name for name in one)


def test_the_layers_whose_core_rose_most_grow():
    method = Triadapt(rank=3, every=1, begin_growing=0.0)
    made = [method.part(torch.zeros(8, 8), None) for _ in range(4)]
    course = Growth(method, made, steps=100, seed=0)
    with torch.no_grad():
        for size, part in zip((1.0, 4.0, 2.0, 3.0), made, strict=True):
            part.update.rows[0].fill_(size)
    course.update(0)  # of 8 ranks that lack, a hundredth: at least one layer
    assert [part.update.ranks for part in made] == [[1], [1, 1], [1], [1]]
    made[2].update.rows[0].data.fill_(5.0)
    course.update(1)  # risen by 0, 4/2 - 4, 3, 0
    assert [len(part.update.ranks) for part in made] == [1, 2, 2, 1]
    course.update(99)  # all that lack: 6, more than there are layers
    assert [len(part.update.ranks) for part in made] == [2, 3, 3, 2]


def test_the_number_that_grows_follows_the_schedule():
    for schedule, expected in (("linear", 4), ("exponential", 2)):  # 8 · ½, and e^(½ ln 8) = 2.8
        method = Triadapt(rank=2, every=1, begin_growing=0.0, schedule=schedule)
        made = [method.part(torch.zeros(8, 8), None) for _ in range(8)]
        with torch.no_grad():
            for number, part in enumerate(made):
                part.update.rows[0].fill_(number)
        Growth(method, made, steps=10, seed=0).update(4)
        assert sum(len(part.update.ranks) > 1 for part in made) == expected


def test_the_penalty_has_the_gradient_of_its_formula():
    method = Triadapt(rank=3, first_rank=2, orthogonality=0.5)
    part = method.part(torch.zeros(4, 5), None)
    fill(part)
    Growth(method, [part], steps=10, seed=0).penalty().backward()
    down, up = part.update.downs[0], part.update.ups[0]
    square = down.detach() @ down.detach().T - torch.eye(2)
    assert torch.allclose(down.grad, 0.5 * 2 * square @ down.detach() / square.norm(), atol=1e-5)
    square = up.detach().T @ up.detach() - torch.eye(2)
    assert torch.allclose(up.grad, 0.5 * 2 * up.detach() @ square / square.norm(), atol=1e-5)
    assert part.update.rows[0].grad is None


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
def test_a_grown_adapter_is_saved_and_loaded_and_is_a_lora_exactly(tmp_path):
    model = lettered()
    mw.apply(model, [Triadapt(**GROWS), Train(tokens=SHORT.tokens, batch=4, length=16, learning_rate=1e-2)], data=TEXT)
    ranks = [part.update.ranks for part in parts(model.module)]
    assert any(len(own) > 1 for own in ranks)
    assert surprise(model) < surprise(lettered())
    model.save(tmp_path / "grown")
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "grown")).eval()
    assert [part.update.ranks for part in parts(loaded)] == ranks
    assert torch.allclose(outputs(loaded), outputs(model.module), atol=1e-6)
    for layer in (layer for layer in loaded.modules() if isinstance(layer, tuners.Bearer)):
        up, down = layer.parts["default"].factors()
        assert torch.allclose(up @ down, layer.get_delta_weight("default"), atol=1e-6)
        assert len(down) == sum(layer.parts["default"].update.ranks)
    one = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "grown"), is_trainable=True)
    assert all(value.requires_grad for part in parts(one) for value in part.parameters())


def test_schedules_of_the_learning_rate_know_what_has_grown():
    model = mw.apply(lettered(), Triadapt(rank=4, every=1, begin_growing=0.0)).module
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    course = tuners.course_of(model, 4, 0)
    course.optimizers = [optimizer]
    course.start()
    optimizer.step()
    course.update(0)
    schedule.step()
    assert sum(value.requires_grad for value in model.parameters()) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("dim", [0, 1])
def test_outputs_and_inputs_can_leave(dim):
    weight, index = normal(6, 5), torch.tensor([0, 2, 3])
    part = Triadapt(rank=4).part(weight, None)
    part.update.grow(2)
    fill(part)
    expected = part.merged(weight, None)[0].index_select(dim, index)
    part.select(dim, index)
    assert torch.allclose(part.merged(weight.index_select(dim, index), None)[0], expected, atol=1e-6)
    assert part.update.grow(1)[1 - dim].shape == ((1, 3) if dim else (3, 1))


def test_bad_settings_are_refused():
    for settings in ({"rank": 2, "first_rank": 3}, {"schedule": "cubic"}, {"every": 0}, {"begin_growing": 1.5}):
        with pytest.raises(SettingError, match=list(settings)[-1]):
            Triadapt(**settings)
    with pytest.raises(SiteError, match="cannot have the rank 40"):
        mw.apply(tiny(), Triadapt(rank=40, where="attn.k"))
