"""The report stage: joins cached predictions with labels, scores them, writes result.json and report.html.

It alone reads test labels. It runs no model and needs no training or evaluation code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.files import MANIFEST, read_json, sha256_file, write_json, write_text
from pipeline.report.also.tables import format_also
from pipeline.report.comparison import build_comparison, format_comparison
from pipeline.report.generated import format_texts, texts_entry
from pipeline.report.inputs import read_inputs
from pipeline.report.page import render_page
from pipeline.report.result import build_result
from pipeline.report.tables import format_table
from pipeline.run_folder.paths import RunPaths, update_status
from pipeline.terminal import one_line


def write_report(run_dir: Path) -> dict[str, Any]:
    """Score the cached predictions of a run; write result.json and report.html; return the content of the former.

    Raises:
        RunFolderError: config.yaml or a prediction file is missing or damaged, or the predictions are of other
            rows than the configured data has.
    """
    inputs = read_inputs(run_dir)
    if inputs.trainings is None:
        result, scored = build_result(inputs)
    else:
        result, scored = build_comparison(inputs, inputs.trainings)
    if inputs.texts is not None:
        names = {system["key"]: system["name"] for system in result["systems"]}
        result["texts"] = texts_entry(inputs.texts, inputs.config, names)
    page = render_page(inputs, result, scored)
    write_json(inputs.paths.result, result)
    write_text(inputs.paths.report, page)
    made = {path.name: sha256_file(path) for path in (inputs.paths.result, inputs.paths.report)}
    update_status(inputs.paths, "report", "running", made=made)
    return result


def print_result(paths: RunPaths) -> None:
    """The tables of result.json."""
    result = read_json(paths.result)
    print(format_comparison(result) if paths.comparison.exists() else format_table(result))
    if "also" in result:
        print(format_also(result))
    if "texts" in result:
        print(format_texts(result["texts"]))


def print_report(run_dir: Path) -> None:
    """The table on the terminal of a run's or comparison's result.json, and where its page lies."""
    paths = RunPaths(run_dir)
    print_result(paths)
    print(f"\n  report   {one_line(os.path.relpath(paths.report))}")
    manifest = paths.export / MANIFEST
    if manifest.exists() and read_json(manifest).get("result_sha256") != sha256_file(paths.result):
        print("  export   is of an earlier report: export again")
