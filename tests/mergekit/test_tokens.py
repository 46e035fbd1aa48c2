"""Models of several vocabularies: each row of the result belongs to its token."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import modelwright as mw
from modelwright.core.errors import ModelError, RecipeError
from modelwright.core.model import Model
from modelwright.mergekit.tokens import template_named

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = {
    "u1": (["<end>", "a", "b", "c", "d"], ["<s1>"]),
    "u2": (["<end>", "c", "x", "b", "y", "a"], ["<s2>", "<s1>"]),
    "u3": (["<end>", "x", "z"], []),
}
IDS = {name: plain + special for name, (plain, special) in WORDS.items()}
WEIGHTS = {"u1": 1, "u2": 2, "u3": 3}
LINEAR = "merge_method: linear\nmodels:\n" + "".join(f"  - {{model: {name}, parameters: {{weight: {w}}}}}\n" for name, w in WEIGHTS.items())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    for seed, (name, (plain, special)) in enumerate(WORDS.items()):
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(plain)}, unk_token="<end>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.add_special_tokens([AddedToken(word, special=True) for word in special])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", clean_up_tokenization_spaces=False)
        rows = len(tokenizer) + (3 if name == "u2" else 0)  # more rows than tokens, as many models have
        Model(name=name, module=tiny("llama", seed=seed, vocab_size=rows), tokenizer=tokenizer).save(folder / name)
    return folder


@pytest.fixture
def merged(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)

    def run(text, save="out"):
        model = mw.merge(text, save=tmp_path / save)
        stated = json.loads((tmp_path / save / "tokenizer.json").read_text("utf-8"))
        ids = stated["model"]["vocab"] | {entry["content"]: entry["id"] for entry in stated["added_tokens"]}
        return load_file(tmp_path / save / "model.safetensors"), ids, model

    return run


def row(root, model, token, tensor=EMBED):
    return load_file(root / model / "model.safetensors")[tensor][IDS[model].index(token)]


@pytest.mark.parametrize("source", ["union", "base", "u2"])
@pytest.mark.parametrize("tensor", [EMBED, HEAD])
def test_each_row_is_the_merge_of_its_tokens_rows_and_what_is_missing_is_the_mean(root, merged, source, tensor):
    tensors, ids, model = merged(LINEAR + f"tokenizer_source: {source}\n")
    if source == "union":
        assert ids == {token: i for i, token in enumerate(["<end>", "a", "b", "c", "d", "<s1>", "x", "y", "z", "<s2>"])}
    else:
        assert list(ids) == IDS["u1" if source == "base" else "u2"]
    assert tensors[tensor].shape[0] == len(ids) == model.config.vocab_size
    for token, i in ids.items():
        have = {name: row(root, name, token, tensor) for name in WORDS if token in IDS[name]}
        mean = sum(have.values()) / len(have)
        expected = sum(weight * have.get(name, mean) for name, weight in WEIGHTS.items()) / 6
        assert torch.allclose(tensors[tensor][i], expected, atol=1e-6), token


def test_a_missing_row_is_the_bases_where_the_base_has_it(root, merged):
    tensors, ids, _ = merged(
        "merge_method: task_arithmetic\nbase_model: u1\nmodels:\n"
        "  - {model: u2, parameters: {weight: 0.5}}\n  - {model: u3, parameters: {weight: 1}}\ntokenizer_source: union\n"
    )
    base = row(root, "u1", "c")
    assert torch.allclose(tensors[EMBED][ids["c"]], base + 0.5 * (row(root, "u2", "c") - base), atol=1e-6)
    assert torch.allclose(tensors[EMBED][ids["z"]], row(root, "u3", "z"), atol=1e-6)  # one model alone has it


def test_rows_may_be_chosen_and_forced_and_padded(root, merged):
    tensors, ids, model = merged("""
merge_method: linear
models: [{model: u1, parameters: {weight: 1}}, {model: u2, parameters: {weight: 1}}]
tokenizer:
  source: union
  pad_to_multiple_of: 16
  tokens:
    x: {source: u3}
    y: {source: {kind: zero}}
    c: {source: {kind: model_token, model: u2, token: y}, force: true}
    <s2>: {source: {kind: model_token, model: u1, token_id: 1}}
""")
    found = tensors[EMBED]
    assert torch.allclose(found[ids["x"]], (row(root, "u3", "x") + row(root, "u2", "x")) / 2, atol=1e-6)
    assert torch.allclose(found[ids["y"]], row(root, "u2", "y") / 2, atol=1e-6)
    assert torch.allclose(found[ids["c"]], row(root, "u2", "y"), atol=1e-6)
    assert torch.allclose(found[ids["<s2>"]], (row(root, "u1", "a") + row(root, "u2", "<s2>")) / 2, atol=1e-6)
    assert found.shape[0] == model.config.vocab_size == 16
    assert torch.allclose(found[len(ids) :], found[: len(ids)].mean(0).expand(16 - len(ids), -1), atol=1e-6)


def test_the_union_of_identical_tokenizers_changes_nothing(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders["a"].parent)
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    plain, union = (
        mw.merge(text + more, save=tmp_path / name).folder for more, name in (("", "plain"), ("tokenizer_source: union\n", "union"))
    )
    one, two = load_file(plain / "model.safetensors"), load_file(union / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (plain / "tokenizer.json").read_bytes() == (union / "tokenizer.json").read_bytes()
    assert (plain / "config.json").read_bytes() == (union / "config.json").read_bytes()


def test_a_tokenizer_of_the_result_loads_and_knows_the_new_tokens(merged):
    _, ids, model = merged(LINEAR + "tokenizer_source: union\n")
    assert model.tokenizer.convert_tokens_to_ids(["a", "z", "<s2>"]) == [ids["a"], ids["z"], ids["<s2>"]]
    assert model.tokenizer("a <s2> b")["input_ids"] == [ids["a"], ids["<s2>"], ids["b"]]


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ("{q: {source: u1}}", "tokenizer.tokens: 'q' is not in the result's tokenizer"),
        ("{x: {source: u1}}", "tokenizer.tokens.x: u1 has no token 'x'"),
        ("{x: {source: {kind: model_token, model: u1, token_id: 99}}}", "u1 has 6 rows; there is no token_id 99"),
    ],
)
def test_rows_that_do_not_exist_are_refused(merged, tokens, wanted):
    with pytest.raises(RecipeError) as error:
        merged(LINEAR + f"tokenizer: {{source: union, tokens: {tokens}}}\n")
    assert wanted in str(error.value)


def test_a_model_without_a_tokenizer_is_refused(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders["a"].parent)
    with pytest.raises(ModelError, match="qwen2 has no tokenizer"):
        mw.merge("merge_method: passthrough\nmodels: [{model: qwen2}]\ntokenizer_source: union\n", save=tmp_path / "out")


@pytest.mark.parametrize("name", ["alpaca", "chatml", "exaone", "llama3", "mistral"])
def test_named_chat_templates_render(merged, name):
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    _, _, model = merged(LINEAR + f"chat_template: {name}\n")
    model.tokenizer.bos_token = "<s>"
    text = model.tokenizer.apply_chat_template(turns, tokenize=False)
    assert [text.index(part) for part in "SUA"] == sorted(text.index(part) for part in "SUA")
    if name == "chatml":
        assert text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n")


def test_auto_takes_the_commonest_chat_template(root, merged):
    texts = {"u1": "one {{ messages }}", "u2": template_named("chatml"), "u3": template_named("chatml")}
    for name, text in texts.items():
        (root / name / "chat_template.jinja").write_text(text, "utf-8")
    try:
        _, _, model = merged(LINEAR + "chat_template: auto\n")
        assert model.tokenizer.chat_template == template_named("chatml")
        assert mw.merge(LINEAR + "chat_template: 'x {{ messages }}'\n", save=model.folder.parent / "own").tokenizer.chat_template[:1] == "x"
    finally:
        for name in texts:
            (root / name / "chat_template.jinja").unlink()
