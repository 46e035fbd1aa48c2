import pytest
import torch

from modelwright.maths import places


@pytest.mark.parametrize(("entries", "count"), [(10, 10), (10, 7), (1000, 30), (1, 1)])
def test_drawn_positions_are_different_in_order_and_as_many_as_asked(entries, count):
    found = places.drawn(entries, count, torch.empty(0))
    assert found.dtype == torch.int32
    assert found.tolist() == sorted(set(found.tolist()))
    assert len(found) == count
    assert 0 <= int(found[0]) <= int(found[-1]) < entries


def test_all_positions_are_drawn_as_often():
    torch.manual_seed(0)
    counts = torch.stack([torch.bincount(places.drawn(40, 4, torch.empty(0)).long(), minlength=40) for _ in range(2000)]).sum(0)
    assert counts.min() > 140  # of 200
    assert counts.max() < 260


def test_of_an_empty_weight_only_the_shape_is_known():
    found = places.drawn(3 * 2**31, 5, torch.empty(0, device="meta"))
    assert (found.is_meta, found.shape, found.dtype) == (True, (5,), torch.int64)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_the_largest_are_found_in_chunks_of_any_size(chunk):
    values = torch.randperm(50, generator=torch.Generator().manual_seed(0)).float()
    asked = []

    def part(at):
        asked.append(at.stop - at.start)
        return values[at]

    found = places.largest(part, 50, 6, chunk)
    assert sorted(values[found].tolist()) == [44, 45, 46, 47, 48, 49]
    assert max(asked) <= chunk
