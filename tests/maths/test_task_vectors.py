import math

import pytest
import torch

from modelwright.maths import masks, slices, task_vectors
from modelwright.maths.slices import flat
from modelwright.maths.task_vectors import elect, trimmed


def trim(delta, keep):
    values = trimmed(flat(delta), delta.numel(), keep)
    return torch.cat([values(at).clone() for at in slices.slices(delta.numel())]).view(delta.shape)


def merge(base, donors, weights, out=None, **settings):
    return task_vectors.merge(base, donors, weights, **settings).whole(out)


def merge_ties(base, donors, weights, keep=0.2, **settings):
    keeps = keep if isinstance(keep, list) else [keep] * len(donors)
    return merge(base, donors, weights, sparsify=[trimming(one) for one in keeps], **settings)


def trimming(keep):
    return lambda values, shape: trimmed(values, torch.Size(shape).numel(), keep)


def average(tensors, weights, out=None, **settings):
    return task_vectors.average(tensors, weights, **settings).whole(out)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def models(request):
    random = torch.Generator().manual_seed(0)
    base = torch.randn(30, 50, generator=random)
    donors = [base + 0.1 * torch.randn(30, 50, generator=random) for _ in range(3)]
    return base.to(request.param), [donor.to(request.param) for donor in donors]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)
    monkeypatch.setattr(masks, "SAMPLE", 200)
    monkeypatch.setattr(masks, "RUN", 20)


def test_a_case_by_hand():
    base = torch.zeros(4)
    first, second = torch.tensor([4.0, -1.0, 3.0, 0.5]), torch.tensor([2.0, 2.0, -5.0, 0.1])
    # keep half: [4, 0, 3, 0] and [0 or 2 ...]: of the second, 2 stands twice and the later stays: [0, 2, -5, 0].
    assert trim(second, 0.5).tolist() == [0.0, 2.0, -5.0, 0.0]
    assert elect([first, second]).tolist() == [1.0, 1.0, -1.0, 1.0]
    assert merge_ties(base, [first, second], [1.0, 1.0], keep=0.5).tolist() == [4.0, 2.0, -5.0, 0.0]
    assert merge(base, [first, second], [1.0, 1.0]).tolist() == pytest.approx([3.0, 2.0, -5.0, 0.3])
    summed = merge(base, [first, second], [1.0, 0.5], consensus=False, normalize=False, scale=2.0)
    assert summed.tolist() == pytest.approx([10.0, 0.0, 1.0, 1.1])


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.2, 0.5, 0.999, 1.0])
def test_trim_keeps_an_exact_number_of_the_largest(models, keep):
    delta = models[0]
    result = trim(delta, keep)
    kept = result != 0
    assert kept.sum() == int(keep * delta.numel())
    assert torch.equal(result[kept], delta[kept])
    assert torch.equal(delta[kept].abs().sort().values, delta.abs().flatten().sort().values[delta.numel() - int(kept.sum()) :])


@pytest.mark.parametrize("keep", [0.05, 0.35, 0.6, 0.95])
def test_of_sizes_that_are_alike_those_that_stand_last_stay(keep):
    """Over slices of 400: the cut may lie in any of them."""
    signs = torch.randn(1000, generator=torch.Generator().manual_seed(0)).sign()
    kept = torch.arange(1000) >= 1000 - int(keep * 1000)
    assert torch.equal(trim(signs, keep), signs * kept)
    mixed = torch.where(torch.arange(1000) % 10 == 0, 2 * signs, signs)  # a hundred are larger, and stay
    count = int(keep * 1000)
    found = trim(mixed, keep)
    larger, alike = mixed.abs() == 2, mixed.abs() == 1
    last = larger if count <= 100 else alike
    chosen = torch.zeros(1000, dtype=torch.bool)
    chosen[last.nonzero()[-(count - (0 if count <= 100 else 100)) :, 0]] = True
    assert torch.equal(found, mixed * (chosen | larger & torch.tensor(count > 100)))


def test_trim_reads_views_and_leaves_them(models):
    delta = models[0].t()
    before = delta.clone()
    assert torch.equal(trim(delta, 1.0), delta)
    trim(delta, 0.2)
    assert torch.equal(delta, before)


def test_scale_zero_gives_the_base(models):
    base, donors = models
    assert torch.equal(merge_ties(base, donors, [0.5, 0.3, 0.2], scale=0.0), base)


def test_one_donor_kept_whole_is_that_donor(models):
    base, donors = models
    assert torch.allclose(merge_ties(base, donors[:1], [0.7], keep=1.0), donors[0], atol=1e-6)


def test_identical_donors_normalised_are_that_donor(models):
    base, donors = models
    result = merge_ties(base, donors[:1] * 4, [0.25, 0.5, 1.0, 2.0], keep=1.0)
    assert torch.allclose(result, donors[0], atol=1e-6)


def test_without_consensus_it_is_task_arithmetic(models):
    base, donors = models
    weights = [0.4, -0.2, 0.7]
    result = merge(base, donors, weights, consensus=False, normalize=False, scale=1.5)
    exact = base.double() + 1.5 * sum(w * (d.double() - base.double()) for w, d in zip(weights, donors, strict=True))
    assert result.dtype == base.dtype
    half = exact.abs() * (2**-24 if base.dtype == torch.float32 else 2**-8)  # half of the step between two values
    assert ((result.double() - exact).abs() <= half + 1e-6).all()  # sums are float32


def test_weights_that_sum_to_one_give_the_average(models):
    base, donors = models
    result = merge(base, donors, [0.2, 0.3, 0.5], consensus=False)
    exact = sum(w * d.double() for w, d in zip([0.2, 0.3, 0.5], donors, strict=True))
    assert torch.allclose(result.double(), exact, rtol=2**-8 if base.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_the_order_of_the_donors_does_not_matter(models):
    base, donors = models
    one = merge_ties(base, donors, [0.2, 0.3, 0.5], keep=0.3)
    other = merge_ties(base, donors[::-1], [0.5, 0.3, 0.2], keep=0.3)
    assert torch.allclose(one.float(), other.float(), atol=1e-6, rtol=2**-8 if base.dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("keep", [0.2, [0.1, 0.5, 1.0]])
@pytest.mark.parametrize("weights", [[0.2, 0.3, 0.5], [1.0, -0.6, 0.4]])
def test_it_is_the_published_formula(models, weights, keep, normalize):
    base, donors = models
    keeps = keep if isinstance(keep, list) else [keep] * 3
    deltas = [weight * trim(donor.float() - base.float(), fraction) for weight, donor, fraction in zip(weights, donors, keeps, strict=True)]
    sign = torch.where(sum(deltas) >= 0, 1.0, -1.0)
    agree = [delta.sign() == sign for delta in deltas]
    mixed = sum(delta * kept for delta, kept in zip(deltas, agree, strict=True))
    if normalize:
        share = sum(weight * kept for weight, kept in zip(weights, agree, strict=True))
        mixed = mixed / torch.where(share == 0, 1.0, share)
    expected = (base.float() + 0.8 * mixed).to(base.dtype)
    result = merge_ties(base, donors, weights, keep=keep, scale=0.8, normalize=normalize)
    assert torch.allclose(result.float(), expected.float(), rtol=1e-5, atol=1e-6)
    assert result.dtype == base.dtype


def test_the_result_may_take_the_place_of_an_input(models):
    base, donors = models
    expected = merge_ties(base, donors, [0.2, 0.3, 0.5])
    for place in (base, donors[1]):
        inputs = [base.clone(), *(donor.clone() for donor in donors)]
        target = inputs[0] if place is base else inputs[2]
        result = merge_ties(inputs[0], inputs[1:], [0.2, 0.3, 0.5], out=target)
        assert result is target
        assert torch.equal(result, expected)


def test_inputs_are_left_alone_and_small_tensors_do(models):
    base, donors = models
    before = [base.clone(), *(donor.clone() for donor in donors)]
    merge_ties(base, donors, [1.0, 1.0, 1.0])
    assert all(torch.equal(a, b) for a, b in zip(before, [base, *donors], strict=True))
    assert merge_ties(torch.ones(()), [torch.ones(())], [1.0]).shape == ()
    assert merge_ties(torch.ones(0, 3), [torch.ones(0, 3)], [1.0]).shape == (0, 3)
    assert merge_ties(torch.ones(3), [torch.full((3,), 2.0)], [1.0], keep=0.1).tolist() == [1.0] * 3


@pytest.mark.parametrize("normalize", [True, False])
def test_an_average_is_exact_to_one_rounding(models, normalize):
    _, donors = models
    weights = [0.2, 0.3, 1.7]
    total = sum(weights) if normalize else 1.0
    exact = sum(weight / total * donor.double() for weight, donor in zip(weights, donors, strict=True))
    result = average(donors, weights, normalize=normalize)
    assert result.dtype == donors[0].dtype
    half = exact.abs() * 2 ** (-24 if result.dtype == torch.float32 else -8)  # half of the step between two values
    assert ((result.double() - exact).abs() <= 1.0001 * half).all()
    wide = average(donors, weights, normalize=normalize, dtype=torch.float32)
    assert ((wide.double() - exact).abs() <= 1.0001 * exact.abs() * 2**-24).all()


def test_an_average_that_nearly_cancels_is_exact():
    tensors = [torch.full((7,), value) for value in (1e8, 1.0, -1e8)]
    assert average(tensors, [1.0, 1.0, 1.0], normalize=False).tolist() == [1.0] * 7


def test_an_average_of_one_tensor_is_that_tensor_bit_for_bit(models):
    for tensor in (models[0], torch.tensor([0.0, -0.0, 1e-45, -3e38])):
        for weights, normalize in (([1.0], False), ([0.3], True), ([0.1, 0.7], True)):
            result = average([tensor] * len(weights), weights, normalize=normalize)
            kind = torch.int32 if tensor.dtype == torch.float32 else torch.int16
            assert torch.equal(result.view(kind), tensor.view(kind))


def test_an_average_may_take_the_place_of_an_input_and_leaves_the_others(models):
    _, donors = models
    expected = average(donors, [0.2, 0.3, 0.5])
    inputs = [donor.clone() for donor in donors]
    assert average(inputs, [0.2, 0.3, 0.5], out=inputs[1]) is inputs[1]
    assert torch.equal(inputs[1], expected)
    assert torch.equal(inputs[0], donors[0])
    assert torch.equal(inputs[2], donors[2])


def test_an_average_of_any_shape(models):
    assert average([torch.tensor(2.0), torch.tensor(4.0)], [1, 3]).item() == 3.5
    assert average([torch.ones(0, 3)], [1.0]).shape == (0, 3)
    view = models[0].t()
    assert torch.equal(average([view, view], [1.0, 1.0]), view)


def test_a_merge_reads_its_inputs_by_slices_and_each_at_most_three_times(models):
    """Once for the sample (a part), once for the cut, once for the result."""

    class Watched:
        def __init__(self, tensor):
            self.tensor, self.shape, self.dtype, self.read = tensor.reshape(-1), tensor.shape, tensor.dtype, 0

        def __getitem__(self, at):
            assert isinstance(at, slice)
            assert at.stop - at.start <= 400
            self.read += at.stop - at.start
            return self.tensor[at]

    base, donors = models
    watched = [Watched(tensor) for tensor in (base, *donors)]
    result = task_vectors.merge(watched[0], watched[1:], [1.0] * 3, sparsify=[trimming(0.2)] * 3)
    assert torch.equal(torch.cat(list(result)).view(base.shape), merge_ties(base, donors, [1.0] * 3))
    assert all(2 * 1500 <= one.read <= 3 * 1500 for one in watched[1:])


def test_the_order_of_rows_is_the_stable_one():
    sizes = torch.randn(20, 333, generator=torch.Generator().manual_seed(0)).abs().mul(8).round() / 8
    sizes[0] = 0
    sizes[1, ::7] = float("inf")
    assert torch.equal(task_vectors._order(sizes), sizes.argsort(dim=-1, stable=True))


@pytest.mark.parametrize("shape", [(7, 150), (30, 50), (3, 1), (2, 900), (0, 4)])
def test_numbers_of_rows_reach_all_their_entries(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    width, count = shape[1], rows.numel()
    found = task_vectors.of_rows([flat(rows), flat(rows)], width, count, lambda one, two: (one * two).sum(-1))
    assert torch.allclose(found, rows.square().sum(-1))
    values = task_vectors.spread(found, width)
    whole = torch.cat([torch.empty(0), *(values(at) for at in slices.slices(count))])
    assert torch.equal(whole, found.repeat_interleave(width))


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_row_wider_than_a_slice_is_read_once(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 64)
    values, reads = torch.randn(5, 1000), []

    def read(at):
        reads.append(at)
        return values.view(-1)[at]

    found = slices.Sliced((5, 1000), torch.float32, task_vectors.by_rows([read], 1000, 5000, lambda rows: rows.cumsum(-1))).whole()
    assert torch.equal(found, values.cumsum(-1))
    assert len(reads) == 5


def test_the_least_of_the_largest_by_hand():
    values = flat(torch.tensor([3.0, -5.0, 1.0, 4.0]))
    assert [task_vectors.least_of_largest(values, 4, keep) for keep in (0.25, 0.5, 0.74, 1.0)] == [5.0, 4.0, 4.0, 1.0]
    assert task_vectors.least_of_largest(values, 4, 0.2) == math.inf  # int(.2 · 4) is none


def test_each_slice_draws_masks_of_its_own():
    ones = torch.ones(2000)
    found = task_vectors.dropped(flat(ones), 0.5, 7)
    parts = [found(at) for at in slices.slices(2000)]
    assert len(parts) == 5
    assert len({tuple(part.tolist()) for part in parts}) == 5
    assert torch.equal(task_vectors.dropped(flat(ones), 0.5, 7)(slice(400, 800)), parts[1])
    assert not torch.equal(task_vectors.dropped(flat(ones), 0.5, 8)(slice(400, 800)), parts[1])


def test_probabilities_by_rank_by_hand():
    # keep .5 ± .3 over a row of four: .2, .4, .6, .8 by the size in the row, the sign aside; of ties the first is smaller.
    rows = torch.tensor([[1.0, -4.0, 2.0, 3.0], [-5.0, 5.0, 0.0, -7.0]])
    found = task_vectors.by_rank(flat(rows), (2, 4), 0.5, 0.3)(slice(0, 8))
    assert found.tolist() == pytest.approx([0.2, 0.8, 0.4, 0.6, 0.4, 0.6, 0.2, 0.8])
    for keep in (0.1, 0.9):  # with which some would stay with less than nothing, or more than surely
        with pytest.raises(AssertionError):
            task_vectors.by_rank(flat(rows), (2, 4), keep, 0.3)
    assert task_vectors.by_rank(flat(rows), (8, 1), 0.6, 0.3)(slice(2, 5)).tolist() == pytest.approx([0.6] * 3)


def test_what_was_kept_of_nothing_stays_nothing_and_sums_are_exact():
    zeros = flat(torch.zeros(5))
    assert task_vectors.restoring(zeros, zeros, 5) == 1
    values = torch.tensor([1e8, -1.0, 1.0, -1.0, 1.0])  # float32 would lose the ones
    assert task_vectors.size(flat(values), 5) == 100_000_004
    kept = torch.tensor([0.0, -1.0, 0.0, 2.0, 0.0])
    doubled = torch.tensor([1.0, -1.0, 2.0, 2.0, 0.0])
    assert task_vectors.restoring(flat(doubled), flat(kept), 5) == 2


def test_outliers_are_left_out_to_the_last_entry():
    values = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    for keep, top, expected in (
        (0.6, 0.2, [0.0, -2.0, 3.0, -4.0, 0.0]),  # one of the largest, one of the smallest
        (0.8, 0.4, [1.0, -2.0, 3.0, -4.0, 0.0]),  # only one has to go
        (0.4, 0.0, [0.0, 0.0, 0.0, -4.0, 5.0]),
        (0.2, 0.8, [1.0, 0.0, 0.0, 0.0, 0.0]),
        (1.0, 0.4, [1.0, -2.0, 3.0, -4.0, 5.0]),
        (0.0, 0.4, [0.0] * 5),
    ):
        assert task_vectors.without_outliers(flat(values), 5, keep, top)(slice(0, 5)).tolist() == expected, (keep, top)


def test_raw_votes_need_consensus():
    """Without consensus all changes count, whoever votes."""
    donors = [torch.tensor([1.0]), torch.tensor([-3.0])]
    assert merge(torch.zeros(1), donors, [1.0, 1.0], consensus=False, normalize=False, raw_votes=True).item() == -2


def test_weights_that_nearly_cancel_where_they_agree_are_no_divisor():
    # .6 + .3 - .9 is 6e-8 in float32 and not 0: the sum of what agrees is not divided by it.
    donors = [torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([-1.0])]
    assert merge(torch.zeros(1), donors, [0.6, 0.3, -0.9]).item() == pytest.approx(1.8)


def test_a_negative_weight_counts_against_the_divisor():
    # Weighted changes 2 and 1 (of -1 by -1) agree; they are divided by 2 - 1.
    donors = [torch.tensor([1.0]), torch.tensor([-1.0])]
    assert merge(torch.zeros(1), donors, [2.0, -1.0]).item() == 3


def test_rows_wider_than_a_slice_hold_no_more_than_two(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 64)
    values, reads = torch.randn(6, 1000), []

    def read(at):
        reads.append(at.start // 1000)
        return values.view(-1)[at]

    found = task_vectors.by_rows([read], 1000, 6000, lambda rows: rows.cumsum(-1))
    for row in (0, 1, 0, 1):  # both are held, as threads that work at a border need
        assert torch.equal(found(slice(1000 * row + 10, 1000 * row + 20)), values.cumsum(-1)[row, 10:20])
    assert reads == [0, 1]
    found(slice(2000, 2010))
    found(slice(0, 10))
    assert reads == [0, 1, 2, 0]  # the first had gone


def test_what_was_kept_is_found_once(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 16)
    values, asked = torch.arange(1.0, 42.0), []

    def kept(at):
        asked.append(at)
        return values[at] * (values[at] % 3 == 0)

    found = task_vectors.remembered(flat(values), kept, 41)
    for _ in range(2):
        whole = torch.cat([found(at) for at in slices.slices(41)])
        assert whole.tolist() == [number * (number % 3 == 0) for number in range(1, 42)]
    assert len(asked) == 3
    assert values.tolist() == list(range(1, 42))
