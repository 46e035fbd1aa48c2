import pytest
import torch
from calibration import batches, correlated, normal
from tiny import outputs, tiny
from torch import nn

import modelwright as mw
from modelwright.core.errors import SiteError, WeightsError
from modelwright.maths.regression import nearest, shrunk
from modelwright.methods.merge.regmean import Regmean


def moments(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.T @ x / len(x) for x in inputs]


def test_a_case_by_hand():
    # One output, moments diag(1, 3) and diag(3, 1): W = (1·2 + 3·6)/4 = 5 and (3·4 + 1·8)/4 = 5.
    solve = nearest([torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([3.0, 1.0]))], [1, 1])
    assert solve([torch.tensor([[2.0, 4.0]]), torch.tensor([[6.0, 8.0]])]).tolist() == [[5.0, 5.0]]


def test_with_whole_moments_it_is_the_least_squares_solution():
    inputs = [correlated(200, 12, seed=1), correlated(100, 12, seed=5)]
    weights = [normal(7, 12, seed=2), normal(7, 12, seed=3)]
    rows = torch.cat([x / len(x) ** 0.5 for x in inputs]).double()
    targets = torch.cat([x.double() @ w.T.double() / len(x) ** 0.5 for x, w in zip(inputs, weights, strict=True)])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    found = nearest([shrunk(one, 1.0) for one in moments(inputs)], [1, 1])(weights)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_without_what_is_off_the_diagonal_it_is_the_mean_of_each_input_by_its_square():
    found = moments([correlated(50, 6, seed=1), correlated(50, 6, seed=9)])
    weights = [normal(4, 6, seed=2), normal(4, 6, seed=3)]
    sizes = [one.diagonal() for one in found]
    expected = (2 * weights[0] * sizes[0] + weights[1] * sizes[1]) / (2 * sizes[0] + sizes[1])
    assert torch.allclose(nearest([shrunk(one, 0.0) for one in found], [2, 1])(weights), expected, atol=1e-5)


def test_inputs_that_never_came_keep_the_mean():
    inputs = [correlated(3, 8, seed=1), correlated(2, 8, seed=4)]  # rank 5 of 8
    for x in inputs:
        x[:, 2] = 0
    weights = [normal(4, 8, seed=2), normal(4, 8, seed=3)]
    found = nearest(moments(inputs), [3, 1])(weights)
    assert torch.allclose(found[:, 2], (3 * weights[0] + weights[1])[:, 2] / 4)
    assert torch.allclose(nearest([torch.zeros(8, 8)] * 2, [1, 1])(weights), (weights[0] + weights[1]) / 2)
    # Outputs on the inputs that came are still reproduced where the two do not contradict each other: 5 rows, 8 unknowns.
    for x, weight in zip(inputs, weights, strict=True):
        assert torch.allclose(x @ found.T, x @ weight.T, atol=1e-3)


@pytest.mark.parametrize("onward", ["donor", "model"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_identical_donors_are_returned(kind, onward):
    donors = [tiny(kind, seed=3), tiny(kind, seed=3)]
    model = mw.apply(tiny(kind), Regmean(onward=onward), donors=donors, data=batches(donors[0]))
    for name, value in model.named_parameters():
        assert torch.allclose(value, donors[0].get_parameter(name), atol=1e-5), name


def linears(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]


def inputs_of(module: nn.Module, data: list[dict], paths: list[str]) -> dict[str, torch.Tensor]:
    """The inputs of linears without padding, by plain hooks."""
    found: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    hooks = [module.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: found[path].append(args[0])) for path in paths]
    with torch.no_grad():
        for batch in data:
            module(**batch)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(found[path], data, strict=True)]) for path in paths}


def test_every_matrix_of_the_blocks_is_solved_on_its_donors_own_inputs_and_the_rest_is_averaged():
    donors = [tiny(seed=1), tiny(seed=2)]
    data = batches(donors[0])
    model = mw.apply(tiny(), Regmean(shrink=0.3, weights=[2, 1]), donors=donors, data=data)
    paths = linears(model)
    found = [inputs_of(donor, data, paths) for donor in donors]
    for path in paths:
        solve = nearest([shrunk(one, 0.3) for one in moments([each[path] for each in found])], [2, 1])
        expected = solve([donor.get_submodule(path).weight.data for donor in donors])
        assert torch.allclose(model.get_submodule(path).weight, expected, atol=1e-4), path
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"):
        mean = (2 * donors[0].get_parameter(name) + donors[1].get_parameter(name)) / 3
        assert torch.allclose(model.get_parameter(name), mean, atol=1e-6), name


def test_activations_may_pass_through_the_merged_blocks():
    """The inputs of a block are those that the merged model gives it."""
    donors = [tiny(seed=1), tiny(seed=2)]
    data = batches(donors[0])
    model = mw.apply(tiny(), Regmean(onward="model"), donors=donors, data=data)
    paths = [f"model.layers.2.self_attn.{part}_proj" for part in "qkv"]  # in a block, what all donors are given alike up to its norm
    merged = inputs_of(model, data, ["model.layers.2.input_layernorm"])
    state = merged["model.layers.2.input_layernorm"]
    with torch.no_grad():
        x = [donor.model.layers[2].input_layernorm(state) for donor in donors]
    for path in paths:
        solve = nearest([shrunk(one, 0.5) for one in moments(x)], [1, 1])
        expected = solve([donor.get_submodule(path).weight.data for donor in donors])
        assert torch.allclose(model.get_submodule(path).weight, expected, atol=1e-4), path


def test_donors_keep_their_blocks():
    donors = [tiny(seed=1), tiny(seed=2)]
    before = [outputs(donor) for donor in donors]
    mw.apply(tiny(), Regmean(onward="model"), donors=donors, data=batches(donors[0]))
    assert all(torch.equal(outputs(donor), one) for donor, one in zip(donors, before, strict=True))


def test_a_tied_head_is_averaged_and_stays_tied():
    donors = [tiny(seed=seed, tie_word_embeddings=True) for seed in (1, 2)]
    model = mw.apply(tiny(tie_word_embeddings=True), Regmean(), donors=donors, data=batches(donors[0]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(model.lm_head.weight, (donors[0].lm_head.weight + donors[1].lm_head.weight) / 2)


def test_a_model_without_a_row_of_blocks_is_merged_at_once():
    donors = [tiny("mlp", seed=1), tiny("mlp", seed=2)]
    data = batches(donors[0])
    model = mw.apply(tiny("mlp"), Regmean(), donors=donors, data=data)
    x = [batch["input"] for batch in data]
    solve = nearest([shrunk(one, 0.5) for one in moments([torch.cat(x)] * 2)], [1, 1])
    assert torch.allclose(model[0].weight, solve([donor[0].weight.data for donor in donors]), atol=1e-5)
    with pytest.raises(SiteError, match="no single row"):
        mw.apply(tiny("mlp"), Regmean(onward="model"), donors=donors, data=data)


def test_donors_with_infinite_weights_are_refused():
    donors = [tiny(seed=1), tiny(seed=2)]
    with torch.no_grad():
        donors[1].model.embed_tokens.weight.mul_(torch.inf)
    with pytest.raises(WeightsError, match="NaN or infinity"):
        mw.apply(tiny(), Regmean(), donors=donors, data=batches(donors[0]))
