"""The JSON Schema of recipes takes what `recipe.read` takes, and refuses what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from modelwright.core import describe, recipe
from modelwright.core.errors import RecipeError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(json.dumps(describe.schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_takes_the_recipes_of_the_repository(path, validator):
    assert [error.message for error in validator.iter_errors(recipe.parse(path))] == []


@pytest.mark.parametrize(
    "text",
    [
        "steps:\n  - prune.wanda: {sparsity: [0.2, 0.6], where: attn}\n",
        "steps:\n  - quantize.rtn: {bits: {attn: 8, mlp: [4, 8]}, skip: [head, block 0]}\n",
        "steps:\n  - quantize.rtn\n",
        "steps:\n  - quantize.rtn:\n",
        "steps:\n  - merge.linear: {donors: [one/, two/], weights: [1, 0.5]}\n",
        'model: small/\nsteps:\n  - prune.wanda: {pattern: "2:4"}\n',
    ],
)
def test_both_take_settings_by_place_and_bare_names(text, validator):
    recipe.read(text)
    assert [error.message for error in validator.iter_errors(recipe.parse(text))] == []


@pytest.mark.parametrize(
    "text",
    [
        "steps:\n  - quantize.rtn: {bit: 4}\n",
        "steps:\n  - quantize.rtn: {bits: 9}\n",
        "steps:\n  - quantize.rtn: {bits: many}\n",
        "steps:\n  - quantise.rtn: {bits: 4}\n",
        "steps:\n  - prune.wanda: {pattern: 2-4}\n",
        "step:\n  - quantize.rtn\n",
        "modle: x\nsteps:\n  - quantize.rtn\n",
        "samples: 0\nsteps:\n  - quantize.rtn\n",
        "steps: []\n",
    ],
)
def test_both_refuse_misspelt_names_and_bad_values(text, validator):
    with pytest.raises(RecipeError):
        recipe.read(text)
    assert not validator.is_valid(recipe.parse(text))


def test_every_setting_has_a_description(validator):
    for step in validator.schema["else"]["properties"]["steps"]["items"]["anyOf"][1:]:
        (settings,) = step["properties"].values()
        assert all(setting["description"] for setting in settings["properties"].values()), step["title"]
