import pytest
import torch
from test_deltas import changes, tuned
from tiny import tiny

import modelwright as mw
from modelwright.maths.slices import Sliced
from modelwright.maths.task_vectors import added
from modelwright.methods.encode.compeft import Compeft


def sliced(values):
    return Sliced(tuple(values.shape), torch.float32, values.reshape(-1).__getitem__)


def coded(parts, **settings):
    """The changes that come back."""
    found = Compeft(**settings).coded({name: sliced(value) for name, value in parts.items()})
    return {name: change.read(slice(0, len(change.labels))).view(parts[name].shape) for name, change in found}


def test_a_case_by_hand():
    # τ = 3, -1, 0, 2 | 0, -4: mean 0, squares 9 + 1 + 4 + 16 = 30, σ = √(30 / 5) = √6. Half of six entries stay: -4, 3, 2.
    size = 6**0.5
    parts = {"a": torch.tensor([[3.0, -1.0], [0.0, 2.0]]), "b": torch.tensor([0.0, -4.0])}
    found = coded(parts, keep=0.5)
    assert found["a"].tolist() == [pytest.approx([size, 0]), pytest.approx([0, size])]
    assert found["b"].tolist() == pytest.approx([0, -size])
    assert torch.allclose(coded(parts, keep=0.5, scale=3.0)["b"], 3 * found["b"])


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_so_many_entries_of_all_tensors_together_are_signs_of_one_size(keep):
    before, after = tiny(), tuned(dtype=torch.float32)
    change = changes(before, after)
    flat = torch.cat([value.view(-1) for _, value in sorted(change.items())])
    found = coded(change, keep=keep)
    made = torch.cat([value.view(-1) for _, value in sorted(found.items())])
    assert int(made.count_nonzero()) == round(keep * len(flat))
    kept = made != 0
    assert flat[kept].abs().min() >= flat[~kept].abs().max()
    assert torch.equal(made[kept].sign(), flat[kept].sign())
    assert torch.allclose(made[kept].abs(), flat.std(), rtol=1e-5)


def test_all_entries_are_the_task_vector_of_one_bit():
    parts = {"a": torch.randn(40, 30, generator=torch.Generator().manual_seed(0))}
    assert torch.allclose(coded(parts, keep=1.0)["a"], parts["a"].sign() * parts["a"].std(), rtol=1e-5)


def test_no_change_gives_the_base_back():
    module = tiny()
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    mw.apply(module, Compeft(), base=tiny())
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def test_the_step_adds_the_coded_change_to_the_base():
    before, after = tiny(), tuned(dtype=torch.float32)
    expected = coded(changes(before, after), keep=0.1, scale=2.0)
    made = mw.apply(after, Compeft(keep=0.1, scale=2.0), base=tiny()).state_dict()
    assert all(torch.allclose(made[name], value + expected[name], atol=1e-6) for name, value in before.state_dict().items())


def test_each_tensor_by_itself_has_its_own_cut_and_size():
    parts = {"small": torch.randn(500, generator=torch.Generator().manual_seed(0)) * 1e-3,
             "large": torch.randn(500, generator=torch.Generator().manual_seed(1))}  # fmt: skip
    assert coded(parts, keep=0.1)["small"].count_nonzero() == 0  # all that is left is in the large one
    found = coded(parts, keep=0.1, scope="tensor")
    for name, value in parts.items():
        assert found[name].count_nonzero() == 50
        assert torch.allclose(found[name].abs().max(), value.std(), rtol=1e-5)


def test_merging_by_signs_and_then_giving_them_their_size_is_merging_the_coded_changes():
    # TIES of changes of one size: trimmed already, elected by sums of signs, the mean of those that agree.
    parts = [torch.randn(1, 900, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    signs = [coded({"a": part}, keep=0.3)["a"].sign() for part in parts]
    base, whole = torch.zeros(1, 900), slice(0, 900)
    by_signs = added(base, [base + one for one in signs], [1.0] * 3)(whole)
    by_size = added(base, [base + 0.25 * one for one in signs], [1.0] * 3)(whole)
    assert by_signs.unique().tolist() == [-1, 0, 1]
    assert torch.equal(0.25 * by_signs, by_size)
