"""Makes the home page and the methods' pages when the documentation is built; none of them is checked in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from modelwright.core import find
from modelwright.core.method import NEEDS, fields_of, plain, setting_texts
from modelwright.core.settings import describe_kind


def on_config(config: Any) -> Any:
    """Put the methods' pages into the navigation, by family."""
    families: dict[str, list[Any]] = {}
    for name in find.names():
        families.setdefault(name.split(".")[0], []).append({name: f"methods/{name}.md"})
    pages: list[Any] = []
    for family, methods in families.items():
        pages.append({family: [{"how to choose": f"methods/{family}.md"}, *methods]} if family in find.families() else methods[0])
    config.nav.append({"Methods": pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    readme = Path(config.config_file_path).with_name("README.md").read_text("utf-8")
    made = {"index.md": readme.replace("](docs/", "](")}
    for family, text in find.families().items():
        made[f"methods/{family}.md"] = f"# {family}\n\n{linked(text)}\n"
    for name in find.names():
        made[f"methods/{name}.md"] = method_page(name)
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def method_page(name: str) -> str:
    """A method's page as Markdown."""
    cls, page = find.find(name), find.page(name)
    lines = [f"# {name}", "", (cls.__doc__ or "").strip(), "", linked(page.text), ""]
    needs = [NEEDS[need].partition(";")[0].partition(":")[0].partition(". ")[0] for need in cls.needs() if need not in ("rng", "seed")]
    facts = {
        "level": cls.level,
        "status": page.status,
        "needs": ", ".join(dict.fromkeys(needs)) or "nothing but the model",
        "wants a model that is": ", ".join(sorted(cls.wants)),
        "leaves it": ", ".join(sorted(cls.leaves)),
        "leaves it no longer": ", ".join(sorted(cls.drops)),
        "neutral with": ", ".join(f"{key}={value!r}" for key, value in (cls.neutral or {}).items()),
    }
    lines += ["| | |", "|---|---|", *(f"| {label} | {cell(text)} |" for label, text in facts.items() if text), ""]
    note = "Numbers may be lists over depth or maps by role. " if cls.by_place else ""
    lines += ["## Settings", "", f"{note}See [words](../words.md).", "", "| setting | default | allowed | meaning |", "|---|---|---|---|"]
    texts = setting_texts(cls)
    for field, kind in fields_of(cls):
        limits = field.metadata.get("range")
        allowed = f"{describe_kind(kind)}{f' {limits}' if limits else ''}"
        lines.append(f"| `{field.name}` | `{plain(field.default)!r}` | {cell(allowed)} | {cell(texts[field.name])} |")
    lines += ["", "## Code", "", "```python", page.path.read_text("utf-8").rstrip(), "```", ""]
    return "\n".join(lines)


def linked(text: str) -> str:
    """Text with links to the papers that it names."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def cell(text: str) -> str:
    """Text for one cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
