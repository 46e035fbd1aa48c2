import pytest
import torch
from calibration import lettered
from test_soup import batches, donors, loss  # noqa: F401
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import ModelError, SettingError
from modelwright.core.recipe import read
from modelwright.methods.merge.consensus import Consensus
from modelwright.methods.merge.tall_masks import TallMasks


def test_every_donor_gets_the_bound_that_serves_it_best(batches, donors):  # noqa: F811
    """Found anew by hand, for each donor and bound: the loss of θ0 + τ_M ⊙ m."""
    model = mw.open(tiny(seed=0))
    mw.apply(model, TallMasks(), donors=donors, data=batches)
    *searched, told = model.history[-1]["notes"]
    base, best = tiny(seed=0), []
    for number, note in enumerate(searched):
        losses = {}
        for bound in (0.2, 0.3, 0.4, 0.5, 0.6):
            served = tiny(seed=0)
            for name, value in served.named_parameters():
                start = base.get_parameter(name)
                changes = [donor.get_parameter(name).detach() - start for donor in donors]
                total = sum(changes)
                mask = changes[number].abs() > bound * (total - changes[number]).abs()
                value.data.copy_(start + total * mask)
            losses[bound] = loss(served, batches)
        found = dict(part.split(": ") for part in note.split("bound: ")[1].split(", "))
        assert {float(bound): float(value) for bound, value in found.items()} == pytest.approx(losses, abs=2e-4)
        best.append(min(found, key=lambda bound: float(found[bound])))
    method = read("steps:\n- " + told.split(": ", 1)[1]).steps[0].method
    assert isinstance(method, Consensus)
    assert [f"{bound:g}" for bound in method.least_each] == best
    again = mw.apply(tiny(seed=0), method, donors=donors)
    for name, value in model.module.named_parameters():
        assert torch.equal(value, again.get_parameter(name)), name


def test_each_donor_is_served_on_its_own_text(tmp_path):
    files = [str(tmp_path / name) for name in ("cities.txt", "sums.txt")]
    for file, text in zip(files, ("a tale of two cities. ", "one and one are two. "), strict=True):
        with open(file, "w", encoding="utf-8") as out:
            out.write(text * 30)
    found = []
    for texts in (files, files[::-1]):
        model = lettered()
        mw.apply(model, TallMasks(texts=texts), donors=[lettered(seed=1), lettered(seed=2)])
        found.append([note.split("bound: ")[1] for note in model.history[-1]["notes"][:-1]])
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]
    with pytest.raises(SettingError, match="1 texts for 2 donors"):
        mw.apply(lettered(), TallMasks(texts=files[:1]), donors=[lettered(seed=1), lettered(seed=2)])


@pytest.mark.parametrize("points", [2, 4])
def test_as_many_bounds_are_tried_as_asked(points, batches, donors):  # noqa: F811
    model = mw.open(tiny(seed=0))
    mw.apply(model, TallMasks(points=points, lowest=0.1, highest=0.9, agree=1), donors=donors[:2], data=batches)
    notes = model.history[-1]["notes"]
    assert len(notes) == 3
    assert notes[0].count(": ") == 2 + points
    assert "0.1: " in notes[0]
    assert "0.9: " in notes[0]


def test_what_cannot_be_searched_is_refused(batches, donors):  # noqa: F811
    with pytest.raises(SettingError, match=r"lowest 0\.6 is not less than highest 0\.6"):
        TallMasks(lowest=0.6)
    with pytest.raises(SettingError, match="weights must be above 0"):
        TallMasks(weights=[1, 0])
    with pytest.raises(ModelError, match="must have the same tensors"):
        mw.apply(tiny(seed=0), TallMasks(), donors=[tiny(intermediate_size=96), tiny()], data=batches)
    with pytest.raises(SettingError, match="agree=4 of 3 donors is never reached"):
        mw.apply(tiny(seed=0), TallMasks(agree=4), donors=donors, data=batches)


def test_bounds_are_merged_that_were_tried(batches, donors):  # noqa: F811
    model = mw.open(tiny(seed=0))
    mw.apply(model, TallMasks(lowest=1e-8, highest=4e-7, points=2), donors=donors[:2], data=batches)
    method = read("steps:\n- " + model.history[-1]["notes"][-1].split(": ", 1)[1]).steps[0].method
    assert set(method.least_each) <= {1e-8, 4e-7}
