"""The papers' recipes: resolved without a network, against a transcription of the published values."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from pipeline.cli import main
from pipeline.config import RunConfig, TemplateConfig, load_config
from pipeline.config.load import RECIPES, find_recipe
from pipeline.data.template import to_row
from pipeline.errors import ConfigError
from pipeline.plan.resolve import resolve_epochs

PAPERS = sorted(path.stem for path in (RECIPES / "papers").glob("*.yaml"))
GLUE_COLUMNS: dict[str, dict[str, Any]] = {
    "mnli": {"premise": "A", "hypothesis": "B", "label": 2, "idx": 0},
    "sst2": {"sentence": "A", "label": 1, "idx": 0},
    "cola": {"sentence": "A", "label": 1, "idx": 0},
    "qqp": {"question1": "A", "question2": "B", "label": 1, "idx": 0},
    "qnli": {"question": "A", "sentence": "B", "label": 1, "idx": 0},
    "rte": {"sentence1": "A", "sentence2": "B", "label": 1, "idx": 0},
    "mrpc": {"sentence1": "A", "sentence2": "B", "label": 1, "idx": 0},
    "stsb": {"sentence1": "A", "sentence2": "B", "label": 3.8, "idx": 0},
}
ALPACA = {"instruction": "Say hello.", "input": "", "output": "Hello!"}
MMLU = {"question": "What?", "subject": "x", "choices": ["k", "l", "m", "n"], "answer": 3}
E2E = {"meaning_representation": "name[Blue Spice]", "human_reference": "A shop."}

# (learning rate, batch, epochs) of AdaLoRA's Table 8; (learning rate, epochs, batch, length) of HiddenKey's table.
LORA_DROPOUT = {
    "mnli": (5e-4, 32, 7), "rte": (1.2e-3, 32, 50), "qnli": (1.2e-3, 32, 5), "mrpc": (1e-3, 32, 30),
    "qqp": (5e-4, 32, 5), "sst2": (8e-4, 32, 24), "cola": (5e-4, 32, 25), "stsb": (2.2e-3, 32, 25),
}
HIDDENKEY = {
    "rte": (4e-4, 30, 64, 512), "mrpc": (3e-4, 30, 32, 512), "stsb": (3e-4, 10, 32, 128), "sst2": (4e-4, 10, 64, 512),
    "cola": (2e-4, 40, 32, 128), "qnli": (2e-4, 10, 32, 512),
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("--dry-run asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def config_of(name: str, *overrides: str) -> RunConfig:
    return load_config(f"papers/{name}", overrides)


def test_every_paper_experiment_has_its_recipe() -> None:
    expected = {f"deberta-v3-base-{task}" for task in LORA_DROPOUT} | {f"roberta-large-{task}" for task in HIDDENKEY}
    llama = {f"llama2-7b-{task}" for task in ("e2e", "rte", "mrpc", "alpaca-mmlu")}
    assert set(PAPERS) == expected | llama | {"gpt2-medium-e2e"}
    table = (RECIPES / "papers" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in table for name in PAPERS) and "None of these has been run here" in table


@pytest.mark.parametrize("name", PAPERS)
def test_every_recipe_passes_a_dry_run_without_a_network(
    name: str, no_network: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", f"papers/{name}", "--dry-run", "--run-dir", str(tmp_path / "run")]) == 0
    assert "epochs (counted in steps when the rows are read)" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", PAPERS)
def test_every_value_says_where_it_is_from(name: str) -> None:
    text = find_recipe(f"papers/{name}").read_text(encoding="utf-8")
    assert "Not run here" in text
    in_block = 0
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        if not line.strip() or line.startswith("#") or (in_block and depth > in_block):
            continue
        in_block = depth if re.search(r": \|-?\s", line) else 0
        if not line.split("  #")[0].rstrip().endswith(":"):
            assert re.search(r"  # (paper|ours)(: |$)", line), line


@pytest.mark.parametrize("task", LORA_DROPOUT)
def test_lora_dropout_has_the_published_values(task: str) -> None:
    config = config_of(f"deberta-v3-base-{task}")
    train, adapter = config.train, config.adapter
    assert (train.learning_rate, train.global_batch, train.epochs) == LORA_DROPOUT[task]
    assert (adapter.target_modules, adapter.rank, adapter.rescale) == ("all-linear", 8, "none")
    assert {site.position for site in adapter.resolved_method().sites} == {"lora_A", "lora_B"}
    assert (train.draw_layout, config.model.attention, config.model.path) == (
        "replicate", "eager", "microsoft/deberta-v3-base")
    adalora = config_of(f"deberta-v3-base-{task}", "adapter.kind=adalora").adapter
    assert adalora.adalora.initial_rank_for(adalora.rank) == 12


@pytest.mark.parametrize("task", HIDDENKEY)
def test_hiddenkey_has_the_published_values(task: str) -> None:
    config = config_of(f"roberta-large-{task}")
    train, adapter, method = config.train, config.adapter, config.adapter.resolved_method()
    assert (train.learning_rate, train.epochs, train.global_batch, config.data.max_tokens) == HIDDENKEY[task]
    assert (train.weight_decay, train.warmup_fraction, train.schedule) == (0.1, 0.06, "linear")
    assert (adapter.rank, adapter.alpha) == (8, 16.0)
    assert [(site.position, site.pattern) for site in method.sites] == [
        ("attention_logits", "column"), ("ffn_hidden", "element")]
    assert (method.consistency.kind, method.consistency.branches, train.draws) == ("kl", "one", 2)
    minus = config_of(f"roberta-large-{task}", "adapter.method=hiddenkey_minus", "adapter.consistency={}")
    assert minus.adapter.resolved_method().consistency.kind == "none"
    baseline = config_of(
        f"roberta-large-{task}", "adapter.method=none", "adapter.rates={}", "adapter.consistency={}")
    assert baseline.adapter.resolved_method().sites == ()


def test_the_decoders_have_the_published_values() -> None:
    gpt2 = config_of("gpt2-medium-e2e")
    assert (gpt2.train.weight_decay, gpt2.train.warmup_steps, gpt2.train.learning_rate) == (0.01, 500, 2e-4)
    assert (gpt2.train.epochs, gpt2.train.global_batch, gpt2.train.label_smoothing) == (5, 8, 0.1)
    assert (gpt2.adapter.rank, gpt2.adapter.alpha) == (4, 32.0)
    for task, epochs, batch in (("rte", 10, 64), ("mrpc", 8, 32)):
        llama = config_of(f"llama2-7b-{task}")
        assert (llama.train.epochs, llama.train.global_batch, llama.train.learning_rate) == (epochs, batch, 5e-4)
        assert (llama.adapter.rank, llama.adapter.alpha, llama.model.kind) == (8, 16.0, "classifier")
    for name in ("gpt2-medium-e2e", "llama2-7b-e2e", "llama2-7b-rte"):
        assert all(site.layers == "auto" for site in config_of(name).adapter.resolved_method().sites)


@pytest.mark.parametrize("name", PAPERS)
def test_templates_fit_the_columns_of_the_data(name: str) -> None:
    config = config_of(name)
    task = name.rpartition("-")[2]
    record = {"mmlu": ALPACA, "e2e": E2E}.get(task) or GLUE_COLUMNS[task]
    row = to_row(record, config.data.template, "train:1")
    pair = {"A", "B"} <= set(record.values())
    if task in GLUE_COLUMNS:
        assert config.data.path == f"nyu-mll/glue:{task}" and config.data.test_rows is None
        assert (row.second == "B") == (pair and not name.startswith("llama"))
        assert row.kind == ("regression" if task == "stsb" else "choice")
        assert row.score == 3.8 if task == "stsb" else row.label == record["label"]
        own = {"mnli": "validation_matched"}.get(task, "validation")
        assert config.data.splits == {"train": "train", "test": own}
    elif task == "e2e":
        assert (row.prompt, row.completion) == ("name[Blue Spice]\n", "A shop.")
    else:
        assert row.completion == "Hello!" and row.prompt.endswith("### Response:\n") and "Say hello." in row.prompt
        assert config.data.evaluation is not None
        question = to_row(MMLU, config.data.evaluation.template or TemplateConfig(), "test:1")
        assert question.prompt == "What?\nA. k\nB. l\nC. m\nD. n\nAnswer:" and question.choices[3] == " D"
        assert question.label == 3


def test_a_recipe_runs_on_rows_of_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RTE's 2,490 and 277 rows: 50 epochs of the 2,090 that are left to train on are 3,266 steps of 32."""
    import datasets

    def load(name: str, variant: str, streaming: bool) -> datasets.DatasetDict:
        assert (name, variant) == ("nyu-mll/glue", "rte")
        sizes = {"train": 2490, "validation": 277, "test": 3}
        return datasets.DatasetDict({
            split: datasets.Dataset.from_list([
                {"sentence1": f"{split} {i}", "sentence2": "B", "label": -1 if split == "test" else i % 2, "idx": i}
                for i in range(size)
            ])
            for split, size in sizes.items()
        })

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert resolve_epochs(config_of("deberta-v3-base-rte")).train.max_steps == -(-50 * 2090 // 32)


def test_recipes_are_found_by_name_and_not_outside_the_folder() -> None:
    assert find_recipe("papers/gpt2-medium-e2e") == RECIPES / "papers" / "gpt2-medium-e2e.yaml"
    for name in ("papers/gpt2-large-e2e", "../config/x", "papers/../../config/x"):
        with pytest.raises(ConfigError, match=r"neither a file nor a recipe.*papers/gpt2-medium-e2e"):
            find_recipe(name)
    for name in PAPERS:
        assert yaml.safe_load(find_recipe(f"papers/{name}").read_text(encoding="utf-8"))["model"]
