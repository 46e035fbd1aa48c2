import itertools

import pytest
import torch
from test_soup import batches, donors, loss  # noqa: F401
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import SettingError
from modelwright.core.recipe import Recipe, Step, read
from modelwright.methods.merge._objective import search
from modelwright.methods.merge.della import Della
from modelwright.methods.merge.evolve import Evolve
from modelwright.methods.merge.pcb import Pcb
from modelwright.methods.merge.task_arithmetic import TaskArithmetic
from modelwright.methods.merge.ties import Ties


@pytest.mark.parametrize("sampler", ["cmaes", "tpe", "grid"])
def test_the_best_is_no_worse_than_the_first_and_what_is_told_gives_it_again(sampler, batches, donors):  # noqa: F811
    model = mw.open(tiny(seed=0))
    trials = {"cmaes": 40, "tpe": 12, "grid": 27}[sampler]
    mw.apply(model, Evolve(trials=trials, sampler=sampler, points=3), donors=donors, data=batches)
    notes = model.history[-1]["notes"]
    first, best = (float(part) for part in notes[0].replace(",", "").split() if "." in part and part.replace(".", "").isdigit())
    if sampler == "grid":  # begins anywhere on it, and meets the best donor alone
        assert best <= min(loss(donor, batches) for donor in donors) + 1e-3
    else:
        equal = mw.apply(tiny(seed=0), TaskArithmetic(weights=[1 / 3] * 3), donors=donors)
        assert first == pytest.approx(loss(equal, batches), abs=1e-3)
    assert best < first
    assert loss(model.module, batches) == pytest.approx(best, abs=1e-3)
    step = read("steps:\n- " + notes[1].split(": ", 1)[1]).steps[0]
    again = mw.apply(tiny(seed=0), step.method, donors=donors)
    for name, value in model.module.named_parameters():
        assert torch.equal(value, again.get_parameter(name)), name


def test_a_trial_draws_as_the_step_that_is_told(batches, donors):  # noqa: F811
    model = mw.open(tiny(seed=0))
    mw.apply(model, Evolve(method="merge.dare", trials=12, sampler="tpe"), donors=donors, data=batches, seed=5)
    step = read("steps:\n- " + model.history[-1]["notes"][1].split(": ", 1)[1]).steps[0]
    assert max(step.method.keep_each) < 1  # so that something is drawn
    again, other = (mw.apply(tiny(seed=0), step.method, donors=donors, seed=seed) for seed in (5, 6))
    assert all(torch.equal(value, again.get_parameter(name)) for name, value in model.module.named_parameters())
    assert not torch.equal(model.module.lm_head.weight, other.lm_head.weight)


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


def test_every_block_is_merged_with_the_coefficients_of_its_group(batches, donors):  # noqa: F811
    """Blocks 0 and 1 and what stands outside with those of the first group, blocks 2 and 3 with those of the second."""
    model = mw.open(tiny(seed=0))
    mw.apply(model, Evolve(groups=2, trials=12, sampler="tpe"), donors=donors, data=batches)
    told = [read("steps:\n- " + note.split(": ", 1)[1]).steps[0].method for note in model.history[-1]["notes"][1:]]
    assert told[0].weights != told[1].weights
    plain = [dict(mw.apply(tiny(seed=0), method, donors=donors).named_parameters()) for method in told]
    for name, value in model.module.named_parameters():
        assert torch.equal(value, plain["layers.2." in name or "layers.3." in name][name]), name


def test_genes_have_their_ranges_and_begin_equal_and_whole():
    method = Evolve(method="merge.ties", lowest=-1.0, highest=0.25, groups=2)
    ranges = {"weight": (-1.0, 0.25), "keep": (0.05, 1.0)}
    genes = {f"{kind} {group} {donor}": ranges[kind] for kind in ranges for group in (0, 1) for donor in (0, 1)}
    assert method.genes(2) == genes
    assert method.first(8) == {gene: 0.125 if gene.startswith("weight") else 1.0 for gene in method.genes(8)}
    assert method.first(2) == {gene: 0.25 if gene.startswith("weight") else 1.0 for gene in genes}  # ½ is out of range
    assert Evolve(method="merge.linear").genes(1) == {"weight 0 0": (0.0, 1.0)}


@pytest.mark.parametrize("sampler", ["cmaes", "tpe", "grid"])
def test_a_search_stays_within_its_ranges_and_finds_the_least(sampler):
    tried = []

    def objective(trial):
        tried.append((trial.suggest_float("a", -1.0, 3.0), trial.suggest_float("b", 0.0, 1.0)))
        return (tried[-1][0] - 1) ** 2 + tried[-1][1]

    study = search(objective, {"a": (-1.0, 3.0), "b": (0.0, 1.0)}, {"a": 0.5, "b": 0.25}, sampler, 9, 3, 0, "test")
    assert len(tried) == len(study.trials) == 9
    if sampler == "grid":
        assert set(tried) == set(itertools.product([-1.0, 1.0, 3.0], [0.0, 0.5, 1.0]))
        assert study.best_params == {"a": 1.0, "b": 0.0}
    else:
        assert tried[0] == (0.5, 0.25)
        assert len(set(tried)) == 9
        assert all(-1 <= a <= 3 and 0 <= b <= 1 for a, b in tried)
    assert study.best_value == min((a - 1) ** 2 + b for a, b in tried)
    again, before = search(objective, {"a": (-1.0, 3.0), "b": (0.0, 1.0)}, {"a": 0.5, "b": 0.25}, sampler, 9, 3, 0, "test"), tried[:9]
    assert tried[9:] == before  # by the seed alone
    assert again.best_value == study.best_value


@pytest.mark.parametrize(("sampler", "kind"), [("cmaes", "CmaEsSampler"), ("tpe", "TPESampler"), ("grid", "GridSampler")])
def test_the_sampler_and_the_points_are_those_of_the_setting(sampler, kind, batches, donors, monkeypatch):  # noqa: F811
    import optuna

    made, create = [], optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **options: made.append(create(**options)) or made[-1])
    mw.apply(tiny(seed=0), Evolve(trials=4, sampler=sampler, points=2, lowest=0.5), donors=donors[:2], data=batches)
    assert type(made[0].sampler).__name__ == kind
    tried = [tuple(trial.params.values()) for trial in made[0].trials]
    if sampler == "grid":
        assert set(tried) == set(itertools.product([0.5, 1.0], [0.5, 1.0]))
    else:
        assert tried[0] == (0.5, 0.5)


def test_genes_make_the_merge_that_they_say():
    method = Evolve(method="merge.ties")
    genes = {"weight 0 0": 0.25, "weight 0 1": 0.5, "keep 0 0": 0.3, "keep 0 1": 1.0}
    merger = method.merger(genes, 0, 2)
    assert merger == Ties(weights=[0.25, 0.5], keep_each=[0.3, 1.0])
    assert read(Recipe(model="starter", steps=(Step(merger, {"donors": ["a", "b"]}),)).yaml()).steps[0].method == merger


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(SettingError, match="prune.wanda is not"):
        Evolve(method="prune.wanda")
    for name in ("merge.slerp", "merge.fisher", "merge.soup"):  # without weights for each donor, or in need of text
        with pytest.raises(SettingError, match=f"{name} is not"):
            Evolve(method=name)
    with pytest.raises(SettingError, match="lowest 1.0 is not less than highest 0.5"):
        Evolve(lowest=1.0, highest=0.5)


def test_shares_of_della_are_tried_that_its_spread_allows(batches, donors, monkeypatch):  # noqa: F811
    tried, build = [], Della.build.__func__
    monkeypatch.setattr(Della, "build", classmethod(lambda cls, settings: tried.append(settings["keep_each"]) or build(cls, settings)))
    for sampler in ("cmaes", "grid"):
        mw.apply(tiny(seed=0), Evolve(method="merge.della", trials=4, points=2, sampler=sampler), donors=donors[:2], data=batches)
    assert all(0.2 <= keep <= 0.8 for keeps in tried for keep in keeps)
    assert Evolve(method="merge.dare").genes(1)["keep 0 0"] == (0.05, 1.0)
