"""What can go wrong, as classes. Each message says what was asked, what was found and what to do.

ModelwrightError
├── SettingError    a setting has a wrong name, type or range
├── MethodError     a method is unknown, or its file cannot be read
├── NeedError       a step lacks something that it needs: calibration text, donors, a teacher
├── SiteError       a layer cannot take the method
│   └── LayoutError the model has nothing of the kind that the method works on, or `where` and `skip` leave nothing of it
├── PlanError       steps that cannot follow each other, or that cannot meet a budget
├── WeightsError    a checkpoint is missing, corrupt, truncated or not finite
├── ModelError      a model's type, layout or tokenizer is unknown or does not match
├── DataError       text or other data is empty, too short or not readable
└── RecipeError     a recipe cannot be read

A plan says all that is wrong with a recipe at once: as the class that all its reasons share, or as the root when they
are of several kinds. `reasons` has them one by one. Only a user's mistakes are errors of these classes; our own are
assertions.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence


class ModelwrightError(Exception):
    """The root of all errors that a user can act on. `reasons`: the sentences of which the message is made."""

    def __init__(self, message: str, reasons: Sequence[str] = ()):
        super().__init__(message)
        self.reasons = tuple(reasons) or (message,)


class SettingError(ModelwrightError, ValueError):
    """A setting has a wrong name, type or range."""


class MethodError(ModelwrightError, LookupError):
    """A method is unknown, or its file cannot be read."""


class NeedError(ModelwrightError, ValueError):
    """A step lacks something that it needs."""


class SiteError(ModelwrightError, ValueError):
    """A layer cannot take the method."""


class LayoutError(SiteError):
    """The model has nothing of the kind that the method works on, or `where` and `skip` leave nothing of it."""


class PlanError(ModelwrightError, ValueError):
    """Steps that cannot follow each other, or that cannot meet a budget."""


class WeightsError(ModelwrightError, ValueError):
    """A checkpoint is missing, corrupt, truncated or not finite."""


class FiniteError(WeightsError):
    """What is computed would be NaN or infinite."""


class ModelError(ModelwrightError, ValueError):
    """A model's type, layout or tokenizer is unknown or does not match."""


class DataError(ModelwrightError, ValueError):
    """Text or other data is empty, too short or not readable."""


class RecipeError(ModelwrightError, ValueError):
    """A recipe cannot be read."""


def nearest(name: str, known: Iterable[str], likeness: float = 0.55) -> str:
    """`" Did you mean 'x'?"` for the known name nearest to `name`, or nothing when none is as alike as `likeness`, at most 1."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return f" Did you mean {found[0]!r}?" if found else ""


def refuse(error: type[ModelwrightError], reasons: Sequence[str]) -> None:
    """Raise `error` with all `reasons`, one a line; do nothing when there are none."""
    if len(reasons) == 1:
        raise error(reasons[0])
    if reasons:
        raise error(f"{len(reasons)} problems:\n" + "\n".join(f"  {n}. {text}" for n, text in enumerate(reasons, 1)), reasons)


class Faults(list[ModelwrightError]):
    """Errors that are collected, to be raised together."""

    @contextlib.contextmanager
    def collected(self, place: str = "") -> Iterator[None]:
        """Take the errors of this block; before each reason stands `place`, such as "step 0: prune.wanda: ", whose last
        part it may begin with itself."""
        try:
            yield
        except ModelwrightError as error:
            last = f"{place.removesuffix(': ').rpartition(': ')[2]}: "
            self.extend(type(error)(place + text.removeprefix(last)) for text in error.reasons)

    def refuse(self) -> None:
        """Raise all of them as one, in the order of the steps: of the class that they share, else of the root."""
        kinds = {type(error) for error in self}
        sentences = sorted(dict.fromkeys(map(str, self)), key=_step_of)
        refuse(kinds.pop() if len(kinds) == 1 else ModelwrightError, sentences)


def _step_of(sentence: str) -> int:
    found = re.match(r"step (\d+): ", sentence)
    return int(found[1]) if found else -1
