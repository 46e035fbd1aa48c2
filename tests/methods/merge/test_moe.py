import pytest
import torch
from calibration import lettered
from tiny import outputs, tiny
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.core.errors import ModelError, NeedError, SettingError, SiteError
from modelwright.methods.merge.moe import Moe

PROMPTS = [["write code", "a function"], ["tell a story"]]
ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize("gates", ["hidden", "cheap_embed", "random", "uniform_random"])
@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"rope_parameters": ROPE}, {"head_dim": 16}], ids=str)
def test_identical_experts_are_the_dense_model(gates, settings):
    prompts = PROMPTS if gates in ("hidden", "cheap_embed") else None
    model = mw.apply(lettered(**settings), Moe(gates=gates, prompts=prompts), donors=[tiny(**settings), tiny(**settings)])
    assert type(model.module).__name__ == "MixtralForCausalLM"
    assert torch.allclose(outputs(model.module), outputs(tiny(**settings)), atol=1e-5)


def test_a_mistral_keeps_its_window():
    window = {"sliding_window": 4}
    model = mw.apply(tiny("mistral", **window), Moe(), donors=[tiny("mistral", **window)] * 2)
    assert torch.allclose(outputs(model), outputs(tiny("mistral", **window)), atol=1e-5)
    assert not torch.allclose(outputs(model), outputs(tiny("mistral")), atol=1e-3)


def test_plain_transformers_loads_it_with_each_experts_own_matrices(tmp_path):
    donors = [tiny(seed=1), tiny(seed=2), tiny(seed=3)]
    model = mw.apply(lettered(), Moe(), donors=donors, save=tmp_path / "mixtral")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral").eval()
    assert torch.allclose(outputs(loaded), outputs(model.module), atol=1e-6)
    assert (loaded.config.model_type, loaded.config.num_local_experts, loaded.config.num_experts_per_tok) == ("mixtral", 3, 2)
    assert (tmp_path / "mixtral" / "tokenizer.json").is_file()
    experts = loaded.model.layers[1].mlp.experts
    for number, donor in enumerate(donors):
        mlp = donor.model.layers[1].mlp
        assert torch.equal(experts.gate_up_proj[number], torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        assert torch.equal(experts.down_proj[number], mlp.down_proj.weight)
    assert torch.equal(loaded.model.layers[2].self_attn.q_proj.weight, tiny().model.layers[2].self_attn.q_proj.weight)


WHOLE = {"gates": "cheap_embed", "prompts": [*PROMPTS, []]}  # of a shared expert without prompts
GATED = {"gates": "cheap_embed", "prompts": [*PROMPTS, ["anything"]]}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"head_dim": 16}], ids=str)
def test_a_shared_expert_that_counts_whole_is_added(kind, settings, tmp_path):
    """Of experts whose outputs are 0, the shared one is the MLP."""
    donors = [tiny(kind, seed=1, **settings), tiny(kind, seed=2, **settings), tiny(kind, **settings)]
    method = Moe(**WHOLE, shared=1, residual_each=[0, 0, 1])
    model = mw.apply(lettered(kind, **settings), method, donors=donors, save=tmp_path / "mixture")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture").eval()
    assert (loaded.config.model_type, loaded.config.num_experts, loaded.config.num_experts_per_tok) == ("qwen2_moe", 2, 2)
    assert torch.allclose(outputs(model.module), outputs(tiny(kind, **settings)), atol=1e-5)
    assert torch.allclose(outputs(loaded), outputs(model.module), atol=1e-6)


@pytest.mark.parametrize(("kind", "window"), [
    ("mistral", {"sliding_window": 4}),
    ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2}),
])  # fmt: skip
def test_windows_stay_where_they_were(kind, window):
    model = mw.apply(lettered(kind, **window), Moe(**WHOLE, shared=1, residual_each=[0, 0, 1]), donors=[tiny(kind, **window)] * 3)
    assert torch.allclose(outputs(model.module), outputs(tiny(kind, **window)), atol=1e-5)
    assert not torch.allclose(outputs(model.module), outputs(tiny(kind)), atol=1e-3)


def test_a_shared_expert_with_prompts_is_weighed_by_a_sigmoid():
    donors = [tiny(seed=1), tiny(seed=2), tiny(seed=3)]
    made = mw.apply(lettered(), Moe(**GATED, shared=1, experts_per_token=1), donors=donors).module
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    block, mlps = made.model.layers[0].mlp, [donor.model.layers[0].mlp for donor in donors]
    with torch.no_grad():
        chosen = (x @ block.gate.weight.T)[0].argmax(-1).tolist()
        shared = torch.sigmoid(x @ block.shared_expert_gate.weight.T) * mlps[2](x)
        expected = torch.stack([mlps[number](x[0, place]) for place, number in enumerate(chosen)]) + shared[0]
        assert torch.allclose(block(x)[0], expected, atol=1e-5)
    rows = Moe(**GATED, shared=1).routers(lettered(), 3, torch.Generator())
    assert torch.equal(block.shared_expert_gate.weight, rows[0][2:])
    assert torch.equal(block.gate.weight, rows[0][:2])


def test_qwen3_makes_a_qwen3_mixture(tmp_path):
    model = mw.apply(lettered("qwen3"), Moe(), donors=[tiny("qwen3")] * 2, save=tmp_path / "mixture")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture").eval()
    assert loaded.config.model_type == "qwen3_moe"
    assert torch.allclose(outputs(loaded), outputs(tiny("qwen3")), atol=1e-5)
    assert model.history[-1]["method"] == "merge.moe"
    window = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
    made = mw.apply(tiny("qwen3", **window), Moe(), donors=[tiny("qwen3", **window)] * 2)
    assert torch.allclose(outputs(made), outputs(tiny("qwen3", **window)), atol=1e-5)
    with pytest.raises(SiteError, match="only some of its blocks have one"):
        mw.apply(tiny("qwen3", **window | {"max_window_layers": 2}), Moe(), donors=[tiny("qwen3")] * 2)


def test_noise_comes_before_the_scale_of_the_outputs():
    donors = [tiny(seed=1), tiny(seed=2)]
    made = mw.apply(tiny(), Moe(noise_each=[0.0, 0.5], residual_each=[2.0, 3.0]), donors=donors, seed=1).model.layers[0].mlp.experts
    mlps = [donor.model.layers[0].mlp for donor in donors]
    assert torch.equal(made.gate_up_proj[0], torch.cat([mlps[0].gate_proj.weight, mlps[0].up_proj.weight]))
    assert torch.equal(made.down_proj[0], 2 * mlps[0].down_proj.weight)
    noise = made.gate_up_proj[1] - torch.cat([mlps[1].gate_proj.weight, mlps[1].up_proj.weight])
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)
    assert abs(noise.mean().item()) < 5 * 0.5 / noise.numel() ** 0.5
    assert (made.down_proj[1] / 3 - mlps[1].down_proj.weight).std().item() == pytest.approx(0.5, rel=0.05)
    again = mw.apply(tiny(), Moe(noise_each=[0.0, 0.5]), donors=donors, seed=1).model.layers[0].mlp.experts
    assert torch.equal(again.gate_up_proj, made.gate_up_proj)


@pytest.mark.parametrize("settings", [{}, {"gates": "cheap_embed", "prompts": [*PROMPTS, ["anything"]]}], ids=["random", "gated"])
def test_a_mixture_shares_no_memory_with_its_donors(settings):
    donors = [tiny(seed=1), tiny(seed=2), tiny(seed=3)]
    before = [{name: value.clone() for name, value in donor.named_parameters()} for donor in donors]
    made = mw.apply(lettered(), Moe(shared=1, **settings), donors=donors).module
    with torch.no_grad():
        for value in made.parameters():
            value.zero_()
    for donor, values in zip(donors, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in donor.named_parameters())


@pytest.mark.parametrize("shared", [0, 1])
def test_a_mixture_has_the_models_dtype_whatever_its_donors_have(shared):
    donors = [tiny(seed=1), tiny(seed=2), tiny(seed=3)]
    made = mw.apply(tiny().bfloat16(), Moe(shared=shared), donors=donors)
    assert {value.dtype for value in made.parameters()} == {torch.bfloat16}
    assert outputs(made).isfinite().all()
    down = donors[1].model.layers[2].mlp.down_proj.weight
    assert torch.equal(made.model.layers[2].mlp.experts.down_proj[1], down.bfloat16())


def test_a_token_goes_to_the_expert_of_the_largest_product():
    """One expert per token: where the router says donor n, the MLP is donor n's."""
    donors = [tiny(seed=1), tiny(seed=2)]
    model = mw.apply(lettered(), Moe(experts_per_token=1), donors=donors).module
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    block = model.model.layers[0].mlp
    with torch.no_grad():
        chosen = (x @ block.gate.weight.T)[0].argmax(-1)
        found = block(x)[0]
        for place, number in enumerate(chosen.tolist()):
            assert torch.allclose(found[place], donors[number].model.layers[0].mlp(x[0, place]), atol=1e-6)
    assert chosen.unique().numel() == 2


def test_routers_are_the_unit_states_of_the_last_tokens():
    base = lettered()
    method = Moe(gates="hidden", prompts=PROMPTS, against=[["tell a story"], ["count", "write code"]])
    with torch.no_grad():
        routers = method.routers(base, 2, torch.Generator())
        entering = {}
        for text in ("write code", "a function", "tell a story", "count"):
            ids = torch.tensor([base.tokenizer(text)["input_ids"]])
            hooks = [
                layer.register_forward_pre_hook(lambda _, args, key=(text, depth): entering.update({key: args[0][0, -1]}))
                for depth, layer in enumerate(base.module.model.layers)
            ]
            base.module(input_ids=ids)
            for hook in hooks:
                hook.remove()
    for depth in range(4):
        one = (entering["write code", depth] + entering["a function", depth]) / 2 - entering["tell a story", depth]
        two = entering["tell a story", depth] - (entering["count", depth] + entering["write code", depth]) / 2
        assert torch.allclose(routers[depth], torch.stack([one / one.norm(), two / two.norm()]), atol=1e-5)


def test_cheap_routers_are_the_mean_embeddings_and_alike_in_all_blocks():
    base = lettered()
    with torch.no_grad():
        routers = Moe(gates="cheap_embed", prompts=PROMPTS).routers(base, 2, torch.Generator())
        ids = base.tokenizer("write code")["input_ids"] + base.tokenizer("a function")["input_ids"]
        mean = base.module.model.embed_tokens.weight[ids].mean(0)
    assert torch.allclose(routers[0][0], mean / mean.norm(), atol=1e-6)
    assert all(torch.equal(one, routers[0]) for one in routers)


def test_random_routers_have_their_size_and_follow_the_seed():
    wide = lettered()
    plain = torch.cat(Moe().routers(wide, 50, torch.Generator().manual_seed(1)))
    assert plain.std().item() == pytest.approx(1, rel=0.05)
    uniform = torch.cat(Moe(gates="uniform_random").routers(wide, 50, torch.Generator().manual_seed(1)))
    assert uniform.abs().max() <= 1 / 8
    assert uniform.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    one, two, three = (mw.apply(tiny(), Moe(), donors=[tiny()] * 2, seed=seed).model.layers[0].mlp.gate.weight for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_rows_that_are_nearly_alike_are_said():
    model = lettered()
    mw.apply(model, Moe(gates="cheap_embed", prompts=[["write code"], ["write code."]]), donors=[tiny(), tiny()])
    assert "nearly alike in blocks 0 (" in model.history[-1]["notes"][0]
    model = lettered()
    mw.apply(model, Moe(), donors=[tiny(), tiny()])
    assert model.history[-1]["notes"] == []


def test_what_cannot_become_a_mixture_is_refused():
    with pytest.raises(SiteError, match="laid out otherwise: it is a gpt2"):
        mw.apply(tiny("gpt2"), Moe(), donors=[tiny("gpt2")] * 2)
    with pytest.raises(SiteError, match="it has biases, first model"):
        mw.apply(tiny(attention_bias=True), Moe(), donors=[tiny(attention_bias=True)] * 2)
    with pytest.raises(ModelError, match="other shapes"):
        mw.apply(tiny(), Moe(), donors=[tiny(), tiny(intermediate_size=96)])
    with pytest.raises(NeedError, match="takes 2 or more donors"):
        mw.apply(tiny(), Moe(), donors=[tiny()])
    with pytest.raises(SettingError, match="3 experts per token, of 2 donors"):
        mw.apply(tiny(), Moe(experts_per_token=3), donors=[tiny()] * 2)
    with pytest.raises(SettingError, match="1 lists of prompts for 2 donors"):
        mw.apply(lettered(), Moe(gates="hidden", prompts=[["a"]]), donors=[tiny()] * 2)
    with pytest.raises(SettingError, match="hidden needs prompts"):
        Moe(gates="hidden")
    with pytest.raises(SettingError, match="hidden needs prompts"):
        Moe(gates="hidden", prompts=[["a"], [], ["b"]], shared=1)
    with pytest.raises(SettingError, match="2 experts per token, of 1 donors besides the shared one"):
        mw.apply(tiny(), Moe(shared=1), donors=[tiny()] * 2)
    with pytest.raises(SiteError, match="laid out otherwise: it is a llama, with a shared expert, and mixtral is asked for"):
        mw.apply(tiny(), Moe(shared=1, architecture="mixtral"), donors=[tiny()] * 3)
    with pytest.raises(SiteError, match="laid out otherwise: it is a qwen2, without a shared expert"):
        mw.apply(tiny("qwen2"), Moe(), donors=[tiny("qwen2")] * 2)
    with pytest.raises(SettingError, match="1 noise_each for 2 donors"):
        mw.apply(tiny(), Moe(noise_each=[0.1]), donors=[tiny()] * 2)
    with pytest.raises(SettingError, match="noise_each are numbers of at least 0; got"):
        Moe(noise_each=[-0.1])
    with pytest.raises(SettingError, match="residual_each are numbers; got"):
        Moe(residual_each=[float("nan")])
    with pytest.raises(SettingError, match="reads no prompts"):
        Moe(prompts=PROMPTS)
    with pytest.raises(NeedError, match="no tokenizer"):
        mw.apply(tiny(), Moe(gates="hidden", prompts=PROMPTS), donors=[tiny()] * 2)
