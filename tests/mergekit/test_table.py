"""Every method and parameter of mergekit is a method of ours with these settings: the same bits, whichever way they come."""

import pytest
import torch

import modelwright as mw
from modelwright.core.errors import MethodError, ModelwrightError, SettingError
from modelwright.core.weights import Checkpoint
from modelwright.mergekit import table
from modelwright.methods.merge.arcee_fusion import ArceeFusion
from modelwright.methods.merge.breadcrumbs import Breadcrumbs
from modelwright.methods.merge.dare import Dare
from modelwright.methods.merge.della import Della
from modelwright.methods.merge.karcher import Karcher
from modelwright.methods.merge.linear import Linear
from modelwright.methods.merge.model_stock import ModelStock
from modelwright.methods.merge.multislerp import Multislerp
from modelwright.methods.merge.nearswap import Nearswap
from modelwright.methods.merge.nuslerp import Nuslerp
from modelwright.methods.merge.passthrough import Passthrough
from modelwright.methods.merge.ram import Ram
from modelwright.methods.merge.sce import Sce
from modelwright.methods.merge.slerp import Slerp
from modelwright.methods.merge.task_arithmetic import TaskArithmetic
from modelwright.methods.merge.ties import Ties

W = "weight: 0.6", "weight: 0.3"
WEIGHTS = dict(weights=[0.6, 0.3])
SPARSE = dict(weights=[0.6, 0.3], keep_each=[1.0, 1.0])
HALVES = "weight: 0.6, density: 0.5", "weight: 0.3, density: 0.4"
HALF = dict(weights=[0.6, 0.3], keep_each=[0.5, 0.4])
# method, parameters of a and b, parameters of all, base, ours
CASES = [
    ("linear", W, "", None, Linear(**WEIGHTS)),
    ("linear", W, "normalize: false", None, Linear(**WEIGHTS, normalize=False)),
    ("passthrough", ("",), "", None, Passthrough()),
    ("passthrough", ("scale: 0.5",), "", None, Passthrough(scale=0.5)),
    ("task_arithmetic", W, "", "c", TaskArithmetic(**WEIGHTS)),
    ("task_arithmetic", W, "normalize: true, lambda: 0.7", "c", TaskArithmetic(**WEIGHTS, normalize=True, scale=0.7)),
    ("ties", W, "", "c", Ties(**SPARSE)),
    ("ties", HALVES, "normalize: false, lambda: 0.7", "c", Ties(**HALF, normalize=False, scale=0.7)),
    ("ties", HALVES, "rescale: true", "c", Ties(**HALF, rescale="l1")),
    ("dare_linear", W, "", "c", Dare(**SPARSE)),
    ("dare_linear", HALVES, "", "c", Dare(**HALF, consensus=False, normalize=False, rescale="inverse")),
    ("dare_linear", HALVES, "rescale: false", "c", Dare(**HALF, rescale="none")),
    ("dare_ties", HALVES, "", "c", Dare(**HALF, consensus=True, normalize=False, rescale="inverse")),
    ("dare_ties", HALVES, "rescale: false, normalize: true", "c", Dare(**HALF, consensus=True, normalize=True, rescale="none")),
    ("della", HALVES, "", "c", Della(**HALF, spread=0.15, consensus=True, normalize=True, rescale="l1")),
    ("della", tuple(one + ", epsilon: 0.3" for one in HALVES), "rescale: false", "c",
     Della(**HALF, spread=0.3, consensus=True, normalize=True, rescale="none")),
    ("della", (HALVES[0] + ", epsilon: 0.1", HALVES[1] + ", epsilon: 0.2"), "", "c", Della(**HALF, spread_each=[0.1, 0.2])),
    ("della_linear", HALVES, "", "c", Della(**HALF, spread=0.15, consensus=False, normalize=False, rescale="l1")),
    ("breadcrumbs", HALVES, "", "c", Breadcrumbs(**HALF, top_each=[0.01, 0.01], consensus=False, normalize=False)),
    ("breadcrumbs", W, "", "c", Breadcrumbs(**SPARSE, top_each=[0.01, 0.01])),
    ("breadcrumbs", HALVES, "rescale: true", "c", Breadcrumbs(**HALF, top_each=[0.01, 0.01], rescale="l1")),
    ("breadcrumbs_ties", ("weight: 0.6, density: 0.5, gamma: 0.1", "weight: 0.3, density: 0.4, gamma: 0.2"), "", "c",
     Breadcrumbs(**HALF, top_each=[0.1, 0.2], consensus=True, normalize=False)),
    ("slerp", ("",), "t: 0.3", "c", Slerp(t=0.3)),
    ("nuslerp", W, "", None, Nuslerp(**WEIGHTS, from_base=False, by_row=False)),
    ("nuslerp", W, "nuslerp_flatten: false", "c", Nuslerp(**WEIGHTS, from_base=True, by_row=True)),
    ("nuslerp", W, "nuslerp_flatten: false, nuslerp_row_wise: true", "c", Nuslerp(**WEIGHTS, from_base=True, by_column=True)),
    ("multislerp", W, "normalize_weights: false", "c", Multislerp(**WEIGHTS, from_base=True, normalize=False)),
    ("multislerp", W, "", None, Multislerp(**WEIGHTS, from_base=False)),
    ("multislerp", W, "", "c", Multislerp(**WEIGHTS, from_base=True)),
    ("karcher", ("", ""), "", None, Karcher(iterations=10, tolerance=1e-5)),
    ("karcher", ("", ""), "max_iter: 1", None, Karcher(iterations=1)),
    ("karcher", ("", ""), "tol: 3", None, Karcher(tolerance=3.0)),
    ("model_stock", ("", ""), "", "c", ModelStock(by_row=False)),
    ("model_stock", ("", ""), "filter_wise: true", "c", ModelStock(by_row=True)),
    ("sce", ("", ""), "", "c", Sce(keep=1.0)),
    ("sce", ("", ""), "select_topk: 0.4", "c", Sce(keep=0.4)),
    ("nearswap", ("",), "t: 0.01", "c", Nearswap(t=0.01)),
    ("arcee_fusion", ("",), "", "c", ArceeFusion()),
    ("ram", ("", ""), "", "c", Ram(threshold=1e-5)),
    ("ram", ("", ""), "epsilon: 0.01", "c", Ram(threshold=0.01)),
    ("ramplus_tl", ("", ""), "", "c", Ram(threshold=1e-5, boost=0.1, most=0.2, scope="tensor")),
    ("ramplus_tl", ("", ""), "r: 0.5, alpha: 2, epsilon: 0.02", "c", Ram(threshold=0.02, boost=0.5, most=2.0)),
]  # fmt: skip


def stated(method, each, once, base):
    models = ", ".join(f"{{model: {name}, parameters: {{{own}}}}}" for name, own in zip("ab", each, strict=False))
    return f"merge_method: {method}\nmodels: [{models}]\nparameters: {{{once}}}\n" + (f"base_model: {base}\n" if base else "")


@pytest.fixture(scope="module")
def near(folders, tmp_path_factory):
    """Two models a and b that share a part of what they changed of c: as finetuned ones do, and not random ones."""
    root = tmp_path_factory.mktemp("near")
    base, common = mw.open(folders["c"]).module, mw.open(folders["a"]).module
    for name, other in (("a", "tied"), ("b", "b")):
        module, own = mw.open(folders["c"]), dict(mw.open(folders[other]).module.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for key, value in module.module.named_parameters():
                start = base.get_parameter(key)
                value.copy_(start + 0.2 * (common.get_parameter(key) - start) + 0.1 * (own[key] - start))
        module.save(root / name)
    mw.open(folders["c"]).save(root / "c")
    return root


@pytest.mark.parametrize(("method", "each", "once", "base", "ours"), CASES, ids=[f"{case[0]} {case[1][0]} {case[2]}" for case in CASES])
def test_it_is_the_method_of_a_recipe_with_these_settings(method, each, once, base, ours, near, tmp_path, monkeypatch):
    monkeypatch.chdir(near)
    theirs = Checkpoint(mw.merge(stated(method, each, once, base), save=tmp_path / "theirs", seed=3).folder)
    donors = [near / name for name in "ab"[: len(each)]]
    made = Checkpoint(mw.apply(near / (base or "a"), ours, donors=donors, save=tmp_path / "ours", seed=3).folder)
    assert set(theirs.names) == set(made.names)
    for name in theirs.names:
        assert torch.equal(theirs.read(name), made.read(name)), name


def test_every_method_of_the_table_is_compared():
    assert {case[0] for case in CASES} == set(table.METHODS)


@pytest.mark.parametrize(
    ("method", "defaults"),
    [
        ("ties", {"density": 1.0, "lambda": 1.0, "normalize": True, "rescale": False}),
        ("della_linear", {"density": 1.0, "epsilon": 0.15, "lambda": 1.0, "normalize": False, "rescale": True}),
        ("breadcrumbs", {"density": 1.0, "gamma": 0.01, "lambda": 1.0, "normalize": False, "rescale": False}),
        ("karcher", {"max_iter": 10, "tol": 1e-5}),
        ("sce", {"select_topk": 1.0}),
        ("model_stock", {"filter_wise": False}),
        ("nuslerp", {"nuslerp_flatten": True, "nuslerp_row_wise": False}),
        ("multislerp", {"normalize_weights": True}),
        ("slerp", {}),
    ],
)
def test_parameters_that_are_not_given_are_mergekits_own(method, defaults):
    entry = table.entry_of(method)
    stated = {theirs: default for theirs, (_, default) in [*entry.each.items(), *entry.once.items()] if default is not table.REQUIRED}
    assert stated == defaults


def test_as_mergekit_of_every_random_method_keeps_the_sums_of_sizes():
    each = {"weight": [0.6], "density": [0.5], "epsilon": [0.15]}
    once = {"normalize": False, "lambda": 1.0, "rescale": True}
    for method, ours, theirs in (("dare_ties", "inverse", "l1"), ("dare_linear", "inverse", "l1"), ("della", "l1", "l1")):
        found = [table.settings(method, each, once, based=True, as_mergekit=mode)["rescale"] for mode in (False, True)]
        assert found == [ours, theirs]


@pytest.mark.parametrize(
    ("method", "each", "once", "wanted"),
    [
        ("ram", ("", ""), "epsilon: -1", "threshold must be a number of at least 0; got -1"),
        ("linear", W, "normalize: maybe", "normalize must be true or false; got 'maybe'"),
        ("ties", ("weight: 1, density: 1.01", W[1]), "", "density must be a number from 0 to 1; got 1.01, 1.0"),
        ("breadcrumbs", ("weight: 1, gamma: -0.1", W[1]), "", "gamma must be a number from 0 to 1; got -0.1, 0.01"),
        ("dare_ties", ("weight: 1, density: much", W[1]), "", "density must be a number from 0 to 1; got much"),
    ],
)
def test_what_a_parameter_cannot_be_is_said(method, each, once, wanted, near, tmp_path, monkeypatch):
    monkeypatch.chdir(near)
    base = None if method in ("linear", "nuslerp") else "c"
    with pytest.raises(ModelwrightError) as error:
        mw.merge(stated(method, each, once, base), save=tmp_path / "out")
    assert isinstance(error.value, (MethodError, SettingError))
    assert wanted in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "sce"])
def test_as_mergekit_rounds_deltas_to_the_dtype_and_weighs_in_it(method, near, tmp_path, monkeypatch):
    """One donor: mergekit takes the difference of what bfloat16 holds, rounds it, and multiplies it by a rounded weight."""
    monkeypatch.chdir(near)
    own = "" if method == "sce" else "weight: 0.3"
    text = f"merge_method: {method}\nbase_model: c\nmodels: [{{model: a, parameters: {{{own}}}}}]\ndtype: bfloat16\n"
    text += "parameters: {normalize: false}\n" if method == "ties" else ""
    found = Checkpoint(mw.merge(text, save=tmp_path / "out", as_mergekit=True).folder)
    weight = 1.0 if method == "sce" else torch.tensor(0.3, dtype=torch.bfloat16).item()
    for name in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        base, donor = (Checkpoint(near / model).read(name).bfloat16() for model in "ca")
        assert torch.equal(found.read(name), base + ((donor - base).float() * weight).bfloat16())
