import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from calibration import batches, gathered, normal
from tiny import outputs, tiny
from torch import nn

import modelwright as mw
from modelwright import small
from modelwright.anatomy._folding import apply_fold, apply_shift, folds
from modelwright.blocks.static import StaticLinear
from modelwright.core.given import Given
from modelwright.core.labels import stripes
from modelwright.core.model import Model
from modelwright.core.walk import change
from modelwright.maths.static_inputs import rounded
from modelwright.methods.quantize.mergequant import MergeQuant
from modelwright.methods.quantize.repq_vit import RepqVit

SPEC = importlib.util.spec_from_file_location("_vit", Path(__file__).parents[3] / "benchmarks" / "_vit.py")
vit = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(vit)
NOISE = 1.0


@pytest.fixture(scope="module")
def trained():
    """A ViT that knows its images, and the same one with unlike channels behind its norms."""
    known = torch.get_num_threads()
    torch.set_num_threads(1)  # so that it learns the same on every machine
    plain = small.vit(110, NOISE)
    uneven = copy.deepcopy(plain)
    vit.uneven(uneven)
    yield {"plain": plain, "uneven": uneven}
    torch.set_num_threads(known)


def right(module):
    return vit.accuracy(module, 512, noise=NOISE)


def changed(module, method):
    """A copy that a method has worked on, with 64 images to look at."""
    module = copy.deepcopy(module)
    needs = {"statistics", "calibration"} & set(method.needs())
    data = [{"pixel_values": part} for part in stripes(64, 7, NOISE).images.split(16)]
    return mw.apply(module, method, data=data if needs else None)


def test_a_case_by_hand():
    # Inputs from -1 to 13 have the middle 6 and reach 7 to both sides: in 4 bits 7 steps of 1. 9.4 is 3.4 from the middle: 3 steps.
    # Codes of the row: max|w| 7 is 7 steps of 1. Outputs: (9 + 13) · 7, and (-1 + 6) · 7 of the second row of inputs.
    seen = gathered(torch.tensor([[9.0, 13.0], [-1.0, 6.0]]), *RepqVit.gathers)
    layer = RepqVit(bits=4, inputs=4).layer(torch.tensor([[7.0, 7.0]]), seen)
    assert (layer.input_shift.item(), layer.input_step.item(), layer.codes().tolist()) == (6.0, 1.0, [[7, 7]])
    assert layer(torch.tensor([[9.4, 13.0], [-1.0, 6.0]])).flatten().tolist() == pytest.approx([154.0, 35.0])


def test_the_fold_is_that_of_the_paper():
    # γ' = γ / r1, β' = (β + s r2) / r1, W' = W diag(r1), b' = b - W (s r2), with s̃ = 1 and z̃ = 0 of a grid from -(2^(b-1)) on.
    model = tiny("vit")
    fold = next(fold for fold in folds(model) if fold.kind == "norm" and fold.depth == 1)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    scale, zero = 0.1 + torch.rand(64, generator=torch.Generator().manual_seed(1)), torch.randint(-7, 8, (64,)).float()
    apply_shift(model, fold, -scale * zero)
    apply_fold(model, fold, scale)
    new = model.state_dict()
    norm = fold.makers[0][0].rpartition(".")[0]
    assert torch.allclose(new[f"{norm}.weight"], old[f"{norm}.weight"] / scale)
    assert torch.allclose(new[f"{norm}.bias"], (old[f"{norm}.bias"] + scale * zero) / scale, atol=1e-5)
    assert len(fold.readers) == 3
    for site in fold.readers:
        weight, bias = old[site.name], old[f"{site.module}.bias"]
        assert torch.allclose(new[site.name], weight * scale)
        assert torch.allclose(new[f"{site.module}.bias"], bias - weight @ (scale * zero), atol=1e-5)


def test_one_step_for_all_after_the_fold_rounds_as_one_for_each_channel_did():
    inputs = normal(300, 64, seed=4) * torch.logspace(-2, 1, 64) + 5 * normal(64, seed=5)
    method, statistics = RepqVit(bits=4, inputs=4), gathered(inputs, *RepqVit.gathers)
    middle = method.recentre(statistics)
    least, most = inputs.amin(0), inputs.amax(0)
    assert torch.allclose(middle, (least + most) / 2)
    statistics.recentre(middle)
    step = method.rescale("norm", [(method, normal(32, 64))], statistics, None)
    share = step * 7 / ((most - least) / 2)
    assert torch.allclose(share, share[0], rtol=1e-3)  # the same clip for all
    own = ((inputs - middle) / step).round().clamp(-7, 7) * step + middle
    assert torch.allclose(rounded((inputs - middle) / step, 4) * step + middle, own)
    error = (own - inputs).square().mean(0) / inputs.var(0)
    assert error.max() < 3 * error.median()  # small channels are not rounded away
    whole = gathered(inputs, *RepqVit.gathers)
    shift, reach = method.together(whole)
    apart = (rounded((inputs - shift) / (reach / 7), 4) * reach / 7 + shift - inputs).square().mean(0) / inputs.var(0)
    assert apart.max() > 100 * error.max()


def test_what_is_gathered_follows_what_is_taken_and_the_factor():
    inputs, shift, factor = normal(50, 64, seed=6), normal(64, seed=7), 0.5 + torch.rand(64, generator=torch.Generator().manual_seed(8))
    names = ("range", "sample", "mean")
    moved, again = gathered(inputs, *names), gathered((inputs - shift) / factor, *names)
    moved.recentre(shift)
    moved.rescale(1 / factor)
    assert torch.equal(gathered(inputs, "range").range[0], inputs.amin(0))
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(moved.range, again.range, strict=True))
    assert all(torch.allclose(getattr(moved, name), getattr(again, name), atol=1e-5) for name in ("sample", "mean"))


@pytest.mark.parametrize("kind", ["vit", "gpt2", "opt"])
def test_with_many_bits_outputs_stay_and_norms_take_the_steps(kind):
    model = Model(name=kind, module=tiny(kind))
    exact = outputs(model.module).clone()
    change(model, RepqVit(bits=8, inputs=14), Given(data=batches(model.module)))
    found = outputs(model.module)
    assert float((found - exact).norm() / exact.norm()) < 0.05
    layers = [layer for layer in model.module.modules() if isinstance(layer, StaticLinear)]
    assert len([layer for layer in layers if layer.input_step is None]) > len(layers) / 2
    assert all((layer.input_shift is None) == (layer.input_step is None) for layer in layers)


def test_a_saved_model_is_the_same_when_loaded(trained, tmp_path):
    model = Model(name="vit", module=changed(trained["plain"], RepqVit(bits=4, inputs=4)))
    model.save(tmp_path / "vit")
    pixels = stripes(8, 3, NOISE).images
    with torch.no_grad():
        one, two = (each(pixel_values=pixels).logits for each in (model.module, mw.open(tmp_path / "vit").module))
    assert torch.equal(one, two)


APPLIES = {
    "rtn": dict(bits=4, group=32), "gptq": dict(bits=4, group=32), "awq": dict(bits=4, group=32), "hqq": dict(bits=4, group=32),
    "nf4": dict(group=32), "mxfp4": {}, "nvfp4": {}, "fp8": {}, "smoothquant": {}, "llm_int8": {}, "bipolar": {},
    "mergequant": dict(bits=6, inputs=6), "repq_vit": {},
}  # fmt: skip


@pytest.mark.parametrize("name", APPLIES)
def test_a_trained_vit_still_knows_its_images(name, trained):
    before = right(trained["plain"])
    assert before > 0.95
    module = changed(trained["plain"], mw.find(f"quantize.{name}").build(APPLIES[name]))
    assert any(not isinstance(layer, nn.Linear) and hasattr(layer, "in_features") for layer in module.modules())
    assert right(module) > before - 0.03


def test_unlike_channels_cost_rounding_to_nearest_its_accuracy_and_the_fold_none(trained):
    plain, uneven = trained["plain"], trained["uneven"]
    assert right(uneven) == pytest.approx(right(plain), abs=0.01)
    nearest = mw.find("quantize.rtn").build({"bits": 3, "group": 0})
    lost = {name: right(module) - right(changed(module, nearest)) for name, module in trained.items()}
    assert lost["uneven"] > 0.3 > 0.1 > lost["plain"]
    small = dict(bits=4, inputs=4)
    assert right(changed(uneven, RepqVit(**small))) > right(plain) - 0.05


def test_with_middles_inputs_lose_less_than_around_zero(trained):
    pixels = stripes(64, 9, NOISE).images
    with torch.no_grad():
        exact = trained["uneven"](pixel_values=pixels).logits
        lost = [float((changed(trained["uneven"], method)(pixel_values=pixels).logits - exact).norm())
                for method in (RepqVit(bits=8, inputs=3), MergeQuant(bits=8, inputs=3))]  # fmt: skip
    assert lost[0] < 0.8 * lost[1]
