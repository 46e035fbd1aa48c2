import pytest
import torch
from calibration import lettered
from tiny import outputs, tiny

import modelwright as mw
from modelwright.blocks.bucket_embedding import BucketEmbedding
from modelwright.core import plan, walk
from modelwright.core.errors import DataError, PlanError, SiteError
from modelwright.core.given import Given
from modelwright.core.measure import flops_per_token
from modelwright.core.model import Model, emptied, stored_bytes
from modelwright.methods.share.graphhash import GraphHash

FORMS = ("graph", "random", "frequency", "double", "double_graph")


def text(seed=0, kinds=(range(1, 11), range(11, 21)), length=400):
    """Ids of two kinds that take turns, so that ids of a kind have the same contexts; all below 21."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.tensor(list(kinds[n % 2]))[torch.randint(10, (1,), generator=rng)][0] for n in range(length)])
    return [{"input_ids": ids.view(4, -1)}]


def shared(form="graph", **settings):
    model = tiny("llama")
    before = model.model.embed_tokens.weight.detach().clone()
    mw.apply(model, GraphHash(form=form, **settings), data=text())
    return model.model.embed_tokens, before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_every_form_stores_the_same_number_of_rows(form, keep):
    layer, _ = shared(form, keep=keep)
    assert isinstance(layer, BucketEmbedding)
    assert layer.table.shape == (int(97 * keep), 64)
    if layer.map is not None:
        assert layer.map.dtype == torch.int32
        assert sorted(set(layer.map.tolist())) == list(range(len(layer.table)))
    assert layer.stored_bytes() == layer.table.nbytes + (4 * 97 if form != "double" else 0)


def test_tokens_of_the_same_contexts_share_rows():
    layer, _ = shared(resolution=0.8)
    first, second = set(layer.map[1:11].tolist()), set(layer.map[11:21].tolist())
    assert not first & second
    unseen = {int(layer.map[n]) for n in (0, *range(21, 97))}
    assert len(unseen) == 1
    assert not unseen & (first | second)


def test_a_higher_resolution_gives_more_rows():
    few, many = (len(shared(resolution=resolution)[0].table) for resolution in (0.5, 50.0))
    assert few < 10 < many <= 21  # 20 tokens that are seen, and a row for the others


def test_rows_that_are_left_go_to_the_most_frequent_tokens_and_then_to_those_unseen():
    layer, before = shared(keep=0.5)  # 48 rows for 20 tokens that are seen, and 28 for the other 77
    own = layer.map[1:21].tolist()
    assert len(set(own)) == 20
    assert torch.allclose(layer.dense()[1:21], before[1:21], atol=1e-6)
    loads = torch.bincount(layer.map[torch.tensor([0, *range(21, 97)])], minlength=48)
    assert int(loads.max()) == 3


def test_a_shared_row_is_the_mean_by_frequency():
    layer, before = shared("random", keep=0.1)
    counts = torch.bincount(text()[0]["input_ids"].flatten(), minlength=97) + 1.0
    members = layer.map == 3
    mean = (counts[members, None] * before[members]).sum(0) / counts[members].sum()
    assert torch.allclose(layer.table[3], mean, atol=1e-5)
    assert layer.map.tolist() == [n % 9 for n in range(97)]


def test_half_of_the_rows_are_kept_for_frequent_tokens():
    layer, before = shared("frequency", keep=0.2)  # 19 rows, 9 of them for one token each
    counts = torch.bincount(text()[0]["input_ids"].flatten(), minlength=97)
    often = counts.argsort(descending=True, stable=True)[:9]
    assert torch.allclose(layer.dense()[often], before[often], atol=1e-5)
    assert torch.bincount(layer.map)[:9].tolist() == [1] * 9


def test_one_seed_gives_the_same_map():
    assert torch.equal(shared(keep=0.1)[0].map, shared(keep=0.1)[0].map)


@pytest.mark.parametrize("form", ["graph", "double", "double_graph"])
def test_it_is_stored_and_loads_again(form, tmp_path):
    model = lettered()
    mw.apply(model, GraphHash(form=form), data=text())
    model.save(tmp_path / "out")
    assert torch.equal(outputs(mw.open(tmp_path / "out").module), outputs(model.module))
    empty = emptied(tiny("llama"))
    predicted, _ = plan.predict(empty, GraphHash(form=form), Given())
    assert stored_bytes(predicted) == stored_bytes(model.module)
    assert flops_per_token(model.module) == flops_per_token(tiny("llama"))


def test_padding_is_no_context():
    batch = {"input_ids": torch.tensor([[1, 2, 3, 90, 91]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    model = tiny("llama")
    mw.apply(model, GraphHash(resolution=1.0), data=[batch])
    labels = model.model.embed_tokens.map
    assert labels[90] == labels[91] == labels[0]


def test_a_tied_head_keeps_its_rows_and_the_user_is_told(tmp_path):
    module = tiny("llama", tie_word_embeddings=True)
    head = module.lm_head.weight.detach().clone()
    model = Model(name="tied", module=module)
    mw.apply(model, GraphHash(), data=text())
    assert torch.equal(module.lm_head.weight, head)
    assert "now stores its rows by itself" in model.history[-1]["notes"][0]
    model.save(tmp_path / "out")
    assert torch.equal(outputs(mw.open(tmp_path / "out").module), outputs(module))


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(PlanError, match=r"keep=0.01 of 97 rows leaves fewer than 2"):
        mw.apply(tiny("llama"), GraphHash(keep=0.01), data=text())
    with pytest.raises(DataError, match="was given no text"):
        walk.change(Model(name="tiny", module=tiny("llama")), GraphHash(), Given(data=[]))
    with pytest.raises(SiteError, match="shared.weight is also encoder.embed_tokens.weight"):
        mw.apply(tiny("t5"), GraphHash(), data=text())
    with pytest.raises(SiteError, match="no embedding of tokens"):
        mw.apply(tiny("vit"), GraphHash(), data=text())
