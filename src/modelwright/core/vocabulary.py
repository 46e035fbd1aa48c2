"""What the tokens of a tokenizer stand for, so that those of two tokenizers can be compared."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

SPECIAL = b"special "


def meanings(tokenizer: Any) -> dict[bytes, int]:
    """The bytes that each token stands for -> its id; special tokens stand for their name.

    "▁" of sentencepiece and "Ġ" of byte-level tokenizers are both a space, and "<0x0A>" is the byte 10. Of tokens that
    stand for the same bytes, one that is written as text counts.
    """
    special = {str(token) for token in tokenizer.all_special_tokens} | {str(token) for token in tokenizer.get_added_vocab()}
    level = _byte_level(tokenizer)
    found: dict[bytes, int] = {}
    bytewise: dict[bytes, int] = {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if token in special:
            found.setdefault(SPECIAL + token.encode(), number)
        elif byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
            bytewise.setdefault(bytes([int(byte[1], 16)]), number)
        elif level:
            found.setdefault(bytes(_bytes_of()[letter] for letter in token) if set(token) <= set(_bytes_of()) else token.encode(), number)
        else:
            found.setdefault(token.replace("▁", " ").encode(), number)
    return bytewise | found


def _byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    stated = json.loads(backend.to_str())
    return '"ByteLevel"' in json.dumps([stated.get("decoder"), stated.get("pre_tokenizer")])


@functools.cache
def _bytes_of() -> dict[str, int]:
    """The letters in which byte-level tokenizers write bytes: those that can be seen as they are, the others from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + number): byte for number, byte in enumerate(hidden)}
