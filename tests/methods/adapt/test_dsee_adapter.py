"""The adapter of DSEE, and what prunes beside it."""

import pytest
import torch
from calibration import TEXT, lettered, normal
from tiny import outputs, tiny, tiny_inputs
from torch import nn

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.blocks.reparametrised import Product, Reparametrised, Scatter
from modelwright.core.adapters import plain_layers, read
from modelwright.core.errors import ModelError, SiteError
from modelwright.core.model import unwrapped
from modelwright.core.tuners import Bearer
from modelwright.methods.adapt.dsee import Dsee
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.hydra import Hydra
from modelwright.methods.prune.dsee import Dsee as Pruned
from modelwright.methods.prune.dsee_heads import DseeHeads
from modelwright.methods.train import Train

BRIEF = Train(tokens=256, batch=4, length=16, learning_rate=1e-2)


def adapted(kind="llama", folder=None, **settings):
    """A tiny model with an adapter that has moved; on disk first where a folder is given."""
    model = lettered(kind)
    if folder is not None:
        model.save(folder)
        model = mw.open(folder)
    mw.apply(model, Dsee(**{"rank": 2, "alpha": 6.0, "entries": 40, **settings}))
    with torch.no_grad():
        for number, (_, part) in enumerate(parts(model)):
            part.update.up.copy_(0.3 * normal(*part.update.up.shape, seed=number))
            part.scatter.values.copy_(normal(len(part.scatter.values), seed=number + 100))
    return model


def parts(model):
    return [(path, layer.parts["default"]) for path, layer in unwrapped(model.module).named_modules() if isinstance(layer, Bearer)]


def test_a_case_by_hand():
    # α/r = 6/2 = 3: with B = e_1 and A = (1, 2) beside S₂ = 5 at (0, 1), the change is 3 · (1, 2 + 5; 0, 0).
    part = Dsee(rank=2, alpha=6, entries=1).part(torch.eye(2), None)
    with torch.no_grad():
        part.update.up.copy_(torch.tensor([[1.0, 0], [0, 0]]))
        part.update.down.copy_(torch.tensor([[1.0, 2], [7, 7]]))
        part.scatter.values.fill_(5)
        part.scatter.places.copy_(torch.tensor([1]))
    assert (part.merged(torch.zeros(2, 2), None)[0]).tolist() == [[3, 21], [0, 0]]


def test_the_support_is_what_low_rank_leaves_over():
    spikes = torch.randperm(32 * 24, generator=torch.Generator().manual_seed(5))[:10]
    weight = normal(32, 5) @ normal(5, 24, seed=1) + torch.zeros(32 * 24).index_fill(0, spikes, 1.0).view(32, 24)
    torch.manual_seed(0)
    found = Dsee(rank=2, entries=10, rounds=1, threshold=5.0).part(weight, None).scatter.places
    assert found.tolist() == sorted(spikes.tolist())
    other = Dsee(rank=2, entries=10, support="random").part(weight, None).scatter.places
    assert len(set(other.tolist())) == 10
    assert set(other.tolist()) != set(spikes.tolist())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_matrix_has_as_many_entries_and_attaching_changes_no_output(kind):
    model = mw.apply(lettered(kind), Dsee(rank=2, entries=12))
    assert torch.equal(outputs(model.module), outputs(tiny(kind)))
    found = parts(model)
    assert {path.rpartition(".")[2] for path, _ in found} == ({"q_proj", "v_proj"} if kind == "llama" else {"c_attn"})
    assert all(len(part.scatter.places.unique()) == 12 for _, part in found)
    sizes = [sum(layer.get_base_layer().weight.shape) for layer in unwrapped(model.module).modules() if isinstance(layer, Bearer)]
    assert sum(value.numel() for value in model.module.parameters() if value.requires_grad) == sum(2 * size + 12 for size in sizes)


def test_training_moves_the_update_on_its_places_and_no_weight():
    model = mw.apply(lettered(), Dsee(rank=2, entries=12))
    places = [part.scatter.places.clone() for _, part in parts(model)]
    mw.apply(model, BRIEF, data=TEXT)
    assert all(part.scatter.values.all() and part.update.up.any() for _, part in parts(model))
    assert all(torch.equal(part.scatter.places, before) for (_, part), before in zip(parts(model), places, strict=True))
    for name, value in tiny().named_parameters():
        bearer = unwrapped(model.module).get_submodule(name.rpartition(".")[0])
        assert torch.equal(bearer.get_base_layer().weight if isinstance(bearer, Bearer) else bearer.weight, value)


def test_measures_of_the_sum_with_and_without_single_entries_by_hand():
    # W = (4, -2; 1, 3), s B A = (-3, 0; 0, 0) and s S = (0, 2; 0, -2.5): WABS (1, 0; 1, 0.5), ABS (3, 2; 0, 2.5), WAB (1, -2; 1, 3) and
    # AB (3, 0; 0, 0). Of four, two go.
    cases = {("both", True): [[4, 0], [1, 0]], ("update", True): [[4, 0], [0, 3]], ("both", False): [[0, -2], [0, 3]],
             ("update", False): [[4, 0], [0, 3]], ("weight", True): [[4, 0], [0, 3]]}  # fmt: skip
    for (measure, sparse), expected in cases.items():
        model = mw.apply(lettered(hidden_size=64, num_hidden_layers=1), Dsee(rank=2, alpha=6, where="attn.q", entries=2))
        bearer = next(layer for layer in unwrapped(model.module).modules() if isinstance(layer, Bearer))
        bearer.base_layer.weight.data = torch.tensor([[4.0, -2], [1, 3]])
        update = Product(nn.Parameter(torch.tensor([[-3.0], [0]])), nn.Parameter(torch.tensor([[1.0, 0]])))
        scatter = Scatter((2, 2), torch.tensor([1, 3], dtype=torch.int32), nn.Parameter(torch.tensor([2.0, -2.5])))
        bearer.parts["default"] = Reparametrised(update, scatter=scatter)
        mw.apply(model, Pruned(measure=measure, sparse=sparse, sparsity=0.5, where="attn.q"))
        assert bearer.base_layer.weight.tolist() == expected, (measure, sparse)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
def test_masked_weights_stay_zero_through_training_and_it_is_stored_with_its_base(tmp_path):
    model = adapted(folder=tmp_path / "plain")
    before = [layer.base_layer.weight.clone() for layer in unwrapped(model.module).modules() if isinstance(layer, Bearer)]
    mw.apply(model, Pruned(sparsity=0.5))
    bearers = [layer for layer in unwrapped(model.module).modules() if isinstance(layer, Bearer)]
    masks = [layer.base_layer.weight == 0 for layer in bearers]
    zeros, entries = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    assert zeros == entries // 2  # one threshold over all matrices with an update
    mw.apply(model, BRIEF, data=TEXT)
    for layer, mask, weight in zip(bearers, masks, before, strict=True):
        assert torch.equal(layer.base_layer.weight, weight.masked_fill(mask, 0))
    model.save(tmp_path / "out")
    again = mw.open(tmp_path / "out")
    assert torch.allclose(outputs(again.module), outputs(model.module), atol=1e-6)
    mw.apply(again, Fold())
    assert (unwrapped(again.module).model.layers[0].self_attn.q_proj.weight == 0).float().mean() < 0.01  # the update fills zeros in


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_heads_take_their_rows_of_the_update_and_of_the_single_entries(kind):
    model, silent = adapted(kind), adapted(kind)
    counts = [len(part.scatter.places) for _, part in parts(model)]
    mw.apply(model, DseeHeads(share=0.5))
    base = unwrapped(silent.module)
    updates, _ = read(silent, sparse=True)
    with plain_layers(base) as bearers:
        found = anatomy_of(base).units(base, "heads")
        scores = DseeHeads().scores(base, found, (updates, bearers))
        for units, score in zip(found, scores, strict=True):
            gone = score.argsort(stable=True)[: units.count // 2]
            span = next(span for span in units.spans if span.output)
            columns = torch.cat([torch.arange(span.start + n * span.width, span.start + (n + 1) * span.width) for n in gone.tolist()])
            base.get_parameter(span.name).data.index_fill_(span.dim, columns, 0)
    inputs = tiny_inputs(tiny(kind))
    assert (outputs(model.module, inputs) - outputs(silent.module, inputs)).abs().max() < 1e-5
    after = parts(model)
    assert all(len(part.scatter.places) < count for (_, part), count in zip(after, counts, strict=True))
    assert all(part.update.up.shape[0] == part.scatter.shape[0] for _, part in after)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
def test_without_heads_it_is_stored_and_trained_on(tmp_path):
    model = adapted(folder=tmp_path / "plain")
    mw.apply(model, [DseeHeads(share=0.5), BRIEF], data=TEXT)
    model.save(tmp_path / "out")
    again = mw.open(tmp_path / "out")
    assert torch.allclose(outputs(again.module), outputs(model.module), atol=1e-6)
    assert [len(part.scatter.places) for _, part in parts(again)] == [len(part.scatter.places) for _, part in parts(model)]


def test_other_adapters_are_refused_by_name():
    with pytest.raises(ModelError, match="only plain LoRA updates of linears and embeddings can be read"):
        mw.apply(mw.apply(lettered(), Hydra()), Pruned())


def test_what_a_matrix_cannot_have_is_refused():
    with pytest.raises(SiteError, match="cannot have the rank 33. Give a rank of at most 32"):
        mw.apply(lettered(), Dsee(rank=33))
    with pytest.raises(SiteError, match=r"has 2048 weights, and 3000 entries were to train. Give fewer"):
        mw.apply(lettered(), Dsee(entries=3000))
