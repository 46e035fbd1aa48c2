"""SpIEL: few entries of each matrix, which move while they train."""

import copy
import itertools

import peft
import pytest
import torch
from calibration import TEXT, lettered, normal, surprise
from tiny import outputs, tiny
from torch import nn

import modelwright as mw
from modelwright.blocks.reparametrised import Reparametrised, Scatter
from modelwright.core import tuners
from modelwright.core.aged_adamw import AgedAdamW
from modelwright.core.errors import ModelError, SettingError
from modelwright.core.sm3 import Sm3
from modelwright.core.training import Training, train
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.spiel import Reselecting, Spiel
from modelwright.methods.quantize.nf4 import Nf4
from modelwright.methods.train import Train

RUN = Training(tokens=12 * 64, batch=4, length=16, learning_rate=1e-2, weight_decay=0.0, save_every=5)
IDS = torch.randint(0, 90, (600,), generator=torch.Generator().manual_seed(3))
WAYS = ["gradient", "momentum"]


def adapted(kind="llama", **settings):
    return mw.apply(lettered(kind), Spiel(**{"trained": 0.05, "every": 4, "gather": 2, **settings})).module


def scatters(module):
    return [layer for layer in module.modules() if isinstance(layer, Scatter)]


def tuned(module, run=RUN, check=None, **others):
    """The module after a run; check(step, course) is called after each step."""
    course = tuners.course_of(module, run.steps, run.seed)
    train(module, IDS, run, course=course, report=lambda step, *_: check and check(step, course), **others)
    return module


def alone(method, steps=10, size=(2, 3), k=2):
    """A matrix with some entries, the course that moves them, and its optimizer."""
    scatter = Scatter(size, torch.arange(k, dtype=torch.int32), nn.Parameter(torch.zeros(k)))
    course = Reselecting(method, [scatter], steps)
    course.optimizers = course.own_optimizers(Training(learning_rate=0.1, weight_decay=0.0))
    course.start()
    return scatter, course


def passed(scatter, gradient):
    """A backward pass in which the matrix's gradient is this [out, in]."""
    (scatter(torch.eye(gradient.shape[1])) * gradient.T).sum().backward()


def test_a_choice_by_hand():
    # Two entries of 2 x 3, at 0 and 1. The first pass has its largest gradients at 1 and 5, which become candidates. Over two passes they
    # sum to (3 + 1, -4 - 4): all entries go the first time and both candidates come. That at 1 goes and comes at once: it keeps its value.
    scatter, course = alone(Spiel(trained=0.4, every=4, gather=2))
    with torch.no_grad():
        scatter.values.copy_(torch.tensor([0.5, 0.25]))
    for step, gradient in enumerate(([[0.0, 3, 1], [0, 2, -4]], [[9.0, 1, 9], [9, 9, -4]])):
        course.begin(step)
        passed(scatter, torch.tensor(gradient))
        course.update(step)
    assert scatter.places.tolist() == [5, 1]
    assert scatter.values.tolist() == [0, 0.25]
    (optimizer,) = course.optimizers
    state = optimizer.state[scatter.values]  # the mean of g is -4 and of g² is 16, over 2 steps; β = (0.9, 0.95)
    assert state["first"].tolist() == pytest.approx([-4 * (1 - 0.9**2), 0])
    assert state["second"].tolist() == pytest.approx([16 * (1 - 0.95**2), 0])
    assert state["age"].tolist() == [2, 0]


def test_a_choice_by_momentum_by_hand():
    # SM3 of entries (0, 0) and (0, 1) with gradients 1 and 2: rows (4, 0), columns (1, 4, 0). Of those inactive (0, 2) has 4 · 0 and all of
    # row 1 have 0; with rows (4, 2) and columns (1, 4, 3) the products are 12 at (0, 2) and 8 at (1, 1).
    scatter, course = alone(Spiel(trained=0.4, every=4, gather=2, grow="momentum"))
    (optimizer,) = course.optimizers
    for held, values in zip(optimizer.numbers(scatter.values), ([4.0, 2], [1.0, 4, 3]), strict=True):
        held.copy_(torch.tensor(values))
    with torch.no_grad():
        scatter.values.copy_(torch.tensor([0.5, 0.25]))
    course.update(1)
    assert sorted(scatter.places.tolist()) == [2, 4]
    assert scatter.values.tolist() == [0, 0]


def test_the_share_that_goes_is_all_at_first_and_then_falls_to_none():
    scatter, course = alone(Spiel(trained=1.0, every=4, gather=2), steps=16, size=(10, 10), k=40)
    moved = []
    for step in range(16):
        course.begin(step)
        with torch.no_grad():
            scatter.values.copy_(1 + torch.arange(40.0))
        before = scatter.places.clone()
        gradient = normal(10, 10, seed=step)
        gradient.view(-1)[before.long()] = 0  # so that what goes does not come back
        passed(scatter, gradient)
        course.update(step)
        moved.append(int((before != scatter.places).sum()))
        assert len(set(scatter.places.tolist())) == 40
    assert [step for step, number in enumerate(moved) if number] == [1, 5, 9, 13]
    assert [number for number in moved if number] == [40, *(int(0.2 * (1 - step / 16) * 40) for step in (5, 9, 13))]


@pytest.mark.parametrize("grow", WAYS)
def test_there_are_always_as_many_different_entries(grow):
    module = adapted(grow=grow)
    sizes = [len(scatter.values) for scatter in scatters(module)]
    assert sizes == [round(0.05 * scatter.shape[0] * scatter.shape[1]) for scatter in scatters(module)]
    seen, dtypes = [], {scatter.places.dtype for scatter in scatters(module)}
    assert dtypes == {torch.int32}

    def check(step, course):
        assert [len(scatter.places.unique()) for scatter in scatters(module)] == sizes
        seen.append(scatters(module)[0].places.clone())

    tuned(module, check=check)
    moves = [step for step, (one, two) in enumerate(itertools.pairwise(seen), 1) if not torch.equal(one, two)]
    assert moves == [1, 5, 9]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_attaching_changes_no_output(kind):
    assert torch.equal(outputs(adapted(kind)), outputs(tiny(kind)))


@pytest.mark.parametrize("grow", WAYS)
def test_a_choice_changes_a_weight_by_no_more_than_the_entries_that_it_drops(grow):
    scatter, course = alone(Spiel(trained=0.4, every=2, gather=1, grow=grow), size=(8, 8), k=20)
    with torch.no_grad():
        scatter.values.copy_(normal(20))
    sizes = scatter.values.abs().sort().values
    for step in (0, 2):
        course.begin(step)
        passed(scatter, normal(8, 8, seed=step))
        if grow == "momentum":
            course.optimizers[0].step()
            sizes = scatter.values.detach().abs().sort().values
        before = scatter.change().detach().clone()
        course.update(step)
        gone = 20 if step == 0 else int(0.2 * (1 - 2 / 10) * 20)
        assert (before - scatter.change()).abs().sum() <= sizes[:gone].sum() + 1e-6
        if step == 0:
            with torch.no_grad():
                scatter.values.copy_(normal(20, seed=4))
            sizes = scatter.values.abs().sort().values


def test_the_gradient_is_that_of_a_dense_change_taken_at_its_places():
    x, places = normal(7, 5).requires_grad_(), torch.tensor([11, 0, 3], dtype=torch.int32)
    scatter = Scatter((4, 5), places, nn.Parameter(normal(3, seed=1)), scale=1.5)
    outer = normal(7, 4, seed=2)
    change = scatter.change().detach().requires_grad_()
    expected = torch.autograd.grad((x @ change.T * outer).sum(), [x, change])
    found = torch.autograd.grad((scatter(x) * outer).sum(), [x, scatter.values])
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    assert torch.allclose(found[1], 1.5 * expected[1].flatten()[places.long()], atol=1e-6)


def test_neither_the_change_nor_its_gradient_is_kept_between_the_passes():
    scatter, sizes = Scatter((40, 50), torch.arange(9, dtype=torch.int32), nn.Parameter(torch.ones(9))), []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: sizes.append(value.numel()) or value, lambda value: value):
        scatter(normal(2, 50).requires_grad_()).sum().backward()
    assert max(sizes) == 2 * 50


def test_with_all_entries_it_is_training_of_the_weight():
    module = adapted(trained=1.0, where="attn.q")
    tuned(module)
    plain = tiny()
    for name, value in plain.named_parameters():
        value.requires_grad_("q_proj" in name)
    train(plain, IDS, RUN)
    assert torch.allclose(outputs(module), outputs(plain), atol=1e-4)
    assert (outputs(module) - outputs(tiny())).abs().max() > 0.05


@pytest.mark.parametrize(("grow", "of_entry"), [("gradient", 3), ("momentum", 0)])
def test_what_trains_and_its_state_grow_with_the_entries_and_not_with_the_matrix(grow, of_entry):
    module, held = adapted(grow=grow), []
    trained = sum(value.numel() for value in module.parameters() if value.requires_grad)
    assert trained == sum(len(scatter.values) for scatter in scatters(module))
    ways = sum(sum(scatter.shape) for scatter in scatters(module)) if grow == "momentum" else 0

    def check(step, course):
        held.append(sum(value.numel() for one in course.optimizers for state in one.state.values() for value in state.values()))

    tuned(module, check=check)
    assert set(held) == {of_entry * trained + ways}


@pytest.mark.parametrize("grow", WAYS)
@pytest.mark.parametrize("last", [6, 8])
def test_a_run_that_was_killed_ends_with_the_same_bits(grow, last, tmp_path):
    # The checkpoint is of step 5, in the middle of a window of three steps.
    def stop(step, course):
        if step == last:
            raise KeyboardInterrupt

    settings = dict(grow=grow, gather=3)
    whole = tuned(adapted(**settings))
    with pytest.raises(KeyboardInterrupt):
        tuned(adapted(**settings), check=stop, folder=tmp_path)
    again = tuned(adapted(**settings), folder=tmp_path)
    states = [module.state_dict() for module in (whole, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_gradients_are_gathered_in_every_part_of_a_batch():
    module, passes = adapted(where="block 0"), []
    run = Training(tokens=4 * 64, batch=4, length=16, accumulation=2, learning_rate=1e-2)

    class Looked(Reselecting):
        def update(self, step):
            passes.extend(int(found[3]) for found in self.gathered.values())
            super().update(step)

    train(module, IDS, run, course=Looked(Spiel(every=4, gather=2), scatters(module), run.steps))
    assert passes == [2] * 7 + [4] * 7


def test_it_learns_and_folded_gives_the_same():
    model = lettered()
    before = surprise(model)
    mw.apply(model, [Spiel(trained=0.1, every=8), Train(tokens=64 * 64, batch=4, length=16, learning_rate=3e-3, weight_decay=0.0)],
             data=TEXT)  # fmt: skip
    assert surprise(model) < 0.8 * before
    expected = outputs(model.module)
    mw.apply(model, Fold())
    assert type(model.module) is type(tiny())
    assert torch.allclose(outputs(model.module), expected, atol=1e-5)
    changed = model.module.model.layers[0].mlp.up_proj.weight != tiny().model.layers[0].mlp.up_proj.weight
    assert 0 < int(changed.sum()) <= round(0.1 * changed.numel())


def test_it_stands_on_packed_weights_and_moves_none_of_their_bits():
    model = mw.apply(lettered(), Nf4())
    expected = outputs(model.module)
    base = {name: value.clone() for name, value in model.module.state_dict().items()}
    mw.apply(model, Spiel(trained=0.05, every=4, gather=2))
    assert torch.equal(outputs(model.module), expected)
    tuned(model.module)
    assert not torch.allclose(outputs(model.module), expected, atol=1e-3)
    after = {name.replace(".base_layer", ""): value for name, value in model.module.get_base_model().state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in base.items())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
def test_moved_entries_are_saved_with_their_places(tmp_path):
    module = tuned(adapted())
    module.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    assert torch.allclose(outputs(loaded), outputs(module.eval()), atol=1e-6)
    assert all(torch.equal(one.places, two.places) for one, two in zip(scatters(loaded), scatters(module), strict=True))


def test_another_loops_optimizer_forgets_what_it_knew_of_entries_that_went():
    scatter, course = alone(Spiel(trained=0.4, every=4, gather=1))
    optimizer = torch.optim.AdamW([scatter.values], lr=0.1, betas=(0.9, 0.9))
    course.optimizers = [optimizer]
    course.begin(0)
    passed(scatter, torch.tensor([[1.0, 9, 2], [3, 9, 2]]))
    optimizer.step()
    course.update(0)
    assert scatter.places.tolist() == [4, 1]
    assert optimizer.state[scatter.values]["exp_avg"].tolist() == pytest.approx([0, 0.9])


def test_without_replacing_the_first_choice_stays():
    module, seen = adapted(replaced=0.0), []
    tuned(module, check=lambda *_: seen.append(scatters(module)[0].places.clone()))
    assert not torch.equal(seen[0], seen[1])
    assert all(torch.equal(seen[1], later) for later in seen[2:])


def test_what_cannot_be_is_refused():
    with pytest.raises(SettingError, match="gather is above every"):
        Spiel(gather=30)
    with pytest.raises(SettingError, match="trained"):
        Spiel(trained=1.5)
    scatter, course = alone(Spiel(trained=0.4, grow="momentum"))
    course.optimizers = [AgedAdamW([scatter.values])]
    with pytest.raises(ModelError, match="momentum reads SM3's state, and the run has none"):
        course.start()
    course.optimizers = [Sm3([scatter.values])]
    course.start()


def test_it_is_a_part_like_others():
    part = Spiel(trained=0.5).part(torch.zeros(3, 4), None)
    assert isinstance(part, Reparametrised)
    assert part.factors() is None  # it has no low rank
    assert copy.deepcopy(part).scatter.places.tolist() == part.scatter.places.tolist()
