"""report.html: one file, no script, no request to anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline import __version__
from pipeline.report import plots, tables
from pipeline.report.also.tables import also_tables
from pipeline.report.comparison import training_table
from pipeline.report.generated import texts_tables
from pipeline.report.inputs import ReportInputs
from pipeline.report.remarks import chance_line
from pipeline.report.scoring import AFTER, BEFORE, ScoredSystem
from pipeline.report.uncertainty.tables import rater_table, row_lists, uncertainty_table
from pipeline.scores.calibration import reliability

_TEMPLATE = "page.html"
_ROWS_PER_POINT = 40
"""At least so many rows behind a point of a reliability diagram."""
_LINES_IN_ENSEMBLE_PLOT = ("base", "plain", "mean_field")


def render_page(inputs: ReportInputs, result: dict[str, Any], scored: Sequence[ScoredSystem]) -> str:
    """The page's HTML. Everything that is not a plot is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )
    search = inputs.search
    return environment.get_template(_TEMPLATE).render(
        result=result,
        name=inputs.paths.root.resolve().name,
        version=__version__,
        summary=tables.summary_table(result),
        scaled=tables.scaled_table(result),
        chance=chance_line(result),
        comparisons=tables.comparison_table(result),
        uncertainty=uncertainty_table(result),
        raters=rater_table(result),
        rows_to_see=row_lists(result, inputs.test_rows),
        trials=tables.trial_table(search) if search else None,
        plain_trials=tables.trial_table(search["plain"]) if search and search.get("plain") else None,
        plots={name: Markup(svg) for name, svg in _plots(inputs, result, scored).items() if svg is not None},
        reliability_bins=_reliability_bins(inputs),
        config=inputs.config_text,
        environment=tables.flatten(inputs.environment),
        also=also_tables(result),
        texts=texts_tables(result),
        trainings=training_table(result) if inputs.trainings is not None else None,
    )


def _plots(inputs: ReportInputs, result: dict[str, Any], scored: Sequence[ScoredSystem]) -> dict[str, str | None]:
    scores = {"choice": ("accuracy", "nll", "ece"), "regression": ("pearson", "spearman", "rmse")}
    return {
        "scores": plots.scores_plot(result["systems"], scores.get(inputs.kind, ("nll",))),
        "training": _training(inputs, scored),
        "reliability": _reliability(inputs, scored) if inputs.kind == "choice" else None,
        "risk_coverage": _risk_coverage(result, scored) if inputs.kind == "choice" else None,
        "ensemble": _ensemble(result),
        "search": plots.search_plot(inputs.search.get("trials", ()), inputs.search.get("best"))
        if inputs.search else None,
    }


def _training(inputs: ReportInputs, scored: Sequence[ScoredSystem]) -> str | None:
    systems = [one.system for one in scored if one.system.curve in inputs.curves]
    curves = {system.key: (system.name, inputs.curves[str(system.curve)]) for system in systems}
    return plots.training_plot(curves) if curves else None


def _reliability(inputs: ReportInputs, scored: Sequence[ScoredSystem]) -> str:
    labels, bins = inputs.splits["test"].labels, _reliability_bins(inputs)
    panels = []
    for one in _few_systems(scored):
        before, after = (reliability(one.predictions["test", scaling][0], labels, bins) for scaling in (BEFORE, AFTER))
        panels.append((one.system.key, one.system.name, before, after))
    return plots.reliability_plot(panels)


def _few_systems(scored: Sequence[ScoredSystem]) -> list[ScoredSystem]:
    """The single predictors (of a comparison, as validation chose them), and the largest mask ensemble (the adapter
    ensemble where there is none)."""
    singles = [one for one in scored if one.system.key.startswith(("base", "plain", "mean_field", "method_"))]
    ensembles = [one for one in scored if one.system.key.startswith("masks_")] or \
                [one for one in scored if one.system.key.startswith("adapters_")]
    return [*singles, *ensembles[-1:]]


def _risk_coverage(result: dict[str, Any], scored: Sequence[ScoredSystem]) -> str:
    shown = [one.system for one in _few_systems(scored)]
    curves = [(system.key, system.name, result["risk_coverage"][system.key]) for system in shown]
    return plots.risk_coverage_plot(curves)


def _reliability_bins(inputs: ReportInputs) -> int:
    """Fewer than the ECE has, so that a point is more signal than noise."""
    return max(2, min(inputs.config.evaluate.ece_bins, inputs.splits["test"].rows // _ROWS_PER_POINT))


def _ensemble(result: dict[str, Any]) -> str | None:
    if result["ensemble"] is None:
        return None
    score = result["ensemble"]["score"]
    lines = [
        (system["key"], system["name"], {scaling: scores[score]["value"] for scaling, scores in system["test"].items()})
        for system in result["systems"] if system["key"] in _LINES_IN_ENSEMBLE_PLOT
    ]
    return plots.ensemble_plot(result["ensemble"], lines)
