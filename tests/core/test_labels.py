"""Labelled texts and images: read, split, and made into what models take."""

import json

import numpy as np
import pytest
import torch

from modelwright.core import labels
from modelwright.core.contract import letters
from modelwright.core.errors import DataError


def test_texts_from_lines_with_labels_of_any_kind(tmp_path):
    file = tmp_path / "my.jsonl"
    file.write_text(
        "\n".join(json.dumps({"text": text, "label": label}) for text, label in [("good", "yes"), ("bad", "no"), ("fine", "yes")])
    )
    found = labels.read(file)
    assert (found.classes, found.labels.tolist(), found.texts) == (2, [1, 0, 1], ("good", "bad", "fine"))
    inputs = found.inputs(letters(), 3)
    assert inputs["input_ids"].shape == (3, 3)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1]] * 3
    with pytest.raises(DataError, match="no tokenizer"):
        found.inputs(None, 3)


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 8, 8, 3)])
def test_images_from_arrays_are_of_mean_zero_and_three_colours(shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "my.npz", x=pixels, y=np.array([3, 5, 3, 5, 3, 5]))
    found = labels.read(tmp_path / "my.npz")
    assert found.images.shape == (6, 3, 8, 8)
    assert found.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert found.images.mean().abs() < 1e-5
    assert set(found.inputs(None, 5)) == {"pixel_values"}


def test_some_of_every_class_are_set_aside_and_the_same_each_time():
    found = labels.stripes(300)
    trained, held = found.split(0.2)
    assert len(trained) + len(held) == 300
    assert held.labels.unique().tolist() == list(range(10))
    assert (held.labels.bincount() - 0.2 * found.labels.bincount()).abs().max() <= 0.5
    assert torch.equal(held.images, found.split(0.2)[1].images)
    assert not (trained.images[:, None] == held.images[None, :5]).flatten(2).all(-1).any()
    lonely = torch.cat([(found.labels == 3).nonzero()[:1, 0], (found.labels != 3).nonzero()[:, 0]])
    trained, held = found.take(lonely).split(0.2)
    assert (int((trained.labels == 3).sum()), int((held.labels == 3).sum())) == (1, 0)
    with pytest.raises(DataError, match="no two of one class"):
        found.take(torch.tensor([int((found.labels == number).nonzero()[0]) for number in range(4)])).split(0.2)


def test_what_is_built_in():
    topics = labels.read("topics")
    assert topics.classes == labels.TOPICS
    assert topics.labels.bincount().min() > 50
    assert {len(text) for text in topics.texts} == {labels.PASSAGE}
    plain, turned = labels.read("stripes"), labels.read("turned stripes")
    assert torch.equal(plain.labels, turned.labels)
    assert not torch.equal(plain.images, turned.images)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "one", "label": 1}\n{"text": "two"}', 'line 2 needs the keys "text"'),
        ("a.jsonl", '{"text": "one", "label": 1}\n{', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "one", "label": 1}', "has 1 classes"),
        ("a.npz", "nothing", "should hold images x and labels y"),
        ("a.csv", "one,1", "which are the forms of labelled data"),
    ],
)
def test_what_cannot_be_read_is_said(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        labels.read(tmp_path / name)
    with pytest.raises(DataError, match="There is no labelled data"):
        labels.read(tmp_path / "none.jsonl")
