import copy

import pytest
import torch
from calibration import batches, blocks_of, correlated, gathered, lettered, normal
from tiny import tiny, tiny_inputs

import modelwright as mw
from modelwright.core.errors import SettingError
from modelwright.core.given import Given
from modelwright.core.walk import change
from modelwright.maths.masks import lowest
from modelwright.methods.prune.sparsegpt import SparseGpt
from modelwright.methods.prune.wanda import Wanda


def diagonal(width=32, seed=3):
    """Statistics of inputs of which only one is not zero at a time: their second moment is diagonal."""
    sizes = torch.rand(width, generator=torch.Generator().manual_seed(seed)) + 0.1
    return gathered(torch.diag(sizes) * width**0.5)


def test_a_case_by_hand():
    # Two inputs x = (3, 1, 0), (-3, 1, 2): mean squares 9, 1, 2, so norms 3, 1, √2.
    # |W|·norm: (3, 4, 7.1) and (6, 1, 1.4). A third of each row goes: the 1 with input 3, and the 1 with input 1.
    statistics = gathered(torch.tensor([[3.0, 1.0, 0.0], [-3.0, 1.0, 2.0]]))
    weight = torch.tensor([[1.0, -4.0, 5.0], [2.0, 1.0, -1.0]])
    assert Wanda(sparsity=0.34).layer(weight, statistics).tolist() == [[0.0, -4.0, 5.0], [2.0, 0.0, -1.0]]


def test_rows_by_sum_by_hand():
    # Scores (1, 2, 3, 4) and (1, 1, 1, 9), as shares of their rows' sums up to each: (.1, .3, .6, 1) and (1, 2, 3, 12) / 12.
    statistics = gathered(torch.eye(4) * 2)  # norms of 1
    weight = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 9.0, 1.0]])
    assert Wanda(by_sum=True, sparsity=0.5).layer(weight, statistics).tolist() == [[4.0, 0.0, 3.0, 2.0], [0.0, 0.0, 9.0, 0.0]]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_rows_by_sum_lose_up_to_one_share(sparsity):
    """The published code's rule: in each row the lowest go as long as their sum is at most a share of the row's."""
    weight, statistics = normal(40, 64) * torch.rand(40, 64) ** torch.arange(40)[:, None], gathered(correlated(200, 64))
    scores = Wanda().score(weight, statistics).double()
    gone = Wanda(by_sum=True, sparsity=sparsity).layer(weight, statistics) == 0
    assert int(gone.sum()) == int(sparsity * weight.numel())
    ordered = scores.sort(1).values.cumsum(1) / scores.sum(1, keepdim=True)
    counts = gone.sum(1)
    assert len(counts.unique()) > 1
    share = max(ordered[row, count - 1] for row, count in enumerate(counts) if count)
    assert all(torch.equal(gone[row], scores[row] <= scores[row].sort().values[count - 1]) for row, count in enumerate(counts) if count)
    assert ((ordered <= share).sum(1) == counts).all()


def test_rows_by_sum_leave_a_pattern_nothing_to_divide():
    with pytest.raises(SettingError, match="by_sum divides one sparsity among rows, and a pattern leaves none"):
        Wanda(by_sum=True, pattern="2:4")


def test_with_a_diagonal_moment_the_score_is_sparsegpts():
    weight, statistics = normal(16, 32), diagonal()
    assert torch.allclose(Wanda().score(weight, statistics) ** 2, weight**2 * statistics.moment.diagonal())
    for pattern in ("2:4", "1:8"):
        ours = Wanda(pattern=pattern).layer(weight, statistics)
        assert torch.equal(ours, SparseGpt(pattern=pattern, damp=0).layer(weight, statistics))
    removed = lowest(Wanda().score(weight, statistics), 0.5)  # SparseGPT's competition is the block, ours the row
    assert torch.equal(SparseGpt(sparsity=0.5, damp=0).layer(weight, statistics), weight.masked_fill(removed, 0))


def test_with_inputs_of_one_size_it_is_magnitude_row_by_row():
    weight, statistics = normal(16, 32), gathered(3 * torch.eye(32))
    result = Wanda(sparsity=0.4).layer(weight, statistics)
    assert torch.equal(result, weight.masked_fill(lowest(weight.abs(), 0.4, per="row"), 0))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_every_row_has_the_same_sparsity(sparsity):
    weight = normal(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    result = Wanda(sparsity=sparsity).layer(weight, gathered(correlated(200, 64)))
    assert ((result == 0).sum(1) == int(sparsity * 64)).all()
    assert torch.equal(result[result != 0], weight[result != 0])  # no weight is updated


def test_the_sparse_form_takes_the_bytes_that_were_planned():
    method = Wanda(sparsity=0.3, store="sparse")
    layer = method.layer(normal(24, 36), gathered(correlated(50, 36)))
    assert layer.nonzeros() == 24 * (36 - 10)
    assert layer.stored_bytes() == method.planned(torch.empty(24, 36, device="meta")).stored_bytes()


def test_sums_run_in_float32():
    ones = torch.ones(5000, 4, dtype=torch.bfloat16)  # added up in bfloat16 they would stop at 256
    assert gathered(ones, "norm").norm.tolist() == [1.0] * 4


def test_padding_does_not_count():
    padded, single = tiny(), tiny()
    data = tiny_inputs(padded)
    rows = [{"input_ids": data["input_ids"][:1]}, {"input_ids": data["input_ids"][1:, :7]}]
    mw.apply(padded, Wanda(), data=[data])
    mw.apply(single, Wanda(), data=rows)
    for (name, one), other in zip(padded.named_parameters(), single.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_block_is_judged_by_the_inputs_that_the_pruned_blocks_before_it_give():
    before = tiny()
    data = batches(before)
    after = mw.apply(copy.deepcopy(before), Wanda(sparsity=0.6), data=data)
    between = copy.deepcopy(before)
    between.model.layers[0].load_state_dict(after.model.layers[0].state_dict())
    seen = []
    layer = between.model.layers[1].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in data:
        between(**batch)
    real = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, data, strict=True)])
    expected = Wanda(sparsity=0.6).layer(layer.weight.detach(), gathered(real.detach()))
    assert torch.equal(after.model.layers[1].self_attn.q_proj.weight == 0, expected == 0)


def test_experts_without_tokens_are_pruned_by_magnitude_and_the_report_says_so():
    model = lettered("mixtral")
    before = copy.deepcopy(model.module)
    data = [{"input_ids": torch.tensor([[5, 9]])}]  # two tokens, two experts each: four of eight at most
    experts = before.model.layers[0].mlp.experts
    chosen = []
    experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    before(**data[0])
    idle = sorted(set(range(8)) - set(chosen[0].flatten().tolist()))
    assert idle
    change(model, Wanda(sparsity=0.5), Given(data=data))
    after = model.module.model.layers[0].mlp.experts
    for number in range(8):
        weight = experts.down_proj.data[number]
        by_size = weight.masked_fill(lowest(weight.abs(), 0.5, per="row"), 0)
        assert torch.equal(after.down_proj[number], by_size) == (number in idle)
    assert any(f"layers.0.mlp.experts.{idle[0]}.down_proj saw no calibration token" in note for note in model.history[-1]["notes"])


def test_every_row_of_a_model_has_its_sparsity_and_the_head_is_left():
    model = mw.open(tiny("qwen2"))
    head = model.module.lm_head.weight.detach().clone()
    mw.apply(model, Wanda(sparsity=0.25), data=batches(model.module))
    for name, weight in blocks_of(model):
        assert ((weight == 0).sum(1) == weight.shape[1] // 4).all(), name
    assert torch.equal(model.module.lm_head.weight, head)
