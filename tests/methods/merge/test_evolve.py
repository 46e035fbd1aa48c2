import pytest
import torch
from test_soup import batches, donors, loss  # noqa: F401
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import SettingError
from modelwright.core.recipe import Recipe, Step, read
from modelwright.methods.merge.della import Della
from modelwright.methods.merge.evolve import Evolve
from modelwright.methods.merge.pcb import Pcb
from modelwright.methods.merge.ties import Ties


@pytest.mark.parametrize("sampler", ["cmaes", "tpe", "grid"])
def test_the_best_is_no_worse_than_the_first_and_what_is_told_gives_it_again(sampler, batches, donors):  # noqa: F811
    model = mw.open(tiny(seed=0))
    mw.apply(model, Evolve(trials=12, sampler=sampler, points=3), donors=donors, data=batches)
    notes = model.history[-1]["notes"]
    first, best = (float(part) for part in notes[0].replace(",", "").split() if "." in part and part.replace(".", "").isdigit())
    assert best <= first
    assert loss(model.module, batches) == pytest.approx(best, abs=1e-3)
    step = read("steps:\n- " + notes[1].split(": ", 1)[1]).steps[0]
    again = mw.apply(tiny(seed=0), step.method, donors=donors)
    for name, value in model.module.named_parameters():
        assert torch.equal(value, again.get_parameter(name)), name


@pytest.mark.parametrize("name", ["dare", "pcb", "lines", "localize_and_stitch", "auto"])
def test_what_is_told_of_a_method_that_draws_or_surveys_gives_the_model_again(name, batches, donors):  # noqa: F811
    model = mw.open(tiny(seed=0))
    mw.apply(model, Evolve(method=f"merge.{name}", trials=3), donors=donors, data=batches, seed=5)
    step = read("steps:\n- " + model.history[-1]["notes"][1].split(": ", 1)[1]).steps[0]
    again = mw.apply(tiny(seed=0), step.method, donors=donors, seed=5)
    for parameter, value in model.module.named_parameters():
        assert torch.equal(value, again.get_parameter(parameter)), parameter


def test_the_search_of_pcb_surveys_once_and_keeps_to_its_range(batches, donors, monkeypatch):  # noqa: F811
    surveys, tried, survey, tensor = [], set(), Pcb.survey, Pcb.tensor
    monkeypatch.setattr(Pcb, "survey", lambda self, *given: surveys.append(self) or survey(self, *given))
    monkeypatch.setattr(Pcb, "tensor", lambda self, weight, donors, survey: tried.add(self.weights) or tensor(self, weight, donors, survey))
    model = mw.open(tiny(seed=0))
    search = Evolve(method="merge.pcb", lowest=0.8, highest=1.3, trials=6)
    mw.apply(model, search, donors=donors, data=batches, seed=5)
    assert len(surveys) == 1
    step = read("steps:\n- " + model.history[-1]["notes"][1].split(": ", 1)[1]).steps[0]
    assert len(tried) == 6
    assert step.method.weights in tried
    assert all(0.8 <= weight <= 1.3 for weights in tried for weight in weights)
    again = mw.apply(tiny(seed=0), step.method, donors=donors, seed=5)
    assert len(surveys) == 2
    for parameter, value in model.module.named_parameters():
        assert torch.equal(value, again.get_parameter(parameter)), parameter


@pytest.mark.parametrize(("name", "settings", "alike"), [
    ("pcb", {"weights": [1, 2], "scale": 0.5}, True),
    ("ties", {"weights": [1, 2]}, True),
    ("ties", {"keep_each": [0.1, 0.5]}, False),
    ("localize_and_stitch", {"weights": [1, 2]}, True),
    ("lines", {"weights": [1, 2], "normalize": True}, False),
    ("pcb", {"keep": 0.5}, False),
])  # fmt: skip
def test_a_survey_is_found_anew_for_settings_that_it_looks_at(name, settings, alike):
    method = mw.find(f"merge.{name}")
    one, two = method.build({}).surveyed(), method.build(settings).surveyed()
    assert (one == two) is alike
    scope = {"scope": "model"} if name == "ties" else {}
    tensors = [torch.randn(500, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = [method.build({**scope, **each}).survey(tensors[0], tensors[1:]) for each in ({}, settings)]
    assert (found[0] == found[1]) is alike


def test_more_trials_are_never_worse(batches, donors):  # noqa: F811
    found = [loss(mw.apply(tiny(seed=0), Evolve(trials=trials), donors=donors, data=batches), batches) for trials in (1, 6, 14)]
    assert found[0] >= found[1] - 1e-6
    assert found[1] >= found[2] - 1e-6


def test_groups_of_blocks_have_coefficients_of_their_own(batches, donors):  # noqa: F811
    method = Evolve(method="merge.ties", groups=2, trials=3)
    assert len(method.genes(3)) == 2 * 2 * 3
    model = mw.open(tiny(seed=0))
    mw.apply(model, method, donors=donors, data=batches)
    assert [note.split(":")[0] for note in model.history[-1]["notes"][1:]] == ["blocks of group 1 of 2", "blocks of group 2 of 2"]


def test_genes_make_the_merge_that_they_say():
    method = Evolve(method="merge.ties")
    genes = {"weight 0 0": 0.25, "weight 0 1": 0.5, "keep 0 0": 0.3, "keep 0 1": 1.0}
    merger = method.merger(genes, 0, 2)
    assert merger == Ties(weights=[0.25, 0.5], keep_each=[0.3, 1.0])
    assert read(Recipe(model="starter", steps=(Step(merger, {"donors": ["a", "b"]}),)).yaml()).steps[0].method == merger


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(SettingError, match="prune.wanda is not"):
        Evolve(method="prune.wanda")
    with pytest.raises(SettingError, match="lowest 1.0 is not less than highest 0.5"):
        Evolve(lowest=1.0, highest=0.5)


def test_shares_of_della_are_tried_that_its_spread_allows(batches, donors, monkeypatch):  # noqa: F811
    tried, build = [], Della.build.__func__
    monkeypatch.setattr(Della, "build", classmethod(lambda cls, settings: tried.append(settings["keep_each"]) or build(cls, settings)))
    for sampler in ("cmaes", "grid"):
        mw.apply(tiny(seed=0), Evolve(method="merge.della", trials=4, points=2, sampler=sampler), donors=donors[:2], data=batches)
    assert all(0.2 <= keep <= 0.8 for keeps in tried for keep in keeps)
    assert Evolve(method="merge.dare").genes(1)["keep 0 0"] == (0.05, 1.0)
