"""`loradrop doctor`: what of the machine, its packages and a configuration is not fit to run, and what mends it.

Works, as far as that goes, in a Python that has none of the packages; what may crash or hang is tried in a process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict

from pipeline.doctor.finding import Finding, failed, lines_of
from pipeline.doctor.machine import machine_findings
from pipeline.doctor.steps import configuration_step, machine_steps, run_steps
from pipeline.errors import EXIT_FAILED, EXIT_OK
from pipeline.plan.request import Request


def diagnose(request: Request) -> int:
    """Print what is found, line by line or as JSON; 1 where something has to be mended, else 0."""
    terminal = sys.stdout.isatty()
    columns = shutil.get_terminal_size().columns if terminal else 0
    found = []
    for one in findings(request):
        found.append(one)
        if not request.json:
            print(lines_of(one, columns, terminal and not os.environ.get("NO_COLOR")), flush=True)
    wrong = sum(one.state == "FAIL" for one in found)
    if request.json:
        print(json.dumps({"ok": not wrong, "findings": [asdict(one) for one in found]}, indent=2))
    else:
        print(f"\n{wrong} of {len(found)} to mend" if wrong else "\nfit to run")
    return EXIT_FAILED if failed(found) else EXIT_OK


def findings(request: Request) -> Iterator[Finding]:
    """The machine first. Without the packages nothing can be tried, and each trial would say the same."""
    missing = False
    for one in machine_findings():
        missing |= one.check in ("python", "packages") and "not installed" in one.detail
        yield one
    if missing:
        return
    steps = machine_steps()
    if request.source is not None or request.run_dir is not None or request.overrides or request.quick:
        steps = (*steps, configuration_step(request))
    yield from run_steps(steps)
