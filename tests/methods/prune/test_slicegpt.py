import copy

import pytest
import torch
from calibration import batches, normal
from tiny import outputs, tiny
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.anatomy._rotation import fold_norms, residual_norms, rotate_stream
from modelwright.blocks.shortcuts import turn_at_each_norm
from modelwright.core.errors import PlanError, SiteError
from modelwright.core.given import Given
from modelwright.core.measure import count, flops_per_token
from modelwright.core.model import Model, emptied, stored_bytes
from modelwright.core.plan import predict
from modelwright.maths.directions import principal
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.prune.slicegpt import SliceGpt, stream_moment

KINDS = ["llama", "gemma", "qwen2", "qwen3", "phi3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]


def orthogonal(width):
    return torch.linalg.qr(normal(width, width).double())[0]


@pytest.mark.parametrize("kind", KINDS)
def test_folded_norms_and_a_turned_stream_leave_the_logits(kind):
    module = tiny(kind, tie_word_embeddings=kind in ("llama", "gemma"))
    expected = outputs(module)
    fold_norms(module)
    offset = 1.0 if kind == "gemma" else 0.0
    assert all((norm.weight == 1 - offset).all() for _, norm in residual_norms(module))
    assert torch.allclose(outputs(module), expected, rtol=1e-4, atol=1e-4)
    before = copy.deepcopy(module.state_dict())
    rotate_stream(module, orthogonal(64))
    assert torch.allclose(outputs(module), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(module.state_dict()["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@torch.no_grad()
def test_the_moment_is_of_what_enters_every_norm_and_the_energy_that_is_lost_the_least_eigenvalues():
    module = tiny()
    data = batches(module)
    seen = []
    for name, norm in module.named_modules():
        if name.endswith("layernorm") or name == "model.norm":
            norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rows = []
    for batch in data:
        seen.clear()
        outputs(module, batch)
        assert len(seen) == 9
        rows += [states[batch["attention_mask"].bool()].double() for states in seen]
    rows = torch.cat(rows)
    moment = stream_moment(Model(name="", module=module), data)
    assert torch.allclose(moment, rows.T @ rows, rtol=1e-5)
    values, vectors = principal(moment, 0.01)
    kept = rows @ vectors[:, :40]
    lost = float((rows - kept @ vectors[:, :40].T).square().sum())
    assert lost == pytest.approx(float(torch.linalg.eigvalsh(rows.T @ rows)[:24].sum()), rel=1e-6)
    assert lost == pytest.approx(float(values[40:].sum()), rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3", "mixtral"])
def test_directions_that_carry_nothing_leave_without_a_trace_and_the_model_is_plain(kind, tmp_path):
    # The stream of a model whose writes lie in 48 directions has no energy in the 16 others.
    module = tiny(kind)
    fold_norms(module)
    basis = orthogonal(64)[:, :48]
    for name, weight in module.named_parameters():
        if name.endswith("embed_tokens.weight"):
            weight.data = (weight.data.double() @ basis @ basis.T).float()
        elif name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            side = weight.data.double().movedim(-2, -1)
            weight.data = (side @ basis @ basis.T).movedim(-1, -2).float().contiguous()
    expected = outputs(module)
    model = Model(name=kind, module=module)
    mw.apply(model, SliceGpt(keep=0.75), data=batches(module))
    assert module.config.hidden_size == 48
    assert torch.allclose(outputs(module), expected, rtol=1e-3, atol=1e-3)
    model.save(tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(again), outputs(module))


def test_every_matrix_of_the_stream_shrinks_by_the_share():
    module = mw.apply(tiny(), SliceGpt(keep=0.75), data=batches(tiny()))
    narrow = 4 * (2 * 48 * 64 + 2 * 48 * 32 + 3 * 48 * 160 + 2 * 48) + 48 + 2 * 97 * 48
    assert count(module)[0] == narrow
    assert {tuple(norm.weight.shape) for _, norm in residual_norms(module)} == {(48,)}
    assert torch.allclose(module.model.norm.weight, torch.full((48,), (64 / 48) ** 0.5))
    assert module.model.norm.variance_epsilon == pytest.approx(1e-6 * 64 / 48)


def test_the_width_is_rounded_down_and_what_no_config_says_loads_after_import(tmp_path):
    module = tiny()
    model = Model(name="llama", module=module)
    mw.apply(model, SliceGpt(keep=0.7, multiple=6), data=batches(module))
    assert module.model.norm.weight.shape == (42,)
    assert any("import modelwright" in note for note in model.history[-1]["notes"])
    model.save(tmp_path / "out")
    assert torch.equal(outputs(mw.open(tmp_path / "out").module), outputs(module))


@pytest.mark.parametrize("kind", ["gpt2", "olmo2", "gemma2", "opt"])
def test_models_whose_stream_cannot_be_turned_are_refused_unchanged(kind):
    module = tiny(kind)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(SiteError, match="The hidden states cannot be turned: "):
        mw.apply(module, SliceGpt(), data=batches(module))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_width_of_nothing_is_refused():
    with pytest.raises(PlanError, match="less than one multiple of 8"):
        mw.apply(tiny(), SliceGpt(keep=0.1), data=batches(tiny()))


def test_all_is_kept_whatever_the_multiple_and_the_note_tells_the_energy():
    assert SliceGpt(keep=1.0, multiple=48).width(tiny()) == (64, 64)
    model = mw.open(tiny())
    values, _ = principal(stream_moment(mw.open(tiny()), batches(tiny())), 0.01)
    mw.apply(model, SliceGpt(keep=0.75), data=batches(tiny()))
    share = float(values.sort(descending=True).values[:48].sum() / values.sum())
    assert 0.5 < share < 0.999
    assert f"48 of 64 directions stay, with {share:.4f} of" in model.history[-1]["notes"][0]


def test_hidden_states_that_are_not_finite_are_refused_unchanged():
    module = tiny()
    module.model.layers[1].mlp.down_proj.weight.data *= torch.inf
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(SiteError, match=r"prune\.slicegpt: what enters a norm is NaN or infinite"):
        mw.apply(module, SliceGpt(), data=batches(tiny()))
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in module.state_dict().items())


# A basis for each norm

EACH = SliceGpt(keep=0.75, rotation="each")


@pytest.mark.parametrize("kind", KINDS)
def test_with_any_basis_at_each_norm_and_all_directions_the_logits_stay(kind):
    module = tiny(kind, tie_word_embeddings=kind in ("llama", "gemma"))
    expected = outputs(module)
    bases = [torch.linalg.qr(normal(64, 64, seed=seed).double())[0] for seed in range(9)]
    turn_at_each_norm(module, bases)
    assert torch.allclose(outputs(module), expected, rtol=1e-4, atol=1e-4)
    turns = module.model.layers[2].shortcuts.turns
    assert torch.allclose(turns[0].weight.double(), bases[5].T @ bases[4], atol=1e-6)
    assert torch.allclose(turns[1].weight.double(), bases[6].T @ bases[5], atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@torch.no_grad()
def test_each_norm_sees_the_principal_components_of_what_the_sliced_part_before_it_gives(kind):
    module = tiny(kind)
    data = batches(module, 10)
    bases, shares = EACH.bases(mw.open(module), data)
    assert torch.equal(outputs(module), outputs(tiny(kind)))  # looking changes nothing
    mw.apply(module, EACH, data=data)
    moments = {}
    mask = [None]

    def add(path):
        def hook(_, args):
            rows = args[0][mask[0].bool()].double()
            moments[path] = moments.get(path, 0) + rows.T @ rows

        return hook

    for path, norm in residual_norms(module):
        norm.register_forward_pre_hook(add(path))
    for batch in data:
        mask[0] = batch["attention_mask"]
        outputs(module, batch)
    assert len(moments) == len(bases) == 9
    ends = [48] * 8 + [48 if kind == "mixtral" else 64]
    assert [len(moment) for moment in moments.values()] == ends
    for moment, basis in zip(moments.values(), bases, strict=True):
        values = moment.diagonal()
        assert torch.allclose(moment, values.diag(), atol=1e-4 * float(values.max()))
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), atol=1e-10)
    assert all(0.8 < share < 1 for share in shares[:-1])
    assert (shares[-1] == 1.0) is (kind == "llama")


@torch.no_grad()
def test_the_energy_that_a_norm_loses_is_that_of_the_least_eigenvalues():
    module = tiny()
    data = batches(module, 10)
    bases, shares = EACH.bases(mw.open(module), data)
    rows = torch.cat([module.model.embed_tokens(batch["input_ids"])[batch["attention_mask"].bool()] for batch in data]).double()
    values = torch.linalg.eigvalsh(rows.T @ rows)
    assert float((rows - rows @ bases[0] @ bases[0].T).square().sum()) == pytest.approx(float(values[:16].sum()), rel=1e-5)
    assert shares[0] == pytest.approx(float(values[16:].sum() / values.sum()))
    assert 0.8 < shares[0] < 0.99


def test_the_sliced_model_is_the_original_with_its_stream_brought_onto_the_bases():
    module, model = tiny(), tiny()
    bases, _ = EACH.bases(mw.open(module), batches(module))
    mw.apply(module, EACH, data=batches(module))
    projections = [(basis @ basis.T).float() for basis in bases]
    inputs = batches(model)[0]
    rotary = model.model.rotary_emb(torch.zeros(1, 12, 64), torch.arange(12)[None])
    with torch.no_grad():
        row = inputs["input_ids"][:1]  # the row without padding
        x = model.model.embed_tokens(row) @ projections[0]
        for depth, block in enumerate(model.model.layers):
            attention, _ = block.self_attn(block.input_layernorm(x), position_embeddings=rotary, attention_mask=None)
            x = (x + attention) @ projections[2 * depth + 1]
            x = (x + block.mlp(block.post_attention_layernorm(x))) @ projections[2 * depth + 2]
        found = model.lm_head(model.model.norm(x))
    assert torch.allclose(outputs(module, {"input_ids": row}), found, rtol=1e-3, atol=1e-3)


def test_the_parameters_of_a_block_are_those_of_the_formula_with_its_matrices():
    # (q, k, v, o and the three of the MLP) times the share, two matrices of its square, and two norms; the last block ends wide
    method = SliceGpt(keep=0.75, rotation="each")
    module = mw.apply(tiny(num_key_value_heads=8), method, data=batches(tiny()))
    sizes = [count(block)[0] for block in module.model.layers]
    plain = 0.75 * (4 * 64 * 64 + 3 * 64 * 160) + 2 * 0.75**2 * 64**2 + 2 * 48
    assert sizes == [plain] * 3 + [plain + 16 * 160 + 16 * 48]
    assert count(module)[0] == sum(sizes) + 97 * 48 + 97 * 64 + 64


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3", "phi3", "mixtral", "qwen3_moe"])
def test_with_a_basis_for_each_norm_it_fits_closer_and_loads_after_import(kind, tmp_path):
    module, plain = tiny(kind), tiny(kind)
    expected = outputs(module)
    model = Model(name=kind, module=module)
    with torch.no_grad():
        planned, _ = predict(emptied(module), EACH, Given())
    mw.apply(model, EACH, data=batches(module))
    mw.apply(plain, SliceGpt(keep=0.75), data=batches(plain))
    assert (outputs(module) - expected).norm() < 0.9 * (outputs(plain) - expected).norm()
    assert any("import modelwright" in note for note in model.history[-1]["notes"])
    assert stored_bytes(planned) == stored_bytes(module)
    assert flops_per_token(planned) == flops_per_token(module)
    model.save(tmp_path / "out")
    assert torch.equal(outputs(mw.open(tmp_path / "out").module), outputs(module))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()  # plain transformers, after `import modelwright`
    assert torch.equal(outputs(again), outputs(module))
    assert count(again) == count(module)


def test_a_turned_model_goes_on_with_a_cache_is_copied_packed_and_not_turned_again():
    module = mw.apply(tiny(), EACH, data=batches(tiny()))
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        whole = module(ids).logits[:, -1]
        start = module(ids[:, :-1], use_cache=True)
        assert torch.allclose(module(ids[:, -1:], past_key_values=start.past_key_values).logits[:, -1], whole, atol=1e-5)
        assert torch.equal(copy.deepcopy(module)(ids).logits[:, -1], whole)
    before = outputs(module)
    with pytest.raises(SiteError, match="shortcuts turns them"):
        mw.apply(module, SliceGpt(), data=batches(module))
    assert torch.equal(outputs(module), before)
    mw.apply(module, Magnitude(sparsity=0.0, store="sparse"))
    assert torch.allclose(outputs(module), before, atol=1e-5)


def test_hidden_states_that_are_not_finite_are_refused_unchanged_at_each_norm_too():
    module = tiny()
    module.model.layers[1].mlp.down_proj.weight.data *= torch.inf
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(SiteError, match=r"prune\.slicegpt: what enters a norm is NaN or infinite"):
        mw.apply(module, EACH, data=batches(tiny()))
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in module.state_dict().items())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
