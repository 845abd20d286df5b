"""Which configurations a folder takes, and what a refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import RunConfig, build_config, dump_config, load_config
from pipeline.config.load import with_values
from pipeline.errors import RunFolderError
from pipeline.files import ADAPTER_WEIGHTS, MANIFEST, publish_folder, read_json, write_json, write_text
from pipeline.run_folder.belongs import MOST_KEYS, differences, forget_untrained, holds_trainings, refuse_other
from pipeline.run_folder.chain import Origin
from pipeline.run_folder.paths import Folders, RunPaths, read_status, update_status
from pipeline.stages import processes, run
from pipeline.stages.processes import begin_training, start

CONFIG = build_config({"adapter": {"rank": 4}})
SOURCE = {"path": "x.jsonl", "splits": {"validation": "a", "calibration": "b", "test": "c"}}


def trained(folder: Path, config: RunConfig = CONFIG) -> RunPaths:
    """A run folder as `train` leaves it."""
    paths = RunPaths(folder)
    assert begin_training(config, folder)
    write_text(paths.metrics, '{"kind": "train", "step": 1}\n')

    def fill(adapter: Path) -> None:
        write_text(adapter / ADAPTER_WEIGHTS, "weights")
        write_json(adapter / MANIFEST, {"origin": Origin(config.training_sha256(), "all.shown").as_dict()})

    publish_folder(paths.adapter, fill)
    update_status(paths, "train", "done", config_sha256=config.training_sha256())
    return paths


def refusal(saved: RunConfig, given: RunConfig, folder: Path) -> str:
    write_text(folder / "config.yaml", dump_config(saved))
    with pytest.raises(RunFolderError) as caught:
        refuse_other(folder / "config.yaml", given, RunConfig.training_part)
    return str(caught.value)


def test_a_refusal_names_the_keys_with_both_values_and_what_the_folder_would_take(tmp_path: Path) -> None:
    given = with_values(CONFIG, {
        "train.seed": 9, "adapter.rank": 8, "ensemble.size": 16, "launch.processes": 2, "data.evaluation": SOURCE,
    })  # fmt: skip
    said = refusal(CONFIG, given, tmp_path)
    assert "belongs to another configuration: adapter.rank is 4 there and 8 here; train.seed is 0 there and 9" in said
    assert "it would take: data.evaluation, ensemble.size, launch.processes." in said
    assert f"--config {tmp_path / 'config.yaml'} has them all" in said
    said = refusal(CONFIG, with_values(CONFIG, {"data.template": {"prompt": "{a}" * 99, "label": "b"}}), tmp_path)
    assert "data.template is null there and {" in said and "…" in said and "it would take" not in said
    assert len(said) < 700


def test_a_refusal_of_many_keys_counts_the_rest(tmp_path: Path) -> None:
    values = dict.fromkeys(("seed", "draws", "keep_checkpoints", "global_batch", "micro_batch", "max_steps"), 7)
    other = {"model.path": "a/b", "data.seed": 7, "data.max_tokens": 7, "data.train_rows": 7, "adapter.rank": 7,
             "adapter.alpha": 7.0, "train.learning_rate": 0.7, "data.test_rows": 7, "train.weight_decay": 0.7}
    said = refusal(CONFIG, with_values(CONFIG, {**{f"train.{k}": v for k, v in values.items()}, **other}), tmp_path)
    assert said.count(" there and ") == MOST_KEYS and "; and 3 more" in said, said


def test_differences_are_of_leaves_and_of_what_is_no_leaf_on_one_side_alone() -> None:
    there, here = {"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 2, "c": [1], "e": 3}, "d": {"f": 1}}
    found = dict(differences(there, here))
    assert set(found) == {"a.b", "a.e", "d"} and found["a.b"] == (1, 2) and found["d"] == (None, {"f": 1})


def test_a_folder_in_which_nothing_was_trained_takes_any_configuration(tmp_path: Path) -> None:
    folder, other = tmp_path / "run", with_values(CONFIG, {"adapter.rank": 8, "train.seed": 3})
    paths = RunPaths(folder)
    assert begin_training(CONFIG, folder)
    update_status(paths, "train", "failed", "no such model", CONFIG.training_sha256())
    write_text(paths.diagnosis / "step_000001" / "x.json", "{}")  # it broke in its first step
    run.refuse_trained(Folders(folder))  # nothing that `train` made
    assert begin_training(other, folder) and load_config(paths.config) == other
    write_text(paths.metrics, '{"kind": "train", "step": 1}\n')
    with pytest.raises(RunFolderError, match=r"adapter\.rank is 8 there and 4 here"):
        begin_training(CONFIG, folder)
    with pytest.raises(RunFolderError, match="holds what `train` made"):
        run.refuse_trained(Folders(folder))


def test_while_a_training_runs_the_rows_that_its_validation_reads_are_its_own(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    assert begin_training(CONFIG, paths.root)
    write_text(paths.metrics, '{"kind": "train", "step": 1}\n')
    for key, value in (("data.evaluation", SOURCE), ("data.choice_score", "per_token")):
        with pytest.raises(RunFolderError, match=rf"configuration: {key}"):
            begin_training(with_values(CONFIG, {key: value}), paths.root)
    assert begin_training(with_values(CONFIG, {"ensemble.size": 2, "search.trials": 9}), paths.root)
    assert load_config(paths.config).ensemble.size == 2


def test_what_may_change_after_a_training_is_followed_and_nothing_is_trained_again(tmp_path: Path) -> None:
    paths = trained(tmp_path / "run")
    changed = with_values(CONFIG, {
        "ensemble.size": 16, "evaluate.ece_bins": 3, "export.draws": 2, "select.by": "nll", "label": "x",
        "data.evaluation": SOURCE, "data.choice_score": "per_token", "train.micro_batch": 1,
    })  # fmt: skip
    assert not begin_training(changed, paths.root)
    saved = load_config(paths.config)
    assert saved == with_values(changed, {"train.micro_batch": CONFIG.train.micro_batch}), "how it was trained stays"
    assert saved.training_sha256() == CONFIG.training_sha256()
    assert not begin_training(CONFIG, paths.root) and load_config(paths.config) == CONFIG
    with pytest.raises(RunFolderError, match=r"train\.seed is 0 there and 5 here\. Put"):
        begin_training(with_values(CONFIG, {"train.seed": 5}), paths.root)


def test_a_later_stage_writes_what_it_was_told_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, seen = trained(tmp_path / "run"), []
    monkeypatch.setattr(processes, "run_stage", lambda *_: seen.append(load_config(paths.config)) or 0)
    changed = with_values(CONFIG, {"export.draws": 3, "launch.processes": 2})
    assert start("export", changed, Folders(paths.root)) == 0
    assert [(one.export.draws, one.launch.processes) for one in seen] == [(3, CONFIG.launch.processes)]
    with pytest.raises(RunFolderError, match="was made from another configuration"):
        start("export", with_values(changed, {"train.seed": 4}), Folders(paths.root))
    assert load_config(paths.config) == seen[0], "what is refused changes nothing"
    assert read_status(paths)["export"]["state"] == "starting"


def test_a_search_without_a_step_leaves_nothing_behind(tmp_path: Path) -> None:
    for name in ("ledger.jsonl", "search.json", "config.yaml", "trials/trial_000/status.json"):
        write_text(tmp_path / name, "{}")
    assert not holds_trainings(tmp_path / "trials")
    forget_untrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    forget_untrained(tmp_path)
    write_text(tmp_path / "trials" / "trial_000" / "metrics.jsonl", "")
    assert holds_trainings(tmp_path / "trials")


def test_a_search_that_says_nothing_of_use_is_concluded_again(tmp_path: Path) -> None:
    folders = Folders(tmp_path / "run")
    for content in ("{}", "[]", "{", '{"best_config": {"data.path": "x"}}'):
        write_text(folders.search / "config.yaml", dump_config(CONFIG))
        write_text(folders.search / "search.json", content)
        assert run.trained_configs(CONFIG, folders) is None


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Folders, list[str]]:
    """A line whose trainings have ended, and the stages that it starts from now on."""
    folders, started = Folders(tmp_path / "run"), list[str]()
    write_text(folders.search / "config.yaml", dump_config(CONFIG))
    write_json(folders.search / "search.json", {"trials": [], "best_config": {"train.learning_rate": 0.1}})
    for config, folder in zip(run.chosen_configs(CONFIG, folders.search), (folders.run, folders.plain), strict=True):
        trained(folder, config)
    write_text(RunPaths(folders.run).requested, dump_config(CONFIG))

    def begun(name: str, config: RunConfig, its: Folders) -> int:
        assert name != "train" or not begin_training(config, its.run), "trained twice"
        started.append(name)
        return 0

    monkeypatch.setattr(run, "run_search", lambda *_: started.append("search") or 0)
    monkeypatch.setattr(run, "start", begun)
    monkeypatch.setattr(run, "print_outcome", lambda *_: None)
    return folders, started


AFTER = ["train", "train", "evaluate", "report", "export"]


def test_a_line_that_is_trained_is_read_again_under_other_settings(line: tuple[Folders, list[str]]) -> None:
    folders, started = line
    assert run.run_line(with_values(CONFIG, {"ensemble.size": 16, "export.draws": 1}), folders) == 0
    assert started == ["search", *AFTER], "which adapters of the search form an ensemble is concluded again"
    assert load_config(RunPaths(folders.run).config).ensemble.size == 16
    assert load_config(RunPaths(folders.plain).config).ensemble.size == 16
    started.clear()
    assert run.run_line(with_values(CONFIG, {"data.evaluation": SOURCE}), folders) == 0
    assert started == AFTER, "the search chose by the rows of before"
    assert load_config(RunPaths(folders.run).requested).data.evaluation is not None
    for key, value in (("train.seed", 9), ("search.trials", 9), ("data.seed", 9)):
        with pytest.raises(RunFolderError, match=rf"{key} is \d+ there and 9 here"):
            run.run_line(with_values(CONFIG, {key: value}), folders)


def test_a_line_takes_other_rows_once_both_trainings_have_ended(line: tuple[Folders, list[str]]) -> None:
    folders, _ = line
    elsewhere = with_values(CONFIG, {"data.evaluation": SOURCE})
    update_status(RunPaths(folders.plain), "train", "stopped")
    with pytest.raises(RunFolderError, match=r"data\.evaluation is null there"):
        run.run_line(elsewhere, folders)
    (RunPaths(folders.run).root / "config.yaml").unlink()
    for path in (folders.run, folders.plain):  # a first start that came no further than this
        RunPaths(path).metrics.unlink()
        for file in (RunPaths(path).adapter).iterdir():
            file.unlink()
        RunPaths(path).adapter.rmdir()
    started = line[1]
    with pytest.raises(AssertionError, match="trained twice"):
        run.run_line(with_values(elsewhere, {"train.seed": 9}), folders)
    assert started == ["search"] and read_json(folders.search / "search.json")
