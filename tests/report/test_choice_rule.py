"""A report under another `data.choice_score` than the predictions were made under."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from helpers.runs import write_predicted

from pipeline.config import RunConfig, build_config
from pipeline.config.load import dump_config
from pipeline.data.splits import EVALUATED_SPLITS, load_splits
from pipeline.files import write_json, write_text
from pipeline.report.inputs import read_inputs
from pipeline.run_folder.members import PredictedMember, write_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import ChoicePredictions
from pipeline.scores.choices import ChoiceLikelihoods, ChoiceScore


def test_changing_the_rule_in_the_saved_configuration_changes_the_scores(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"film {i}", "choices": [" no", " not at all"], "label": i % 2}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    paths = RunPaths(tmp_path / "run")

    def configured(rule: ChoiceScore) -> RunConfig:
        sizes = {f"{split}_rows": 8 for split in EVALUATED_SPLITS}
        data = {"path": str(tmp_path / "rows.jsonl"), "choice_score": rule, **sizes}
        config = build_config({"data": data})
        write_text(paths.config, dump_config(config))
        return config

    splits = load_splits(configured("sum").data)
    write_members(paths.predictions, [PredictedMember("base", "base")])
    write_json(paths.environment, {"device": "cpu"})
    kept: dict[str, ChoiceLikelihoods] = {}
    for split in EVALUATED_SPLITS:
        ids = tuple(row.id for row in getattr(splits, split))
        found = -10 * np.random.default_rng(0).random((1, len(ids), 2))
        tokens, characters = np.full((len(ids), 2), (1, 3)), np.full((len(ids), 2), (2, 10))
        kept[split] = ChoiceLikelihoods(found, tokens, characters)
        write_predicted(paths.root, split, ChoicePredictions.of_texts(ids, kept[split], "sum"), splits.fingerprint)
    tables = []
    for rule in ("sum", "per_token", "per_character"):
        configured(rule)
        inputs = read_inputs(paths.root)
        for split in EVALUATED_SPLITS:
            assert np.array_equal(inputs.splits[split].outputs, kept[split].log_probs(rule))
        tables.append(inputs.splits["test"].outputs)
    assert not np.array_equal(tables[0], tables[1]) and not np.array_equal(tables[1], tables[2])
