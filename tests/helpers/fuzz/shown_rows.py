"""`loradrop data` on what other kinds make of rows and templates: what it shows must not rule a terminal."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from helpers.fuzz import data_files, templates
from helpers.fuzz.case import Case


def make(random: Random) -> Case:
    case = random.choice((data_files.make, templates.make))(random)
    argv = ["data", *case.argv[case.argv.index("--run-dir") :]]
    return replace(case, kind="shown_rows", argv=tuple(argv), may_change=("home/.cache/loradrop/",))
