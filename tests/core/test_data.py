import json

import pytest
import torch

from modelwright.core.data import Text, digest, fits, read, tokens, windows
from modelwright.core.errors import DataError, ModelError
from modelwright.starter import paragraphs


class Bytes:
    """A tokenizer of bytes, with the beginning and end tokens that a test wants."""

    def __init__(self, bos=None, eos=None):
        self.bos_token_id, self.eos_token_id = bos, eos

    def encode(self, text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens
        return list(text.encode())


def documents(count, size=300):
    return [f"Document {n}.\n\n" + f"{n} {n * n} words. " * (size // 12) for n in range(count)]


def test_a_text_file_is_one_document_unchanged(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("One.\n\n\nTwo ü.\n".encode())
    assert read(file).documents == ("One.\n\n\nTwo ü.\n",)
    assert read(str(file)).source == str(file)


def test_a_jsonl_file_has_one_document_a_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\\ntwo"}\n\n{"text": "three \\u2028 four", "other": 1}\n')
    assert read(file).documents == ("one\ntwo", "three \u2028 four")


def test_a_parquet_file_has_one_document_a_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").documents == ("one", "two")
    parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r'column "text".*body'):
        read(tmp_path / "b.parquet")


def test_a_parquet_file_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="pip install pyarrow"):
        read(tmp_path / "a.parquet")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / "d.png").write_bytes(b"\x89PNG")
    assert read(tmp_path).documents == ("first", "second", "third")


def test_a_list_of_strings_is_text_and_text_is_itself():
    text = read(["one", "two"])
    assert text.documents == ("one", "two")
    assert read(text) is text


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no-such\.txt.*no such file"):
        read(tmp_path / "no-such.txt")


@pytest.mark.parametrize("content", ["", " \n\n\t\n"])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match=r"a\.txt is empty"):
        read(tmp_path / "a.txt")


def test_a_folder_without_text_is_named(tmp_path):
    with pytest.raises(DataError, match=r"has no \.txt"):
        read(tmp_path)


def test_a_file_that_is_not_utf8_names_the_byte_and_its_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good " * 3 + b"\xff bad")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 0xff at offset 15.*iconv"):
        read(tmp_path / "a.txt")


def test_a_broken_line_of_json_is_named_by_number(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read(file)
    file.write_text('{"body": "one"}\n')
    with pytest.raises(DataError, match=r"line 1 needs the key .text.*'body'"):
        read(file)


def test_a_hub_name_is_downloaded_and_read_as_a_folder(tmp_path, monkeypatch):
    (tmp_path / "part.txt").write_text("from the hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: tmp_path)
    assert read("owner/name").documents == ("from the hub",)


def test_a_hub_that_does_not_answer_is_said(monkeypatch):
    def fail(name, **options):
        raise OSError("unreachable")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(DataError, match=r"'owner/name' was asked for; there is no such folder here.*unreachable.*\.jsonl"):
        read("owner/name")


def test_values_that_are_not_strings_are_refused():
    with pytest.raises(DataError, match="int"):
        read(["one", 2])


@pytest.mark.parametrize(
    "given",
    [
        documents(40),
        [*documents(40), *documents(40)],
        ["\n\n".join(documents(40))],
        ["x" * 5000],
        ["short", "\n\n".join(documents(40))],
        ["One license.\n\n" + text for text in documents(40)],
    ],
    ids=["many", "each twice", "one long", "no spaces", "short and long", "shared paragraph"],
)
def test_split_shares_no_document_and_no_paragraph(given):
    text = read(given)
    ours, held = text.split(0.1)
    assert not set(ours.documents) & set(held.documents)
    assert not {p for d in ours.documents for p in paragraphs(d)} & {p for d in held.documents for p in paragraphs(d)}
    share = sum(map(len, held.documents)) / sum(map(len, text.documents))
    assert 0.03 < share < 0.12
    assert text.split(0.1) == (ours, held)


def test_one_long_document_is_split_in_two_contiguous_parts():
    whole = "\n\n".join(documents(40))
    ours, held = read([whole]).split(0.2)
    assert ours.documents[0] + held.documents[0] == whole


def test_split_does_not_depend_on_the_order_of_the_documents():
    one, other = read(documents(40)).split(), read(documents(40)[::-1]).split()
    assert set(one[1].documents) == set(other[1].documents)


def test_text_that_cannot_be_split_is_refused():
    with pytest.raises(DataError, match="cannot be split"):
        read(["a\n\na\n\na\n\na"]).split()
    with pytest.raises(DataError, match="between 0 and 1"):
        read(documents(4)).split(1.5)


def test_a_source_with_its_own_split_keeps_it():
    ours, held = Text(("a", "b"), "x", held=("c",)).split(0.5)
    assert (ours.documents, held.documents) == (("a", "b"), ("c",))


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (None, None, [97, 98, 99]),
        (None, 1, [97, 98, 1, 99, 1]),
        (2, 1, [2, 97, 98, 1, 2, 99, 1]),
        (0, 0, [0, 97, 98, 0, 99]),
    ],
)
def test_documents_are_joined_by_the_tokenizers_own_marks(bos, eos, expected):
    ids = tokens(read(["ab", "c"]), Bytes(bos, eos))
    assert ids.dtype == torch.long
    assert ids.tolist() == expected


def test_nothing_is_cut_off():
    assert len(tokens(read(["x" * 100_000]), Bytes())) == 100_000


def test_too_little_text_says_how_many_tokens_there_are_and_are_needed():
    with pytest.raises(DataError, match="has 5 tokens; at least 1,000 are needed"):
        tokens(read(["abcde"]), Bytes(), needed=1000)
    with pytest.raises(DataError, match="5 tokens; one window needs 8"):
        windows(torch.arange(5), 8)


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(ModelError, match=r"id 122.*100 tokens"):
        tokens(read(["z" * 9]), Bytes(), vocabulary=100)
    fits(99, 100)


def test_windows_are_contiguous_and_drop_only_the_remainder():
    assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_digest_knows_content_and_borders_but_not_the_source():
    assert digest(Text(("ab", "c"), "x")) == digest(Text(("ab", "c"), "y"))
    kinds = [Text(("ab", "c"), "x"), Text(("a", "bc"), "x"), Text(("ab",), "x", ("c",)), Text(("c", "ab"), "x")]
    assert len({digest(text) for text in kinds}) == 4


def test_the_same_text_in_two_forms_has_one_digest(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents(3)))
    assert digest(read(tmp_path / "a.jsonl")) == digest(read(documents(3)))


def test_a_thinned_text_is_spread_over_the_whole():
    text = Text(tuple(f"{number:04d} words" for number in range(100)), "numbers")
    part = text.thinned(200)
    assert part.documents == tuple(f"{number:04d} words" for number in range(0, 100, 5))
    assert sum(map(len, part.documents)) >= 200
    assert text.thinned(1000) is text
    assert text.thinned(600) is text  # half of it would be too little
