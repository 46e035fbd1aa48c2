"""What the tables of many methods share: which rows are dominated, and a plot of size against quality."""

from __future__ import annotations

from typing import Any


def mark_dominated(rows: list[dict[str, Any]], size: str, quality: str, column: str) -> None:
    """Name in each row the best of those that have no more of both, "" where there is none."""
    for one in rows:
        others = [other for other in rows if other is not one and other[quality] is not None and one[quality] is not None]
        better = [other for other in others if other[size] <= one[size] and other[quality] <= one[quality]]
        one[column] = min(better, key=lambda other: other[quality])["method"] if better else ""


def stored_bits(module: Any) -> float:
    """Bits per weight of a module's stored layers, but for biases; tensors that several have in common count once."""
    from modelwright.blocks._stored import Stored

    layers = [layer for layer in module.modules() if isinstance(layer, Stored)]
    held = {id(value): value.nbytes for layer in layers for name, value in layer.state_dict(keep_vars=True).items() if name != "bias"}
    return 8 * sum(held.values()) / sum(layer.weights() for layer in layers)


def plot(rows: list[dict[str, Any]], x: str, panels: dict[str, str], label: str, divided: float = 1.0, begins: bool = False) -> str:
    """The column `x`, over `divided`, against each of the columns `panels` names, with its label: a line for each method, as SVG.

    rows: the first is the original's. begins: lines begin there; otherwise it is a dotted level.
    """
    from modelwright import report

    figure, _ = report.figure_of(7.6 * len(panels), 6.4)
    figure.clear()
    names, first = list(dict.fromkeys(one["method"] for one in rows[1:])), rows[0]
    level = next(first[key] for key in panels if first[key] is not None)
    for place, (key, title) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        if not begins:
            axes.axhline(level, color="0.5", lw=0.8, ls=":")
        for number, name in enumerate(names):
            own = [one for one in rows if one["method"] == name and one[key] is not None]
            points = sorted((one[x] / divided, one[key]) for one in own)
            if points:
                points = [*points, (first[x] / divided, level)] if begins else points
                axes.plot(*zip(*points, strict=True), marker="osD^v"[number % 5], ms=4, lw=1, label=name, color=f"C{number % 10}",
                          ls=("-", "--", ":")[number // 10 % 3])  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylim(level * 0.9, min(40 * level, 1.3 * max(one[key] for one in rows if one[key] is not None)))
        axes.set_xlabel(label)
        axes.set_ylabel(title)
        axes.set_xlim(left=0)
    lines = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines, loc="outside lower center", frameon=False, fontsize=7, ncols=4 * len(panels))
    return report.svg_of(figure)


def source(path: str, folder: str) -> str:
    """A model or text as it stands in a command: its own word, or its place under DATA."""
    return path if "/" not in path else f"DATA/{folder}/{path.rstrip('/').rpartition('/')[2]}"
