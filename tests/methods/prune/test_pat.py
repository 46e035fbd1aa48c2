import pytest
import torch
from calibration import TEXT, lettered, normal
from tiny import outputs, tiny, tiny_inputs
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.core.contract import LETTERS
from modelwright.core.errors import LayoutError, PlanError, SettingError
from modelwright.core.training import Training, next_token, train
from modelwright.maths.channel_masks import not_orthogonal
from modelwright.methods.prune._channels import NAME
from modelwright.methods.prune.pat import Narrowing, Pat

RUN = Training(tokens=12 * 64, batch=4, length=16)
IDS = torch.randint(1, 90, (600,), generator=torch.Generator().manual_seed(0))
KINDS = ["llama", "gemma", "qwen2", "qwen3", "phi3", "mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT[0])
    return file


def narrowing(module, run=RUN, **settings):
    return Narrowing(Pat(**{"mixing": 6, "rank": 4} | settings), module, run, [])


def trained_by_chance(course):
    """Random numbers in all that trains, with 48 positive logits."""
    for number, value in enumerate(value for value in course.module.parameters() if value.requires_grad):
        value.data += 0.1 * normal(*value.shape, seed=number)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    course.mixing.chosen.logits.data[order] = torch.cat([torch.linspace(0.1, 1, 48), torch.linspace(-1, 0, 16)])
    return course


@pytest.mark.parametrize("name", KINDS)
def test_nothing_has_changed_at_first_and_nothing_is_left_when_it_leaves(name):
    module = tiny(name)
    names, before = module.state_dict().keys(), outputs(module)
    course = narrowing(module)
    course.begin(0)
    assert torch.allclose(outputs(module), before, atol=1e-6)
    trained_by_chance(course)
    assert not torch.allclose(outputs(module), before, atol=1e-2)
    course.leave()
    assert torch.equal(outputs(module), before)
    assert module.state_dict().keys() == names
    assert all(value.requires_grad for value in module.parameters())


def test_what_trains_is_counted_by_the_formula():
    module = tiny()
    course = narrowing(module)
    width, places = 64, 2 * 4 + 1
    updates = sum(update.up.numel() + update.down.numel() for update in course.beside.updates.values())
    assert updates == 4 * 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 160) * 3)
    found = sum(value.numel() for value in module.parameters() if value.requires_grad)
    assert found == 2 * 6 * width * places + width * places + width + updates


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_narrow_model_is_the_masked_one(name, tied, tmp_path):
    module = tiny(name, tie_word_embeddings=tied)
    course = trained_by_chance(narrowing(module))
    course.begin(RUN.steps)
    expected = outputs(module)
    course.finish()
    assert torch.allclose(outputs(module), expected, rtol=1e-4, atol=1e-4)
    assert module.config.hidden_size == 48
    assert course.notes == ["prune.pat: 48 of 64 channels stay; 48 were chosen in training"]
    module.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again), outputs(module))


@pytest.mark.parametrize(("alpha", "rank"), [(4.0, 20), (10.0, 4)])
def test_updates_are_scaled_by_alpha_over_rank(alpha, rank):
    module = tiny()
    course = narrowing(module, alpha=alpha, rank=rank)
    layer = module.model.layers[1].mlp.down_proj
    update, x = course.beside.updates["model.layers.1.mlp.down_proj.weight"], normal(3, 160)
    update.up.data = normal(64, rank)
    change = alpha / rank * update.up @ update.down
    assert torch.allclose(layer(x), x @ (layer.weight + change).T, atol=1e-4)
    before = layer.weight.detach().clone()
    course.beside.fold()
    assert torch.allclose(layer.weight, before + change, atol=1e-5)


def test_channels_that_are_masked_are_0_wherever_the_stream_goes():
    module = tiny()
    course = trained_by_chance(narrowing(module))
    course.begin(RUN.steps)
    gone = course.mixing.chosen.logits <= 0
    seen = []
    for name, norm in module.named_modules():
        if name.endswith("layernorm") or name == "model.norm":
            norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    outputs(module)
    assert len(seen) == 9
    assert all((states[..., gone] == 0).all() and (states[..., ~gone] != 0).any() for states in seen)


def test_the_loss_is_the_texts_and_what_the_parts_cost():
    module = tiny()
    method = Pat(mixing=6)
    course = Narrowing(method, module, RUN, [])
    course.mixing.chosen.step = 5
    mask = torch.ones(2, 16, dtype=torch.bool)
    ids = tiny_inputs(module)["input_ids"][:2, :16]
    mask = torch.ones_like(ids, dtype=torch.bool)
    total, parts = method.loss(module, ids, mask)
    assert parts["width"].item() == pytest.approx(10 * (64 - 48) / 48 + 0.25)
    rows = [part.down.detach() for part in course.mixing.mixed.values()]
    assert parts["rotation"].item() == pytest.approx(sum(((row @ row.T - torch.eye(6)) ** 2).mean().item() for row in rows), rel=1e-5)
    assert parts["text"].item() == pytest.approx(next_token(module, ids, mask)[0].item())
    assert total.item() == pytest.approx(sum(part.item() for part in parts.values()))
    total.backward()
    assert course.mixing.chosen.logits.grad.isfinite().all()


def test_training_chooses_channels_until_they_are_settled():
    ids = torch.tensor([1 + LETTERS.index(letter) for letter in TEXT[0]]) % 97
    module = tiny()
    run = Training(tokens=60 * 64, batch=4, length=16, learning_rate=0.02)
    method, seen, turned = Pat(mixing=6, rank=4, settled=0.8), [], []

    class Watched(Narrowing):
        def update(self, step):
            seen.append(self.mixing.chosen.logits.detach().clone())
            turned.append(sum(not_orthogonal(part.down).item() for part in self.mixing.mixed.values()))

    course = Watched(method, module, run, [])
    mask = torch.ones(1, 60, dtype=torch.bool)
    before = next_token(module, ids[None, :60], mask)[0].item()
    train(module, ids, run, method.loss, course=course)
    assert abs(int((seen[-1] > 0).sum()) - 48) <= 8
    assert all(torch.equal(logits, seen[47]) for logits in seen[48:])
    assert not torch.equal(seen[46], seen[47])
    assert turned[-1] < 0.2 * turned[0]
    assert module.config.hidden_size == 48
    assert next_token(module, ids[None, :60], mask)[0].item() < 0.9 * before


def test_the_result_is_a_plain_narrow_model(text, tmp_path):
    model = lettered(tie_word_embeddings=True)
    mw.apply(model, Pat(tokens=768, batch=4, length=16, mixing=8), data=text, save=tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.config.hidden_size, loaded.config.head_dim) == (48, 8)
    assert torch.allclose(outputs(loaded), outputs(model.module), atol=1e-5)
    assert not any(NAME in name for name, _ in model.module.named_modules())
    assert "adapters" not in model.marks


def test_a_run_that_was_broken_off_ends_with_the_same_bits(tmp_path):
    settings = Training(tokens=12 * 64, batch=4, length=16, save_every=4)

    def run(module, **others):
        course = narrowing(module, settings)
        train(module, IDS, settings, course.method.loss, course=course, **others)

    def stop(step, total, parts):
        if step == 9:
            raise KeyboardInterrupt

    whole, broken, fresh = tiny(), tiny(), tiny()
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(broken, folder=tmp_path, report=stop)
    assert torch.equal(outputs(broken), outputs(tiny()))
    run(fresh, folder=tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), fresh.parameters(), strict=True))


def test_without_a_share_to_lose_it_only_tunes():
    module = tiny()
    course = trained_by_chance(narrowing(module, keep=1.0))
    course.finish()
    assert module.config.hidden_size == 64
    assert course.notes == ["prune.pat: 64 of 64 channels stay; 48 were chosen in training"]


@pytest.mark.parametrize("name", ["gpt2", "olmo2", "gemma2", "opt"])
def test_models_whose_channels_cannot_leave_are_refused_unchanged(name, text):
    model = lettered(name)
    before = outputs(model.module)
    with pytest.raises(LayoutError, match="cannot be turned"):
        mw.apply(model, Pat(tokens=256, batch=2, length=16, mixing=8), data=text)
    assert torch.equal(outputs(model.module), before)
    assert all(value.requires_grad for value in model.module.parameters())


def test_sizes_that_cannot_be_are_refused(text):
    with pytest.raises(PlanError, match=r"no 200 rows of 64 are orthogonal. Let mixing be 16 or less"):
        mw.apply(lettered(), Pat(tokens=256, batch=2, length=16), data=text)
    with pytest.raises(PlanError, match="less than one multiple of 8"):
        mw.apply(lettered(), Pat(tokens=256, batch=2, length=16, mixing=8, keep=0.1), data=text)
    with pytest.raises(SettingError, match="settled is below 0.5"):
        Pat(settled=0.4)
