"""Plots as inline SVG that follows the page's colours. No pyplot: nothing global is touched."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.inputs import TrainingCurve
from pipeline.report.tables import HEADINGS
from pipeline.scores.calibration import Reliability

_INK, _FAINT = "#010203", "#040506"
"""Stand-ins, replaced by the page's own colours so that dark pages work."""
COLOURS = {"base": "#8a8f98", "plain": "#d1700f", "mean_field": "#1f77c9", "masks": "#0a9484", "adapters": "#b0569b",
           "greedy": "#b59410", "fitted": "#7d6fd0", "adaptive": "#5f8f3e"}
"""Colour-blind-safe, readable on white and on black; by the first part of a system's key."""
METHOD_COLOURS = ("#d1700f", "#1f77c9", "#0a9484", "#b0569b", "#b59410", "#7d6fd0", "#c8504f", "#5f8f3e")
"""Of compared methods; the first is plain LoRA's."""
_PANELS_PER_ROW = 5
_STYLE: Any = {
    "font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "axes.titlesize": 10.5,
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _FAINT, "xtick.color": _INK, "ytick.color": _INK,
    "axes.grid": True, "grid.color": _FAINT, "grid.linewidth": 0.5, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9,
}
_MARKERS: dict[str, dict[str, Any]] = {"before": {"marker": "o", "mfc": "none"}, "after": {"marker": "o"}}
"""Of values before and after temperature scaling: hollow and filled."""


def colour(key: str) -> str:
    """Of a system, by its key; compared methods are numbered: method_2, variant_2_1 and ensemble_2 share a colour."""
    kind, _, number = key.partition("_")
    if kind in ("method", "variant", "ensemble"):
        return METHOD_COLOURS[int(number.partition("_")[0]) % len(METHOD_COLOURS)]
    return COLOURS.get(key if key in COLOURS else kind, _INK)


def draw(name: str, size: tuple[float, float], columns: int, fill: Callable[[list[Axes]], None], rows: int = 1) -> str:
    """An SVG element. `name` keeps the element ids of several plots on one page apart."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        fill(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _as_part_of_page(text.getvalue(), name)


def _as_part_of_page(svg: str, name: str) -> str:
    """Only the element, without metadata and outside names; sizes and colours left to the page."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    start, rest = svg.split(">", 1)
    start = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", start)
    start = start.replace("<svg", f'<svg id="{name}" role="img"')
    rest = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", rest)
    return f"{start}>{rest}".replace(_INK, "currentColor").replace(_FAINT, "var(--rule)")


def scores_plot(systems: Sequence[dict[str, Any]], scores: Sequence[str]) -> str:
    """One panel per score: every system with its interval, before (hollow) and after (filled) scaling."""

    def fill(axes: list[Axes]) -> None:
        for axis, score in zip(axes, scores, strict=True):
            for row, system in enumerate(systems):
                for scaling, shift in (("before", -0.13), ("after", 0.13)):
                    entry = system["test"].get(scaling, {}).get(score)
                    if entry is not None and not (score == "accuracy" and scaling == "after"):
                        ends = [[entry["value"] - entry["low"]], [entry["high"] - entry["value"]]]
                        axis.errorbar(entry["value"], row + shift, xerr=[[max(0.0, e[0])] for e in ends],
                                      color=colour(system["key"]), markersize=5, linewidth=1.2, **_MARKERS[scaling])
            axis.set_title(HEADINGS[score])
            axis.set_yticks(range(len(systems)), [s["name"] for s in systems] if axis is axes[0] else [])
            axis.set_ylim(len(systems) - 0.5, -0.5)
            axis.tick_params(axis="y", length=0)
            axis.grid(visible=False, axis="y")

    return draw("plot-scores", (11.0, 0.8 + 0.42 * len(systems)), len(scores), fill)


def training_plot(curves: Mapping[str, tuple[str, TrainingCurve]]) -> str:
    """Training loss and validation NLL by step; curves: system key -> (name, curve)."""

    def fill(axes: list[Axes]) -> None:
        for key, (name, curve) in curves.items():
            axes[0].plot(list(curve.loss), list(curve.loss.values()), color=colour(key), label=name, linewidth=1.4,
                         marker="o" if len(curve.loss) == 1 else None)
            steps, values = list(curve.validation_nll), list(curve.validation_nll.values())
            axes[1].plot(steps, values, color=colour(key), label=name, linewidth=1.4, marker="o", markersize=4)
        axes[0].set_title("Training loss per supervised token or row")
        axes[1].set_title("Validation NLL (nats)")
        for axis in axes:
            axis.set_xlabel("step")  # and no zero forced into sight: differences between curves would vanish
            axis.margins(y=0.1)
            axis.locator_params(axis="x", integer=True)
        axes[0].legend()

    return draw("plot-training", (11.0, 3.4), 2, fill)


def reliability_plot(panels: Sequence[tuple[str, str, Reliability, Reliability]]) -> str:
    """Accuracy against confidence; panels: (system key, name, before, after scaling)."""
    lowest = min(float(min(r.confidence.min(), r.accuracy.min())) for _, _, *both in panels for r in both)
    low = max(0.0, lowest - 0.1)

    def fill(axes: list[Axes]) -> None:
        for axis, (key, name, before, after) in zip(axes, panels, strict=False):
            axis.plot([low, 1], [low, 1], color=_FAINT, linewidth=1)
            for points, scaling, label in ((before, "before", "before"), (after, "after", "after temperature")):
                errors = 2.0 * np.sqrt(points.accuracy * (1.0 - points.accuracy) / points.rows)
                axis.errorbar(points.confidence, points.accuracy, errors, color=colour(key), linewidth=0.9,
                              elinewidth=0.5, markersize=5, label=label, **_MARKERS[scaling])
            axis.set(title=name, xlabel="confidence", xlim=(low, 1.02), ylim=(low, 1.03), aspect="equal")
        for axis in axes[len(panels):]:
            axis.set_visible(False)
        axes[0].set_ylabel("accuracy")
        axes[0].legend(loc="upper left")

    rows = -(-len(panels) // _PANELS_PER_ROW)
    columns = -(-len(panels) // rows)
    return draw("plot-reliability", (2.85 * columns, 3.2 * rows), columns, fill, rows)


def risk_coverage_plot(curves: Sequence[tuple[str, str, Mapping[str, Sequence[float]]]]) -> str:
    """Error rate among the surest rows by how many of the rows these are; curves: (system key, name, curve)."""

    def fill(axes: list[Axes]) -> None:
        for key, name, curve in curves:
            axes[0].plot(curve["coverage"], curve["risk"], color=colour(key), linewidth=1.4, label=name)
        axes[0].set(xlabel="share of rows answered, surest first", ylabel="error rate among them", xlim=(0.0, 1.0))
        axes[0].set_ylim(bottom=0.0)
        axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return draw("plot-risk-coverage", (11.0, 3.6), 1, fill)


def ensemble_plot(ensemble: Mapping[str, Any], lines: Sequence[tuple[str, str, dict[str, float]]]) -> str:
    """Test NLL (or squared error) by number of mask draws, one panel per scaling; band: spread between subsets.

    lines: (system key, name, scaling -> score) of systems to compare with.
    """
    scalings, score = list(ensemble["test"]), ensemble["score"]
    titles = {"before": "Before temperature scaling", "after": "After temperature scaling"}

    def fill(axes: list[Axes]) -> None:
        for axis, scaling in zip(axes, scalings, strict=True):
            curve, sizes = ensemble["test"][scaling], ensemble["sizes"]
            low, high = ([v + sign * s for v, s in zip(curve[score], curve[f"{score}_spread"], strict=True)]
                         for sign in (-1, 1))
            axis.fill_between(sizes, low, high, color=COLOURS["masks"], alpha=0.2, linewidth=0)
            axis.plot(sizes, curve[score], color=COLOURS["masks"], marker="o", markersize=4, label="mask ensemble")
            for key, name, values in lines:
                axis.axhline(values[scaling], color=colour(key), linewidth=1.2, linestyle="--", label=name)
            if chosen := ensemble["chosen_size"]:
                axis.axvline(chosen, color=_INK, linewidth=0.8, linestyle=":", label="chosen on validation")
            axis.set(title=titles[scaling], xlabel="mask draws averaged", xticks=sizes)
        axes[0].set_ylabel("test NLL (nats)" if score == "nll" else f"test {score.upper()}")
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return draw("plot-ensemble", (11.0, 3.4), len(scalings), fill)


def search_plot(trials: Sequence[Mapping[str, Any]], best: str | None) -> str | None:
    """Trials over the first two searched dimensions, coloured by validation NLL; None where no trial has one."""
    scored = [trial for trial in trials if trial.get("validation_nll") is not None]
    keys = _plotted_keys(scored)
    if not keys:
        return None
    x, y = keys[0], keys[1] if len(keys) > 1 else "validation_nll"

    def fill(axes: list[Axes]) -> None:
        axis, nll = axes[0], [trial["validation_nll"] for trial in scored]
        across = [trial["config"][x] for trial in scored]
        up = [trial["config"][y] if y in trial["config"] else trial["validation_nll"] for trial in scored]
        points = axis.scatter(across, up, c=nll, cmap="viridis", s=110, linewidths=0)
        for trial, right, top in zip(scored, across, up, strict=True):
            if trial.get("name") == best:
                axis.scatter([right], [top], s=260, facecolors="none", edgecolors=_INK)
            rank = trial["config"].get("adapter.rank")
            text = f"{trial['validation_nll']:.3f}" + (f"\nrank {rank}" if rank is not None else "")
            beside: dict[str, Any] = {"xytext": (11, 0), "textcoords": "offset points", "va": "center"}
            axis.annotate(text, (right, top), fontsize=8.5, **beside)
        axis.set(xlabel=x, ylabel="validation NLL" if y == "validation_nll" else y)
        if min(across) > 0 and max(across) / min(across) > 5:
            axis.set_xscale("log")
        axis.margins(0.15)
        axis.figure.colorbar(points, ax=axis, label="validation NLL (nats)")

    return draw("plot-search", (8.0, 4.0), 1, fill)


def _plotted_keys(scored: Sequence[Mapping[str, Any]]) -> list[str]:
    """Numeric dimensions that differ between trials: learning rate and dropout rate first."""
    configs = [trial.get("config", {}) for trial in scored]
    keys = [key for key in (configs[0] if configs else {}) if all(isinstance(c.get(key), int | float) for c in configs)]
    varied = [key for key in keys if len({config[key] for config in configs}) > 1] or keys
    preferred = ["train.learning_rate", "adapter.rate"]
    return sorted(varied, key=lambda key: (preferred.index(key) if key in preferred else len(preferred)))[:2]
