"""A model folder whose files are damaged or contradict themselves: refused by its name, whoever reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.model.kind import local_kind
from pipeline.model.load import load_skeleton

DESCRIPTIONS = {
    "no JSON": "{", "no mapping": "[]", "deep": "[" * 99_999, "a long number": '{"vocab_size": ' + "9" * 9_999 + "}",
    "an unknown family": '{"model_type": "nope"}', "a family that is no name": '{"model_type": ["llama"]}',
    "a size that is no number": '{"model_type": "llama", "hidden_size": "x"}',
    "sizes that do not fit": '{"model_type": "llama", "hidden_size": 7, "num_attention_heads": 3}',
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_damaged_configuration_is_refused_by_the_model_s_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(DESCRIPTIONS[name])
    config = ModelConfig(path=str(tmp_path))
    with pytest.raises(ConfigError, match=rf"model\.path = '{tmp_path}'"):
        local_kind(config)
        load_skeleton(config)


def test_architectures_of_another_kind_name_no_classifier(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": 5}')
    assert local_kind(ModelConfig(path=str(tmp_path))) == "causal"
