"""What a user sees first loads neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "optuna", "peft")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["list"], ["list", "prune"], ["fit", "--help"]], ids=" ".join)
def test_nothing_heavy_is_imported(arguments):
    code = (
        "import sys, runpy, modelwright\n"
        f"arguments = {arguments!r}\n"
        "sys.argv = ['modelwright', *arguments]\n"
        "try:\n"
        "    arguments and runpy.run_module('modelwright', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_public_names_are_callable_as_often_as_one_likes():
    code = "import modelwright as mw; [getattr(mw, name) for name in mw.__all__ for _ in 'ab']; print([n for n in mw.__all__ if n[0] != '_' and not callable(getattr(mw, n))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
