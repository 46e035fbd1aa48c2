import pytest
import torch
from calibration import normal
from tiny import outputs, tiny
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.core.errors import SettingError, SiteError
from modelwright.core.given import Given
from modelwright.maths.divergence import kolmogorov_smirnov
from modelwright.methods.prune.prunenet import PruneNet, distance, logits, reads


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def matrices(number=3, rows=24, width=12):
    return [normal(rows, width, seed=seed) for seed in range(number)]


def spectra(found):
    return [torch.linalg.svdvals(matrix) for matrix in found]


@pytest.mark.parametrize(("first", "second"), [(5, 7), (6, 6), (1, 9), (40, 31)])
def test_the_distance_of_two_samples_is_the_two_sample_statistic(first, second):
    one, two = normal(first), normal(second, seed=1) + 0.5
    found = kolmogorov_smirnov(one, two)
    steps = [abs((one <= point).double().mean() - (two <= point).double().mean()) for point in [*one, *two]]
    assert found == pytest.approx(float(max(steps)))
    assert 0 <= found <= 1
    assert kolmogorov_smirnov(one, one) == 0
    assert kolmogorov_smirnov(one, one + 100) == 1


def test_a_case_by_hand():
    # W = diag(4, 3, 2, 1): the rows are the singular values. Steps of thirds and quarters: without the row of 1 the cumulated
    # distributions are 0 1/3 2/3 1 and 1/4 2/4 3/4 1 at 1, 2, 3, 4, which are 1/4 apart; without those of 2 and 1, 2/4.
    matrix = torch.diag(torch.tensor([4.0, 3, 2, 1]))[:, :4]
    spectrum = torch.linalg.svdvals(matrix)
    assert distance(matrix, torch.tensor([2, 0, 1]), spectrum) == pytest.approx(1 / 4)
    assert distance(matrix, torch.tensor([0, 1]), spectrum) == pytest.approx(2 / 4)
    # logit α = (W Pᵀ + b) r: with P of ones, b of 2 and r = (1, 0): row sums and 2.
    policy = (torch.ones(2, 3), torch.full((2,), 2.0), torch.tensor([1.0, 0.0]))
    assert logits(policy, torch.tensor([[1.0, 2, 3], [0, 0, 1]])).tolist() == [8.0, 3.0]


def test_the_policy_is_the_published_one_whatever_the_order_of_its_products():
    project, bias, rates, matrix = normal(7, 5), normal(7, seed=1), normal(7, seed=2), normal(7, 5, seed=3)
    published = (matrix @ project.T + bias) @ rates[:, None]
    assert torch.allclose(logits((project, bias, rates), matrix), published[:, 0], atol=1e-5)


def test_rows_are_drawn_without_replacement_and_by_their_chances():
    method, matrix = PruneNet(share=0.5), torch.eye(8)
    policy = (torch.eye(8), torch.zeros(8), torch.tensor([6.0] * 4 + [-6.0] * 4))
    drawn = torch.stack([method.drawn(policy, matrix, seeded(seed)).sort().values for seed in range(50)])
    assert drawn.shape == (50, 4)
    assert all(len(set(rows.tolist())) == 4 for rows in drawn)
    assert (drawn < 4).float().mean() > 0.9


def test_learning_raises_the_reward_of_what_is_drawn():
    """Where some rows alone carry the spectrum, a learnt policy draws them more often than an untrained one."""
    # Rows 0 to 11 repeat each other and add to one singular value; the others have one each.
    matrix = torch.cat([torch.cat([torch.ones(12, 1), torch.zeros(12, 12)], 1), torch.eye(13)[1:]])
    spectrum = torch.linalg.svdvals(matrix)
    means = []
    for episodes in (0, 200):
        method = PruneNet(share=0.25, episodes=episodes, learning_rate=1e-2)
        policy = method.learnt([matrix], [spectrum], seeded())
        means.append(sum(distance(matrix, method.drawn(policy, matrix, seeded(n)), spectrum) for n in range(40)) / 40)
    assert means[1] < 0.9 * means[0], means


def test_entropy_keeps_probabilities_near_one_half():
    found = matrices()
    sizes = []
    for entropy in (0.0, 1e4):
        method = PruneNet(share=0.3, entropy=entropy, learning_rate=1e-2)
        policy = method.learnt(found, spectra(found), seeded())
        sizes.append(max(float(logits(policy, matrix).abs().mean()) for matrix in found))
    assert sizes[1] < sizes[0]


def test_a_blocks_reward_counts_by_the_discount_to_the_power_of_its_place():
    first, second, third = matrices(3)

    def learnt(discount, *chosen):
        return PruneNet(share=0.3, discount=discount, episodes=1, learning_rate=1e-2).learnt(chosen, spectra(chosen), seeded())

    # With 0 only the first block is learnt from, whose power is 0.
    same = [learnt(0.0, first, other) for other in (second, third)]
    assert all(torch.equal(one, two) for one, two in zip(*same, strict=True))
    assert not torch.equal(learnt(0.0, second, first)[0], same[0][0])
    others = [learnt(0.5, first, other) for other in (second, third)]
    assert not torch.equal(others[0][0], others[1][0])


def test_of_more_draws_the_nearest_is_nearer():
    found = matrices(1)[0]
    spectrum = torch.linalg.svdvals(found)
    policy = (torch.zeros(24, 12), torch.zeros(24), torch.zeros(24))
    apart = []
    for draws in (1, 20):
        score = PruneNet(share=0.3, draws=draws).nearest(policy, found, spectrum, seeded())
        assert sorted(set(score.tolist())) == [0.0, 1.0]
        assert int(score.sum()) == 24 - 7
        apart.append(distance(found, score.nonzero()[:, 0], spectrum))
    assert apart[1] < apart[0]


def test_the_neurons_of_highest_probability_stay():
    module = tiny()
    method = PruneNet(share=0.3, episodes=1)
    expected = method.look(mw.open(tiny()), method.found(tiny()), Given(seed=0).rng())
    gates = [block.mlp.gate_proj.weight.clone() for block in module.model.layers]
    mw.apply(module, method)
    for block, gate, score in zip(module.model.layers, gates, expected, strict=True):
        kept = score.argsort(descending=True)[: 160 - 48].sort().values
        assert torch.equal(block.mlp.gate_proj.weight, gate[kept])


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "vit"])
def test_it_reads_the_matrix_that_neurons_read_through(name):
    module = tiny(name)
    found = PruneNet().found(module)
    assert [reads(units, dict(module.named_parameters())).shape for units in found] == [(160, 64)] * 4
    if name == "phi3":
        first = module.model.layers[0].mlp.gate_up_proj.weight[:160]
        assert torch.equal(reads(found[0], dict(module.named_parameters())), first)


@pytest.mark.parametrize("draws", [0, 2])
def test_the_result_loads_in_plain_transformers_and_depends_on_the_seed_alone(draws, tmp_path):
    made = []
    for number, seed in enumerate((3, 3, 4)):
        model = mw.apply(mw.open(tiny()), PruneNet(share=0.25, episodes=2, draws=draws), seed=seed)
        assert model.history[-1]["notes"] == []
        model.save(tmp_path / str(number))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).eval()
        assert loaded.config.intermediate_size == 120
        assert not hasattr(loaded.config, "quantization_config")
        made.append(outputs(loaded))
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2], atol=1e-4)


def test_what_it_cannot_prune_is_refused():
    with pytest.raises(SettingError, match=r"units are mlp; got heads. Use prune.llm_pruner for others"):
        PruneNet(units=("heads",))
    uneven = tiny()
    mlp = uneven.model.layers[0].mlp
    for layer, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
        layer.weight = torch.nn.Parameter(layer.weight.data.narrow(dim, 0, 100))
    before = outputs(uneven)
    with pytest.raises(SiteError, match=r"one policy is for blocks of one size, and the MLPs read through 100 × 64, 160 × 64"):
        mw.apply(uneven, PruneNet())
    assert torch.equal(outputs(uneven), before)


@pytest.mark.parametrize(("distances", "best"), [([0.5, 0.1, 0.9], 2), ([0.9, 0.5, 0.1], 3), ([0.1, 0.5, 0.9], 1)])
def test_the_policy_of_the_best_episode_counts(distances, best, monkeypatch):
    def policy(episodes):
        found = iter(distances)
        monkeypatch.setattr("modelwright.methods.prune.prunenet.distance", lambda *_: next(found))
        return PruneNet(share=0.3, episodes=episodes, learning_rate=0.1).learnt(matrices(1), spectra(matrices(1)), seeded())

    every, alone = policy(3), policy(best)
    assert all(torch.equal(one, other) for one, other in zip(every, alone, strict=True))


def test_one_neuron_stays_whatever_is_asked():
    for draws in (0, 2):
        module = mw.apply(tiny(), PruneNet(share=1.0, episodes=1, draws=draws))
        assert module.config.intermediate_size == 1
        assert outputs(module).isfinite().all()
