"""What a stock tool may differ by, and a clean process that cannot load what it is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.families import adapted_llama

from pipeline.adapters.peft_format import adapter_matrices, write_adapter
from pipeline.adapters.spec import AdapterSpec
from pipeline.export.order import ParityError
from pipeline.export.parity import judged, stock_logits
from pipeline.model.load import BaseIdentity
from pipeline.support.tiny import write_tiny_model

BASE, OURS = np.zeros((2, 5)), np.full((2, 5), 2.0)


def test_a_difference_is_measured_by_the_adapters_effect() -> None:
    found = judged("x: tool", OURS, BASE, OURS + 0.09, BASE)
    assert found == {
        "max_difference": pytest.approx(0.09), "max_effect": 2.0, "ratio": pytest.approx(0.045), "base_noise": 0.0,
    }
    assert judged("x: tool", OURS, BASE, OURS + 0.11, BASE, noise=0.02)["base_noise"] == 0.02


@pytest.mark.parametrize(
    ("ours", "theirs", "noise", "said"),
    [
        (BASE, BASE, 0.0, "the adapter has no effect"),  # of ours
        (OURS, BASE, 0.0, "the adapter has no effect"),  # the tool left it out
        (OURS, OURS + 0.11, 0.0, r"x: tool differs by 0.11 where the adapter's whole effect is 2 \(allowed: 5%\)"),
        (OURS, OURS * np.nan, 0.0, "differs by nan"),
        (OURS, OURS, 0.6, "the bare base differs by 0.6"),  # an effect that could hide in the noise
    ],
)
def test_what_is_no_export_is_an_error(ours: np.ndarray, theirs: np.ndarray, noise: float, said: str) -> None:
    with pytest.raises(ParityError, match=said):
        judged("x: tool", ours, BASE, theirs, BASE, noise)


@pytest.mark.slow
def test_a_rank_that_is_not_what_the_configuration_says_is_named(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    spec = AdapterSpec(rank=4)
    adapters = adapted_llama(spec, layers=2)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", adapter_matrices(adapters.layers, 0), spec, 2, "tiny", adapters.suffixes)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"r": {spec.rank}', f'"r": {spec.rank + 1}'))
    identity = BaseIdentity("tiny", str(model), None, "none", False, "float32", 0, 0)
    with pytest.raises(ParityError, match=r"adapter cannot be loaded by stock(.|\n)*size mismatch"):
        stock_logits(identity, [[3, 4, 5]], "cpu", [tmp_path / "adapter"], False)
