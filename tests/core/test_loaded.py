"""What loads through our quantizer is a model like any other, where it stores no codes."""

import pytest
import torch
from tiny import outputs, tiny
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import modelwright as mw

STEPS = {
    "factors": ("factor.svd", {}),
    "widths": ("prune.flap", {"share": 0.3}),
    "places": ("share.depth", {"loops": 2}),
    "bit masks": ("prune.magnitude", {"store": "sparse"}),
}


@pytest.mark.parametrize("step", STEPS)
def test_it_changes_dtype_and_trains_as_any_other(step, tmp_path):
    name, settings = STEPS[step]
    texts = torch.randint(60, (4, 16), generator=torch.Generator().manual_seed(0))
    start = mw.Model(name="llama", module=tiny("llama"))
    mw.apply(start, mw.find(name)(**settings), data=[{"input_ids": texts}], save=tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).float()
    assert model.config.quantization_config.quant_method == "modelwright"
    before = {name: value.clone() for name, value in model.named_parameters()}
    stated = TrainingArguments(tmp_path / "out", max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no")
    Trainer(model, stated, train_dataset=[{"input_ids": row, "labels": row} for row in texts]).train()
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not still, still
    found = outputs(model.eval())
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), found)


def test_what_stores_codes_trains_beside_adapters_alone(tmp_path):
    mw.apply(mw.Model(name="llama", module=tiny("llama")), mw.find("quantize.hqq")(group=32), save=tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, TrainingArguments(tmp_path / "out", report_to=[], use_cpu=True))


def test_a_model_that_python_saves_says_on_a_card_how_it_loads(tmp_path):
    mw.apply("starter", mw.find("share.depth")(), save=tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text("utf-8")
    assert "# starter\n" in card
    assert "What was done: train, share.depth." in card
    assert "import modelwright\nfrom transformers" in card
    assert "makes another model of it" in card
    mw.apply(tmp_path / "shared", mw.find("prune.magnitude")(), save=tmp_path / "streamed")
    assert "What was done: train, share.depth, prune.magnitude." in (tmp_path / "streamed" / "README.md").read_text("utf-8")
