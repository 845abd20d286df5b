"""Public data sets as they come, where they are at hand (../shared/data; never needed by a user)."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from helpers import ROOT
from transformers import AutoTokenizer

from pipeline.config import DataConfig, TemplateConfig
from pipeline.data.check import check_data
from pipeline.data.encode import encode_candidates
from pipeline.data.rows import Row
from pipeline.data.splits import Splits, load_splits
from pipeline.model.embedded import embedded_folder

SHARED = ROOT.parent / "shared" / "data"


def load(name: str, template: TemplateConfig, **config: Any) -> Splits:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not in ../shared/data")
    data = DataConfig(path=str(path), template=template, **config)
    check_data(data)
    return load_splits(data)


def test_rte_pairs_in_tsv() -> None:
    template = TemplateConfig(
        prompt="{sentence1}\nDoes it follow that: {sentence2}\nAnswer:",
        choices=(" entailment", " not_entailment"),
        label="label",
    )
    splits = load("glue_rte/train.tsv", template)
    total = [splits.train, splits.validation, splits.calibration, splits.test]
    assert sum(map(len, total)) + splits.repeated == 2490
    assert 0.4 < sum(row.label == 0 for row in splits.test) / len(splits.test) < 0.6


@pytest.mark.parametrize(("name", "count"), [("arc_easy/ARC-Easy.train.json", 2251),
                                             ("openbookqa/openbookqa.train.json", 4957)])
def test_multiple_choice_in_json_arrays(name: str, count: int) -> None:
    template = TemplateConfig(
        prompt="{instruction}\nThe correct answer is", choices=tuple(f" answer{i}" for i in range(1, 6)), label="answer"
    )
    splits = load(name, template)
    rows = [row for part in (splits.train, splits.validation, splits.calibration, splits.test) for row in part]
    assert len(rows) + splits.repeated == count
    assert all(f"Answer{row.label + 1}" in row.prompt for row in rows if row.label is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc_easy/ARC-Easy.test.json", "openbookqa/openbookqa.train.json"])
def test_rows_with_a_choice_that_begins_another(name: str) -> None:
    """Answers written out: those that are closed are those whose tokens a comparison of all pairs finds."""
    folder = embedded_folder("embedded:smollm2-135m-instruct")
    if folder is None or not (SHARED / name).is_file():
        pytest.skip(f"{name} is not in ../shared/data, or the embedded model not in the cache")
    tokenizer, closed, rows = AutoTokenizer.from_pretrained(folder), 0, 0
    for number, record in enumerate(json.loads((SHARED / name).read_text(encoding="utf-8"))):
        listed = record["instruction"].partition("\n\n")[2].partition("\n\nAnswer format")[0]
        texts = [f" {text.strip()}" for text in re.split(r"Answer\d: ", listed)[1:]]
        if len(set(texts)) < len(texts) or len(texts) < 2 or not all(text.strip() for text in texts):
            continue
        alone = [tokenizer(text)["input_ids"] for text in texts]
        wanted = any(a != b and b[: len(a)] == a for a in alone for b in alone)
        row = Row(str(number), record["instruction"], tuple(texts), 0)
        found = {one.input_ids[-1] == tokenizer.eos_token_id for one in encode_candidates(row, tokenizer, 512)}
        assert found == {wanted}
        closed, rows = closed + wanted, rows + 1
    print(f"{name}: {closed} of {rows} rows")
    assert 0 < closed < rows / 10


def test_e2e_keeps_the_texts_of_one_meaning_together() -> None:
    splits = load("e2e/devset.csv", TemplateConfig(prompt="{mr}\n", completion="{ref}"))
    parts = (splits.train, splits.validation, splits.calibration, splits.test)
    owners = [{row.prompt for row in part} for part in parts]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 547
    assert len(splits.test) == 400


def test_alpaca_instructions() -> None:
    template = TemplateConfig(prompt="{instruction}\n{input}\n", completion="{output}")
    sizes = {"validation_rows": 200, "calibration_rows": 200, "test_rows": 100}
    splits = load("alpaca_en_1k/alpaca_en_demo.json", template, **sizes)
    assert len(splits.train) == 999 - splits.repeated - 500
    assert all(row.completion for row in splits.train)


def test_banking77_has_77_choices() -> None:
    path = SHARED / "banking77/train.csv"
    if not path.is_file():
        pytest.skip("banking77/train.csv is not in ../shared/data")
    names = sorted({line.rpartition(",")[2] for line in path.read_text(encoding="utf-8").splitlines()[1:]
                    if " " not in line.rpartition(",")[2] and "," in line})
    template = TemplateConfig(prompt="{text}\nIntent:", choices=tuple(f" {name}" for name in names), label="category")
    splits = load("banking77/train.csv", template)
    assert len(names) == 77 and len({row.label for row in splits.train}) == 77
