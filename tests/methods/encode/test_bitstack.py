import copy
import json
import math

import pytest
import torch
from calibration import batches
from tiny import outputs, tiny

import modelwright as mw
from modelwright.blocks.bit_stack import BitStackLinear
from modelwright.core import resizing, walk
from modelwright.core.errors import ModelError, PlanError, SettingError, SiteError
from modelwright.core.given import Given, first
from modelwright.core.gradients import text_loss
from modelwright.core.model import Model, stored_bytes, weight_of
from modelwright.core.statistics import Statistics
from modelwright.core.weights import Checkpoint
from modelwright.maths import residual
from modelwright.maths.signed_low_rank import decode
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.encode.bitstack import Bitstack
from modelwright.methods.quantize.dequantize import Dequantize
from modelwright.methods.share.depth import Depth

METHOD = Bitstack(terms=4, rank=4, tries=4)


def stored(method=METHOD, kind="llama", **config):
    model = mw.open(tiny(kind, **config))
    return walk.change(model, method, Given(data=batches(model.module)))


def layers(module):
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BitStackLinear)}


def tensors(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stored().save(tmp_path_factory.mktemp("stacks") / "all")


# Scaling


def test_the_scale_is_the_mean_norm_of_a_sequence_by_hand():
    # channel 0: norms 5 and 1, channel 1: 0 and 2, without the pad token
    x = torch.tensor([[[3.0, 0.0], [4.0, 0.0], [9.0, 9.0]], [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]])
    statistics = Statistics(2, ("sequence",))
    statistics.add(x, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert statistics.sequence.tolist() == [3.0, 1.0]
    assert statistics.tokens == 5
    # over a power of 4: the geometric mean of 3.001 and 1.001 is nearest to 1
    assert METHOD.rescale("norm", [], statistics, lambda _: 0.0).tolist() == pytest.approx([3.001, 1.001])
    statistics.add(32 * x[:, :2])  # norms of 160 and 32 · √1, of 0 and 64, beside them
    expected = torch.tensor([(5 + 1 + 160 + 32) / 4, (0 + 2 + 0 + 64) / 4]) + 1e-3
    assert METHOD.rescale("norm", [], statistics, lambda _: 0.0).tolist() == pytest.approx((expected / 4**2).tolist())
    large = Statistics(2, ("sequence",))
    large.add(torch.full((2, 4, 2), 500.0))  # of which four are 1000 long, 2^9.97: 4^5 is nearest
    assert METHOD.rescale("norm", [], large, lambda _: 0.0).tolist() == pytest.approx([1000.001 / 4**5] * 2)


def test_defaults_are_those_of_the_paper():
    assert (Bitstack().terms, Bitstack().rank, Bitstack().tries, Bitstack().measure) == (16, 16, 32, "perplexity")
    assert (Bitstack(terms=3).passes(2), Bitstack(terms=3, measure="error").passes(2)) == (2 + 7 * 2 * 2, 2)


@pytest.mark.parametrize(
    ("kind", "dtype", "apart"),  # Llama's and Gemma's norms are in float32 always, and experts take no float64
    [("gpt2", torch.float64, 1e-12), ("llama", torch.float64, 1e-6), ("gemma", torch.float64, 1e-6), ("qwen3_moe", torch.float32, 1e-5)],
)
def test_scaling_changes_no_output(kind, dtype, apart):
    model = mw.open(tiny(kind).to(dtype))
    before, weights = outputs(model.module), tensors(model.module)
    with torch.no_grad(), walk.split_experts(model.module):
        METHOD.scale(model, METHOD.chosen(model.module, []), batches(model.module), [])
    assert torch.allclose(outputs(model.module), before, atol=apart * float(before.abs().max()), rtol=apart)
    assert not same(tensors(model.module), weights)


def test_each_matrix_is_that_of_the_model_times_the_scale():
    model, plain = stored(Bitstack(terms=12, rank=16, measure="error")), tiny()
    q = model.module.model.layers[0].self_attn.q_proj.dense()
    norms = [one.model.layers[0].input_layernorm.weight for one in (plain, model.module)]
    scale = norms[0] / norms[1]
    assert torch.allclose(q / scale, plain.model.layers[0].self_attn.q_proj.weight, atol=2e-3)
    assert scale.std() > 0.05 * scale.mean()


def test_large_inputs_leave_float16_norms_and_weights_in_its_range():
    module = tiny().half()
    with torch.no_grad():
        module.model.embed_tokens.weight.mul_(50)
        module.model.layers[0].input_layernorm.weight.mul_(400)
    model = walk.change(mw.open(module), Bitstack(terms=2, rank=4, tries=2), Given(data=batches(module)))
    assert all(value.isfinite().all() for value in model.module.state_dict().values())
    assert (model.module.model.layers[0].input_layernorm.weight.abs() > 1e-4).all()


# Terms and their order


def test_more_terms_lose_less():
    data = batches(tiny())
    losses, model = [], stored(Bitstack(terms=6, rank=16, measure="error"))
    for terms in range(6, 0, -1):
        for layer in layers(model.module).values():
            layer.keep(terms)
        losses.append(float((outputs(model.module) - outputs(tiny())).norm()))
    assert losses == sorted(losses)
    assert losses[0] < 0.15 * losses[-1]
    assert math.isfinite(text_loss(model, data))


def test_the_order_is_by_the_perplexity_when_one_matrix_alone_has_one_more_term():
    method = Bitstack(terms=3, rank=2, tries=5, where="attn.{q,o}")
    model = stored(method, num_hidden_layers=2)
    found = layers(model.module)
    whole = {name: layer.stack() for name, layer in found.items()}
    data = first(batches(model.module), 5)
    expected = []
    for level in (1, 2):
        losses = {}
        for name in found:
            for other, layer in found.items():
                layer.keep(0)
                for term in whole[other][: level + (other == name)]:
                    layer.add(term)
            losses[name] = text_loss(model, data)
        expected += sorted(losses, key=losses.__getitem__)
    order = {place: name for name, layer in layers(stored(method, num_hidden_layers=2).module).items() for place in layer.places}
    assert [order[place] for place in range(8)] == expected


def test_by_error_the_matrix_that_gains_most_goes_first():
    model = stored(Bitstack(terms=3, rank=4, measure="error"))
    scaled = mw.open(tiny())
    with torch.no_grad():
        chosen = METHOD.chosen(scaled.module, [])
        METHOD.scale(scaled, chosen, batches(scaled.module), [])
    found = layers(model.module)
    gains = {}
    for site, _ in chosen:
        stack, weight = found[site.module].stack(), weight_of(scaled.module, site)
        left = residual.left(weight, stack, decode)
        gains[site.module] = float(left[0] - left[1])
    first = sorted(found, key=lambda name: found[name].places[0])
    assert first == sorted(gains, key=gains.__getitem__, reverse=True)


def test_all_matrices_have_a_term_before_any_has_the_next():
    found = layers(stored().module)
    for level in range(3):
        assert sorted(layer.places[level] for layer in found.values()) == [level * len(found) + number for number in range(len(found))]


# Sizes


def test_bytes_of_a_term_by_hand():
    layer = BitStackLinear(4096, 4096, rank=16, device="meta")
    assert layer.stored_bytes() == 4096 * 4096 // 8 + 2 * 16 * (4096 + 4096)  # 2.36 MB
    assert BitStackLinear(3, 5, rank=2, device="meta").stored_bytes() == 2 + 2 * 2 * (3 + 5)


def test_every_budget_is_kept_and_nearly_used_up(folder):
    model = mw.open(folder)
    found = resizing.stacks(model.module)
    least, most = resizing.sizes(model.module, found)
    step, before = max(stack.step for stack in found), 0
    for budget in range(least, most + 3000, 2741):
        mw.resize(model, budget)
        size = stored_bytes(model.module)
        assert before <= size <= budget
        assert size == most or size > budget - step
        before = size
    assert before == most


def test_a_size_is_a_prefix_of_the_one_order(folder):
    model = mw.open(folder)
    found = layers(model.module)
    every = sorted(place for layer in found.values() for place in layer.places)
    mw.resize(model, "60%")
    held = sorted(place for layer in found.values() for place in layer.places)
    assert 0 < len(held) < len(every)
    assert held == every[: len(held)]


def test_terms_that_went_come_back_bit_by_bit(folder):
    model = mw.open(folder)
    before, wanted = tensors(model.module), outputs(model.module)
    for budget in ("50%", "80%", "40%"):
        mw.resize(model, budget)
        assert not torch.equal(outputs(model.module), wanted)
    mw.resize(model, "100%")
    assert same(tensors(model.module), before)
    assert torch.equal(outputs(model.module), wanted)


def test_terms_come_back_beside_an_adapter(folder):
    model = mw.apply(mw.open(folder), Lora(rank=2))
    before = outputs(model.module)
    mw.resize(model, "60%")
    assert not torch.equal(outputs(model.module), before)
    mw.resize(model, "100%")
    assert torch.equal(outputs(model.module), before)


def test_a_folder_is_opened_with_what_fits_and_with_nothing_else(folder):
    small, shrunk = mw.resize(folder, "50%"), mw.resize(mw.open(folder).module, "50%")
    assert stored_bytes(small.module) <= 0.5 * stored_bytes(mw.open(folder).module)
    assert same(tensors(small.module), tensors(shrunk))
    assert not small.unread


def test_only_what_is_lacking_is_read(folder, monkeypatch):
    model, read = mw.resize(folder, "50%"), []
    before, plain = set(model.module.state_dict()), Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.append(name) or plain(self, name))
    mw.resize(model, "70%")
    assert sorted(read) == sorted(set(model.module.state_dict()) - before)
    assert read
    read.clear()
    mw.resize(model, "45%")
    assert not read


def test_a_smaller_model_is_saved_as_small_and_grows_no_more(folder, tmp_path):
    small = mw.resize(folder, "50%")
    small.save(tmp_path / "small")
    again = mw.open(tmp_path / "small")
    assert torch.equal(outputs(again.module), outputs(small.module))
    assert again.marks == {"packed"}
    assert stored_bytes(mw.resize(again, "10MB").module) == stored_bytes(small.module)


def test_a_budget_as_a_setting_is_a_prefix_at_once(folder):
    chosen = stored(Bitstack(terms=4, rank=4, tries=4, budget="25%"))
    assert stored_bytes(chosen.module) <= 0.25 * stored_bytes(tiny())
    assert same(tensors(chosen.module), tensors(mw.resize(folder, stored_bytes(chosen.module)).module))


def test_a_budget_below_the_least_is_refused_by_its_bytes(folder):
    model = mw.open(folder)
    least, _ = resizing.sizes(model.module, resizing.stacks(model.module))
    with pytest.raises(PlanError, match=rf"1000 is 1,000 bytes, and the least that this model can have is {least:,}"):
        mw.resize(model, 1000)
    mw.resize(model, least)
    assert stored_bytes(model.module) == least
    assert {layer.terms for layer in layers(model.module).values()} == {1}
    plain = mw.open(tiny())
    before = tensors(plain.module)
    with pytest.raises(PlanError, match=f"the least that this model can have is {least:,}"):
        walk.change(plain, Bitstack(terms=4, rank=4, budget="1kB"), Given(data=batches(plain.module)))
    assert same(tensors(plain.module), before)
    with pytest.raises(SettingError, match=r"encode\.bitstack: budget: .*written 40%, 300MB or 2x; got 'much'"):
        Bitstack(budget="much")


def test_a_module_is_given_back_and_what_has_no_terms_is_refused(folder):
    module = mw.open(folder).module
    assert mw.resize(module, "70%") is module
    with pytest.raises(ModelError, match=r"has no matrix that is stored in terms.*encode\.bitstack"):
        mw.resize(tiny(), "70%")


def test_the_order_stands_in_the_config(folder):
    stated = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]["modules"]
    assert {text["kind"] for text in stated.values()} == {"bit_stack"}
    assert {name: text["places"] for name, text in stated.items()} == {
        name: layer.places for name, layer in layers(mw.open(folder).module).items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_stay_what_they_are_in_a_model_of_another_dtype(dtype, tmp_path):
    module = tiny(num_hidden_layers=2).to(dtype)
    model = walk.change(mw.open(module), METHOD, Given(data=batches(module)))
    model.save(tmp_path / "all")
    small = mw.resize(tmp_path / "all", "60%")
    mw.resize(small, "100%")
    assert same(tensors(small.module), tensors(model.module))
    assert next(iter(layers(small.module).values())).dense().dtype == dtype


# With other methods


def test_blocks_that_share_weights_store_their_terms_once(tmp_path):
    model = mw.open(tiny())
    given = Given(data=batches(model.module))
    walk.change(model, Depth(loops=2), given)
    walk.change(model, METHOD, given)
    model.save(tmp_path / "all")
    whole = stored_bytes(model.module)
    small = mw.resize(tmp_path / "all", "60%")
    assert stored_bytes(small.module) <= 0.6 * whole
    assert stored_bytes(mw.resize(small, "100%").module) == whole
    assert torch.equal(outputs(small.module), outputs(model.module))


def test_dense_weights_can_be_had_again():
    model = stored()
    expected = outputs(model.module)
    walk.change(model, Dequantize(), Given())
    assert torch.allclose(outputs(model.module), expected, atol=1e-5)
    assert not layers(model.module)


def test_inputs_that_are_not_finite_are_refused():
    module = tiny()
    with torch.no_grad():
        module.model.embed_tokens.weight[5:] = float("inf")
    with pytest.raises(SiteError, match="its inputs are NaN or infinite"):
        walk.change(Model(name="odd", module=module), METHOD, Given(data=batches(tiny())))


def test_a_copy_of_a_layer_holds_the_same():
    layer = next(iter(layers(stored().module).values()))
    other = copy.deepcopy(layer).bfloat16()
    assert other.dense().dtype == torch.bfloat16
    assert {value.dtype for name, value in other.state_dict().items() if "left" in name} == {torch.float16}
    assert torch.equal(other.float().dense(), layer.dense())
