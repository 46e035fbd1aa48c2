import copy
import itertools

import pytest
import torch
from calibration import TEXT, lettered, normal
from tiny import outputs, tiny
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.core.contract import LETTERS
from modelwright.core.errors import SettingError, SiteError
from modelwright.core.training import Training, next_token, train
from modelwright.maths.second_order import without_columns
from modelwright.methods.prune._units import take_out
from modelwright.methods.prune.efficientllm import EfficientLlm, Shrinking, readers
from modelwright.methods.train import Train

RUN = Training(tokens=12 * 64, batch=4, length=16)
IDS = torch.randint(1, 90, (600,), generator=torch.Generator().manual_seed(0))
ALL = ("mlp", "heads", "residual")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT[0])
    return file


def shrinking(module, run=RUN, **settings):
    return Shrinking(EfficientLlm(**{"every": 2, "share": 0.5} | settings), module, run, [])


def kept_of(course):
    return [stays.nonzero()[:, 0].tolist() for stays in course.stays]


def test_times_and_shares_by_hand():
    assert EfficientLlm(share=0.6, every=10, end=0.5).updates(60) == pytest.approx({9: 0.2, 19: 0.4, 29: 0.6})
    assert EfficientLlm(share=0.4, every=1, end=1.0).updates(2) == pytest.approx({0: 0.2, 1: 0.4})
    assert EfficientLlm(every=31, end=0.5).updates(60) == {}


def test_where_the_time_never_comes_nothing_is_pruned(text):
    one, other = lettered(), lettered()
    mw.apply(one, EfficientLlm(tokens=768, batch=4, length=16, every=1000), data=text)
    mw.apply(other, Train(tokens=768, batch=4, length=16), data=text)
    assert all(torch.equal(value, other.module.state_dict()[name]) for name, value in one.module.state_dict().items())
    assert "no unit goes, since `every` is 1000" in one.history[-1]["notes"][0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen2"])
def test_the_readers_of_units_are_the_matrices_behind_them(name):
    module = tiny(name)
    found = {}
    for units in EfficientLlm().found(module):
        found |= {site.role: (site.transposed, span.dim) for site, span in readers(module, units)}
    assert found == dict.fromkeys(("mlp.down", "attn.o"), (name == "gpt2", 0 if name == "gpt2" else 1))
    if name != "gpt2":
        (stream,) = EfficientLlm(units=("residual",)).found(module)
        roles = [site.role for site, _ in readers(module, stream)]
        assert len(roles) == (4 * 2 if name == "phi3" else 4 * 5) + 1
        assert "head" in roles


@pytest.mark.parametrize("effect", ["first", "mix"])
def test_saliency_is_the_sum_over_steps_of_what_the_weights_of_a_unit_do(effect):
    module, seen = tiny(), []

    class Watched(Shrinking):
        def gradient(self, step):
            super().gradient(step)
            block, total = self.module.model.layers[0].mlp, 0.0
            for weight in (block.gate_proj.weight[7], block.up_proj.weight[7], block.down_proj.weight[:, 7]):
                whole = next(value for value in (block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight)
                             if value.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr())  # fmt: skip
                gradient = whole.grad[:, 7] if whole is block.down_proj.weight else whole.grad[7]
                effects = weight * gradient - (0.5 * (weight * gradient) ** 2 if effect == "mix" else 0)
                total += effects.abs().sum().item()
            seen.append(total)
            assert self.scores[0][7].item() == pytest.approx(sum(seen[-1 - step % 2 :]), rel=1e-4)

    run = Training(tokens=4 * 64, batch=4, length=16)
    train(module, IDS, run, course=Watched(EfficientLlm(every=2, share=0.0, end=1.0, effect=effect), module, run, []))
    assert len(seen) == 4


def test_moments_are_of_the_inputs_of_the_readers():
    module = tiny()
    course = shrinking(module, share=0.0)
    caught = []
    module.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: caught.append(args[0].detach().flatten(0, 1)))
    module(input_ids=IDS[:32].view(2, 16))
    module(input_ids=IDS[32:64].view(2, 16))
    one, two = (x.T @ x / 32 for x in caught)
    found = course.moments["model.layers.1.mlp.down_proj.weight"]
    assert torch.allclose(found, 0.09 * one + 0.1 * two, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "phi3", "qwen3_moe"])
def test_what_went_is_silent_learns_nothing_and_can_be_cut_out(name):
    module = tiny(name)
    units = ("mlp", "heads") if name == "gpt2" else ALL
    course = shrinking(module, units=units, share=0.25)
    for number, score in enumerate(course.scores):
        score.copy_(normal(len(score), seed=number).abs())
    module(input_ids=IDS[:64].view(4, 16))
    course.update(max(course.times))
    course.leave()
    sliced = copy.deepcopy(module)
    take_out(sliced, course.found, kept_of(course))
    assert torch.allclose(outputs(sliced), outputs(module), rtol=1e-4, atol=1e-4)
    next_token(module, IDS[:64].view(4, 16), torch.ones(4, 16, dtype=torch.bool))[0].backward()
    for entry, stays in zip(course.found, course.stays, strict=True):
        assert int((~stays).sum()) == entry.count // 4
        for span in entry.spans:
            value = module.get_parameter(span.name)
            gone = [part.movedim(span.dim, 0)[span.start : span.start + entry.count * span.width][~stays.repeat_interleave(span.width)]
                    for part in (value.detach(), value.grad) if part is not None]  # fmt: skip
            assert all((part == 0).all() for part in gone), span


def test_what_stays_of_a_reader_makes_up_for_what_goes():
    module = tiny()
    course = shrinking(module, units=("mlp",), share=0.25)
    module(input_ids=IDS[:512].view(32, 16))
    before = module.model.layers[2].mlp.down_proj.weight.detach().clone()
    for number, score in enumerate(course.scores):
        score.copy_(normal(len(score), seed=number).abs())
    course.update(max(course.times))
    gone = ~course.stays[2]
    moment = course.moments["model.layers.2.mlp.down_proj.weight"]
    after = module.model.layers[2].mlp.down_proj.weight.detach()
    assert torch.allclose(after, without_columns(before, moment, gone), atol=1e-6)
    assert (after[:, gone] == 0).all()

    def cost(weight):
        change = (weight - before).double()
        return torch.trace(change @ moment.double() @ change.T).item()

    assert cost(after) < 0.8 * cost(before.masked_fill(gone, 0))


def test_units_go_as_the_line_says_and_stay_gone():
    module, seen = tiny(), []

    class Watched(Shrinking):
        def update(self, step):
            super().update(step)
            seen.append([~stays for stays in self.stays])
            for entry, stays in zip(self.found, self.stays, strict=True):
                for span in entry.spans:
                    value = self.module.get_parameter(span.name).detach().movedim(span.dim, 0)
                    part = value[span.start : span.start + entry.count * span.width]
                    assert (part[~stays.repeat_interleave(span.width)] == 0).all()

    method = EfficientLlm(units=ALL, every=2, share=0.5)
    run = Training(tokens=12 * 64, batch=4, length=16, learning_rate=0.01, weight_decay=0.5)
    train(module, IDS, run, course=Watched(method, module, run, []))
    share = 0.0
    for step, entries in enumerate(seen):
        share = method.updates(12).get(step, share)
        assert all(int(gone.sum()) == int(share * len(gone) + 1e-9) for gone in entries)
    assert all((two | ~one).all() for first, second in itertools.pairwise(seen) for one, two in zip(first, second, strict=True))
    assert (module.config.hidden_size, module.config.intermediate_size, module.config.num_key_value_heads) == (32, 80, 2)


def test_the_result_is_a_plain_smaller_model_that_has_learnt(tmp_path):
    module = tiny()
    ids = torch.tensor([1 + LETTERS.index(letter) for letter in TEXT[0]]) % 97
    mask = torch.ones(1, 60, dtype=torch.bool)
    before = next_token(module, ids[None, :60], mask)[0].item()
    run = Training(tokens=30 * 128, batch=4, length=32, learning_rate=0.005)
    notes = []
    train(module, ids, run, course=Shrinking(EfficientLlm(units=ALL, every=1, share=0.5), module, run, notes))
    assert next_token(module, ids[None, :60], mask)[0].item() < 0.7 * before
    assert notes == []
    module.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (again.config.hidden_size, again.config.intermediate_size, again.config.num_key_value_heads) == (32, 80, 2)
    assert torch.allclose(outputs(again), outputs(module.eval()), atol=1e-5)


def test_units_of_all_blocks_may_compete(text, tmp_path):
    model = lettered()
    mw.apply(model, EfficientLlm(tokens=768, batch=4, length=16, every=2, scope="model"), data=text, save=tmp_path / "out")
    sizes = {block.mlp.up_proj.out_features for block in model.module.model.layers}
    assert len(sizes) > 1
    assert "loads after `import modelwright`" in model.history[-1]["notes"][-1]
    assert torch.allclose(outputs(mw.open(tmp_path / "out").module), outputs(model.module), atol=1e-5)


def test_a_run_that_was_broken_off_ends_with_the_same_bits(tmp_path):
    settings = Training(tokens=12 * 64, batch=4, length=16, save_every=3)

    def run(module, **others):
        train(module, IDS, settings, course=shrinking(module, settings, units=ALL), **others)

    def stop(step, total, parts):
        if step == 4:
            raise KeyboardInterrupt

    whole, broken, fresh = tiny(), tiny(), tiny()
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(broken, folder=tmp_path, report=stop)
    assert not any(module._forward_pre_hooks for module in broken.modules())
    run(fresh, folder=tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), fresh.parameters(), strict=True))


def test_zeros_that_were_there_stay():
    module = tiny()
    module.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
    train(module, IDS, RUN, course=shrinking(module, units=("heads",)))
    assert (module.model.layers[0].mlp.up_proj.weight[:, ::2] == 0).all()
    assert (module.model.layers[0].mlp.up_proj.weight[:, 1::2] != 0).all()


def test_what_cannot_be_is_refused_before_anything_changes(text):
    with pytest.raises(SettingError, match="units are some of mlp, heads, residual; got experts"):
        EfficientLlm(units=("experts",))
    model = lettered("gpt2")
    before = outputs(model.module)
    with pytest.raises(SiteError, match="cannot lose residual"):
        mw.apply(model, EfficientLlm(tokens=256, batch=2, length=16, units=("residual",)), data=text)
    with pytest.raises(SiteError, match="all are spared"):
        mw.apply(model, EfficientLlm(tokens=256, batch=2, length=16, spare_first=4), data=text)
    assert torch.equal(outputs(model.module), before)


def test_one_unit_of_each_kind_stays_whatever_is_asked(text):
    model = lettered()
    mw.apply(model, EfficientLlm(tokens=256, batch=2, length=16, every=1, share=1.0), data=text)
    assert (model.module.config.intermediate_size, model.module.config.num_key_value_heads) == (1, 1)
    assert outputs(model.module).isfinite().all()


def test_what_went_stays_gone_whatever_it_scores():
    module = tiny()
    run = Training(tokens=8 * 64, batch=4, length=16)
    course = Shrinking(EfficientLlm(share=0.4, every=2, end=0.75, units=("mlp",)), module, run, [])
    for moment in course.moments.values():
        moment.copy_(torch.eye(len(moment)))
    for score in course.scores:
        score.copy_(torch.arange(len(score)))
    course.start()
    course.update(1)
    gone = ~course.stays[0]
    assert gone.nonzero()[:, 0].tolist() == list(range(int(0.4 / 3 * 160)))
    course.scores[0][gone] = 1e9
    course.update(3)
    assert (~course.stays[0])[gone].all()
    assert int((~course.stays[0]).sum()) == int(0.8 / 3 * 160)
    course.leave()
