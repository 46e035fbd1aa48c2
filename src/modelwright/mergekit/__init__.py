"""Configurations of mergekit, unchanged: `schema` reads them, `plan` says what each tensor is made of, `run` writes it."""

from .run import merge

__all__ = ["merge"]
