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
    "u2": (["<end>", "c", "y", "b", "x", "a"], ["<s2>", "<s1>"]),
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
        assert ids == {token: i for i, token in enumerate(["<end>", "a", "b", "c", "d", "<s1>", "y", "x", "z", "<s2>"])}
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
    d: {source: {kind: model_token, model: u2, token_id: 0}}
    <s2>: {source: {kind: model_token, model: u1, token_id: 1}}
""")
    found = tensors[EMBED]
    assert torch.allclose(found[ids["x"]], (row(root, "u3", "x") + row(root, "u2", "x")) / 2, atol=1e-6)
    assert torch.allclose(found[ids["y"]], row(root, "u2", "y") / 2, atol=1e-6)
    assert torch.allclose(found[ids["c"]], row(root, "u2", "y"), atol=1e-6)
    assert torch.allclose(found[ids["<s2>"]], (row(root, "u1", "a") + row(root, "u2", "<s2>")) / 2, atol=1e-6)
    assert torch.allclose(found[ids["d"]], (row(root, "u1", "d") + row(root, "u2", "<end>")) / 2, atol=1e-6)
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


def test_identical_tokenizers_are_still_padded_and_their_rows_replaced(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders["a"].parent)
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    one, two = (load_file(folders[name] / "model.safetensors")[EMBED] for name in "ab")
    ids = mw.open(folders["a"]).tokenizer.get_vocab()
    padded = mw.merge(text + "tokenizer: {pad_to_multiple_of: 32}\n", save=tmp_path / "padded")
    found = load_file(padded.folder / "model.safetensors")[EMBED]
    real = len(ids)
    assert found.shape[0] == padded.config.vocab_size == -(-real // 32) * 32
    assert torch.allclose(found[:real], ((one + two) / 2)[:real], atol=1e-6)
    assert torch.allclose(found[real:], found[:real].mean(0).expand(len(found) - real, -1), atol=1e-6)
    forced = mw.merge(
        text + "tokenizer: {tokens: {q: {source: {kind: zero}, force: true}, z: {source: b, force: true}}}\n", save=tmp_path / "two"
    )
    found = load_file(forced.folder / "model.safetensors")[EMBED]
    assert (found[ids["q"]] == 0).all()
    assert torch.equal(found[ids["z"]], two[ids["z"]])
    assert torch.allclose(found[ids["a"]], ((one + two) / 2)[ids["a"]], atol=1e-6)


def test_tokens_that_no_merged_model_has_are_zeros_and_said(root, merged):
    """The tokenizer is that of u3, which is not merged: of its tokens u1 has the end alone."""
    text = "merge_method: passthrough\nmodels: [{model: u1}]\n"
    tensors, ids, model = merged(text + "tokenizer_source: u3\n")
    assert torch.equal(tensors[EMBED][ids["<end>"]], row(root, "u1", "<end>"))
    assert (tensors[EMBED][[ids["x"], ids["z"]]] == 0).all()
    assert any("2 tokens are in no model's vocabulary; their embeddings are zeros" in note for note in model.history[-1]["notes"])
    zero = "{source: {kind: zero}}"
    for tokens, said in ((f"{{x: {zero}, z: {zero}}}", False), (f"{{x: {zero}}}", True)):
        _, _, model = merged(text + f"tokenizer: {{source: u3, tokens: {tokens}}}\n", save=f"said-{said}")
        assert any("no model's vocabulary" in note for note in model.history[-1]["notes"]) == said  # not of zeros that were asked for


def test_tokens_beyond_a_models_rows_are_none_of_its_tokens(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    short = mw.open(root / "u3")  # <end>, x and z, of which z loses its row
    short.module.resize_token_embeddings(2)
    short.module.config.vocab_size = 2
    short.save(tmp_path / "short")
    text = f"models: [{{model: u2, parameters: {{weight: 1}}}}, {{model: {tmp_path}/short, parameters: {{weight: 1}}}}]\n"
    union = mw.merge("merge_method: linear\n" + text + "tokenizer_source: union\n", save=tmp_path / "union")
    assert "z" not in union.tokenizer.get_vocab()
    assert union.config.vocab_size == len(IDS["u2"])
    own = mw.merge("merge_method: linear\n" + text + f"tokenizer_source: {tmp_path}/short\n", save=tmp_path / "own")
    assert own.config.vocab_size == 2


def test_a_tokenizer_of_the_result_loads_and_knows_the_new_tokens(merged):
    _, ids, model = merged(LINEAR + "tokenizer_source: union\n")
    assert model.tokenizer.convert_tokens_to_ids(["a", "z", "<s2>"]) == [ids["a"], ids["z"], ids["<s2>"]]
    assert model.tokenizer("a <s2> b")["input_ids"] == [ids["a"], ids["<s2>"], ids["b"]]


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ("{q: {source: u1}}", "tokenizer.tokens: 'q' is not in the result's tokenizer"),
        ("{x: {source: u1}}", "tokenizer.tokens.x: u1 has no token 'x'"),
        ("{x: {source: {kind: model_token, model: u1, token_id: 6}}}", "u1 has 6 rows; there is no token_id 6"),
        ("{x: {source: {kind: model_token, model: u1, token_id: -1}}}", "u1 has 6 rows; there is no token_id -1"),
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


CHATS = {  # of three turns: the text, and what is added for the next answer
    "alpaca": ("S\n\n### Instruction:\nU\n\n### Response:\nA<end>\n\n", "### Response:\n"),
    "chatml": ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
               "<|im_start|>assistant\n"),
    "exaone": ("[|system|]S[|endofturn|]\n[|user|]U[|endofturn|]\n[|assistant|]A[|endofturn|]\n", "[|assistant|]"),
    "llama3": ("<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "mistral": ("<s>S\n\n[INST] U [/INST] A<end>", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_named_chat_templates_give_their_formats(merged, name):
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    _, _, model = merged(LINEAR + f"chat_template: {name}\n")
    model.tokenizer.bos_token = "<s>"
    text = model.tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == CHATS[name][0]
    assert model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == CHATS[name][0] + CHATS[name][1]


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
