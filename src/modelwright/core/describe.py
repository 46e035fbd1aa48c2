"""Pages and schemas, generated from the methods themselves."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

from . import find
from .method import DRIVEN, NEEDS, AdapterMethod, Method, fields_of, plain, setting_texts
from .recipe import GIVEN, TEXT
from .settings import Pattern, describe_kind


def page(name: str) -> str:
    """A method's page: summary, docstring, needs, settings, status."""
    cls = find.find(name)
    text = find.page(name).text
    lines = [name, "=" * len(name), "", (cls.__doc__ or "").strip(), "", text, ""]
    lines += [f"Level: {cls.level}.  Status: {cls.status}."]
    needs = [need for need in cls.needs() if need not in DRIVEN]
    lines += ["Needs: " + (", ".join(needs) if needs else "nothing but the model") + "."]
    for label, marks in (("Wants", cls.wants), ("In the place of float", cls.suffices), ("Leaves", cls.leaves), ("Drops", cls.drops)):
        if marks:
            lines.append(f"{label}: {', '.join(sorted(marks))}.")
    lines += ["", "Settings" + (" (numbers may be lists over depth or maps by role):" if cls.by_place else ":")]
    texts = setting_texts(cls)
    for field, kind in fields_of(cls):
        limits = field.metadata.get("range")
        lines.append(f"  {field.name} = {plain(field.default)!r}")
        lines.append(f"      {describe_kind(kind)}{f' {limits}' if limits else ''}; {texts[field.name]}")
    return "\n".join(lines)


def schema() -> dict[str, Any]:
    """The JSON Schema of recipes, with every method's settings, and of comparisons."""
    steps: list[dict[str, Any]] = []
    for name in find.names():
        cls = find.find(name)
        steps.append({
            "type": "object", "title": name, "description": find.page(name).summary,
            "properties": {name: _settings_schema(cls)}, "required": [name], "additionalProperties": False,
        })  # fmt: skip
    bare = {"enum": [name for name in find.names() if not set(find.find(name).needs()) & set(GIVEN)]}
    whole = {"type": "integer", "minimum": 0}
    recipe = {
        "properties": {
            "model": {"type": ["string", "object"], "description": 'a folder, a hub name, "starter", or fresh weights'},
            "data": {"type": ["string", "object"], "description": '.txt .jsonl .parquet, a folder, a hub name, or "corpus"'},
            "samples": {**whole, "minimum": 1, "description": "calibration sequences"},
            "length": {**whole, "minimum": 1, "description": "tokens in each"},
            "seed": whole,
            "steps": {"type": "array", "minItems": 1, "items": {"anyOf": [bare, *steps]}},
            "save": {"type": "string", "description": "the folder to write"},
        },
        "required": ["steps"],
        "additionalProperties": False,
    }
    listed = {"type": "array", "minItems": 1, "items": {"type": "number", "minimum": 0}}
    counts = {"type": "array", "items": {**whole, "minimum": 1}, "description": "labelled examples to train on, a curve"}
    ends = {
        "type": "object",
        "properties": {"model": {"type": "string"}, "data": {"type": "string"}, "examples": counts},
        "required": ["model", "data"],
    }
    beside = [step for step in steps if issubclass(find.find(step["title"]), AdapterMethod)]
    named = {"enum": [step["title"] for step in beside]}
    comparison = {
        "properties": {
            "compare": {"type": "array", "minItems": 1, "description": "adapters", "items": {"anyOf": [named, *beside]}},
            "tasks": {"type": "object", "minProperties": 1, "additionalProperties": {**ends, "additionalProperties": False}},
            "parameters": {"type": ["integer", "string"], "description": "the most that train: a number, or a share such as 1%"},
            "tokens": {**whole, "minimum": 1, "description": "seen in training, repeats too"},
            "batch": {**whole, "minimum": 1, "description": "sequences in a step, or twice as many examples"},
            "length": {**whole, "minimum": 2, "description": "tokens in each"},
            "rates": {**listed, "description": "learning rates, of which each adapter takes the best"},
            "seeds": {**listed, "description": "of the runs"},
            "held": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1, "description": "the share of data to measure on"},
            "save": {"type": "string", "description": "the folder to write"},
        },
        "required": ["compare", "tasks", "save"],
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A Modelwright recipe, or a comparison",
        "type": "object",
        "if": {"required": ["compare"]},
        "then": comparison,
        "else": recipe,
    }


def _settings_schema(cls: type[Method]) -> dict[str, Any]:
    texts = setting_texts(cls)
    properties: dict[str, Any] = {}
    for field, kind in fields_of(cls):
        limits = field.metadata.get("range")
        one = _kind_schema(kind)
        if limits:
            bounds = {"minimum": limits.low, "maximum": limits.high}
            one |= {key: value for key, value in bounds.items() if value is not None}
        if cls.by_place and limits:
            one = {"anyOf": [one, {"type": "array"}, {"type": "object"}]}
        properties[field.name] = {**one, "description": texts[field.name]}
        if field.default is not dataclasses.MISSING:
            properties[field.name]["default"] = plain(field.default)
    for need in cls.needs():
        if need in GIVEN:
            kind_of = {"type": "array", "items": {"type": "string"}} if need == "donors" else {"type": "string"}
            properties[need] = {**kind_of, "description": NEEDS[need].partition(".")[0]}
    if cls.reads_text() and TEXT not in properties:
        properties[TEXT] = {"type": ["string", "object"], "description": "text for this step, where the recipe's is not for it"}
    required = [need for need in cls.needs() if need in GIVEN]
    return {
        "type": ["object", "null"] if not required else "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _kind_schema(kind: Any) -> dict[str, Any]:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return {"enum": list(typing.get_args(kind))}
    if origin is tuple:
        return {"type": "array", "items": _kind_schema(typing.get_args(kind)[0])}
    if origin is not None:
        return {"anyOf": [_kind_schema(member) for member in typing.get_args(kind)]}
    plain_kinds = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}
    if kind in plain_kinds:
        return {"type": plain_kinds[kind]}
    return {"type": "string", "pattern": r"^\d+:\d+$"} if kind is Pattern else {}
