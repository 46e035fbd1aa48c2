"""The drivers: which sites, what they see, what is carried on, what streams."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import modelwright as mw
from modelwright.core import data as texts
from modelwright.core import statistics as sums
from modelwright.core import stream, walk
from modelwright.core.find import find
from modelwright.core.given import Given
from modelwright.core.method import LayerMethod
from modelwright.core.model import Model
from modelwright.core.passage import Resident
from modelwright.core.tiny import outputs, tiny, tiny_inputs
from modelwright.core.weights import Checkpoint
from modelwright.maths import second_order

Magnitude, Gptq, Rtn, Wanda = (find(name) for name in ("prune.magnitude", "quantize.gptq", "quantize.rtn", "prune.wanda"))


@dataclass(frozen=True, kw_only=True)
class Look(LayerMethod):
    """Changes nothing and remembers what it was shown."""

    gathers: ClassVar[tuple[str, ...]] = ("moment", "norm", "mean", "largest", "absolute")
    seen: ClassVar[dict] = {}

    def layer(self, weight, statistics):
        self.seen.setdefault(tuple(weight.shape), []).append(statistics)
        return weight


@pytest.fixture(autouse=True)
def _forget():
    Look.seen.clear()
    Look._outside_name = "look"


def inputs_of_every_linear(module, batches):
    """What each linear is really given, by plain hooks on the whole model, without padded tokens."""
    found = {}
    for batch in batches:
        handles = []
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear):

                def hook(_, args, name=name, mask=batch["attention_mask"]):
                    x = args[0]
                    found.setdefault(name, []).append(x[mask.bool()] if x.shape[:2] == mask.shape else x.flatten(0, -2))

                handles.append(layer.register_forward_pre_hook(hook))
        with torch.no_grad():
            module(**batch, use_cache=False)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def test_statistics_are_those_of_the_real_inputs_without_padding():
    module = tiny("llama")
    batches = [tiny_inputs(module, seed) for seed in range(3)]
    real = inputs_of_every_linear(module, batches)
    walk.change(Model(name="tiny", module=module), Look(where="mlp.down"), Given(data=batches))
    for depth, statistics in enumerate(Look.seen[(64, 160)]):
        x = real[f"model.layers.{depth}.mlp.down_proj"]
        assert statistics.tokens == len(x) == 3 * (12 + 7)
        torch.testing.assert_close(statistics.moment, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.norm, x.square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.largest, x.abs().amax(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.absolute, x.abs().mean(0), rtol=1e-4, atol=1e-6)


def test_later_blocks_see_what_changed_earlier_ones_give():
    batches = [tiny_inputs(tiny("llama"), 0)]
    module = tiny("llama")
    walk.change(Model(name="tiny", module=module), Magnitude(where="block 0", sparsity=0.9), Given())
    changed = inputs_of_every_linear(module, batches)["model.layers.1.mlp.down_proj"]

    @dataclass(frozen=True, kw_only=True)
    class Prune(LayerMethod):
        """Zeroes most of the first block and looks at the second."""

        gathers: ClassVar[tuple[str, ...]] = ("mean",)
        means: ClassVar[list] = []

        def layer(self, weight, statistics):
            self.means.append(statistics.mean)
            return Magnitude(sparsity=0.9).tensor(weight) if len(self.means) <= 7 else weight

    Prune._outside_name = "prune"
    walk.change(Model(name="tiny", module=tiny("llama")), Prune(), Given(data=batches))
    second_down = Prune.means[13]
    torch.testing.assert_close(second_down, changed.mean(0), rtol=1e-4, atol=1e-6)


def test_with_stages_the_later_matrices_of_a_block_see_the_changed_earlier_ones():
    batches = [tiny_inputs(tiny("llama"), 0)]
    together, in_turn = (mw.apply(tiny("llama"), Gptq(bits=2, group=32, stages=stages), data=batches) for stages in (False, True))
    same = [torch.equal(one.dense(), two.dense()) for one, two in (
        (together.model.layers[0].self_attn.q_proj, in_turn.model.layers[0].self_attn.q_proj),
        (together.model.layers[0].mlp.down_proj, in_turn.model.layers[0].mlp.down_proj))]  # fmt: skip
    assert same == [True, False]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "bert", "vit", "phi3", "mixtral", "opt", "gpt_neox"])
def test_walk_without_a_change_ends_with_the_models_own_last_state(kind):
    module = tiny(kind)
    batches = [tiny_inputs(module, seed) for seed in range(2)]
    passage = Resident(Model(name=kind, module=module))
    last = []
    stack = module.get_submodule(passage.path)
    handle = stack[-1].register_forward_hook(lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for batch in batches:
            passage.forward(batch)
        handle.remove()
        passage.enter(batches)
        for depth in range(passage.depths):
            passage.states = list(passage.run_block(depth))
    for carried, real in zip(passage.states, last, strict=True):
        torch.testing.assert_close(carried, real)


def test_head_can_be_worked_on_too():
    module = tiny("llama")
    batches = [tiny_inputs(module)]
    real = inputs_of_every_linear(module, batches)["lm_head"]
    walk.change(Model(name="tiny", module=module), Look(where="head"), Given(data=batches))
    (statistics,) = Look.seen[(97, 64)]
    torch.testing.assert_close(statistics.moment, real.T @ real / len(real), rtol=1e-4, atol=1e-6)


def test_settings_by_role_and_depth_reach_the_weights():
    module = mw.apply(tiny("llama"), Magnitude(sparsity={"mlp": [0.25, 0.75], "attn.q": 0.5}))
    share = [float((block.mlp.up_proj.weight == 0).float().mean()) for block in module.model.layers]
    assert share == pytest.approx([0.25, 0.4167, 0.5833, 0.75], abs=1e-3)
    assert float((module.model.layers[2].self_attn.q_proj.weight == 0).float().mean()) == 0.5
    assert not (module.model.layers[2].self_attn.o_proj.weight == 0).any()


def test_what_is_left_out_is_in_the_notes():
    given = Given(data=[tiny_inputs(tiny("llama"))])
    model = Model(name="tiny", module=tiny("llama"))
    walk.change(model, find("factor.svd")(where="mlp", keep=0.5), given)
    model.marks = {"float"}
    walk.change(model, find("prune.magnitude")(sparsity={"mlp": 0.5}, store="sparse", where=("mlp", "attn")), given)
    assert any("left 16 weights alone" in note for note in given.notes)


def test_module_in_memory_is_changed_in_place_and_returned():
    module = tiny("llama")
    assert mw.apply(module, Magnitude()) is module
    model = mw.open(tiny("llama"))
    assert mw.apply(model, Magnitude()) is model


def test_plain_torch_modules_are_taken_too():
    module = tiny("mlp")
    data = [{"input": torch.randn(32, 12)}]
    mw.apply(module, [Wanda(), find("factor.svd")(keep=0.9)], data=data)
    assert outputs(module).isfinite().all()


def test_streaming_reads_one_tensor_at_a_time(small, tmp_path, monkeypatch):
    alive = []
    read = Checkpoint.read

    def counted(self, name):
        import weakref

        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        assert sum(ref() is not None for ref in alive) <= 2, "tensors pile up"
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    model = mw.open(small)
    assert stream.possible(model, Magnitude())
    stream.write(model, Magnitude(), Given(), tmp_path / "out")
    assert len(alive) > 20


def test_streamed_walk_holds_one_block(small, text, tmp_path, monkeypatch):
    held = []
    finish = stream.Streamed.finish

    def counted(self, depth):
        real = {
            name.split(".")[2] for name, value in self.module.named_parameters() if name.startswith("model.layers.") and not value.is_meta
        }
        held.append(real)
        finish(self, depth)

    monkeypatch.setattr(stream.Streamed, "finish", counted)
    mw.apply(small, Gptq(group=32), data=str(text), samples=4, length=32, save=tmp_path / "out")
    assert held[1:] == [{"1"}, {"2"}, {"3"}]


def test_a_moment_is_held_no_longer_than_a_matrix_waits_for_it(monkeypatch):
    made, alive = weakref.WeakSet(), []

    class Watched(second_order.Moment):
        def __init__(self, *args):
            super().__init__(*args)
            made.add(self)

    sweep = second_order.sweep

    def counted(*args, **settings):
        alive.append(len(made))
        return sweep(*args, **settings)

    monkeypatch.setattr(sums, "Moment", Watched)
    monkeypatch.setattr(second_order, "sweep", counted)
    module = tiny("llama")
    walk.change(Model(name="tiny", module=module), Gptq(group=32), Given(data=[tiny_inputs(module)]))
    # q, k and v share one, and gate and up; o and down have their own. What is being swept has let go of its own.
    assert alive == [4, 4, 3, 2, 2, 1, 0] * len(module.model.layers)


def test_matrices_that_share_inputs_are_factored_once(monkeypatch):
    factored = []
    factor = second_order.inverse_factor
    monkeypatch.setattr(sums, "inverse_factor", lambda moment, damp: (factored.append(damp), factor(moment, damp))[1])
    module = tiny("llama")
    given = Given(data=[tiny_inputs(module)])
    walk.change(Model(name="tiny", module=module), Gptq(group=32, damp={"attn.k": 0.5, "*": 0.01}), given)
    assert factored == [0.01, 0.5, 0.01, 0.01, 0.01, 0.01] * len(module.model.layers)


def test_large_embedding_is_read_row_by_row(small, text, tmp_path, monkeypatch):
    expected = mw.apply(small, Gptq(group=32), data=text, length=32, save=tmp_path / "whole")
    monkeypatch.setattr(stream, "LARGE", 0)
    read, rows = Checkpoint.read, Checkpoint.read_rows
    whole, some = [], []
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (whole.append(name), read(self, name))[1])
    monkeypatch.setattr(Checkpoint, "read_rows", lambda self, name, *at: (some.append(name), rows(self, name, *at))[1])
    found = mw.apply(small, Gptq(group=32), data=text, length=32, save=tmp_path / "rows")
    assert set(some) == {"model.embed_tokens.weight"}
    assert "model.embed_tokens.weight" not in whole
    assert torch.equal(outputs(found.module), outputs(expected.module))


@pytest.mark.parametrize("on_disk", [True, False], ids=["streamed", "in memory"])
def test_a_resumed_step_repeats_the_notes_of_blocks_that_were_finished(on_disk, small, text, tmp_path, monkeypatch):
    method = Gptq(group=32, bits={"mlp.*": 4})

    def notes(work):
        given = Given(data=texts.read(str(text)), samples=4, length=32, work=work)
        model = mw.open(small)
        if on_disk:
            stream.write(model, method, given, tmp_path / f"{work.name}-out")
        else:
            walk.change(model, method, given)
        return given.notes

    whole = notes(tmp_path / "whole")
    assert len(whole) >= 4
    keep = Resident.keep

    def killed(self, depth, *rest):
        if depth == 2:
            raise KeyboardInterrupt
        keep(self, depth, *rest)

    monkeypatch.setattr(Resident, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        notes(tmp_path / "broken")
    monkeypatch.setattr(Resident, "keep", keep)
    assert notes(tmp_path / "broken") == whole


def test_a_layer_that_cannot_be_made_from_the_config_is_named_in_the_notes(small, text, tmp_path, monkeypatch):
    kind = type(mw.open(small).module.model.rotary_emb)
    make = kind.__init__

    def other(self, config):
        if torch.empty(0).is_meta:  # the module is made so; the layer by itself is not
            make(self, config)
        else:
            raise TypeError("it takes a size as well")

    model = mw.open(small)
    monkeypatch.setattr(kind, "__init__", other)
    given = Given()
    assert not stream.possible(model, Gptq(), given.notes)
    assert len(given.notes) == 1
    assert "model.rotary_emb" in given.notes[0]
    assert "it takes a size as well" in given.notes[0]
    assert stream.possible(model, Magnitude(), given.notes)
    assert len(given.notes) == 1


def test_seed_and_place_alone_decide_random_numbers():
    one, two = Given(seed=1).rng("a.weight"), Given(seed=1).rng("a.weight")
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=two))
    assert Given(seed=1).rng("a").initial_seed() != Given(seed=1).rng("b").initial_seed()
    assert Given(seed=1).rng("a").initial_seed() != Given(seed=2).rng("a").initial_seed()


def test_packed_model_refuses_pruning_and_says_why(small):
    model = mw.apply(mw.open(small), Rtn(group=32))
    with pytest.raises(mw.core.errors.PlanError, match="wants a model that is float"):
        mw.apply(model, Magnitude())


def test_embedding_can_be_packed_streamed_and_loaded_again(tmp_path):
    Model(name="tiny", module=tiny("llama")).save(tmp_path / "in")
    method = Rtn(bits=8, group=32, where=("embed", "mlp"))
    streamed = mw.apply(tmp_path / "in", method, save=tmp_path / "out")
    kind = type(streamed.module.model.embed_tokens).__name__
    assert kind == "PackedEmbedding"
    memory = mw.apply(tiny("llama"), method)
    assert torch.equal(outputs(streamed.module), outputs(memory))
    assert (outputs(memory) - outputs(tiny("llama"))).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (find("factor.svd")(where="embed"), "is an embedding, which cannot become a LowRankLinear"),
        (Rtn(where="embed", symmetric=False, group=32), "symmetric packed integers alone"),
    ],
)
def test_forms_that_an_embedding_cannot_take_are_refused(method, sentence):
    with pytest.raises(mw.core.errors.SiteError, match=sentence):
        mw.apply(tiny("llama"), method)


def test_head_is_changed_on_disk_as_in_memory(small, text, tmp_path):
    for method in (Wanda(where="head"), Gptq(where=("head", "mlp"), group=32)):
        saved = mw.apply(small, method, data=str(text), samples=4, length=32, save=tmp_path / method.name())
        memory = mw.apply(mw.open(small), method, data=str(text), samples=4, length=32)
        assert torch.equal(outputs(saved.module), outputs(memory.module))
        assert not torch.equal(outputs(saved.module), outputs(mw.open(small).module))


def test_tied_embedding_stays_as_it_is():
    with pytest.raises(mw.core.errors.SiteError, match="tied to the head"):
        mw.apply(tiny("llama", tie_word_embeddings=True), Rtn(where="embed", group=32))


def test_zeros_of_a_bare_module_survive_training(small, text):
    model = mw.open(tiny("llama"), tokenizer=mw.open(small).tokenizer)
    mw.apply(model.module, Magnitude())
    zeros = model.module.model.layers[1].mlp.up_proj.weight == 0
    mw.apply(model, find("train")(tokens=320, batch=2, length=16), data=str(text))
    assert torch.equal(model.module.model.layers[1].mlp.up_proj.weight == 0, zeros)


def test_several_methods_stream_one_after_the_other(small, text, tmp_path):
    methods = [Magnitude(sparsity=0.3), Gptq(group=32)]
    saved = mw.apply(small, methods, data=str(text), samples=4, length=32, save=tmp_path / "out")
    memory = mw.apply(mw.open(small), methods, data=str(text), samples=4, length=32)
    assert torch.equal(outputs(saved.module), outputs(memory.module))
    assert [step["method"] for step in saved.history] == ["prune.magnitude", "quantize.gptq"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
