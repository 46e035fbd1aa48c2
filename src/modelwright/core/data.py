"""Text: reading it, splitting it into calibration and held-out parts, and turning it into windows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.core import hub
from modelwright.core.errors import DataError, ModelError
from modelwright.starter import code_text, corpus_text, paragraphs

if TYPE_CHECKING:
    from torch import Tensor

READABLE = (".txt", ".jsonl", ".parquet")
FORMS = "Give a .txt, .jsonl or .parquet file, a folder of them, a hub data set as owner/name, corpus, or code."


@dataclass(frozen=True)
class Text:
    """Documents in their order, where they come from, and those that the source itself sets aside for measuring."""

    documents: tuple[str, ...] = field(repr=False)
    source: str
    held: tuple[str, ...] = field(default=(), repr=False)

    def split(self, held: float = 0.1) -> tuple[Text, Text]:
        """(calibration text, held-out text), the second about the fraction `held` of the characters.

        Whole documents are set aside, chosen by a hash of their content, so that neither order nor chance matters.
        Where whole documents do not fit, as with one long file, the end of the longest is cut off.
        Held-out paragraphs that also stand in the calibration text are dropped. The built-in corpus keeps its own
        split. Raises DataError when nothing is left on one side.
        """
        if not 0 < held < 1:
            raise DataError(f"A held-out fraction of {held} was asked for; it must lie between 0 and 1.")
        if self.held:
            ours, theirs = list(self.documents), list(self.held)
        else:
            ours, theirs = _set_aside(self.documents, held)
        seen = {paragraph for text in ours for paragraph in paragraphs(text)}
        theirs = [_without(text, seen) for text in theirs]
        theirs = [text for text in theirs if text.strip()]
        if not theirs or not any(text.strip() for text in ours):
            raise DataError(
                f"{self.source} cannot be split into calibration and held-out text: it is too short or repeats itself. Give more text."
            )
        part = "part" if self.held else f"{held:.0%}"
        return Text(tuple(ours), self.source), Text(tuple(theirs), f"the held-out {part} of {self.source}")

    def thinned(self, characters: int) -> Text:
        """Every so-manieth document, so that some `characters` or more are left; all of a text that has no more."""
        step = sum(map(len, self.documents)) // max(characters, 1)
        return Text(self.documents[::step], self.source, self.held) if step > 1 else self


def read(source: str | Path | Text | Sequence[str]) -> Text:
    """The text in `source`: a file, a folder, a hub data set, `"corpus"`, `"code"`, or a list of strings.

    corpus is the documentation inside Python, on which the starter was trained, code the standard library's sources. A .txt file is one
    document; a .jsonl file has one per line under "text"; a .parquet file one per row of "text".
    A folder is read in the order of its paths. Raises DataError when there is nothing, or nothing readable.
    """
    if isinstance(source, Text):
        return source
    if not isinstance(source, str | Path):
        return _text(source, "the given strings")
    if str(source) == "corpus":
        train, held = corpus_text()
        return Text(train, "corpus", held)
    if str(source) == "code":
        return Text(code_text(), "code")
    path = Path(source)
    if path.is_file():
        return _text(_file(path), str(source))
    if path.is_dir():
        return _text(_folder(path), str(source))
    if "/" in str(source) and hub.is_name(str(source)) and path.suffix not in READABLE:
        patterns = [f"*{suffix}" for suffix in READABLE]
        folder = hub.fetch(str(source), patterns, what="Text", error=DataError, kind="dataset", advice=f"Check the connection. {FORMS}")
        return _text(_folder(folder), str(source))
    raise DataError(f"The data {str(source)!r} was asked for; there is no such file or folder.{hub.nearest_path(str(source))} {FORMS}")


def corpus() -> Text:
    """The built-in text: the documentation inside Python, with its own held-out part."""
    return read("corpus")


def tokens(text: Text, tokenizer: Any, *, needed: int = 2, vocabulary: int | None = None) -> Tensor:
    """All of `text` as one row of token ids, long [n]; nothing is cut off.

    Each document stands after the tokenizer's beginning token and before its end token, as far as it has them;
    where the two are the same token, one stands before each document.
    Raises DataError when there are fewer than `needed` tokens, ModelError when an id does not fit `vocabulary`.
    """
    import torch

    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    before = [] if begin is None else [begin]
    after = [] if end is None or end == begin else [end]
    ids: list[int] = []
    for document in text.documents:
        ids += before + tokenizer.encode(document, add_special_tokens=False, verbose=False) + after
    if len(ids) < needed:
        raise DataError(f"{text.source} has {len(ids):,} tokens; at least {needed:,} are needed. Give more text.")
    if vocabulary is not None:
        fits(max(ids), vocabulary)
    return torch.tensor(ids, dtype=torch.long)


def windows(ids: Tensor, length: int) -> Tensor:
    """`ids` [n] cut into rows of `length`, long [n // length, length]; the remainder at the end is left out.

    Raises DataError when there is not one whole row.
    """
    count = len(ids) // length
    if count == 0:
        raise DataError(f"The text has {len(ids):,} tokens; one window needs {length:,}. Give more text.")
    return ids[: count * length].view(count, length)


def within(config: Any, length: int) -> int:
    """`length` in tokens, or the longest context that a model's config allows where that is less."""
    return min(length, getattr(config, "max_position_embeddings", None) or length)


def fits(largest: int, vocabulary: int) -> None:
    """Raise ModelError when the token id `largest` lies outside a model's `vocabulary`."""
    if largest >= vocabulary:
        raise ModelError(
            f"The tokenizer gives the id {largest}, but the model's vocabulary has {vocabulary} tokens. "
            "Use the tokenizer that belongs to the model."
        )


def digest(text: Text) -> str:
    """SHA-256 of the documents, in hex: equal for equal documents in equal order, whatever their source."""
    total = hashlib.sha256()
    for part in (text.documents, text.held):
        total.update(len(part).to_bytes(8, "big"))
        for document in part:
            content = document.encode()
            total.update(len(content).to_bytes(8, "big") + content)
    return total.hexdigest()


def _text(documents: Iterable[str], source: str) -> Text:
    found = tuple(documents)
    if not all(isinstance(document, str) for document in found):
        raise DataError(f"{source} should be strings; found {sorted({type(item).__name__ for item in found})}.")
    found = tuple(document for document in found if document.strip())
    if not found:
        raise DataError(f"{source} is empty: no document with text in it. {FORMS}")
    return Text(found, source)


def _folder(folder: Path) -> list[str]:
    files = sorted(file for file in folder.rglob("*") if file.suffix in READABLE and file.is_file())
    if not files:
        raise DataError(f"The folder {folder} has no {', '.join(READABLE)} file.")
    return [document for file in files for document in _file(file)]


def _file(file: Path) -> list[str]:
    if file.suffix == ".parquet":
        return _parquet(file)
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start:,}. "
            f"Convert it first, for example with `iconv -t utf-8 {file.name}`."
        ) from error
    return _jsonl(file, text) if file.suffix == ".jsonl" else [text]


def _jsonl(file: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file} line {number} is not JSON: {error.msg}. Each line must be one object.") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            found = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
            raise DataError(f'{file} line {number} needs the key "text" with a string; found {found or "no key"}.')
        documents.append(row["text"])
    return documents


def _parquet(file: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{file} needs the package pyarrow to be read: `pip install pyarrow`.") from error
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if "text" not in names:
                raise DataError(f'{file} needs a column "text"; it has {", ".join(names)}.')
            rows = table.read(columns=["text"])["text"].to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable parquet file: {error}") from error
    return [row for row in rows if row is not None]


def _set_aside(documents: tuple[str, ...], held: float) -> tuple[list[str], list[str]]:
    """Whole documents up to the fraction `held`; where those come to less than half of it, the longest one's end."""
    target = held * sum(map(len, documents))
    count = Counter(documents)
    unique = sorted(count, key=lambda text: hashlib.sha256(text.encode()).digest())
    chosen: set[str] = set()
    size = 0
    for document in unique[:-1]:
        whole = len(document) * count[document]
        if size + whole <= target:
            chosen.add(document)
            size += whole
    ours = [document for document in documents if document not in chosen]
    theirs = [document for document in documents if document in chosen]
    if size < target / 2:
        longest = max(ours, key=len)
        at = _cut(longest, len(longest) - round(target - size))
        place = ours.index(longest)
        ours[place] = longest[:at]
        theirs.append(longest[at:])
    return ours, theirs


def _cut(text: str, near: int) -> int:
    """The paragraph end, else line end, else space, nearest before `near` but in its half of the text; else `near`."""
    near = max(1, min(near, len(text) - 1))
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, near // 2, near)
        if at > 0:
            return at + len(mark)
    return near


def _without(text: str, seen: set[str]) -> str:
    """`text` itself, or its unseen paragraphs when some of them are in `seen`."""
    pieces = paragraphs(text)
    kept = [piece for piece in pieces if piece not in seen]
    return text if len(kept) == len(pieces) else "\n\n".join(kept)
