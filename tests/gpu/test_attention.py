"""DropKey, DropAttention and HiddenCut on the attention that a GPU takes: PyTorch's fused kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.acceptance import Figures, norm_apart
from helpers.attention_heads import FORMS, heads_of, model_masks, some_drops, visible_to
from helpers.attention_reference import dense_attention
from helpers.attention_rounding import output_bound
from helpers.families import examples, gradients, trained_start
from helpers.site_models import compare_with_reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.adapters.attach import attach
from pipeline.adapters.layout import training_layout
from pipeline.adapters.members import MaskKey
from pipeline.adapters.sites.attention_kernels import AttentionInputs
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.config.model import ModelConfig
from pipeline.loss.objective import SupervisedLM
from pipeline.model.load import load_base
from pipeline.training.batch import choose_rows, lay_out

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("stock_attention")]
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Flash takes no mask on a GPU: what hands one over gets the other."""
GRADIENT_TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8}
"""Of the largest entry."""
PATTERNS = ("column", "element", "span")
ATTENTION = tuple(
    Site(position=position, pattern=pattern, rate=0.4)  # type: ignore[arg-type]
    for position in ("attention_logits", "attention_weights") for pattern in PATTERNS
)
of_each_site = pytest.mark.parametrize("site", ATTENTION, ids=lambda site: f"{site.position}-{site.pattern}")
HIDDEN = {pattern: Site(position="ffn_hidden", pattern=pattern, rate=0.4) for pattern in PATTERNS}  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_kernel(form: str, dtype: torch.dtype, device: torch.device, small: bool, figures: Figures) -> None:
    """Forward and gradients against float64, query by query; no backend that writes the weights out is allowed."""
    tokens, stopped = 7 if small else 29, form == "plain weights"
    worst, off = 0.0, 0.0
    for name in ("none", "padded", "packed", "packed -inf"):
        heads = heads_of(tokens, 64, mask=model_masks(tokens, dtype)[name], dtype=dtype)
        leaves = [x.requires_grad_() for x in (heads.query, heads.key, heads.value)]
        dropped, seen = some_drops(heads, columns=form == "column"), visible_to(heads)
        theirs = dense_attention(*leaves, heads.scale, seen, **{"weights" if stopped else "logits": dropped})
        on_device = [x.detach().to(device).requires_grad_() for x in leaves]
        mask = None if heads.mask is None else heads.mask.to(device)
        with sdpa_kernel(FUSED):
            ours = FORMS[form](AttentionInputs(*on_device, mask, heads.scale, heads.causal), dropped.to(device))
            sighted = seen.any(-1)
            direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5)) * sighted.unsqueeze(-1)
            direction = direction.to(dtype)
            found = torch.autograd.grad(ours, on_device, direction.to(device))
        wanted = torch.autograd.grad(theirs, leaves, direction.double())
        bound = output_bound(*leaves, heads.scale, seen, dropped)
        assert all(bool(x.isfinite().all()) for x in (ours, *found))
        worst = max(worst, float(((ours.detach().cpu() - theirs.detach()).abs() / bound)[sighted].max()))
        for one, other in zip(found, wanted, strict=True):
            off = max(off, float((one.cpu() - other).abs().max()) / float(other.abs().max()))
    figures.within("output, share of what rounding allows", worst, 1.0)
    figures.within("gradients, against dense float64", off, GRADIENT_TOLERANCE[dtype])


@of_each_site
def test_site(site: Site, device: torch.device, small: bool, figures: Figures) -> None:
    """Whole models in float32, HiddenCut of the same pattern beside it, against stock modules in float64."""
    models = (("llama", "nf4"),) if small else (("llama", "nf4"), ("llama", "none"), ("gpt2", "none"), ("bert", "nf4"))
    for family, quantization in models:
        tolerance = 2e-4 if small else 1e-3
        apart = compare_with_reference(
            family, site, HIDDEN[site.pattern], quantization=quantization, tolerance=tolerance, device=device
        )
        figures.within(f"{family}, base {quantization}, against float64", apart, tolerance)


@of_each_site
def test_end_to_end(site: Site, device: torch.device, tiny_folder: Path, figures: Figures) -> None:
    """Rows laid end to end in bfloat16, attention in groups of rows of similar length: as near to float32 as padded."""

    def of(dtype: str, end_to_end: bool) -> dict[str, Tensor]:
        config = ModelConfig(path=str(tiny_folder / "model"), quantization="none", compute_dtype=dtype)  # type: ignore[arg-type]
        spec = AdapterSpec(rank=4, sites=(site, HIDDEN[site.pattern]))
        adapters = trained_start(attach(load_base(config, device).model, [spec], "all-linear", seed=0))
        adapters.model.train()
        if end_to_end:
            assert choose_rows(adapters, config.attention, 32) is None
        layout = training_layout(range(6), 4, "split", True)
        rows = lay_out(adapters, examples([5, 19, 4, 7, 8, 11]), layout, 2, MaskKey(3, 5))
        with adapters.axis.active(rows.plan), sdpa_kernel(FUSED):
            SupervisedLM(adapters.model)(**rows.model_tensors, row_weights=rows.weights).backward()
        return gradients(adapters)

    exact = of("float32", False)
    of_padded = norm_apart(of("bfloat16", False), exact)
    figures.add("gradients, padded against float32", f"{of_padded:.1e}", apart=of_padded)
    apart = norm_apart(of("bfloat16", True), exact)
    figures.within("gradients, end to end against float32", apart, 1.5 * of_padded + 0.02)
