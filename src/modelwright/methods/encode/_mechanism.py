"""Encoding: values → symbols → an entropy code. What is counted on the way is told."""

from __future__ import annotations


class Tally(str):
    """A note for the user that grows with every tensor: how many weights were coded, in how many bytes, and how few could be."""

    weights: int
    stored: int
    least: float

    @classmethod
    def add(cls, notes: list[str], name: str, weights: int, stored: int, least: float) -> None:
        """Count one more tensor of so many weights, in the note of this step.

        stored: its bytes. least: the bytes that its exponents' entropy leaves.
        """
        place = next((number for number, note in enumerate(notes) if isinstance(note, cls)), len(notes))
        if place < len(notes):
            before = notes.pop(place)
            assert isinstance(before, cls)
            weights, stored, least = weights + before.weights, stored + before.stored, least + before.least
        note = cls(
            f"{name}: {weights:,} weights take {8 * stored / weights:.3f} bits each; the entropy of their exponents leaves "
            f"{8 * least / weights:.3f} at least"
        )
        note.weights, note.stored, note.least = weights, stored, least
        notes.insert(place, note)
