"""Settings: types, ranges, values by place."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from modelwright.core.errors import SettingError
from modelwright.core.find import find
from modelwright.core.method import TensorMethod, setting_texts
from modelwright.core.settings import ByRole, Pattern, at_depth, count, fraction


@dataclass(frozen=True, kw_only=True)
class Sample(TensorMethod):
    """A method for these tests."""

    share: float = fraction(0.5)  # of something
    bits: int = count(4, 1, 8)  # per weight
    pattern: Pattern | None = None  # of a row

    def tensor(self, weight):
        return weight


def test_list_over_depth_is_a_straight_line_between_anchors():
    assert [at_depth((0.2, 0.8), depth, 4) for depth in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [at_depth((0.0, 1.0, 0.0), depth, 5) for depth in range(5)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_list_as_long_as_the_model_gives_every_block_its_own():
    values = (0.1, 0.9, 0.3, 0.7)
    assert [at_depth(values, depth, 4) for depth in range(4)] == list(values)


def test_whole_numbers_take_the_nearest_anchor():
    assert [at_depth((2, 8), depth, 5) for depth in range(5)] == [2, 2, 2, 8, 8]


def test_outside_the_blocks_and_in_a_single_block_the_first_anchor_holds():
    assert at_depth((0.2, 0.8), None, 4) == 0.2
    assert at_depth((0.2, 0.8), 0, 1) == 0.2


def test_map_by_role_resolves_and_leaves_other_roles_alone():
    method = Sample(share={"mlp": [0.2, 0.8], "attn.{q,k}": 0.1})
    assert method.at("mlp.down", 3, 4).share == pytest.approx(0.8)
    assert method.at("attn.q", 0, 4).share == 0.1
    assert method.at("attn.o", 0, 4) is None
    assert Sample(share={"mlp": 0.2, "*": 0.4}).at("attn.o", 0, 4).share == 0.4


def test_settings_are_hashable_and_print_as_they_are_written():
    method = Sample(share={"mlp": [0.2, 0.8]}, pattern="2:4")
    assert hash(method) == hash(Sample(share={"mlp": [0.2, 0.8]}, pattern="2:4"))
    assert repr(method) == "Sample(share={'mlp': [0.2, 0.8]}, pattern='2:4')"
    assert eval(repr(method)) == method
    assert isinstance(method.share, ByRole)


def test_pattern_keeps_n_of_m():
    assert Pattern.parse("2:4").sparsity == 0.5
    assert Pattern.parse("1:4").sparsity == 0.75
    for text in ("4:2", "0:4", "2of4", "2:4:8"):
        with pytest.raises(SettingError, match="keep:of"):
            Pattern.parse(text)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"share": 1.5}, "share must be a number from 0 to 1; got 1.5"),
        ({"share": float("nan")}, "share must be a number from 0 to 1"),
        ({"share": True}, "share must be a number"),
        ({"share": {"mlp": 2.0}}, "share must be a number from 0 to 1; got 2.0"),
        ({"share": []}, "empty list"),
        ({"share": {}}, "empty map"),
        ({"bits": 2.5}, "bits must be a whole number from 1 to 8; got 2.5"),
        ({"bits": "4"}, "bits must be a whole number"),
        ({"where": 3}, "where must be"),
    ],
)
def test_bad_value_is_named_with_what_is_allowed(settings, sentence):
    with pytest.raises(SettingError) as error:
        Sample(**settings)
    assert sentence in str(error.value)


def test_all_bad_values_are_said_at_once():
    with pytest.raises(SettingError) as error:
        Sample.build({"share": 7, "bits": 99, "brits": 1})
    assert all(part in str(error.value) for part in ("share", "bits must", "'brits'. Did you mean 'bits'?"))


def test_comments_beside_settings_are_their_texts():
    texts = setting_texts(find("quantize.gptq"))
    assert texts["bits"] == "per weight"
    assert "share a scale" in texts["group"]


def test_a_setting_with_a_wrong_name_names_the_nearest():
    with pytest.raises(SettingError, match="merge.ties has no setting 'keeep'. Did you mean 'keep'"):
        find("merge.ties")(keeep=1)


@pytest.mark.parametrize("name", ["merge.linear", "merge.karcher", "merge.ties", "merge.fisher"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_no_numbers_are_said_with_their_donor(name, value):
    with pytest.raises(SettingError, match=f"^{name}: weights are numbers; got {value}, for donor 2 of 3.$"):
        find(name)(weights=[1.0, value, 1.0])
