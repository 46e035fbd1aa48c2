import copy
import itertools

import pytest
import torch
from calibration import TEXT, lettered, normal
from tiny import outputs, tiny
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.core.beside import Beside
from modelwright.core.contract import LETTERS
from modelwright.core.errors import SettingError, SiteError
from modelwright.core.training import Training, next_token, train
from modelwright.methods.prune._units import take_out
from modelwright.methods.prune.loraprune import Leaving, LoraPrune, importance

RUN = Training(tokens=12 * 64, batch=4, length=16, learning_rate=0.01, warmup=0.0)
IDS = torch.randint(1, 90, (600,), generator=torch.Generator().manual_seed(0))
ALL = {"spare_first": 0, "spare_last": 0, "every": 2}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT[0])
    return file


def beside(module, **settings):
    made = Beside(module, anatomy_of(module).sites(module), **{"rank": 4, "alpha": 8.0, "dropout": 0.0, "seed": 0} | settings)
    for number, update in enumerate(made.updates.values()):
        update.up.data = 0.1 * normal(*update.up.shape, seed=number)
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_an_update_beside_a_matrix_is_as_good_as_in_it_and_leaves_no_trace(name):
    module = tiny(name)
    names = {key: value.clone() for key, value in module.state_dict().items()}
    plain = outputs(module)
    made = beside(module)
    assert {key for key, value in module.named_parameters() if value.requires_grad} == {
        f"{site.module}.beside.{part}" for site in made.layers for part in ("up", "down")
    }
    together = outputs(module)
    assert not torch.allclose(plain, together, atol=1e-2)
    made.remove()
    assert torch.equal(outputs(module), plain)
    assert all(torch.equal(value, names[key]) for key, value in module.state_dict().items())
    assert all(value.requires_grad for value in module.parameters())
    made.fold()
    assert torch.allclose(outputs(module), together, atol=1e-5)
    assert module.state_dict().keys() == names.keys()


def test_updates_begin_as_nothing():
    module = tiny()
    plain = outputs(module)
    Beside(module, anatomy_of(module).sites(module), rank=4, alpha=8.0, dropout=0.5, seed=0)
    assert torch.equal(outputs(module), plain)


def test_the_ramp_goes_from_a_tenth_of_the_run_to_nine_tenths():
    ramp = LoraPrune(share=0.5, every=10).updates(200)
    assert list(ramp) == list(range(20, 181, 10))
    assert ramp[20] == 0.0
    assert ramp[100] == pytest.approx(0.5 - 0.5 / 8)
    assert ramp[180] == 0.5
    assert LoraPrune(share=0.5).updates(1) == {0: 0.5}


def test_members_are_normed_and_added_by_hand():
    # Neurons of a gate of two inputs, an up of two, and a down of one output.
    units = next(units for units in anatomy_of(tiny()).units(tiny(), "mlp") if units.depth == 0)
    effects = {span.name: torch.zeros(160, 64) if span.dim == 0 else torch.zeros(64, 160) for span in units.spans}
    gate, up, down = (effects[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    gate[0, :2], gate[1, 5] = torch.tensor([1.0, 2.0]), 4.0  # 3 and 4, of norm 5
    up[2, 7] = 100.0  # the only one: 1
    down[:2, 0], down[3, 2] = torch.tensor([5.0, 7.0]), 5.0  # 12 and 5, of norm 13
    found = importance(units, effects)
    assert found[:4].tolist() == pytest.approx([3 / 5 + 12 / 13, 4 / 5, 1 + 5 / 13, 0])


def test_query_heads_count_with_the_key_value_head_that_they_read():
    module = tiny()  # query heads 2j and 2j + 1, each of 8 rows, read key-value head j
    units = anatomy_of(module).units(module, "heads")[0]
    effects = {span.name: torch.zeros_like(module.get_parameter(span.name)) for span in units.spans}
    effects["model.layers.0.self_attn.q_proj.weight"][16:32] = 1.0
    assert importance(units, effects).tolist() == [0.0, 1.0, 0.0, 0.0]
    effects["model.layers.0.self_attn.v_proj.weight"][24:32] = 3.0
    assert importance(units, effects).tolist() == [0.0, 1.0, 0.0, 1.0]


def test_the_average_is_of_the_steps_and_is_taken_before_the_optimizer():
    module, seen = tiny(), []

    class Watched(Leaving):
        def gradient(self, step):
            effects = {}
            for part in ("gate", "up", "down"):
                name = f"model.layers.0.mlp.{part}_proj.weight"
                update = self.beside.updates[name]
                if step == 0:  # B is 0, so that G = dB A
                    assert (update.up == 0).all()
                    effects[name] = ((update.up.grad @ update.down) * self.module.get_parameter(name)).abs()
            super().gradient(step)
            seen.append(self.scores[0].clone())
            if step == 0:
                assert torch.allclose(self.scores[0], 0.1 * importance(self.found[0], effects), atol=1e-6)

    train(module, IDS, RUN, course=Watched(LoraPrune(**ALL, dropout=0.0, share=0.0), module, RUN, []))
    assert len(seen) == 12
    assert all((two >= 0.9 * one - 1e-7).all() for one, two in itertools.pairwise(seen))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen3"])
def test_silenced_is_removed_and_either_order_of_merging_and_slicing_gives_the_same(name):
    module = tiny(name)
    course = Leaving(LoraPrune(**ALL, share=0.5), module, RUN, [])
    for number, update in enumerate(course.beside.updates.values()):
        update.up.data = 0.1 * normal(*update.up.shape, seed=number)
    for number, score in enumerate(course.scores):
        score.copy_(normal(len(score), seed=number).abs())
    whole = outputs(module)
    course.update(max(course.times))
    silenced = outputs(module)
    assert not torch.allclose(whole, silenced, atol=1e-2)
    kept = [stays.nonzero()[:, 0].tolist() for stays in course.stays]
    assert all(len(rows) == units.count // 2 for rows, units in zip(kept, course.found, strict=True))
    # Slice weights and updates first, and merge then: by hand, on a copy.
    other = copy.deepcopy(module)
    updates = {key: getattr(layer, "beside", None) for key, layer in other.named_modules()}
    updates = {key: update for key, update in updates.items() if update is not None}
    changes = {key: update.change().detach() for key, update in updates.items()}
    for key in updates:
        other.get_submodule(key)._modules.pop("beside")
        other.get_submodule(key)._forward_hooks.clear()
        other.get_submodule(key)._forward_pre_hooks.clear()
    turned = {site.module for site in course.beside.layers if site.transposed}
    delta = copy.deepcopy(other)
    for key, change in changes.items():
        delta.get_submodule(key).weight.data = change.T.clone() if key in turned else change
    take_out(delta, course.found, kept)
    take_out(other, course.found, kept)
    for key in changes:
        other.get_submodule(key).weight.data += delta.get_submodule(key).weight.data
    course.finish()
    assert torch.allclose(outputs(module), silenced, atol=1e-5)
    assert all(torch.allclose(value, other.state_dict()[key], atol=1e-6) for key, value in module.state_dict().items())


def test_units_that_went_stay_gone_and_no_more_go_than_the_ramp_says():
    module, seen = tiny(), []

    class Watched(Leaving):
        def update(self, step):
            super().update(step)
            seen.append(~self.stays[0])

    method = LoraPrune(**ALL, share=0.5, dropout=0.0)
    train(module, IDS, RUN, course=Watched(method, module, RUN, []))
    share = 0.0
    for step, gone in enumerate(seen):
        share = method.updates(12).get(step, share)
        assert int(gone.sum()) == int(share * 160)
    assert all((two | ~one).all() for one, two in itertools.pairwise(seen))
    assert int(seen[-1].sum()) == 80


def test_the_result_is_a_plain_smaller_model(text, tmp_path):
    model = lettered()
    before = outputs(model.module)
    mw.apply(model, LoraPrune(**ALL, tokens=768, batch=4, length=16, share=0.5), data=text, save=tmp_path / "out")
    assert not torch.allclose(outputs(tiny()), outputs(model.module))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.intermediate_size == 80
    assert loaded.config.num_key_value_heads == 2
    assert torch.allclose(outputs(loaded), outputs(model.module), atol=1e-5)
    assert before.shape == outputs(loaded).shape
    assert "adapters" not in model.marks


def test_spared_blocks_are_tuned_and_stay_whole(text):
    model = lettered()
    mw.apply(model, LoraPrune(tokens=768, batch=4, length=16, every=2, spare_first=1, spare_last=1, learning_rate=0.01), data=text)
    assert [block.mlp.up_proj.out_features for block in model.module.model.layers] == [160, 80, 80, 160]
    assert not torch.equal(model.module.model.layers[0].mlp.up_proj.weight, tiny().model.layers[0].mlp.up_proj.weight)
    assert torch.equal(model.module.model.embed_tokens.weight, tiny().model.embed_tokens.weight)
    assert "loads after `import modelwright`" in model.history[-1]["notes"][0]


def test_tuning_repairs_more_than_pruning_breaks():
    ids = torch.tensor([1 + LETTERS.index(letter) for letter in TEXT[0]]) % 97
    mask = torch.ones(1, 60, dtype=torch.bool)
    module = tiny(max_position_embeddings=64)
    run = Training(tokens=30 * 128, batch=4, length=32, learning_rate=0.01)
    before = next_token(module, ids[None, :60], mask)[0].item()
    train(module, ids, run, course=Leaving(LoraPrune(**ALL, share=0.5), module, run, []))
    assert module.model.layers[0].mlp.up_proj.out_features == 80
    assert next_token(module, ids[None, :60], mask)[0].item() < 0.9 * before


def test_a_run_that_was_broken_off_ends_with_the_same_bits(tmp_path):
    settings = Training(tokens=12 * 64, batch=4, length=16, save_every=4)

    def run(module, **others):
        train(module, IDS, settings, course=Leaving(LoraPrune(**ALL), module, settings, []), **others)

    def stop(step, total, parts):
        if step == 9:
            raise KeyboardInterrupt

    whole, broken, fresh = tiny(), tiny(), tiny()
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(broken, folder=tmp_path, report=stop)
    assert broken.state_dict().keys() == tiny().state_dict().keys()
    assert torch.equal(outputs(broken), outputs(tiny()))
    run(fresh, folder=tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), fresh.parameters(), strict=True))


def test_what_cannot_be_is_refused_before_anything_changes(text):
    for wrong in ("residual", "experts"):
        with pytest.raises(SettingError, match=f"units are some of mlp, heads; got {wrong}"):
            LoraPrune(units=(wrong,))
    with pytest.raises(SettingError, match="begin is after end"):
        LoraPrune(begin=0.95)
    with pytest.raises(SettingError, match="initial is above share"):
        LoraPrune(initial=0.6)
    model = lettered()
    with pytest.raises(SiteError, match=r"of 4 blocks all are spared \(spare_first=3, spare_last=1\)"):
        mw.apply(model, LoraPrune(tokens=256, batch=2, length=16), data=text)
    assert torch.equal(outputs(model.module), outputs(tiny()))
    assert all(value.requires_grad for value in model.module.parameters())


def test_one_unit_of_each_kind_stays_whatever_is_asked(text):
    model = lettered()
    mw.apply(model, LoraPrune(**ALL, tokens=256, batch=2, length=16, share=1.0), data=text)
    assert model.module.config.intermediate_size == 1
    assert model.module.config.num_key_value_heads == 1
    assert outputs(model.module).isfinite().all()


def test_the_updates_are_those_that_the_settings_ask_for():
    course = Leaving(LoraPrune(**ALL, rank=2, alpha=3.0, dropout=0.2), tiny(), RUN, [])
    update = course.beside.updates["model.layers.0.mlp.up_proj.weight"]
    assert (update.scale, update.dropout.p, tuple(update.up.shape)) == (1.5, 0.2, (160, 2))
    assert LoraPrune(initial=0.2, share=0.5).updates(200)[20] == pytest.approx(0.2)


def test_what_went_stays_gone_though_its_average_is_the_highest():
    course = Leaving(LoraPrune(**ALL, share=0.5), tiny(), RUN, [])
    first, last = min(step for step, share in course.times.items() if share > 0), max(course.times)
    for score in course.scores:
        score.copy_(torch.arange(len(score)))
    course.update(first)
    gone = [~stays for stays in course.stays]
    assert gone[0].any()
    for score, out in zip(course.scores, gone, strict=True):
        score[out] = 1e9
    course.update(last)
    assert all((~stays)[out].all() for stays, out in zip(course.stays, gone, strict=True))
    assert int((~course.stays[0]).sum()) == 80


def test_matrices_that_are_stored_the_other_way_round_are_scored_alike():
    module = tiny("gpt2")
    course = Leaving(LoraPrune(**ALL, rank=4, alpha=8.0, dropout=0.0), module, RUN, [])
    effects = {}
    for number, (site, layer) in enumerate(course.beside.layers.items()):
        update = course.beside.updates[site.name]
        update.up.data, update.up.grad = normal(*update.up.shape, seed=number), normal(*update.up.shape, seed=number + 50)
        update.down.grad = normal(*update.down.shape, seed=number + 99)
        slope = update.up.grad @ update.down + update.up @ update.down.grad - update.up.grad @ update.down.grad
        effects[site.name] = (slope * (layer.weight.T + 2 * update.up @ update.down)).abs().detach()
    course.gradient(0)
    for units, score in zip(course.found, course.scores, strict=True):
        if units.kind == "mlp":
            block = units.scope or f"transformer.h.{units.depth}.mlp"
            fc, out = (next(value for name, value in effects.items() if name == f"transformer.h.{units.depth}.mlp.{part}.weight")
                       for part in ("c_fc", "c_proj"))  # fmt: skip
            parts = [fc.sum(1), out.sum(0)]
            assert torch.allclose(score, 0.1 * sum(part / part.norm() for part in parts), rtol=1e-4), block
