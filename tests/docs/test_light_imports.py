"""What a user sees first loads neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "numba", "matplotlib", "optuna", "peft")


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
    code = (
        "import modelwright as mw\n"
        "for name in 2 * [name for name in mw.__all__ if name[0] != '_']:\n"
        "    assert callable(getattr(mw, name)), name\n"
        "print('all')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "all", done.stdout + done.stderr
