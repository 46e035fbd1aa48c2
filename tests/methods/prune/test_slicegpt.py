import copy

import pytest
import torch
from calibration import batches, normal
from tiny import outputs, tiny
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.anatomy._rotation import fold_norms, residual_norms, rotate_stream
from modelwright.core.errors import PlanError, SiteError
from modelwright.core.measure import count
from modelwright.core.model import Model
from modelwright.methods.prune.slicegpt import SliceGpt, directions, stream_moment

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


def test_a_case_by_hand():
    # Along (1, 1)/√2 the moment [[3, 1], [1, 3]] has energy 4, along (1, -1)/√2 energy 2.
    values, vectors = directions(torch.tensor([[3.0, 1.0], [1.0, 3.0]], dtype=torch.float64), 0.01)
    assert values.tolist() == pytest.approx([4, 2])
    assert vectors.abs().flatten().tolist() == pytest.approx([0.5**0.5] * 4)
    assert float(vectors[0, 0] * vectors[1, 0]) > 0


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
    values, vectors = directions(moment, 0.01)
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
    with pytest.raises(SiteError, match="no directions of the stream to remove"):
        mw.apply(module, SliceGpt(), data=batches(module))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_width_of_nothing_is_refused():
    with pytest.raises(PlanError, match="less than one multiple of 8"):
        mw.apply(tiny(), SliceGpt(keep=0.1), data=batches(tiny()))


def test_all_is_kept_whatever_the_multiple_and_the_note_tells_the_energy():
    assert SliceGpt(keep=1.0, multiple=48).width(tiny()) == (64, 64)
    model = mw.open(tiny())
    values, _ = directions(stream_moment(mw.open(tiny()), batches(tiny())), 0.01)
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
