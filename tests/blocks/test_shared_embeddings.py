"""Embeddings whose ids share rows."""

import json

import pytest
import torch
from torch import nn

from modelwright.blocks import build
from modelwright.blocks.bucket_embedding import BucketEmbedding
from modelwright.blocks.unified_embedding import UnifiedEmbedding
from modelwright.maths.hashing import mixed


def unified(**settings):
    torch.manual_seed(0)
    return UnifiedEmbedding(**({"rows": 1000, "width": 4, "features": {"user": 2, "item": 3}, "tables": 2} | settings))


def test_the_mix_is_that_of_splitmix_in_every_process():
    # The first two outputs of SplitMix64 with the seed 1234567, as they are published, without the highest bit.
    published = [6457827717110365317, 3203168211198807973]
    assert [int(mixed(torch.tensor(1234567), salt)) for salt in (0, 1)] == published


def test_the_mix_is_even():
    loads = torch.bincount(mixed(torch.arange(100_000), 3) % 100, minlength=100)
    assert int(loads.min()) > 850
    assert int(loads.max()) < 1150


def test_one_value_has_other_rows_in_other_features_and_chunks():
    layer, values = unified(features={"a": 2, "b": 2}, tables=1), torch.arange(2000)
    rows = [layer.places(name, values)[1][:, k] for name in ("a", "b") for k in range(2)]
    for n, one in enumerate(rows):
        for two in rows[n + 1 :]:
            assert float((one == two).float().mean()) < 0.005


def test_chunks_lie_side_by_side_and_take_the_tables_in_turn():
    layer = unified()
    values = {"user": torch.tensor([[5, 7]]), "item": torch.tensor([5])}
    found = layer(values)
    assert found["user"].shape == (1, 2, 8)
    assert found["item"].shape == (1, 12)
    assert layer.places("user", values["user"])[0] == [0, 1]
    assert layer.places("item", values["item"])[0] == [0, 1, 0]
    rows = layer.places("item", values["item"])[1][0]
    assert torch.equal(found["item"][0, 4:8], layer.tables[1, rows[1]])


def test_any_number_is_a_value():
    found = unified()({"user": torch.tensor([-1, 2**62])})["user"]
    assert found.shape == (2, 8)
    assert found.isfinite().all()


def test_the_gradient_is_the_sum_over_features():
    layer = unified(rows=3)
    values = {"user": torch.arange(6), "item": torch.arange(4)}

    def gradient(names):
        layer.zero_grad()
        sum(layer({name: values[name]})[name].sum() for name in names).backward()
        return layer.tables.grad.clone()

    assert torch.allclose(gradient(["user", "item"]), gradient(["user"]) + gradient(["item"]))


def test_its_size_does_not_grow_with_features():
    one, many = unified(), unified(features={str(n): 2 for n in range(50)})
    assert one.tables.numel() == many.tables.numel() == 2 * 1000 * 4


def test_a_unified_embedding_is_made_anew():
    layer = unified()
    anew = build(json.loads(json.dumps(layer.describe())), torch.float32, "meta")
    anew.load_state_dict(layer.state_dict(), assign=True)
    values = {"item": torch.arange(20), "user": torch.arange(20)}
    assert all(torch.equal(anew(values)[name], layer(values)[name]) for name in values)
    assert list(anew.features) == ["user", "item"]


def bucketed(mapped=True, salts=()):
    layer = BucketEmbedding(9, 5, buckets=4, mapped=mapped, salts=salts)
    layer.table.data = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    if mapped:
        layer.map = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 3], dtype=torch.int32)
    return layer


@pytest.mark.parametrize(("mapped", "salts"), [(True, ()), (False, (0, 1)), (True, (0,))])
def test_rows_of_buckets_are_looked_up_stored_and_made_anew(mapped, salts):
    layer = bucketed(mapped, salts)
    ids = torch.tensor([[8, 0], [4, 2]])
    assert torch.equal(layer(ids), layer.dense()[ids])
    expected = layer.table[layer.map.long()] if mapped else 0
    for salt in salts:
        expected = expected + layer.table[mixed(torch.arange(9), salt) % 4]
    assert torch.allclose(layer.dense(), expected)
    assert layer.stored_bytes() == 4 * 5 * 4 + 9 * 4 * mapped
    anew = build(json.loads(json.dumps(layer.describe())), torch.float32, "meta")
    anew.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(anew(ids), layer(ids))
    assert layer.nonzeros() == 20


def test_a_cast_leaves_the_map():
    layer = bucketed().to(torch.bfloat16)
    assert layer.map.dtype == torch.int32
    assert layer.dense().dtype == torch.bfloat16


def test_buckets_stand_for_tables_alone():
    assert "is a Linear" in bucketed().why_not(nn.Linear(9, 5))
    old = nn.Embedding(9, 5)
    old.embed_scale = 3.0
    layer = bucketed().standing_for(old)
    assert torch.equal(layer(torch.tensor([1])), 3 * layer.dense()[[1]])
