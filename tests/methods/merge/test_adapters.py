import copy

import pytest
import torch
from calibration import lettered, normal
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core.adapters import Update, read
from modelwright.core.errors import ModelError, PlanError, SettingError
from modelwright.core.model import open
from modelwright.maths.task_vectors import merge, trimmed
from modelwright.methods.merge.adapters import Adapters
from modelwright.methods.merge.extract import Extract

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
RNG = torch.Generator().manual_seed(0)


def adapted(kind="llama", seed=1, rank=2, alpha=8.0, targets=("q_proj", "up_proj"), **settings):
    """A tiny model with a random adapter of peft."""
    module = get_peft_model(tiny(kind), LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **settings))
    with torch.no_grad():
        for number, (name, value) in enumerate(module.named_parameters()):
            if "lora_" in name:
                value.copy_(0.1 * normal(*value.shape, seed=100 * seed + number))
    return open(module.eval())


def change(weights, parts):
    return sum(weight * part.up @ part.down for weight, part in zip(weights, parts, strict=True))


def test_a_case_by_hand():
    # 2 · [1; 0][1 2] - 1 · [0; 1][3 4] = [[2, 4], [-3, -4]].
    one = Update(torch.tensor([[1.0], [0]]), torch.tensor([[1.0, 2]]))
    two = Update(torch.tensor([[0.0], [1]]), torch.tensor([[3.0, 4]]))
    for method in (Adapters(), Adapters(kind="svd")):
        found = method.together([(2.0, one), (-1.0, two)], RNG)
        assert found.rank == 2
        assert torch.allclose(found.up @ found.down, torch.tensor([[2.0, 4], [-3, -4]]), atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_cat_is_every_adapter_put_into_the_base_in_turn(kind, rslora):
    targets = ("q_proj", "up_proj") if kind == "llama" else ("c_attn", "c_fc")
    donors = [
        adapted(kind, 1, 2, 8.0, targets, use_rslora=rslora, fan_in_fan_out=kind == "gpt2"),
        adapted(kind, 2, 3, 3.0, targets[:1], fan_in_fan_out=kind == "gpt2"),
    ]
    merged = mw.apply(open(tiny(kind)), Adapters(weights=[1.0, 1.0]), donors=donors)
    base = tiny(kind)
    for donor in donors:
        folded = copy.deepcopy(donor.module).merge_and_unload()
        for (name, value), start in zip(base.named_parameters(), tiny(kind).parameters(), strict=True):
            value.data += folded.get_parameter(name).data - start.data
    assert torch.allclose(outputs(merged.module), outputs(base), atol=1e-5)


def test_svd_at_the_sum_of_the_ranks_is_cat_and_below_it_the_nearest():
    parts = [next(iter(read(adapted(seed=seed, rank=seed + 1))[0].values())) for seed in (1, 2)]
    pairs = list(zip([0.7, -0.2], parts, strict=True))
    exact = change([0.7, -0.2], parts)
    cat, svd, low = (Adapters(**settings).together(pairs, RNG) for settings in ({}, {"kind": "svd"}, {"kind": "svd", "rank": 2}))
    assert (cat.rank, svd.rank, low.rank) == (5, 5, 2)
    assert torch.allclose(cat.up @ cat.down, exact, atol=1e-6)
    assert torch.allclose(svd.up @ svd.down, exact, atol=1e-6)
    lost = torch.linalg.svdvals(exact)[2:].square().sum().item()
    assert (exact - low.up @ low.down).square().sum().item() == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("kind", ["cat", "svd", "ties", "dare"])
def test_one_adapter_of_weight_one_is_itself(kind):
    donor = adapted(alpha=12.0)  # scale 6: multiplied in once
    expected = outputs(donor.module)
    settings = {"keep": 1.0} if kind in ("ties", "dare") else {}
    merged = mw.apply(open(tiny()), Adapters(kind=kind, **settings), donors=[donor])
    assert torch.allclose(outputs(merged.module), expected, atol=1e-5)
    assert torch.equal(outputs(donor.module), expected)


def test_ties_works_on_the_changes():
    parts = [next(iter(read(adapted(seed=seed))[0].values())) for seed in (1, 2)]
    found = Adapters(kind="ties", keep=0.3, rank=64).together(list(zip([1.0, 2.0], parts, strict=True)), RNG)
    changes = [part.up @ part.down for part in parts]
    sparse = [lambda values, shape: trimmed(values, shape[0] * shape[1], 0.3)] * 2
    expected = merge(torch.zeros_like(changes[0]), changes, [1.0, 2.0], sparsify=sparse).whole()
    assert torch.allclose(found.up @ found.down, expected, atol=1e-5)


def test_dare_is_right_on_average_and_the_same_for_the_same_seed():
    part = next(iter(read(adapted())[0].values()))
    draws = [Adapters(kind="dare", rank=64).together([(1.0, part)], torch.Generator().manual_seed(seed)) for seed in [*range(200), 0]]
    mean = sum(one.up @ one.down for one in draws[:-1]) / 200
    exact = part.up @ part.down
    assert (mean - exact).norm() < 0.15 * exact.norm()
    assert torch.equal(draws[0].up, draws[-1].up)
    zeros = [((one.up @ one.down).abs() < 1e-6).float().mean().item() for one in draws[:5]]
    assert zeros == pytest.approx([0.5] * 5, abs=0.05)
    assert not torch.equal(draws[0].up, draws[1].up)


def test_every_adapter_of_dare_has_a_mask_of_its_own():
    part = next(iter(read(adapted())[0].values()))
    change = part.up @ part.down
    found = Adapters(kind="dare", rank=64).together([(1.0, part), (1.0, part)], RNG)
    times = (found.up @ found.down / change)[change.abs() > 1e-3]  # 0, 1 or 2 of two, times 1/keep = 2
    assert [((times - value).abs() < 0.1).float().mean().item() for value in (0, 2, 4)] == pytest.approx([0.25, 0.5, 0.25], abs=0.06)


def test_ties_and_dare_by_hand():
    # Changes (2, 4) and (-6, 1). TIES: the sums -4 and 5 elect - and +: -6, and the mean of 4 and 1. DARE that keeps all adds
    # them up, -4 and 5; with consensus -6 and 5.
    one, two = (Update(torch.tensor([[1.0]]), torch.tensor([row])) for row in ([2.0, 4.0], [-6.0, 1.0]))
    expected = {("ties", False): [-6.0, 2.5], ("dare", False): [-4.0, 5.0], ("dare", True): [-6.0, 5.0]}
    for (kind, consensus), row in expected.items():
        found = Adapters(kind=kind, consensus=consensus, keep=1.0).together([(1.0, one), (1.0, two)], RNG)
        assert (found.up @ found.down).flatten().tolist() == pytest.approx(row)


@pytest.mark.parametrize("kind", ["svd", "ties", "dare"])
def test_the_rank_is_the_one_asked_for_and_by_itself_the_sum_of_the_donors(kind):
    pairs = [(1.0, next(iter(read(adapted(seed=seed, rank=seed + 1))[0].values()))) for seed in (1, 2)]
    assert Adapters(kind=kind).together(pairs, RNG).rank == 5
    assert Adapters(kind=kind, rank=3).together(pairs, RNG).rank == 3


def test_weights_count_in_changes_and_in_biases():
    donors = [adapted("qwen2", seed, targets=("q_proj", "k_proj")[:seed], lora_bias=True) for seed in (1, 2)]
    for number, donor in enumerate(donors):
        for place, (name, value) in enumerate(donor.module.named_parameters()):
            if name.endswith("lora_B.default.bias"):
                value.data.copy_(normal(*value.shape, seed=100 * number + place))
    merged = mw.apply(open(tiny("qwen2")), Adapters(weights=[0.5, -2.0]), donors=donors)
    expected = tiny("qwen2")
    with torch.no_grad():
        for weight, donor in zip([0.5, -2.0], donors, strict=True):
            folded = copy.deepcopy(donor.module).merge_and_unload()
            for name, start in tiny("qwen2").named_parameters():
                expected.get_parameter(name).add_(folded.get_parameter(name) - start, alpha=weight)
    folded = merged.module.merge_and_unload()
    for name, value in expected.named_parameters():
        assert torch.allclose(folded.get_parameter(name), value, atol=1e-5), name
    assert not torch.allclose(expected.model.layers[0].self_attn.k_proj.bias, tiny("qwen2").model.layers[0].self_attn.k_proj.bias)


def test_what_is_saved_whole_is_added_up_too():
    donors = [mw.apply(lettered(), Extract(rank=64), donors=[tiny(seed=seed)]) for seed in (1, 2)]
    merged = mw.apply(lettered(), Adapters(weights=[0.25, 0.5]), donors=donors)
    base, one, two = tiny(), tiny(seed=1), tiny(seed=2)
    for value, first, second in zip(base.parameters(), one.parameters(), two.parameters(), strict=True):
        value.data = 0.25 * value.data + 0.25 * first.data + 0.5 * second.data
    assert torch.allclose(outputs(merged.module), outputs(base), atol=1e-4)


def test_plain_peft_loads_the_result_and_the_models_own_adapter_goes(tmp_path):
    donors = [adapted(seed=1), adapted(seed=2, rank=3, targets=("q_proj", "v_proj"))]
    merged = mw.apply(open(tiny()), Adapters(), donors=donors)
    expected = outputs(merged.module)
    merged.save(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter")).eval()
    assert torch.allclose(outputs(plain), expected, atol=1e-6)
    again = mw.apply(adapted(seed=5), Adapters(), donors=donors)
    assert torch.allclose(outputs(again.module), expected, atol=1e-6)


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(PlanError, match="wants donors that are adapters"):
        mw.apply(open(tiny()), Adapters(), donors=[tiny()])
    with pytest.raises(ModelError, match="or in other shapes"):
        mw.apply(open(tiny(intermediate_size=96)), Adapters(), donors=[adapted()])
    with pytest.raises(ModelError, match="only low-rank updates"):
        mw.apply(open(tiny()), Adapters(), donors=[adapted(use_dora=True)])
    with pytest.raises(SettingError, match="Choose svd for a lower rank"):
        Adapters(rank=4)
    with pytest.raises(SettingError, match="2 weights for 1 donors"):
        mw.apply(open(tiny()), Adapters(weights=[1, 1]), donors=[adapted()])
    whole = adapted(targets=("v_proj",), modules_to_save=["q_proj"])
    with pytest.raises(ModelError, match="which another adapter saves whole"):
        mw.apply(open(tiny()), Adapters(), donors=[adapted(), whole])
