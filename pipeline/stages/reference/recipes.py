"""`loradrop recipes`: what `--config NAME` takes."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path

from pipeline.config.load import recipe_files
from pipeline.errors import EXIT_OK
from pipeline.plan.request import Request


def show_recipes(request: Request) -> int:
    """Print every recipe's name and what it is."""
    recipes = {name: summary(path) for name, path in recipe_files().items()}
    if request.json:
        print(json.dumps(recipes, ensure_ascii=False, indent=2))
        return EXIT_OK
    width = shutil.get_terminal_size((80, 24)).columns
    column = max(map(len, recipes)) + 2
    for name, text in recipes.items():
        start, rest = f"{name:{column}}", " " * column
        print(textwrap.fill(text, width, initial_indent=start, subsequent_indent=rest, break_on_hyphens=False))
    print("\nTake one with --config NAME. Those of the papers have the published values;\nnone has been run here yet.")
    return EXIT_OK


def summary(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line.lstrip("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]
    sentence, _, _ = " ".join(comment).partition(". ")
    return sentence.rstrip(".") + "."
