"""Plots of accuracy, speed and training, from the rows of a result's JSON.

The suffix of a plot's path is its format. Files are written atomically. Without rows, a plot raises ValueError.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from ..errors import BadValue
from ..files import replacing
from ..labels import method_name, multiply_adds_unit, reduction_label, series_name


# Okabe and Ito's colours, which colour-blind readers can distinguish; in print, markers do.
_STYLES = {"dtem": ("#0072B2", "o"), "tome": ("#D55E00", "s"), "evit": ("#009E73", "^")}
_SPARE_STYLES = (("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#7F5F3F", "<"), ("#999999", "X"))
_ALL_STYLES = (*_STYLES.values(), *_SPARE_STYLES)
_UNMERGED = "none"
_MEASURES = {
    "top1": "Top-1 accuracy (%)",
    "agreement": "Agreement with the unmerged model (%)",
    "cosine": "Cosine with the unmerged features",
}


def plot_accuracy(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str | None = None) -> None:
    """Plot top-1 accuracy against multiply-adds: a line per method, r at its points, and the unmerged model.

    `rows` are the rows of an evaluation. Without labels, it draws agreement with the unmerged model; for features, the
    cosine with the unmerged features.
    """
    figure, (axis,) = _figure(rows, path, (6.4, 4.2))
    measure, styles = measure_of(rows), _series_styles(rows)
    factor, unit = multiply_adds_unit(max(row["multiply_adds"] for row in rows))
    series: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["multiply_adds"]):
        series.setdefault(series_name(row), []).append(row)
    # Labels are above the line of the best method, and below the lines of the others.
    best_first = sorted(series, key=lambda name: -fmean(row[measure] for row in series[name]))
    best = next((name for name in best_first if series[name][0]["method"] != _UNMERGED), None)
    for name in best_first:
        points, (colour, marker) = series[name], styles[name]
        x, y = [row["multiply_adds"] / factor for row in points], [row[measure] for row in points]
        if points[0]["method"] == _UNMERGED:
            axis.axhline(y[0], color="0.45", linewidth=1, linestyle=(0, (5, 4)), zorder=1)
            label = name + ("" if measure == "cosine" else f" ({y[0]:.1f} %)")
            axis.plot(x, y, marker, color=colour, markersize=13, label=label, zorder=3)
            continue
        axis.plot(x, y, color=colour, marker=marker, markersize=5.5, linewidth=1.8, label=name, zorder=4)
        place: dict[str, Any] = {"xytext": (4, -6), "ha": "left", "va": "top"}
        if name == best:
            place = {"xytext": (-4, 6), "ha": "right", "va": "bottom"}
        box = {"boxstyle": "square,pad=0.1", "facecolor": axis.get_facecolor(), "edgecolor": "none", "alpha": 0.75}
        look = {"textcoords": "offset points", "fontsize": 8, "color": colour, "bbox": box, "zorder": 5}
        for row, point in zip(points, zip(x, y, strict=True), strict=True):
            axis.annotate("" if row["r"] is None else reduction_label(row["r"]), point, **place, **look)
    axis.set(xlabel=f"Multiply-adds per image ({unit})", ylabel=_MEASURES[measure])
    axis.margins(x=0.08, y=0.12)
    _legend(axis, loc="lower right")
    save_figure(figure, path, title)


def plot_pareto(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str | None = None) -> None:
    """Plot accuracy against multiply-adds and against speed; a line joins the best trade-offs (`pareto_front`).

    `rows` are the rows of an evaluation. Without speeds, the second panel is left out.
    """
    timed = all(row["images_per_second"] is not None for row in rows)
    figure, axes = _figure(rows, path, (5.2 * (1 + timed), 4.4), panels=1 + timed)
    measure = measure_of(rows)
    factor, unit = multiply_adds_unit(max(row["multiply_adds"] for row in rows))
    # The last entry is 1 if less is better, -1 if more is better.
    panels = [(f"Multiply-adds per image ({unit})", [row["multiply_adds"] / factor for row in rows], 1)]
    if timed:
        panels.append(("Images per second", [row["images_per_second"] for row in rows], -1))
    quality = [row[measure] for row in rows]
    series = list(dict.fromkeys(series_name(row) for row in rows))
    styles = _series_styles(rows)
    for axis, (label, x, sign) in zip(axes, panels, strict=True):
        front = sorted((x[i], quality[i]) for i in pareto_front([sign * value for value in x], quality))
        axis.plot(*zip(*front, strict=True), color="0.6", linewidth=4, alpha=0.45, zorder=1, label="best trade-off")
        for name in series:
            points = sorted((x[i], quality[i]) for i, row in enumerate(rows) if series_name(row) == name)
            colour, marker = styles[name]
            size = 12 if marker == "*" else 6
            axis.plot(
                *zip(*points, strict=True), color=colour, marker=marker, markersize=size, linewidth=1.4, label=name
            )
        axis.set_xlabel(label)
    axes[0].set_ylabel(_MEASURES[measure])
    _legend(axes[0], fontsize=9)
    save_figure(figure, path, title)


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """The indices of the best trade-offs: no other point is at least as good in both figures and better in one."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -qualities[i]))
    front: list[int] = []
    for i in order:
        best = front[-1] if front else None
        equal = best is not None and (costs[i], qualities[i]) == (costs[best], qualities[best])
        if best is None or equal or qualities[i] > qualities[best]:
            front.append(i)
    return sorted(front)


def measure_of(rows: Sequence[dict[str, Any]]) -> str:
    """The figure to compare rows by: top-1, without labels agreement, for features the cosine."""
    return next(name for name in _MEASURES if all(row.get(name) is not None for row in rows))


def picture_name(rows: Sequence[dict[str, Any]]) -> str:
    """The file name of `plot_accuracy` in the folder of an evaluation."""
    return "features.png" if measure_of(rows) == "cosine" else "accuracy.png"


def _series_styles(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every line; the first line of a method has the method's own style."""
    styles: dict[str, tuple[str, str]] = {}
    spare, taken = iter(_SPARE_STYLES), set()
    for row in rows:
        method = row["method"]
        if series_name(row) in styles:
            continue
        own = ("0.2", "*") if method == _UNMERGED else None if method in taken else _STYLES.get(method)
        styles[series_name(row)] = own or next(spare, ("0.4", "x"))
        taken.add(method)
    return styles


def plot_correlation(
    layers: Mapping[str, Sequence[float]], path: str | os.PathLike[str], title: str | None = None
) -> None:
    """Plot Kendall's τ layer by layer: a line per name, for example before and after training."""
    figure, (axis,) = _figure(layers, path, (6.4, 3.6))
    for (name, values), (colour, marker) in zip(layers.items(), cycle(_STYLES.values()), strict=False):
        axis.plot(range(1, len(values) + 1), values, color=colour, marker=marker, linewidth=1.8, label=name)
    axis.set(xlabel="Layer", ylabel="Kendall's τ: keys, embedding")
    axis.set_ylim(min(0, *(value for values in layers.values() for value in values)), 1.05)
    _legend(axis)
    save_figure(figure, path, title)


def plot_speedups(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str | None = None) -> None:
    """Plot speed-up against batch size: a line per row of a benchmark, and dotted lines at the ideal speed-ups."""
    figure, (axis,) = _figure(rows, path, (6.8, 4.2))
    axis.axhline(1, color="0.45", linewidth=1, zorder=1)
    merged = [row for row in rows if row["method"] != _UNMERGED]
    amounts = list(dict.fromkeys((row["method"], str(row["r"])) for row in merged))
    kinds = [f"{row['tokens_read']} tokens" if "tokens_read" in row else row["runtime"] for row in merged]
    colours = dict(zip(amounts, cycle(style for style, _ in _ALL_STYLES), strict=False))
    dashes = dict(zip(dict.fromkeys(kinds), cycle(["-", "--", ":", "-."]), strict=False))
    drawn = set()
    for row, kind in zip(merged, kinds, strict=True):
        colour = colours[row["method"], str(row["r"])]
        label = f"{method_name(row['method'])} {reduction_label(row['r'])}, {kind}"
        x = [batch["batch_size"] for batch in row["batches"]]
        y = [batch["speedup"]["median"] for batch in row["batches"]]
        axis.plot(x, y, dashes[kind], color=colour, marker="o", markersize=4.5, label=label, zorder=3)
        ideal = row["ideal_speedup"]
        if ideal is not None and (colour, round(ideal, 3)) not in drawn:
            axis.axhline(ideal, color=colour, linewidth=0.9, linestyle=(0, (1, 3)), zorder=1)
            drawn.add((colour, round(ideal, 3)))
    axis.set_xscale("log", base=2)
    axis.set(xlabel="Batch size", ylabel="Speed-up over the unmerged model (dotted: by count)")
    if merged:
        _legend(axis, fontsize=8)
    save_figure(figure, path, title)


def plot_advice(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str | None = None) -> None:
    """Plot agreement (or cosine) of an advice's rows against speed: a panel per batch size, a line per method.

    Every line starts at the unmerged model.
    """
    sizes = [batch["batch_size"] for batch in rows[0]["batches"]] if rows else []
    figure, axes = _figure(rows, path, (1 + 4.6 * len(sizes), 4.2), panels=max(1, len(sizes)))
    measure = "cosine" if rows[0]["agreement"] is None else "agreement"
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    colours = dict(zip(runtimes, cycle(style for style, _ in _ALL_STYLES), strict=False))
    markers = {row["method"]: _STYLES.get(row["method"], ("", "D"))[1] for row in rows}
    for place, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
        for runtime in runtimes:
            own = [row for row in rows if row["runtime"] == runtime]
            plain = [row for row in own if row["method"] == _UNMERGED]
            for method in dict.fromkeys(row["method"] for row in own):
                points = plain + [row for row in own if row["method"] == method != _UNMERGED]
                x = [row["batches"][place]["images_per_second"]["median"] for row in points]
                y = [row[measure] for row in points]
                look = {"color": colours[runtime], "linewidth": 1.4, "markersize": 5.5}
                if method == _UNMERGED:
                    axis.plot(x, y, "*", **{**look, "markersize": 13}, zorder=4)
                    continue
                axis.plot(x, y, marker=markers[method], label=f"{method_name(method)}, {runtime}", **look)
                for row, point in zip(points[1:], list(zip(x, y, strict=True))[1:], strict=True):
                    axis.annotate(str(row["r"]), point, (5, 3), textcoords="offset points", fontsize=8)
        axis.set_title(f"batches of {size}", fontsize=10)
        axis.set_xlabel("Images per second (numbers: r; stars: unmerged)")
    axes[0].set_ylabel(_MEASURES[measure])
    _legend(axes[0], fontsize=8, loc="upper right")
    save_figure(figure, path, title)


def plot_training(rows: Sequence[tuple[str, Sequence[float]]], r: Sequence[int], path: str | os.PathLike[str]) -> None:
    """Plot KL as a share of the first row's KL, the best row on top; rows are (title, KL at each r)."""
    figure, (axis,) = _figure(rows, path, (8, 1.2 + 0.28 * len(rows)))
    first = rows[0][1]
    ranked = sorted(rows, key=lambda row: -sum(row[1]))
    for number, (amount, (colour, marker)) in enumerate(zip(r, _ALL_STYLES, strict=False)):
        shares = [values[number] / first[number] for _, values in ranked]
        axis.plot(shares, range(len(ranked)), marker, color=colour, markersize=5, label=f"r = {amount}", alpha=0.9)
    axis.axvline(1, color="0.45", linewidth=1, linestyle=(0, (5, 4)), zorder=1)
    axis.axvline(0.5, color="0.75", linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    axis.set_yticks(range(len(ranked)), [title for title, _ in ranked], fontsize=7)
    axis.set_xlabel(f"KL, as a share of that of “{rows[0][0]}”")
    axis.grid(False, axis="y")
    _legend(axis, fontsize=7)
    save_figure(figure, path)


def check_figure_format(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if the suffix of a path is no format for figures."""
    formats = FigureCanvasBase.get_supported_filetypes()
    if _format(path) not in formats:
        raise BadValue("path", os.fspath(path), f"a name that ends in one of .{', .'.join(sorted(formats))}")


def save_figure(figure: Figure, path: str | os.PathLike[str], title: str | None = None) -> None:
    """Write a figure atomically, in the format of the path's suffix."""
    if title is not None:
        figure.suptitle(title, fontsize=11, parse_math=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=_format(path))


def _figure(
    content: Any, path: str | os.PathLike[str], size: tuple[float, float], panels: int = 1
) -> tuple[Figure, list[Any]]:
    """An empty figure and its panels. Raises ValueError without content, or for an unknown format."""
    check_figure_format(path)
    if not content:
        raise BadValue("rows", content, "at least one row")
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])
    for axis in axes:
        axis.grid(color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axis: Any, **options: Any) -> None:
    """A legend of plain text, in which a dollar sign does not start a formula."""
    for text in axis.legend(frameon=False, **options).get_texts():
        text.set_parse_math(False)


def _format(path: str | os.PathLike[str]) -> str:
    return Path(path).suffix[1:].lower()
