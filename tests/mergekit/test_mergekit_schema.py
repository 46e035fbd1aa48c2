"""What a configuration says, before any model is opened."""

import pytest

from modelwright.core.errors import RecipeError
from modelwright.mergekit.schema import Parameter, Reference, Row, Vocabulary, along, read

LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"


def one(text):
    (config,) = read(text)
    return config


@pytest.mark.parametrize(
    ("values", "t", "expected"),
    [
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 0.5, 1.0), 0.5, 0.5),
        ((0.0, 1.0, 0.0), 0.75, 0.5),
        ((0.0, 1.0, 0.0), 1.0, 0.0),
        ((3.0,), 0.7, 3.0),
        (("x", "y", "z"), 0.49, "x"),
        (("x", "y", "z"), 1.0, "z"),
        ((True, False), 0.5, True),
    ],
)
def test_a_gradient_runs_straight_between_equally_spaced_anchors(values, t, expected):
    assert along(values, t) == pytest.approx(expected) if isinstance(expected, float) else along(values, t) == expected


def test_the_first_matching_filter_wins_and_without_one_there_is_no_value():
    parameter = Parameter((("self_attn", (0.0, 1.0)), ("mlp", 0.3), ("attn", 9.0)))
    assert parameter.at("layers.0.self_attn.q_proj.weight", 0.5) == 0.5
    assert parameter.at("layers.0.mlp.up_proj.weight", 0.5) == 0.3
    assert parameter.at("norm.weight", 0.5) is None
    assert Parameter((("*", 2.0),)).at("norm.weight", 0.5) == 2.0


def test_numbers_written_as_texts_are_numbers_and_zero_is_a_value():
    config = one('merge_method: linear\nmodels: [{model: a, parameters: {weight: "0.53"}}, {model: b, parameters: {weight: 0}}]\n')
    weights = [source.parameters["weight"].at("x", 0) for source in config.towers[0].slices[0].sources]
    assert weights == [0.53, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", Reference("a")),
        ("org/name@main", Reference("org/name", "main")),
        ("org/name@main+my/lora", Reference("org/name", "main", "my/lora")),
        ("a+b@2", Reference("a", None, "b", "2")),
        ("{model: a, lora: {path: b, revision: r}}", Reference("a", None, "b", "r")),
        ("{model: {path: a, revision: r}}", Reference("a", "r")),
    ],
)
def test_references_have_revisions_and_adapters(text, expected):
    config = one(f"merge_method: passthrough\nmodels: [{{model: {text}}}]\n")
    assert config.towers[0].slices[0].sources[0].model == expected


def test_keys_that_mean_nothing_are_left_out_with_a_note():
    config = one("bogus: 1\nmerge_method: linear\nmodels: [{model: a, layer_range: [0, 4]}]\nparameters: {weight: 1}\nparameters_old: {}\n")
    assert [note.partition(": left out, as mergekit does")[0] for note in config.notes] == [
        "bogus",
        "parameters_old",
        "models.0.layer_range",
    ]


@pytest.mark.parametrize(
    ("text", "where", "meant"),
    [
        (LINEAR + "dtpye: float32\n", "dtpye", "dtype"),
        (LINEAR + "paramters: {normalize: true}\n", "paramters", "parameters"),
        ("merge_method: linear\nmodels: [{model: a, paramters: {weight: 1}}]\n", "models.0.paramters", "parameters"),
        ("merge_method: linear\nmodels: [{model: {model: {path: a, revison: b}}}]\n", "models.0.model.model.revison", "revision"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: {value: 1, fliter: mlp}}}]\n",
         "models.0.parameters.weight.fliter", "filter"),
        ("merge_method: linear\nmodules: {text: {models: [{model: a}], parameter: {weight: 1}}}\n", "modules.text.parameter", "parameters"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}], base_modle: b}]\n", "slices.0.base_modle",
         "base_model"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1], parmeters: {weight: 1}}]}]\n",
         "slices.0.sources.0.parmeters", "parameters"),
        (LINEAR + "tokenizer: {soruce: union}\n", "tokenizer.soruce", "source"),
        (LINEAR + "tokenizer: {tokens: {x: {source: a, froce: true}}}\n", "tokenizer.tokens.x.froce", "force"),
        (LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, modle: a, token: y}}}}\n", "tokenizer.tokens.x.source.modle",
         "model"),
        ("base_model: a\nexpert_per_token: 1\nexperts: [{source_model: a}, {source_model: b}]\n", "expert_per_token", "experts_per_token"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_refused_at_every_level(text, where, meant):
    with pytest.raises(RecipeError) as error:
        read(text)
    assert f"{where} is no key here. Did you mean {meant!r}?" in str(error.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("merge_methd: linear\nmodels: [{model: a}]\n", "merge_method is missing. Is 'merge_methd' meant?"),
        ("merge_method: linear\n", "exactly one of models, slices and modules; found none"),
        (LINEAR + "slices: []\n", "found models and slices"),
        ("- 1\n", "A mergekit configuration is a mapping"),
        ("merge_method: linear\nmodels: a\n", "models must be a list"),
        ("merge_method: linear\nmodels: [{modle: a}]\n", "models.0 must be a mapping with `model:`"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [4, 2]}]}]\n", "layer_range must be [first, one"),
        ("merge_method: linear\nslices: [{sources: [{model: a}]}]\n", "slices.0.sources.0.layer_range"),
        (LINEAR + "dtype: bfloat61\n", "Did you mean 'bfloat16'?"),
        (LINEAR + "tokenizer_source: union\ntokenizer: {source: base}\n", "tokenizer_source or tokenizer, not both"),
        (LINEAR + "tokenizer: {pad_to_multiple_of: 0}\n", "pad_to_multiple_of must be a whole number"),
        (LINEAR + "tokenizer: {tokens: {x: {source: {kind: zeros}}}}\n", "kind is model_token or zero"),
        (LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}\n", "exactly one of token and token_id"),
        (LINEAR + "chat_template: chatlm\n", "Did you mean 'chatml'?"),
        (LINEAR + "parameters: {normalize: {filter: x}}\n", "list of {filter: ..., value: ...}"),
        ("merge_method: linear\nmodels: [{model: a+b+c}]\n", "one adapter at most"),
        ("modules: {text: {}}\nmerge_method: linear\n", "modules.text must have exactly one of models and slices"),
        (f"{LINEAR}---\n{LINEAR}", "Of several documents, one has no `name`"),
        (f"name: x\n{LINEAR}---\nname: x\n{LINEAR}---\n{LINEAR}", "'x' is given to 2 documents"),
        ("experts: []\n", "needs `base_model:`"),
        ("merge_method: [\n", "not valid YAML"),
        ("\n\n", "configuration is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(text, wanted):
    with pytest.raises(RecipeError) as error:
        read(text)
    assert wanted in str(error.value)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(RecipeError, match="4 problems"):
        read("merge_method: 3\nmodels: [{}]\ndtype: f\nchat_template: x\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", True), ("'yes'", True), ("'False'", False), ("'1e3'", 1000.0), ("'1e+3'", 1000.0), ("'-.5E-1'", -0.05), ("' 2 '", 2.0),
     ("'1e'", "1e"), ("3", 3.0), ("auto", "auto")],
)  # fmt: skip
def test_values_written_as_texts_are_what_they_say(text, expected):
    config = one(LINEAR + f"parameters: {{normalize: {text}}}\n")
    found = config.parameters["normalize"].at("x", 0)
    assert found == expected
    assert type(found) is type(expected)


def test_a_value_of_zero_or_false_under_a_filter_is_a_value():
    config = one(LINEAR + "parameters: {weight: [{filter: mlp, value: 0}, {value: false}], normalize: false}\n")
    assert config.parameters["weight"].at("x.mlp", 0) == 0.0
    assert config.parameters["weight"].at("x.attn", 0) is False
    assert config.parameters["normalize"].at("x", 0) is False


@pytest.mark.parametrize("layers", ["[2, 2]", "[-1, 2]", "[0, 1, 2]", "[0, true]", "[0.0, 1.0]", "3"])
def test_a_range_of_layers_has_a_first_and_a_later_one(layers):
    with pytest.raises(RecipeError, match=r"layer_range must be \[first, one"):
        read(f"merge_method: passthrough\nslices: [{{sources: [{{model: a, layer_range: {layers}}}]}}]\n")


def test_the_document_without_a_name_comes_last_and_the_others_in_their_order():
    found = read(f"name: x\n{LINEAR}---\n{LINEAR}---\nname: y\n{LINEAR}")
    assert [config.name for config in found] == ["x", "y", None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tokenizer_source: union", Vocabulary("union")),
        ("tokenizer_source: base", Vocabulary("base")),
        ("tokenizer_source: b@r", Vocabulary(Reference("b", "r"))),
        ("tokenizer: {pad_to_multiple_of: 64}", Vocabulary("union", multiple=64)),
        ("tokenizer: {source: base, tokens: {x: {source: b}}}", Vocabulary("base", {"x": Row(Reference("b"), "x")})),
        ("tokenizer: {tokens: {x: {source: {kind: zero}, force: true}}}", Vocabulary("union", {"x": Row(force=True)})),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: b, token_id: 0}}}}",
            Vocabulary("union", {"x": Row(Reference("b"), None, 0)}),
        ),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: b, token: y}}}}",
            Vocabulary("union", {"x": Row(Reference("b"), "y")}),
        ),
    ],
)
def test_a_tokenizer_is_a_source_with_rows_of_its_own(text, expected):
    assert one(LINEAR + text + "\n").vocabulary == expected


def test_a_configuration_may_be_one_line_of_text():
    line = '{"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}], "dtype": "bfloat16"}'
    (config,) = read(line)
    assert (config.method, config.dtype, len(config.references)) == ("linear", "bfloat16", 1)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("", "The configuration is empty"),
        (" ", "The configuration is empty"),
        (None, "A configuration of mergekit is a YAML file, YAML text or a mapping; got None"),
        (3, "A configuration of mergekit is a YAML file, YAML text or a mapping; got 3"),
    ],
)
def test_what_is_no_configuration_is_said(source, sentence):
    with pytest.raises(RecipeError, match=sentence):
        read(source)


def test_keys_of_the_tokenizer_at_the_top_are_sent_to_their_place():
    stated = {"merge_method": "linear", "models": [{"model": "a"}], "pad_to_multiple_of": 8}
    with pytest.raises(RecipeError, match="^pad_to_multiple_of belongs under `tokenizer:`"):
        read(stated)
