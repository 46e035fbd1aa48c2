"""The two files of a new method."""

from __future__ import annotations

import re
from pathlib import Path

from . import find
from .errors import MethodError, nearest
from .files import write_text

METHOD = '''"""One line that says what it does, so that a user can choose by it.

Authors year, arXiv:number, section. Differs: where this departs from it, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modelwright.core.method import LayerMethod
from modelwright.core.settings import fraction
from modelwright.core.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class {cls}(LayerMethod):
    """What it does to a model, in one line."""

    status: ClassVar[str] = "sketch"  # "checked" once its test compares it with the published formula
    gathers: ClassVar[tuple[str, ...]] = ("norm",)  # of core.statistics: norm, square, mean, absolute, largest, moment
    neutral = dict(strength=0.0)  # settings under which no output may change

    strength: float = fraction(0.5)  # what it means and its unit

    def layer(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """weight [out, in], statistics.norm [in] → [out, in]."""
        return weight * (1 - self.strength * statistics.norm / statistics.norm.max())
'''

TEST = '''"""{name}: one case small enough to work by hand, and every promise of its source."""

from __future__ import annotations

import torch

from modelwright.core.find import find
from modelwright.core.statistics import Statistics


def test_one_weight_worked_by_hand():
    statistics = Statistics(2, ("norm",))
    statistics.add(torch.tensor([[1.0, 2.0]]))
    result = find("{name}")(strength=1.0).layer(torch.tensor([[4.0, 4.0]]), statistics)
    assert result.tolist() == [[2.0, 0.0]]
'''


def write(family: str, name: str) -> list[Path]:
    """Write the method's file and its test: into the checkout of this package inside which one stands, else into the current folder.

    Raises:
        MethodError: the name is taken, not a Python name, or the family is unknown.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise MethodError(f"A method's name is in lower case with underscores, such as mine; got {name!r}.")
    if family not in find.families():
        raise MethodError(f"There is no family {family!r}.{nearest(family, find.families())} Families are {', '.join(find.families())}.")
    checkout = find.FOLDER.parents[2]
    tests = checkout / "tests" / "methods"
    inside = tests.is_dir() and Path.cwd().is_relative_to(checkout)
    method = find.FOLDER / family / f"{name}.py" if inside else Path(f"{name}.py")
    test = tests / family / f"test_{name}.py" if inside else Path(f"test_{name}.py")
    taken = [path for path in (method, test) if path.exists()]
    if taken:
        raise MethodError(f"{taken[0]} exists. Choose another name.")
    cls = "".join(part.capitalize() for part in name.split("_"))
    write_text(method, METHOD.format(cls=cls))
    write_text(test, TEST.format(name=f"{family}.{name}" if inside else f"{name}.py:{cls}"))
    return [method, test]
