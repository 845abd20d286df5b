"""Wrong keys: what other tools call a setting is answered with our name; guesses are made only where they are near."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import ROOT

from pipeline.config import load_config
from pipeline.config.load import config_keys
from pipeline.config.names import foreign
from pipeline.config.names.foreign import FOREIGN
from pipeline.config.names.hints import nearest, way_out
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError

KEYS = tuple(config_keys())
WRONG = {
    # names of other tools
    "lora_r=8": "Here: adapter.rank.",
    "adapter.r=8": "Here: adapter.rank.",
    "lora_alpha=16": "Here: adapter.alpha.",
    "adapter.lora_dropout=0.1": "Here: adapter.rate and adapter.method; dropout of the adapter's input, PEFT's, is",
    "use_dora=true": "DoRA is not offered",
    "modules_to_save=[lm_head]": "Here: model.kind; a classifier's new head is trained",
    "loraplus_lr_ratio=16": "Here: train.lora_plus_ratio.",
    "base_model=x": "Here: model.path.",
    "model_name_or_path=x": "Here: model.path.",
    "model.name=x": "Here: model.path.",
    "load_in_4bit=true": "Here: model.quantization; true is nf4",
    "load_in_8bit=true": "Here: model.quantization; true is int8.",
    "bf16=true": "Here: model.compute_dtype; bfloat16",
    "torch_dtype=auto": "Here: model.compute_dtype;",
    "attn_implementation=flash_attention_2": "Here: model.attention; sdpa, which takes a flash kernel",
    "train.batch_size=8": "Here: train.global_batch and train.micro_batch;",
    "per_device_train_batch_size=8": "Here: train.micro_batch;",
    "gradient_accumulation_steps=4": "Here: train.global_batch; accumulation follows",
    "num_train_epochs=3": "Here: train.epochs.",
    "lr_scheduler_type=cosine": "Here: train.schedule.",
    "warmup_ratio=0.1": "Here: train.warmup_fraction.",
    "max_grad_norm=1": "Here: train.max_gradient_norm.",
    "eval_steps=10": "Here: train.validate_every_steps;",
    "save_total_limit=2": "Here: train.keep_checkpoints.",
    "output_dir=out": "Give the folder as --run-dir.",
    "report_to=wandb": "Here: logging.wandb and logging.tensorboard;",
    "gradient_checkpointing=true": "Here: train.activation_checkpointing.",
    "max_seq_length=2048": "Here: data.max_tokens.",
    "cutoff_len=2048": "Here: data.max_tokens.",
    "dataset=x": "Here: data.path.",
    "val_set_size=0.1": "Here: data.validation_rows; a number of rows.",
    "train_on_inputs=false": "Only answers are trained on",
    "lora.r=8": "Here: adapter; a section: see loradrop keys adapter.",
    "max_steps=4": "Here: train.max_steps; search.max_steps is the length of a trial.",
    # ours, without the section or in another one
    "learning_rate=1e-4": "Here: train.learning_rate.",
    "train.rank=8": "Here: adapter.rank.",
    "template=x": "There are data.sources.template, data.template, data.evaluation.template, evaluate.also.template.",
    # ours, misspelt
    "trian.max_steps=4": "Did you mean train?",
    "adapter.rnak=4": "Did you mean adapter.rank?",
    "epoch=3": "Did you mean train.epochs?",
    "train.lerning_rate=3": "Did you mean train.learning_rate?",
    "compare.method=[none]": "Did you mean compare.methods?",  # though there is adapter.method
    # nothing that we know
    "train.foo=3": "See loradrop keys train.",
    "adapter.rates.everywhere=0.1": "See loradrop keys adapter.rates.",
    "foo=3": "See loradrop keys.",
    "adapter=lora": "is a section of keys, not a key with a value. See loradrop keys adapter.",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_key_is_answered_with_the_right_one(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert WRONG[override] in str(caught.value) and str(caught.value).startswith(override.split("=")[0].split(".")[0])


@pytest.mark.parametrize("name", FOREIGN)
def test_every_answer_to_another_tools_name_is_true(name: str) -> None:
    """It names keys that there are, is a sentence, and the name is none of ours."""
    found = FOREIGN[name]
    assert name not in KEYS and set(found.here) <= set(KEYS)
    sections = "|".join(RunConfig.model_fields)
    assert set(re.findall(rf"\b(?:{sections})\.[\w.]*\w", found.note)) <= set(KEYS)
    assert str(found)[0].isupper() and str(found).endswith(".") and way_out(name, KEYS) == str(found)


def test_no_name_is_listed_twice_and_there_are_enough() -> None:
    names = [name for names, _, _ in foreign._TABLE for name in names.split()]
    assert len(names) == len(set(names)) >= 60 and len(WRONG) >= 40


def test_what_is_not_near_is_no_guess() -> None:
    """All of a section are alike in its name; that made train.spike of train.batch_size."""
    assert nearest("train.batch_size", KEYS) is None
    assert nearest("nothing", KEYS) is None and nearest("smoothin", KEYS) == "search.early_exit.smoothing"
    assert nearest("train.seeed", KEYS) == "train.seed"
    assert nearest("evaluation.ece_bins", KEYS) == "evaluate.ece_bins"


def test_names_are_answered_where_only_some_keys_may_stand() -> None:
    """A search and a comparison vary some keys only: what they cannot vary is not offered."""
    some = ["adapter.rank", "train.draws"]
    assert way_out("lora_r", some) == "Here: adapter.rank."
    assert "model.path" not in way_out("base_model", some)


def test_the_document_has_the_same_table() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    table = [line for line in text.partition("## Names of other tools")[2].splitlines() if line.startswith("| `")]
    assert len(table) == len(foreign._TABLE)
    for line, (names, here, note) in zip(table, foreign._TABLE, strict=True):
        left, right = line.removeprefix("| ").removesuffix(" |").split(" | ")
        assert left == ", ".join(f"`{name}`" for name in names.split())
        assert right.startswith(" and ".join(f"`{key}`" for key in here)) and right.endswith(note)


def test_a_key_with_dots_in_a_file_is_told_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("adapter.adalora.interval: 8\n")
    with pytest.raises(ConfigError, match="a key stands in its section: adapter: {adalora: {interval: …}}."):
        load_config(tmp_path / "mine.yaml")
