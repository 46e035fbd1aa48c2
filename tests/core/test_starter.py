import lzma
import math
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors import safe_open

from modelwright import starter
from modelwright.core.data import digest, read, tokens, windows
from modelwright.core.errors import ModelError, SettingError
from modelwright.starter.new import fresh, train_tokenizer

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def corpus():
    return starter.corpus_text()


def test_the_corpus_is_about_two_megabytes_with_a_small_part_held_out(corpus):
    train, held = (sum(len(text.encode()) for text in part) for part in corpus)
    assert 1_500_000 < train < 4_000_000
    assert 0.03 < held / (train + held) < 0.12


def test_the_corpus_is_the_same_in_another_process(corpus):
    code = "from modelwright.core.data import *; print(digest(read('corpus')))"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({**os.environ, "PYTHONHASHSEED": seed} for seed in "12")
    ]
    assert runs[0] == runs[1] == digest(read("corpus")) + "\n"


def test_no_paragraph_stands_on_both_sides(corpus):
    train, held = ({p for text in part for p in starter.paragraphs(text)} for part in corpus)
    assert held
    assert not train & held


def test_the_split_goes_by_top_level_module(corpus):
    import json.decoder
    import logging.config

    train, held = ("\n\n".join(part) for part in corpus)
    assert starter.held_out("logging")
    assert starter.held_out("json")
    for module in (logging, logging.config, json, json.decoder):
        assert module.__doc__.strip().split("\n\n")[0] in held
    assert not starter.held_out(starter.TOPICS)
    assert "Assert statements are a convenient way" in train


def test_reading_the_corpus_imports_no_module_of_it_and_no_torch():
    code = (
        "import sys; from modelwright.starter import corpus_text; corpus_text(); "
        "print([m for m in ('torch', 'transformers', 'antigravity', 'tkinter', 'wsgiref', 'this') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_tokenizer_gives_back_any_text(corpus):
    tokenizer = train_tokenizer(corpus[0][:20], 400, 64)
    for text in [
        "plain",
        "  two  spaces \n\n\ttab ",
        "naïve 日本語 🙂 \u2028 \x00",
        corpus[1][0],
        "<|endoftext|>x",
        " , .",
        "",
    ]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 400
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0


def test_a_fresh_model_has_the_same_bits_for_the_same_seed(corpus):
    text = read(corpus[0][:20])
    models = [fresh(CONFIG, {"vocabulary": 300}, text, seed) for seed in (1, 1, 2)]
    weights = [model.state_dict()["model.embed_tokens.weight"] for model, _ in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert models[0][1].get_vocab() == models[1][1].get_vocab()
    assert models[0][0].config.vocab_size == 300


def test_wrong_names_for_a_new_model_are_refused_with_the_nearest():
    text = read(["words " * 100])
    with pytest.raises(SettingError, match="Did you mean 'hidden_size'"):
        fresh({"hiden_size": 4}, {}, text, 0)
    with pytest.raises(SettingError, match="'vocabulary'"):
        fresh({}, {"vocab": 4}, text, 0)
    with pytest.raises(SettingError, match="at least 257"):
        fresh({}, {"vocabulary": 4}, text, 0)


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(starter.path()).float().eval()
    return model, AutoTokenizer.from_pretrained(starter.path())


def test_the_starter_is_bfloat16_and_smaller_than_eight_megabytes():
    assert sum(file.stat().st_size for file in starter.path().iterdir()) < 8_000_000
    with safe_open(starter.path() / "model.safetensors", "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"BF16"}  # noqa: SIM118


def test_the_starter_predicts_held_out_text_in_fewer_bits_than_xz_takes(corpus, shipped):
    model, tokenizer = shipped
    text = "".join(corpus[1])
    ids = windows(tokens(read(corpus[1]), tokenizer, vocabulary=model.config.vocab_size), 512)[::8]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    size = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in ids)
    packed = lzma.compress(text.encode(), format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    assert nats.item() / math.log(2) / size < 0.9 * 8 * len(packed) / len(text.encode())


def test_the_starter_continues_an_english_sentence_with_english_words(corpus, shipped):
    model, tokenizer = shipped
    prompt = tokenizer("If the file does not exist, the function", return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    words = re.findall(r"[a-z]+", tokenizer.decode(made[0, prompt["input_ids"].shape[1] :]).lower())
    known = Counter(re.findall(r"[a-z]+", " ".join(corpus[0]).lower()))
    assert len(words) >= 8
    assert sum(known[word] >= 10 for word in words[:-1]) >= 0.9 * len(words[:-1])


def test_an_installation_without_the_model_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(starter, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        starter.path()
