import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modelwright.maths import slices
from modelwright.maths.slices import Joined, Sliced, Stacked, each, flat


@pytest.fixture(autouse=True, params=[1, 3], ids=["one thread", "three threads"])
def threads(request, monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 10)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_slices_cover_all_entries_once():
    assert slices.slices(25) == [slice(0, 10), slice(10, 20), slice(20, 25)]
    assert slices.slices(0) == []


def test_results_come_in_order_and_torch_keeps_its_threads(threads):
    seen = []

    def work(at):
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        return at.start

    assert list(each(work, 95)) == list(range(0, 95, 10))
    assert torch.get_num_threads() == threads
    if threads > 1:
        assert {inside for _, inside in seen} == {1}
        assert threading.current_thread().name not in {name for name, _ in seen}


def test_an_error_in_a_slice_ends_the_work(threads):
    def work(at):
        if at.start == 30:
            raise ValueError("slice 30")
        return at.start

    with pytest.raises(ValueError, match="slice 30"):
        list(each(work, 10_000))
    assert torch.get_num_threads() == threads


def test_a_reader_that_stops_early_leaves_no_thread_behind(threads):
    before = threading.active_count()
    results = each(lambda at: at.start, 10_000)
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


def test_a_sliced_tensor_is_the_whole_one():
    one, other = torch.randn(5, 7), torch.randn(5, 7)
    result = Sliced((5, 7), torch.bfloat16, lambda at: flat(one)(at) + flat(other)(at))
    assert torch.equal(result.whole(), (one + other).bfloat16())
    assert torch.equal(torch.cat(list(result)).view(5, 7), (one + other).bfloat16())
    place = one.clone()
    assert Sliced((5, 7), torch.float32, lambda at: flat(place)(at) * 2).whole(out=place) is place
    assert torch.equal(place, one * 2)


def test_a_scalar_and_an_empty_tensor():
    assert Sliced((), torch.float32, lambda at: torch.ones(1)).whole().shape == ()
    assert Sliced((0, 3), torch.float32, lambda at: torch.ones(1)).whole().shape == (0, 3)


def test_joined_tensors_are_read_across_their_borders():
    parts = [torch.arange(7.0), torch.arange(12.0).view(3, 4), torch.ones(()), torch.arange(25.0)]
    joined, whole = Joined(parts), torch.cat([part.reshape(-1) for part in parts])
    assert joined.shape == (45,)
    for at in [*slices.slices(45), slice(0, 45), slice(5, 21), slice(7, 8), slice(19, 20)]:
        assert torch.equal(joined[at], whole[at])


def test_joined_tensors_take_the_widest_dtype():
    joined = Joined([torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1 + 2**-20])])
    assert joined.dtype == torch.float32
    assert joined[slice(0, 2)].tolist() == [1.0, 1 + 2**-20]


def test_work_records_no_gradients(threads):
    weight = torch.ones(40, requires_grad=True)
    assert not any(part.requires_grad for part in each(lambda at: weight[at] * 2, 40))


def test_work_runs_no_further_ahead_than_a_few_slices(threads):
    """So that results that wait for their reader do not fill the memory."""
    done = []
    results = each(lambda at: done.append(at.start), 10_000)
    next(results)
    assert len(done) <= 2 * threads + 1 + threads
    results.close()
    assert len(done) <= 4 * threads + 2  # what waits when the reader leaves is not worked on


def test_joined_tensors_are_read_at_every_place():
    parts = [torch.arange(3.0), torch.arange(2.0).to(torch.bfloat16), torch.arange(4.0)]
    joined, whole = Joined(parts), torch.cat([part.float() for part in parts])
    for start in range(9):
        for stop in range(start + 1, 10):
            found = joined[slice(start, stop)]
            assert found.dtype == torch.float32
            assert torch.equal(found, whole[start:stop])


def test_a_parameter_is_read_as_a_plain_tensor():
    assert not flat(torch.nn.Parameter(torch.ones(2, 3)))(slice(1, 4)).requires_grad


def test_threads_made_afterwards_have_torchs_number_of_threads(threads):
    list(each(lambda at: at.start, 200))
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [threads]


def test_stacked_values_are_those_of_each_slice_whatever_came_before():
    one, two = torch.arange(20.0).bfloat16(), torch.arange(20.0, 40.0)
    stacked = Stacked([flat(one), flat(two)], torch.float32)
    for at in (slice(3, 8), slice(0, 20), slice(5, 7), slice(2, 19)):  # longer and shorter than what is held
        rows = stacked(at)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, torch.stack([one[at].float(), two[at]]))
    first = stacked(slice(0, 4))
    with ThreadPoolExecutor(1) as pool:  # has memory of its own
        other = pool.submit(stacked, slice(10, 14)).result()
    assert torch.equal(first[0], one[:4].float())
    assert torch.equal(other[0], one[10:14].float())
