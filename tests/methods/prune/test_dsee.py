import peft
import pytest
import torch
from calibration import TEXT, lettered, normal
from tiny import outputs, tiny, tiny_inputs
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.core.adapters import plain_layers, read
from modelwright.core.errors import ModelError, PlanError, SettingError, SiteError
from modelwright.core.model import quiet, unwrapped
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.prune.dsee import Dsee
from modelwright.methods.prune.dsee_heads import DseeHeads
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.train import Train

BRIEF = Train(tokens=256, batch=4, length=16, learning_rate=1e-2)


def adapted(kind="llama", where="attn.{q,v}", folder=None, **config):
    """A tiny model with random updates beside its queries and values; on disk first where a folder is given."""
    model = lettered(kind, **config)
    if folder is not None:
        model.save(folder)
        model = mw.open(folder)
    mw.apply(model, Lora(rank=2, alpha=6, where=where))
    with torch.no_grad():
        for number, (name, value) in enumerate(model.module.named_parameters()):
            if "lora_B" in name:
                value.copy_(0.3 * normal(*value.shape, seed=number))
    return model


def layer(model, path):
    return unwrapped(model.module).get_submodule(path)


def factors(model):
    return {name: value.clone() for name, value in model.module.state_dict().items() if "lora_" in name}


def bases(model):
    return {name: value for name, value in model.module.state_dict().items() if "base_layer" in name or "mlp" in name}


def test_a_case_by_hand():
    # W = (3, -2; 1, 0.5) with s B A = 3 · (1; 0)(-1, 1) = (-3, 3; 0, 0): sums (0, 1; 1, 0.5). Of four, two go: by their sum the
    # first and the last, by the update the second row, by the weight the second row too.
    model = adapted(hidden_size=64, num_hidden_layers=1)
    query = layer(model, "model.layers.0.self_attn.q_proj")
    for measure, expected in (("both", [[0, -2], [1, 0]]), ("update", [[3, -2], [0, 0]]), ("weight", [[3, -2], [0, 0]])):
        query.base_layer.weight.data = torch.tensor([[3.0, -2], [1, 0.5]])
        query.lora_B["default"].weight.data = torch.tensor([[1.0, 0], [0, 0]])
        query.lora_A["default"].weight.data = torch.tensor([[-1.0, 1], [0, 0]])
        model.marks = {"float", "adapters"}
        mw.apply(model, Dsee(measure=measure, sparsity=0.5, where="attn.q"))
        assert query.base_layer.weight.tolist() == expected, measure


def test_the_update_stays_and_the_layer_is_the_masked_weight_with_it():
    model = adapted()
    before, weights = factors(model), {name: value.clone() for name, value in bases(model).items()}
    mw.apply(model, Dsee(sparsity=0.4))
    after = factors(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    query, inputs = layer(model, "model.layers.1.self_attn.q_proj"), normal(5, 64)
    kept = weights["base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight"] * (query.base_layer.weight != 0)
    update = 3 * query.lora_B["default"].weight @ query.lora_A["default"].weight
    assert 0 < (query.base_layer.weight == 0).float().mean() < 1
    assert torch.allclose(query(inputs), inputs @ (kept + update).T, atol=1e-5)


def test_there_are_two_thresholds():
    model = adapted()
    mw.apply(model, Dsee(sparsity=0.3, adapted=0.6))
    count = {own: [0, 0] for own in (True, False)}
    for site in model.sites():
        if site.role.startswith(("attn", "mlp")):
            weight = unwrapped(model.module).get_parameter(site.name)
            count[site.module.endswith("base_layer")][0] += int((weight == 0).sum())
            count[site.module.endswith("base_layer")][1] += weight.numel()
    assert count[True][0] == int(0.6 * count[True][1])
    assert count[False][0] == int(0.3 * count[False][1])


def test_by_weight_it_is_magnitude_over_each_set():
    model, other = adapted(where=("attn", "mlp")), lettered()
    mw.apply(model, Dsee(measure="weight", scope="tensor", sparsity=0.5))
    mw.apply(other, Magnitude(sparsity=0.5))
    for site in other.sites():
        if site.role.startswith(("attn", "mlp")):
            assert torch.equal(layer(model, site.module).base_layer.weight, other.module.get_parameter(site.name)), site.name


def test_with_no_sparsity_training_goes_as_without():
    one, two = adapted(), adapted()
    mw.apply(one, [Dsee(sparsity=0.0, adapted=0.0), BRIEF], data=TEXT)
    mw.apply(two, BRIEF, data=TEXT)
    assert torch.equal(outputs(one.module), outputs(two.module))


def test_it_is_stored_with_its_base_tuned_on_and_folded(tmp_path):
    model = adapted(folder=tmp_path / "plain")
    mw.apply(model, [Dsee(sparsity=0.5), BRIEF], data=TEXT)
    zeros = {name: value == 0 for name, value in bases(model).items() if name.endswith("weight")}
    assert sum(int(mask.sum()) for mask in zeros.values()) > 10_000
    expected = outputs(model.module)
    model.save(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    loaded = mw.open(tmp_path / "moved")
    assert loaded.marks == {"float", "adapters", "sparse"}
    assert torch.equal(outputs(loaded.module), expected)
    assert all(torch.equal(loaded.module.state_dict()[name] == 0, mask) for name, mask in zeros.items())
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path / "moved" / "base")
    with quiet():
        borne = peft.PeftModel.from_pretrained(elsewhere, tmp_path / "moved").eval()
    assert torch.allclose(outputs(borne), expected, atol=1e-5)
    mw.apply(loaded, Fold())
    assert "sparse" not in loaded.marks
    assert (loaded.module.model.layers[0].self_attn.q_proj.weight != 0).all()
    assert torch.allclose(outputs(loaded.module), expected, atol=1e-5)


def test_any_change_under_an_adapter_is_stored(tmp_path):
    model = adapted(folder=tmp_path / "plain")
    mw.apply(model, Magnitude(sparsity=0.5))
    model.save(tmp_path / "out")
    assert torch.equal(outputs(mw.open(tmp_path / "out").module), outputs(model.module))


def test_it_runs_in_a_recipe(tmp_path):
    lettered().save(tmp_path / "in")
    (tmp_path / "text.txt").write_text(TEXT[0])
    steps = [{"adapt.lora": {"rank": 2, "where": "attn"}}, {"prune.dsee": {"sparsity": 0.5}},
             {"train": {"tokens": 64, "batch": 2, "length": 16}}]  # fmt: skip
    done = mw.run({"model": str(tmp_path / "in"), "data": str(tmp_path / "text.txt"), "steps": steps, "save": str(tmp_path / "out")})
    assert done.account[2]["zeros"] - done.account[1]["zeros"] == done.account[3]["zeros"] == WEIGHTS // 2  # B is zero until it is trained
    assert mw.open(tmp_path / "out").module.state_dict()[NAME].eq(0).any()
    assert not [note for row in done.account for note in row.get("notes", ()) if "predicted" in note]


WEIGHTS = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64)
NAME = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"


def test_bad_settings_and_models_are_refused():
    with pytest.raises(SettingError, match="adapted is one share of weights that compete over the model"):
        Dsee(adapted=0.5, scope="tensor")
    with pytest.raises(SettingError, match="adapted is one share"):
        Dsee(adapted=[0.1, 0.5])
    with pytest.raises(PlanError, match=r"prune\.dsee wants a model that is adapters"):
        mw.apply(lettered(), Dsee())
    model = adapted()
    model.module.add_adapter("second", model.module.peft_config["default"])
    model.module.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match="2 active adapters"):
        mw.apply(model, Dsee())


# Heads


def test_heads_by_hand():
    # With W and the update at 0 but for the rows of some heads, the sizes of these decide: of two values of each entry.
    model = adapted(num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1)
    for part in ("q", "v"):
        one = layer(model, f"model.layers.0.self_attn.{part}_proj")
        one.base_layer.weight.data.zero_()
        one.lora_B["default"].weight.data.zero_()
        one.lora_A["default"].weight.data.fill_(1.0)
        for head, (weight, update) in enumerate(((4.0, 0.0), (0.0, 1.0), (3.0, 0.5), (2.0, 2.0))):
            one.base_layer.weight.data[16 * head] = weight / 64 * (-1) ** torch.arange(64)
            one.lora_B["default"].weight.data[16 * head] = update / 64 / 6
    seen = {}
    for measure in ("weight", "update", "both"):
        updates, _ = read(model)
        with plain_layers(unwrapped(model.module)):
            units = anatomy_of(unwrapped(model.module)).units(unwrapped(model.module), "heads")
            seen[measure] = DseeHeads(measure=measure).scores(unwrapped(model.module), units, (updates, {}))[0]
    assert torch.allclose(seen["weight"], torch.tensor([8.0, 0, 6, 4]))
    assert torch.allclose(seen["update"], torch.tensor([0.0, 2, 1, 4]))
    assert torch.allclose(seen["both"], torch.tensor([8.0, 2, 7, 8]))


@pytest.mark.parametrize(("kind", "rows"), [("gpt2", slice(64, 128)), ("llama", None)])
def test_keys_do_not_count_fused_with_queries_and_values_or_alone(kind, rows):
    model = adapted(kind, "attn.qkv" if rows else "attn")
    base = unwrapped(model.module)
    updates, _ = read(model)
    with plain_layers(base) as bearers:
        found = anatomy_of(base).units(base, "heads")
        before = DseeHeads().scores(base, found, (updates, bearers))
        key = base.get_parameter("transformer.h.1.attn.c_attn.weight" if rows else "model.layers.1.self_attn.k_proj.weight").data
        (key[:, rows] if rows else key).mul_(9)
        after = DseeHeads().scores(base, found, (updates, bearers))
    if rows:  # the update's own rows of keys
        update = updates["transformer.h.1.attn.c_attn"]
        assert (update.up[rows] @ update.down).any()
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "bert", "vit"])
def test_heads_that_leave_are_those_whose_outputs_were_zero(kind):
    where = "attn.qkv" if kind in ("gpt2", "gpt_neox") else "attn"
    model, silent = adapted(kind, where), adapted(kind, where)
    mw.apply(model, DseeHeads(share=0.5))
    base = unwrapped(silent.module)
    updates, _ = read(silent)
    with plain_layers(base) as bearers:
        found = anatomy_of(base).units(base, "heads")
        scores = DseeHeads().scores(base, found, (updates, bearers))
        for units, score in zip(found, scores, strict=True):
            gone = score.argsort(stable=True)[: units.count // 2]
            span = next(span for span in units.spans if span.output)
            weight = base.get_parameter(span.name)
            columns = torch.cat([torch.arange(span.start + n * span.width, span.start + (n + 1) * span.width) for n in gone.tolist()])
            weight.data.index_fill_(span.dim, columns, 0)
            bearer = bearers.get(span.name.removesuffix(".weight"))
            if bearer is not None:
                bearer.lora_A["default"].weight.data.index_fill_(1, columns, 0)
    inputs = tiny_inputs(tiny(kind))
    assert (outputs(model.module, inputs) - outputs(silent.module, inputs)).abs().max() < 1e-5
    assert sum(value.numel() for value in model.module.parameters()) < sum(value.numel() for value in silent.module.parameters())


def test_without_heads_it_is_stored_and_tuned_on(tmp_path):
    model = adapted(where="attn", folder=tmp_path / "plain")
    mw.apply(model, [DseeHeads(share=0.5), BRIEF], data=TEXT)
    model.save(tmp_path / "out")
    assert torch.equal(outputs(mw.open(tmp_path / "out").module), outputs(model.module))
    mw.apply(model, Fold())
    assert torch.allclose(outputs(mw.apply(mw.open(tmp_path / "out"), Fold()).module), outputs(model.module), atol=1e-6)


def test_an_adapter_on_other_parts_gives_heads_no_score():
    with pytest.raises(SiteError, match="updates no queries and no values. Score the weights"):
        mw.apply(adapted(where="mlp"), DseeHeads())
    mw.apply(adapted(where="mlp"), DseeHeads(measure="weight"))
