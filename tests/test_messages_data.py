"""Messages about rows that no other test reaches: what is wrong with them, and what is said (tests/messages.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.config import DataConfig, build_config, load_config
from pipeline.data.encode import encode_training
from pipeline.data.encode_classifier import encode_classification, encode_text
from pipeline.data.rows import Row
from pipeline.data.sources import Source, open_records
from pipeline.data.splits import Splits, load_splits, with_training_rows
from pipeline.data.stream import RowStream
from pipeline.ensemble.rows import RowForm
from pipeline.errors import DataError, UserError
from pipeline.plan import memory_table
from pipeline.plan.memory import NoPlan
from pipeline.serving.rows import ClassifyBody
from pipeline.support.tiny import encoder_tokenizer

EACH_TURN = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def forgetful() -> PreTrainedTokenizerFast:
    """A tokenizer that knows yes and no, and makes no token of perhaps."""
    words = Tokenizer(models.WordLevel({"yes": 0, "no": 1}))
    words.normalizer, words.pre_tokenizer = normalizers.Replace("perhaps", ""), pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=EACH_TURN)


def lines(path: Path, count: int) -> Path:
    rows = [{"prompt": f"the film {n}", "choices": [" good", " bad"], "label": n % 2} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_without_tokens_or_answers(forgetful: PreTrainedTokenizerFast) -> None:
    turns = ({"role": "user", "content": "no"}, {"role": "assistant", "content": "perhaps"})
    with pytest.raises(DataError, match="row a: has no tokens in the model's vocabulary. Leave the row out"):
        encode_training(Row("a", messages=turns), forgetful, 9)
    with pytest.raises(DataError, match="row a = 'perhaps': has no tokens in the model's vocabulary. Leave the row"):
        encode_text(Row("a", "perhaps", ("x", "y"), 0), forgetful, 9)
    with pytest.raises(DataError, match="row a: label: is missing. Give the index of the right choice"):
        encode_classification(Row("a", "the film", ("x", "y")), encoder_tokenizer(), 9)


def test_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.columns = \['a'\]: names columns of a local .csv or .tsv, and own/rows"):
        open_records(Source("own/rows", None, {"train": "train"}, columns=("a",)))
    path = lines(tmp_path / "rows.jsonl", 20)
    sizes: dict[str, Any] = {"validation_rows": 2, "calibration_rows": 2, "test_rows": 2}
    few = build_config({"data": {"sources": [{"path": str(path), "weight": 1e-9}], **sizes}}).data
    with pytest.raises(DataError, match="data.sources: leave no training row. Raise a weight"):
        load_splits(few)
    own = load_splits(DataConfig(path=str(path), **sizes))
    taught = DataConfig(path=str(path), train_path=str(path))
    every = Splits([], [], [], [*own.train, *own.validation, *own.calibration, *own.test], "")
    with pytest.raises(DataError, match="data.train_path = .*holds no row that the other splits do not own. Give"):
        with_training_rows(every, taught)


def test_streams(tmp_path: Path) -> None:
    config = DataConfig(path=str(lines(tmp_path / "rows.jsonl", 3)), streaming=True)
    owned = {("question", Row("", f"the film {n}").question) for n in range(3)}
    with pytest.raises(DataError, match="data.path = .*has no row that the other splits do not own. Give more rows"):
        next(RowStream(config, owned, "choice", 0).from_position(0))
    with pytest.raises(DataError, match="rows.jsonl:1: is a choice row among chat rows. Keep one kind"):
        next(RowStream(config, (), "chat", 0).from_position(0))


@pytest.mark.parametrize(
    ("form", "record", "said"),
    [
        (RowForm("choice", None, ("a", "b"), True), {"messages": [
            {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
        ]}, "row 1: is a chat row; the run answers choice rows. Leave it out."),
        (RowForm("choice", None, ("a", "b"), True), {"prompt": "Q", "choices": ["a", "c"]},
         "row 1: choices = ['a', 'c']: differ from ['a', 'b'], of which the model has an output each"),
    ],
)
def test_rows_of_another_form_than_the_runs(form: RowForm, record: dict[str, Any], said: str) -> None:
    (found,) = form.read([("row 1", record)])
    assert said in str(found)


def test_what_clients_send() -> None:
    with pytest.raises(DataError, match="text: stands for a row that needs one column; these need several.*Send"):
        ClassifyBody(text="Q").records(None)
    with pytest.raises(DataError, match="rows: are given in one way"):
        ClassifyBody().records("prompt")


@pytest.mark.parametrize("error", [
    UserError("model.path", "own/model", "is not in the cache"), DataError("data", None, "suits a causal model alone"),
])
def test_rows_that_cannot_be_planned_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: UserError) -> None:
    """The tokenizer is not there yet, or nobody knows of which kind the model is: a dry run says so, and goes on."""

    def absent(model: object) -> None:
        raise error

    monkeypatch.setattr(memory_table, "load_tokenizer", absent)
    config = load_config(None, [
        "model.path=own/model", f"data.path={lines(tmp_path / 'rows.jsonl', 20)}", "data.train_rows=5",
        "data.validation_rows=2", "data.calibration_rows=2", "data.test_rows=2",
    ])
    with pytest.raises(NoPlan, match=re.escape(str(error))):
        memory_table.expected_batch(config.data, config.model, packing=False)
