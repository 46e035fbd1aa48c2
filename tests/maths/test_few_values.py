import pytest
import torch

from modelwright.core.errors import WeightsError
from modelwright.maths.few_values import FewValues, Largest, clustered, decode, deviation, encode, parts_of, signs, with_feedback
from modelwright.maths.slices import SLICE, Joined

CODES = ("rice", "huffman", "masks")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def top(values, count):
    """Which `count` are the largest in size, the first of those that tie."""
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[(-values.abs()).argsort(stable=True)[:count]] = True
    return mask


def error(values, change):
    return float((values - change.read(slice(0, len(values)))).square().sum())


@pytest.mark.parametrize("kept", [0, 1, 17, 999, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_of_all_tensors_stay_and_of_ties_the_first(kept, ties):
    values = normal(1000).mul(2).round() if ties else normal(1000)
    parts = [values[:300], values[300:301], values[301:301], values[301:]]
    largest = Largest(Joined(parts), kept)
    assert torch.equal(torch.cat([largest.mark(part) for part in parts]), top(values, kept))


def test_the_count_is_exact_over_many_slices():
    values = normal(3 * SLICE + 7).mul(3).round()
    largest = Largest(Joined([values]), 123_456)
    assert torch.equal(largest.mark(values), top(values, 123_456))


def test_the_deviation_is_that_of_all_entries():
    values = normal(3 * SLICE) + 5
    assert deviation(values) == pytest.approx(float(values.double().std()))
    assert deviation(torch.tensor([3.0])) == 0


def test_signs_by_hand():
    part = torch.tensor([0.5, -2.0, 0.0, 1.0])
    change = signs(part, torch.tensor([False, True, True, True]), 0.25)
    assert change.read(slice(0, 4)).tolist() == [0.0, -0.25, 0.0, 0.25]


def test_clusters_by_hand():
    # Above 0: 1, 4, 6. They begin at their mean 11/3; its middle to 0 is 11/6, so that 1 goes to 0 and the mean is 5; then 2.5: no change.
    part = torch.tensor([1.0, -3.0, 4.0, 0.1, 6.0])
    kept = torch.tensor([True, True, True, False, True])
    change = clustered(part, kept, 3, 4)
    assert change.values.tolist() == [-3.0, 5.0]
    assert change.read(slice(0, 5)).tolist() == [0.0, -3.0, 5.0, 0.0, 5.0]
    assert clustered(part, kept, 3, 0).read(slice(0, 5)).tolist() == pytest.approx([0.0, -3.0, 11 / 3, 0.0, 11 / 3])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [3, 5, 9])
def test_clusters_err_no_more_than_any_grid_with_the_same_entries_and_less_with_each_step(seed, levels):
    values = normal(5000, seed=seed) ** 3
    kept = top(values, 1000)
    errors = [error(values, clustered(values, kept, levels, steps)) for steps in (0, 1, 2, 4, 50)]
    assert errors == sorted(errors, reverse=True)
    for low, high in torch.rand(200, 2, generator=torch.Generator().manual_seed(seed)) * 40:
        fixed = torch.where(values < 0, -low, high) * kept
        assert errors[3] <= float((values - fixed).square().sum())


def test_clusters_of_one_sign_or_of_nothing():
    part = normal(50).abs()
    change = clustered(part, part > 0, 3, 4)
    assert change.values[0] == 0
    assert set(change.labels.tolist()) <= {0, 2}
    assert clustered(part, part < 0, 3, 4).labels.sum() == 0
    few = clustered(torch.tensor([1.0, -1.0]), torch.tensor([True, True]), 9, 4)
    assert few.read(slice(0, 2)).tolist() == [1.0, -1.0]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("levels", [3, 5, 9])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 5000])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_changes_come_back_and_take_the_bytes_that_are_counted(code, levels, count, share):
    random = torch.Generator().manual_seed(count)
    labels = torch.randint(1, levels, (count,), generator=random) * (torch.rand(count, generator=random) < share)
    change = FewValues(labels.to(torch.uint8), normal(levels - 1))
    parts, numbers = encode(change, code)
    assert tuple(parts) == parts_of(code)
    again = decode(parts, numbers, count)
    assert torch.equal(again.labels, change.labels)
    assert torch.equal(again.values, change.values)


@pytest.mark.parametrize(("share", "bits"), [(0.05, 0.339), (0.1, 0.576), (0.2, 0.939), (0.5, 1.5)])
def test_an_entry_takes_the_papers_bits(share, bits):
    values = normal(1 << 20)
    change = signs(values, top(values, round(share * len(values))), 1.0)
    stored = {code: 8 * sum(part.nbytes for part in encode(change, code)[0].values()) / len(values) for code in CODES}
    assert stored["rice"] == pytest.approx(bits, rel=0.02)
    assert stored["masks"] == pytest.approx(2, abs=1e-3)
    assert stored["huffman"] == pytest.approx(1 + share + 2**-6, abs=0.01)  # 1, 2, 2 bits, and 16 for every 1024


def test_what_feedback_lost_comes_with_the_next_round():
    def code(change):
        return clustered(change, top(change, 50), 3, 4)

    total, sent, residual = torch.zeros(500), torch.zeros(500), None
    for seed in range(12):
        change = normal(500, seed=seed)
        found, residual = with_feedback(change, residual, code)
        total, sent = total + change, sent + found.read(slice(0, 500))
        assert torch.allclose(sent + residual, total, atol=1e-4)
    alone = sum(code(normal(500, seed=seed)).read(slice(0, 500)) for seed in range(12))
    assert (sent - total).norm() < 0.8 * (alone - total).norm()


def test_damage_is_said():
    change = signs(normal(1000), top(normal(1000), 100), 1.0)
    parts, numbers = encode(change, "rice")
    with pytest.raises(WeightsError, match="has one at"):
        decode(parts, numbers, 10)
    with pytest.raises(WeightsError, match="are stored"):
        decode(parts, numbers | {"nonzeros": 99}, 1000)
    parts, numbers = encode(change, "huffman")
    with pytest.raises(WeightsError, match="has an entry of value 2 of 1"):
        decode(parts | {"values": torch.ones(1)}, numbers, 1000)
