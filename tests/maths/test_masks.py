import math

import pytest
import torch

from modelwright.core.errors import SiteError
from modelwright.maths import masks, slices, task_vectors
from modelwright.maths.masks import find_cut, lowest


def test_a_case_by_hand():
    score = torch.tensor([[3.0, 1.0, 2.0, 4.0], [8.0, 7.0, 6.0, 5.0]])
    assert lowest(score, 0.5).tolist() == [[True] * 4, [False] * 4]
    assert lowest(score, 0.5, per="row").tolist() == [[False, True, True, False], [False, False, True, True]]
    assert lowest(score, pattern=(1, 4)).tolist() == [[True, True, True, False], [False, True, True, True]]
    assert lowest(score, pattern=(1, 2)).tolist() == [[False, True, True, False], [False, True, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sparsity", [0, 1e-4, 0.1, 0.5, 0.9, 0.999, 1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (130, 500)])
def test_counts_are_exact_and_the_lowest_go(shape, sparsity, dtype, monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 5000)
    monkeypatch.setattr(masks, "SAMPLE", 1000)
    monkeypatch.setattr(masks, "RUN", 20)
    score = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = lowest(score, sparsity)
    assert mask.sum() == math.floor(sparsity * score.numel())
    assert torch.equal(score[mask].sort().values, score.flatten().sort().values[: int(mask.sum())])
    rows = lowest(score, sparsity, per="row")
    assert (rows.sum(1) == math.floor(sparsity * score.shape[1])).all()
    for values, removed in zip(score, rows, strict=True):
        assert torch.equal(values[removed].sort().values, values.sort().values[: int(removed.sum())])


@pytest.mark.parametrize(
    "score",
    [
        torch.zeros(40, 50),
        torch.arange(2000.0).view(40, 50) % 3,
        torch.cat([torch.zeros(1900), torch.rand(100)]).view(40, 50),
        torch.cat([torch.rand(100), torch.full((1900,), float("inf"))]).view(40, 50),
        torch.cat([torch.full((1900,), -float("inf")), torch.ones(100)]).view(40, 50),
        10.0 ** torch.arange(-1000, 1000).div(30).float().view(40, 50),
    ],
)
@pytest.mark.parametrize("sparsity", [0.01, 0.3333, 0.5, 0.97])
def test_ties_are_removed_from_the_front(score, sparsity, monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 300)
    monkeypatch.setattr(masks, "SAMPLE", 100)
    monkeypatch.setattr(masks, "RUN", 20)

    def by_sorting(values):
        mask = torch.zeros_like(values, dtype=torch.bool)
        mask[values.argsort(stable=True)[: math.floor(sparsity * values.numel())]] = True
        return mask

    assert torch.equal(lowest(score, sparsity).view(-1), by_sorting(score.view(-1)))
    assert torch.equal(lowest(score, sparsity, per="row"), torch.stack([by_sorting(row) for row in score]))


def test_a_sample_that_misleads_costs_only_time(monkeypatch):
    brackets = iter([(5.0, 6.0), (5.0, 6.0), (float("-inf"), float("inf"))] * 3)
    monkeypatch.setattr(masks, "_bracket", lambda *_: next(brackets))
    values = torch.arange(10.0)
    assert find_cut(values.__getitem__, 10, 2) == (1.0, 0, 1)
    assert find_cut(values.__getitem__, 10, 9) == (8.0, 0, 1)
    next(brackets)
    assert find_cut(values.__getitem__, 10, 7) == (6.0, 0, 1)  # the upper end of the bracket itself


def test_a_cut_says_in_which_slice_its_ties_end(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 4)
    values = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0, 1.0, 1.0, 1.0, 3.0])
    cut = find_cut(values.__getitem__, 9, 6)  # the 0 and five of the six ones
    assert cut == (1.0, 4, 2)
    marked = [cut.mark(values[at], at).tolist() for at in slices.slices(9)]
    assert marked == [[True, True, False, True], [True, True, True, False], [False]]


@pytest.mark.parametrize(("keep", "run"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (5, 16), (7, 32), (4, 4)])
def test_a_pattern_keeps_n_of_every_m(keep, run):
    score = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).mul(4).round()
    mask = lowest(score, pattern=(keep, run))
    runs, marked = score.view(-1, run), mask.view(-1, run)
    assert (marked.sum(1) == run - keep).all()
    for values, removed in zip(runs, marked, strict=True):
        assert removed.nonzero()[:, 0].tolist() == sorted(values.argsort(stable=True)[: run - keep].tolist())


def test_scores_that_are_views_are_read_as_they_look():
    score = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).t()
    for options in ({"sparsity": 0.4}, {"sparsity": 0.4, "per": "row"}, {"pattern": (2, 4)}):
        assert torch.equal(lowest(score, **options), lowest(score.contiguous(), **options))


def test_masks_leave_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    lowest(torch.rand(200, 200, generator=torch.Generator().manual_seed(0)), 0.5)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("share", [0, 0.01, 0.25, 0.5, 0.999, 1])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_quantiles_lie_between_their_neighbours(share, count, monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 300)
    score = torch.randn(count, generator=torch.Generator().manual_seed(1))
    shares = [share, 0.75, 0.75, 0.76]
    expected = score.double().quantile(torch.tensor(shares, dtype=torch.float64))
    assert masks.quantiles(slices.flat(score), count, shares) == pytest.approx(expected.tolist())


def test_several_cuts_are_found_in_one_pass(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 5000)
    monkeypatch.setattr(masks, "SAMPLE", 1000)
    monkeypatch.setattr(masks, "RUN", 20)
    score, read = torch.randn(50_000, generator=torch.Generator().manual_seed(1)), []

    def values(at):
        read.append(at.stop - at.start)
        return score[at]

    ranks = [12_500, 25_000, 12_501, 0, 37_500, 25_000]
    cuts = masks.find_cuts(values, 50_000, ranks)
    assert [cut.value for cut in cuts] == [score.kthvalue(rank).values.item() if rank else float("-inf") for rank in ranks]
    assert sum(read) == 50_000 + 1000  # all of it once, and the sample


def test_the_sample_grows_with_the_values(monkeypatch):
    monkeypatch.setattr(masks, "SAMPLE", 64)
    monkeypatch.setattr(masks, "RUN", 4)
    assert [len(masks._sample(torch.arange(count).__getitem__, count)) for count in (64, 65, 51_200, 10_000_000)] == [0, 64, 100, 4096]


def test_values_without_an_order_are_refused():
    values = torch.full((10,), float("nan"))
    with pytest.raises(SiteError, match="NaN"):
        find_cut(values.__getitem__, 10, 5)


def test_the_sample_is_the_same_every_time(monkeypatch):
    """Drawn from a generator of its own, so that the work is the same too."""
    monkeypatch.setattr(slices, "SLICE", 5000)
    monkeypatch.setattr(masks, "SAMPLE", 1000)
    monkeypatch.setattr(masks, "RUN", 20)
    values, read = torch.randn(30_000, generator=torch.Generator().manual_seed(1)), []

    def reading(at):
        read.append((at.start, at.stop))
        return values[at]

    for seed in (1, 2):
        torch.manual_seed(seed)
        find_cut(reading, 30_000, 9000)
    assert read[: len(read) // 2] == read[len(read) // 2 :]


def test_a_sample_of_one_place_misses_and_a_wider_bracket_finds_the_cut(monkeypatch):
    """Of sorted values one run of the sample says nothing about the others."""
    monkeypatch.setattr(masks, "SAMPLE", 1000)
    monkeypatch.setattr(masks, "RUN", 1000)
    values, tried, bracket = torch.arange(30_000.0), [], masks._bracket
    monkeypatch.setattr(masks, "_bracket", lambda *given: tried.append(given[-1]) or bracket(*given))
    assert find_cut(values.__getitem__, 30_000, 9000).value == 8999
    assert tried == [10.0, 80.0]


@pytest.mark.parametrize("at", [slice(0, 8), slice(2, 4), slice(4, 9)])
def test_a_cut_marks_no_slices_but_those_that_it_was_found_in(at, monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 4)
    values = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0, 1.0, 1.0, 1.0, 3.0])
    cut = find_cut(values.__getitem__, 9, 6)
    trimmed = task_vectors.without_lowest(slices.flat(values), 9, 6)
    for work in (cut.mark, cut.before):
        with pytest.raises(AssertionError):
            work(values[at].clone(), at)
    with pytest.raises(AssertionError):
        trimmed(at)
