import copy

import pytest
import torch
from calibration import normal
from tiny import outputs, tiny

import modelwright as mw
from modelwright.blocks.tensor_conv import TensorConv
from modelwright.blocks.tensor_embedding import TensorEmbedding
from modelwright.core import plan
from modelwright.core.errors import SiteError
from modelwright.core.given import Given
from modelwright.core.measure import flops_per_token
from modelwright.core.model import Model, emptied, stored_bytes
from modelwright.maths.tensor_factors import rebuilt
from modelwright.methods.factor.tensor import Tensor
from modelwright.methods.prune.magnitude import Magnitude

FORMS = ("cp", "tucker", "tt")


def factored(weight, **settings):
    return Tensor(**settings).tensor(weight, torch.Generator().manual_seed(0), [])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(32, 24, 3, 3), (32, 24, 5), (48, 36)])
def test_keep_is_the_share_of_the_entries_that_the_parts_hold(form, keep, shape):
    layer = factored(normal(*shape), form=form, keep=keep, iterations=2)
    held = sum(part.numel() for part in layer.parts) / normal(*shape).numel()
    assert 0.75 * keep < held <= keep


def test_a_kernel_of_one_rank_is_found():
    kernel = torch.einsum("o,i,hw->oihw", normal(6), normal(5, seed=1), normal(3, 3, seed=2))
    for form in FORMS[:2]:
        layer = factored(kernel, form=form, keep=0.4)
        assert torch.allclose(layer.dense(), kernel, atol=1e-5)


def test_a_table_whose_rows_are_products_is_found():
    rows = torch.einsum("ai,bj,ck->abcijk", normal(4, 4), normal(4, 4, seed=1), normal(4, 4, seed=2)).reshape(64, 64)
    for form in FORMS:
        assert torch.allclose(factored(rows, form=form, keep=0.1).dense(), rows, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_dense_is_what_the_parts_stand_for(form):
    kernel = normal(16, 12, 3, 3)
    dense = factored(kernel, form=form, store="dense")
    assert isinstance(dense, torch.Tensor)
    assert torch.equal(dense, factored(kernel, form=form).dense())


@pytest.mark.parametrize("form", FORMS)
def test_more_parts_are_nearer(form):
    kernel = normal(16, 12, 3, 3)
    errors = [(factored(kernel, form=form, keep=keep, store="dense") - kernel).norm() for keep in (0.1, 0.4, 0.8)]
    assert errors[0] > errors[1] > errors[2]


def test_a_weight_that_parts_would_not_shrink_is_left_and_noted():
    notes = []
    kernel = normal(1, 1, 3, 3)
    assert Tensor(keep=0.5).tensor(kernel, torch.Generator(), notes) is kernel
    assert "left a weight of [1, 1, 3, 3]" in notes[0]
    notes = []
    assert Tensor(keep=1.0).tensor(kernel, torch.Generator(), notes) is kernel
    assert not notes


@pytest.mark.parametrize("form", FORMS)
def test_convolutions_of_a_plain_network(form):
    module = tiny("cnn")
    before, empty = copy.deepcopy(module), emptied(module)
    mw.apply(module, Tensor(form=form, keep=0.9, iterations=20))
    assert isinstance(module.second, TensorConv)
    assert isinstance(module.head, torch.nn.Linear)
    assert stored_bytes(module) < 0.95 * stored_bytes(before)
    predicted, _ = plan.predict(empty, Tensor(form=form, keep=0.9), Given())
    assert stored_bytes(predicted) == stored_bytes(module)
    dense = copy.deepcopy(before)
    for name in ("first", "second", "third"):
        getattr(dense, name).weight.data = getattr(module, name).dense().detach()
    assert torch.allclose(outputs(module), outputs(dense), atol=1e-4)
    assert flops_per_token(module) == flops_per_token(predicted) < flops_per_token(before)


@pytest.mark.parametrize("form", FORMS)
def test_a_table_streams_is_stored_and_loads_again(form, tmp_path):
    Model(name="tiny", module=tiny("llama")).save(tmp_path / "in")
    method = Tensor(form=form, iterations=5)
    streamed = mw.apply(tmp_path / "in", method, save=tmp_path / "out")
    table = streamed.module.model.embed_tokens
    assert isinstance(table, TensorEmbedding)
    assert "low-rank" in streamed.marks
    memory = mw.apply(tiny("llama"), method)
    assert torch.equal(outputs(streamed.module), outputs(memory))
    assert torch.allclose(memory.model.embed_tokens(torch.arange(97)), table.dense(), atol=1e-5)
    from transformers import AutoModelForCausalLM

    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), outputs(memory))
    streamed._marks = None
    (tmp_path / "out" / "modelwright.json").unlink()
    assert mw.open(tmp_path / "out").marks == {"float", "low-rank"}


def test_patches_of_an_image_model_are_convolutions(tmp_path):
    module = mw.apply(tiny("vit"), Tensor(keep=0.6))
    patches = module.vit.embeddings.patch_embeddings.projection
    assert isinstance(patches, TensorConv)
    assert patches.stride == (4, 4)
    Model(name="vit", module=module).save(tmp_path / "vit")
    assert torch.allclose(outputs(mw.open(tmp_path / "vit").module), outputs(module), atol=1e-6)


def test_the_embeddings_scale_of_gemma_stays():
    before = tiny("gemma", tie_word_embeddings=False)
    after = mw.apply(copy.deepcopy(before), Tensor(form="tucker", keep=0.999, parts=2, store="factors"))
    ids = torch.tensor([[3, 4]])
    assert after.model.embed_tokens.multiplier == 8.0
    assert torch.allclose(after.model.embed_tokens(ids), 8 * after.model.embed_tokens.dense()[ids], atol=1e-5)


def test_later_steps_leave_the_parts_and_say_so():
    model = mw.open(mw.apply(tiny("cnn"), Tensor(keep=0.9)))
    parts = [part.clone() for part in model.module.second.parts]
    mw.apply(model, Magnitude(sparsity=0.5, where="head"))
    assert all(torch.equal(one, two) for one, two in zip(parts, model.module.second.parts, strict=True))


def test_a_tied_table_is_refused_by_name():
    with pytest.raises(SiteError, match="embed_tokens.weight is an embedding that is tied to the head"):
        mw.apply(tiny("llama", tie_word_embeddings=True), Tensor())


def test_what_is_no_convolution_is_refused_by_name():
    module = torch.nn.Sequential(torch.nn.ConvTranspose2d(8, 12, 3), torch.nn.Linear(12, 5))
    with pytest.raises(SiteError, match="0.weight is a ConvTranspose2d"):
        mw.apply(module, Tensor())


def test_a_rank_that_cannot_be_solved_for_is_refused_before_work():
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Embedding(32000, 4096), torch.nn.Linear(4096, 5))
    with pytest.raises(SiteError, match="0.weight is 32000 × 4096, so that cp would have the rank 42,226"):
        mw.apply(module, Tensor())
    predicted, _ = plan.predict(module, Tensor(form="tt"), Given())
    assert isinstance(predicted[0], TensorEmbedding)


def test_parts_are_those_of_the_tensor_that_is_named():
    layer = factored(normal(6, 4, 3, 3), form="tt", keep=0.7)
    assert torch.allclose(rebuilt("tt", layer.parts).permute(3, 0, 1, 2), layer.dense())
