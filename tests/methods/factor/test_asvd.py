import re

import pytest
import torch
from calibration import batches, correlated, gathered, normal
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import PlanError, SettingError, SiteError
from modelwright.core.gradients import text_loss
from modelwright.core.model import Model, put, weight_of
from modelwright.core.passage import statistics_of
from modelwright.core.walk import split_experts
from modelwright.maths.low_rank import factor
from modelwright.methods.factor.asvd import Asvd
from modelwright.methods.factor.svd import Svd
from modelwright.methods.factor.svd_llm import SvdLlm

WEIGHT = normal(24, 40)
INPUTS = correlated(300, 40)
SEEN = gathered(INPUTS, "absolute", "largest", "moment")


def factored(seen=SEEN, weight=WEIGHT, **settings):
    method = Asvd(allocate="uniform", **settings)
    return method.factored(weight, method.metric(seen))


def lost(result, inputs=INPUTS):
    return (inputs.double() @ (WEIGHT - result).double().T).square().sum().item()


def shares(model):
    note = next(note for note in model.history[-1]["notes"] if "of these matrices' parameters" in note)
    held = float(re.search(r"keeps ([\d.]+) of", note)[1])
    return held, [float(entry.rpartition(" ")[2]) for entry in note.partition("parameters: ")[2].split(", ")]


def test_a_case_by_hand():
    # Inputs 16·e1 and e2, e3, e4: the means of |x| are (4, 1/4, 1/4, 1/4), their roots (2, 1/2, 1/2, 1/2). Of
    # W = diag(1, 3, 1, 1) the products W S are (2, 3/2, 1/2, 1/2): rank 1 keeps place 1. To the power 0, S = 1, and it keeps the 3.
    seen = gathered(torch.diag(torch.tensor([16.0, 1.0, 1.0, 1.0])), "absolute")
    weight = torch.diag(torch.tensor([1.0, 3.0, 1.0, 1.0]))
    assert torch.allclose(factored(seen, weight, rank=1).dense(), torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0])), atol=1e-6)
    assert torch.allclose(factored(seen, weight, rank=1, power=0).dense(), torch.diag(torch.tensor([0.0, 3.0, 0.0, 0.0])), atol=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize(("measure", "power"), [("mean", 0.5), ("mean", 1.0), ("largest", 0.5)])
def test_its_error_under_its_metric_is_the_singular_values_that_are_dropped(rank, measure, power):
    size = INPUTS.abs().mean(0) if measure == "mean" else INPUTS.abs().amax(0)
    stretched = size.double() ** power
    result = factored(rank=rank, measure=measure, power=power).dense()
    dropped = torch.linalg.svdvals(WEIGHT.double() * stretched)[rank:]
    assert ((WEIGHT - result) * stretched).square().sum().item() == pytest.approx(dropped.square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("rank", [2, 6, 12])
def test_it_lies_between_svd_and_svd_llm_on_these_inputs(rank):
    ours = lost(factored(rank=rank).dense())
    assert lost(SvdLlm(rank=rank).layer(WEIGHT, SEEN).dense()) <= ours < lost(Svd(rank=rank).tensor(WEIGHT).dense())


def test_the_full_rank_gives_the_weight():
    assert torch.allclose(factored(rank=24, store="dense"), WEIGHT, atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_with_inputs_that_are_all_alike_all_three_are_one(size):
    alike = gathered(size * torch.eye(40), "absolute", "moment")
    plain = Svd(rank=6).tensor(WEIGHT).dense()
    assert torch.allclose(factored(alike, rank=6).dense(), plain, atol=1e-5)
    assert torch.allclose(SvdLlm(rank=6).layer(WEIGHT, alike).dense(), plain, atol=1e-5)


def test_the_metric_in_a_model_is_that_of_the_unchanged_models_inputs():
    module = tiny()
    data = batches(module)
    model = Model(name="", module=module)
    site = next(site for site in model.sites() if site.role == "mlp.down" and site.depth == 3)
    seen = statistics_of(model, [site], ("absolute",), data)[site.name]
    b, a = factor(weight_of(module, site), 11, seen.absolute**0.5)
    mw.apply(model, Asvd(rank=11, allocate="uniform"), data=data)
    assert torch.allclose(module.get_submodule(site.module).dense(), b @ a, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_the_fisher_metric_is_the_root_mean_square_of_the_gradients_of_each_column_over_sequences(kind):
    module = tiny(kind)
    model, data = Model(name="", module=module), batches(module, 2)
    sites = [site for site in model.sites() if site.role in ("attn.o", "mlp.down")]
    squares = {site.name: [] for site in sites}
    for batch in data:
        for row in range(len(batch["input_ids"])):
            module.zero_grad()
            one = {name: value[row : row + 1] for name, value in batch.items()}
            ids = one["input_ids"].masked_fill(one["attention_mask"] == 0, -100)
            torch.nn.functional.cross_entropy(module(**one).logits[0, :-1], ids[0, 1:]).backward()
            for site in sites:
                gradient = module.get_parameter(site.name).grad
                squares[site.name].append((gradient.T if site.transposed else gradient).square().mean(0))
    module.zero_grad()
    found = Asvd(measure="fisher", power=0.5).metrics(model, sites, data)
    for site, metric in zip(sites, found, strict=True):
        assert torch.allclose(metric, torch.stack(squares[site.name]).mean(0).double() ** 0.25, rtol=1e-3), site.name
        assert metric.std() > 0
    assert all(value.grad is None for value in module.parameters())


def test_the_fisher_metric_decides_what_is_kept():
    module = tiny()
    data, model = batches(module), Model(name="", module=tiny())
    site = next(site for site in model.sites() if site.role == "mlp.down" and site.depth == 1)
    (metric,) = Asvd(measure="fisher").metrics(model, [site], data)
    b, a = factor(weight_of(model.module, site), 11, metric)
    mw.apply(module, Asvd(rank=11, allocate="uniform", measure="fisher"), data=data)
    assert torch.allclose(module.get_submodule(site.module).dense(), b @ a, atol=1e-5)
    mean, largest = (factor(weight_of(model.module, site), 11, *Asvd(measure=measure).metrics(model, [site], data))
                     for measure in ("mean", "largest"))  # fmt: skip
    assert not torch.allclose(b @ a, mean[0] @ mean[1], atol=1e-3)
    assert not torch.allclose(b @ a, largest[0] @ largest[1], atol=1e-3)


def test_an_expert_that_no_token_reaches_counts_its_inputs_alike():
    module, model = tiny("mixtral"), Model(name="", module=tiny("mixtral"))
    with split_experts(model.module):
        sites = [site for site in model.sites() if site.role == "experts.down"]
        idle = []
        for measure in ("mean", "fisher"):
            found = Asvd(measure=measure).metrics(model, sites, [{"input_ids": torch.tensor([[5, 9]])}])
            idle.append([bool((metric == metric[0]).all() and metric[0] > 0) for metric in found])
        assert 0 < sum(idle[0]) <= sum(idle[1]) < len(sites)  # what only the last token reaches has no gradient
        assert all(fisher for mean, fisher in zip(*idle, strict=True) if mean)
    mw.apply(module, Asvd(measure="fisher", allocate="uniform", where="experts"), data=[{"input_ids": torch.tensor([[5, 9]])}])


@pytest.mark.parametrize("store", ["factors", "dense"])
def test_what_is_cut_in_the_end_is_what_was_tried(store):
    """Under the metric: another one in the search would find other perplexities, and other factors."""
    method = Asvd(keep=0.6, keeps=(0.4, 0.7), where="attn.o", store=store, power=2.0)
    module = tiny(num_hidden_layers=3)
    with torch.no_grad():
        for block in module.model.layers:
            block.self_attn.v_proj.weight *= torch.logspace(-2, 1, 32)[:, None]  # inputs of very different sizes
    data, model = batches(module), Model(name="", module=module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    sites = [site for site in model.sites() if site.role == "attn.o"]
    metrics = method.metrics(model, sites, data)
    mw.apply(module, method, data=data)
    for place, (site, metric) in enumerate(zip(sites, metrics, strict=True)):
        weight = before[site.name]
        layer = module.get_submodule(site.module)
        if store == "factors" and isinstance(layer, torch.nn.Linear):
            assert torch.equal(layer.weight, weight)
            continue
        result = layer.weight if store == "dense" else layer.dense()
        options = [weight, *(b @ a for b, a in (factor(weight, int(keep * 64 * 64 / 128), metric) for keep in method.keeps))]
        assert any(torch.allclose(result, option, atol=1e-5) for option in options), place


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_the_search_takes_the_cuts_of_least_perplexity_until_the_budget_is_met(keep):
    method = Asvd(keep=keep, keeps=(0.45, 0.7), where="mlp")
    module = tiny(num_hidden_layers=2)
    data = batches(module)
    model = Model(name="", module=module)
    sites = [site for site in model.sites() if site.role.startswith("mlp")]
    seen = statistics_of(model, sites, ("absolute",), data)
    tried, size = [], 64 * 160
    for number, site in enumerate(sites):
        before = weight_of(module, site).clone()
        for share in method.keeps:
            rank = int(share * size / 224)
            b, a = factor(before, rank, method.metric(seen[site.name]))
            put(module, site, b @ a)
            tried.append((text_loss(model, data), number, share, rank * 224))
        put(module, site, before)
    kept, cost = {}, dict.fromkeys(range(6), size)
    for _, number, share, held in sorted(tried):
        if sum(cost.values()) <= keep * 6 * size:
            break
        if held < cost[number]:
            kept[number], cost[number] = share, held
    mw.apply(model, method, data=data)
    held, found = shares(model)
    assert found == [kept.get(number, 1.0) for number in range(6)]
    assert held == pytest.approx(sum(cost.values()) / (6 * size), abs=1e-4)
    assert held <= keep
    stored = sum(value.numel() for name, value in module.named_parameters() if ".mlp." in name)
    assert stored == sum(cost.values())


def test_settings_that_cannot_be_met_are_refused():
    with pytest.raises(SettingError, match=r"keeps are shares between 0 and 1; got \[0.5, 1.0\]"):
        Asvd(keeps=(0.5, 1.0))
    with pytest.raises(SettingError, match="keep is one number for all matrices"):
        Asvd(keep={"mlp": 0.5})
    with pytest.raises(PlanError, match=r"keep=0.3 was asked for, and keeps of 0.5 hold 0.4"):
        mw.apply(tiny(), Asvd(keep=0.3, keeps=(0.5,), where="mlp.down"), data=batches(tiny())[:1])


@pytest.mark.parametrize(("measure", "what"), [("mean", "inputs"), ("largest", "inputs"), ("fisher", "gradients")])
def test_inputs_that_are_not_finite_are_refused_unchanged(measure, what):
    module = tiny()
    module.model.layers[1].mlp.up_proj.weight.data *= 1e38
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(SiteError, match=rf"factor\.asvd: the {what} of model.layers.\d.* are NaN or infinite"):
        mw.apply(module, Asvd(allocate="uniform", measure=measure), data=batches(tiny()))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weights_and_metrics_that_are_not_finite_have_no_factors():
    for weight, metric in ((WEIGHT * torch.nan, None), (WEIGHT, torch.full((40,), torch.inf))):
        with pytest.raises(SiteError, match="are NaN or infinite, so that it has no factors"):
            factor(weight, 4, metric)


def test_a_search_that_is_broken_off_leaves_the_weights_as_they_were(monkeypatch):
    module = tiny(num_hidden_layers=2)
    data, before = batches(module), {name: value.clone() for name, value in module.state_dict().items()}
    calls = []

    def broken(*given):
        calls.append(text_loss(*given))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr("modelwright.methods.factor.asvd.text_loss", broken)
    with pytest.raises(KeyboardInterrupt):
        mw.apply(module, Asvd(where="mlp", keeps=(0.4, 0.7)), data=data)
    assert len(set(calls)) == 5
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
