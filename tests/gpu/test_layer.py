"""The adapted linear as one function, in bfloat16, on a plain and on an NF4 base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.acceptance import Figures, norm_apart
from helpers.families import LORA_DROPOUT, examples, gradients, trained_start
from helpers.layers import MIXED, RANK, TOLERANCE, dense_results, hosted, results, rows_of, unequal_members
from torch import Tensor

from pipeline.adapters.attach import attach
from pipeline.adapters.fused import fuses
from pipeline.adapters.layout import split_layout
from pipeline.adapters.members import MaskKey
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.model import ModelConfig
from pipeline.loss.objective import SupervisedLM
from pipeline.model.load import load_base
from pipeline.support.tiny import tiny_decoder, tiny_tokenizer
from pipeline.training.batch import choose_rows, lay_out

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
precision = pytest.mark.parametrize("quantization", ["none", "nf4"])


@precision
def test_parity(quantization: str, device: torch.device, small: bool, figures: Figures) -> None:
    """Two adapters of one rank and one of another; members with masks, without, and without an adapter."""
    shape, rows, tokens = ((64, 128), 2, 5) if small else ((512, 768), 4, 64)
    adapters = hosted(BF16, shape=shape, device=device, quantized=quantization == "nf4")
    x = rows_of(len(MIXED), rows, tokens, BF16, shape[0])
    assert fuses(adapters.layers["linear"].base, x), "the plain path would be compared with itself"
    fused = results(adapters, MIXED, x, True)
    figures.close("fused, against the plain path", fused, results(adapters, MIXED, x, False), TOLERANCE[BF16])
    figures.close("fused, against dense float64", fused, dense_results(adapters, MIXED, x), TOLERANCE[BF16])


def test_unequal_members(device: torch.device, small: bool, figures: Figures) -> None:
    """Draws over rows that lie end to end have unequally many tokens, and some none."""
    shape, rank, times = ((64, 128), 4, 1) if small else ((512, 768), 16, 40)
    for kind, ours, theirs in unequal_members(BF16, shape, rank, device, times):
        figures.close(f"{kind}, against float64", ours, theirs, TOLERANCE[BF16])


@precision
def test_model(quantization: str, device: torch.device, tmp_path: Path, figures: Figures) -> None:
    """A model's gradients under LoRA Dropout, rows end to end: those in float32, as near as on the plain path.

    With activation checkpointing they are the same. The model is stored in bfloat16: 4 bits of a weight that is rounded
    first can be another number.
    """
    tiny_decoder().to(BF16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    def of(dtype: str, fused: bool = True, checkpointing: bool = False) -> dict[str, Tensor]:
        config = ModelConfig(path=str(tmp_path), quantization=quantization, compute_dtype=dtype, hold="quantized")  # type: ignore[arg-type]
        model = load_base(config, device).model
        spec = AdapterSpec(rank=4, sites=(*LORA_DROPOUT, RANK))
        adapters = trained_start(attach(model, [spec], "all-linear", seed=0, fused=fused))
        model.train()
        x = torch.zeros(1, dtype=getattr(torch, dtype), device=device)
        assert all(fuses(layer.base, x) for layer in adapters.layers.values())
        assert choose_rows(adapters, config.attention, 16) is None
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        rows = lay_out(adapters, examples([7, 5, 9, 6]), split_layout(range(4), 3), 2, MaskKey(1, 0))
        with adapters.axis.active(rows.plan):
            SupervisedLM(model)(**rows.model_tensors, row_weights=rows.weights).backward()
        return gradients(adapters)

    exact, plain, fused = of("float32", fused=False), of("bfloat16", fused=False), of("bfloat16")
    of_plain = norm_apart(plain, exact)
    figures.add("model, plain path against float32", f"{of_plain:.1e}", apart=of_plain)
    figures.within("model, fused against float32", norm_apart(fused, exact), 1.5 * of_plain + 0.01)
    figures.close("model, checkpointed against not", of("bfloat16", checkpointing=True), fused, 0.01)
