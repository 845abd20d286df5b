"""`python -m pipeline.support.sites`: the table of what every model family honours.

family × position × pattern × compensation × backend (weights, attention). Each cell is found out on a tiny random model
of the family, never looked up: the site is attached, trained for one step, and held against what a site must keep
(`try_cell`). A cell is `tested`, or `refused` with the error that a user would see, or `FAILED`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters, attach, with_row_keys
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import LEGAL, Site, patterns_at
from pipeline.config.model import ModelConfig
from pipeline.errors import ConfigError, LoradropError, UserError
from pipeline.model.load import pin_training_mode, quantization_config, switch_off_dropout
from pipeline.support.tiny import DECODERS, ENCODERS, random_model

BACKENDS = (("none", "sdpa"), ("none", "eager"), ("nf4", "sdpa"), ("nf4", "eager"))
"""(model.quantization, model.attention)."""
RATE = 0.4
LENGTHS = (9, 5)
"""Tokens of the two test rows; the second is padded."""

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "bert", "roberta", "deberta-v2", "gemma2", "mixtral")
"""Model types of the table, in its order."""


class CellFault(LoradropError):
    """A site does not keep what a site must keep."""


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    family: str
    site: Site
    quantization: str
    attention: str
    status: str
    """`tested`, `refused` or `FAILED`."""
    detail: str = ""
    """The error, where it is not `tested`."""


def tiny_model(
    family: str, quantization: str = "none", attention: str = "sdpa", device: str | torch.device = "cpu"
) -> nn.Module:
    """A random model with a language-modelling head, loaded as the product loads a base (fp32 compute).

    Raises:
        ConfigError: the family does not have this attention implementation.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loader = AutoModelForCausalLM if family in DECODERS else AutoModelForMaskedLM
    model = random_model({**DECODERS, **ENCODERS}[family], loader)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        settings = ModelConfig(quantization=quantization)  # type: ignore[arg-type]
        try:
            model = loader.from_pretrained(
                folder, attn_implementation=attention, dtype=torch.float32, device_map={"": torch.device(device)},
                quantization_config=quantization_config(settings, torch.float32),
            )
        except ValueError as error:
            raise ConfigError(
                "model.attention",
                attention,
                f"is not supported by the model type {family}",
                "Set model.attention=eager.",
            ) from error
    model.requires_grad_(False)
    model.config.use_cache = False
    switch_off_dropout(model)
    pin_training_mode(model)
    return model


def legal_sites(rate: float = RATE) -> Iterator[Site]:
    """Every position × pattern × compensation, DropAttention with and without its stop-gradient."""
    for position, (_, compensations) in LEGAL.items():
        for pattern in patterns_at(position):
            for compensation in compensations:
                for stop in (True, False) if position == "attention_weights" else (True,):
                    fields = {"position": position, "pattern": pattern, "compensation": compensation}
                    yield Site.model_validate({**fields, "rate": rate, "stop_gradient": stop})


def try_cell(model: nn.Module, site: Site) -> None:
    """Attach `site` to a copy of `model` and train one step under two masks beside a row without.

    Raises:
        ConfigError: the family refuses the site.
        CellFault: a value is not finite, the masks do nothing, rows without a mask change, padding has weight, or a
            causal model looks ahead.
    """
    family: str = model.config.model_type  # type: ignore[union-attr, assignment]
    causal = family in DECODERS
    ids, mask = _batch()
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
    adapters = attach(copy.deepcopy(model), [AdapterSpec(rank=4, alpha=8.0, sites=(site,))], "all-linear", seed=0)
    with torch.no_grad():
        for layer in adapters.layers.values():
            for bucket in layer.buckets:
                bucket.lora_B.copy_(torch.randn(bucket.lora_B.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    adapters.model.train()
    logits = _forward(adapters, ids, mask)
    logits[:, mask.bool()].square().mean().backward()
    gradients = [p.grad for p in adapters.model.parameters() if p.grad is not None]
    _require(bool(gradients) and all(bool(g.isfinite().all()) for g in gradients), "a gradient is not finite")
    _require(bool(logits.isfinite().all()), "a logit is not finite")
    seen = logits[:, mask.bool()].detach()
    _require_close(seen[0], before[mask.bool()], "a row without adapter or mask is not the base model's")
    _require(not torch.allclose(seen[2], seen[3], atol=1e-3), "two draws give the same result")
    _require(not torch.allclose(seen[1], seen[2], atol=1e-3), "a mask does nothing")
    with torch.no_grad():
        other = torch.where(mask.bool(), ids, torch.full_like(ids, 7))
        _require_close(_forward(adapters, other, mask)[:, mask.bool()], seen, "padding has weight")
        if causal:
            ahead = ids.clone()
            ahead[:, 3:] = (ahead[:, 3:] + 11) % 60 + 3
            _require_close(_forward(adapters, ahead, mask)[:, :, :3], logits.detach()[:, :, :3], "it looks ahead")


def _batch() -> tuple[Tensor, Tensor]:
    """Two rows of token ids, the second padded on the right, and their mask."""
    ids = torch.randint(3, 60, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    return torch.where(mask.bool(), ids, torch.full_like(ids, 5)), mask


def _forward(adapters: Adapters, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits (M, B, T, V) of the base, the adapter without a mask, and two draws of it."""
    members = [Member(None), Member(0), Member(0, 0), Member(0, 1)]
    size, (rows, tokens) = len(members), ids.shape
    plan = adapters.plan(members, rows, MaskKey(0, 0))
    positions = torch.arange(tokens).repeat(size * rows, 1)
    plan = with_row_keys(plan, torch.arange(100, 100 + rows).repeat(size), positions)
    with adapters.axis.active(plan):
        logits: Tensor = adapters.model(input_ids=ids.repeat(size, 1), attention_mask=mask.repeat(size, 1)).logits
    return logits.view(size, rows, tokens, -1)


def _require_close(ours: Tensor, wanted: Tensor, what: str) -> None:
    scale = max(float(wanted.abs().max()), 1.0)
    _require(float((ours - wanted).abs().max()) <= 1e-4 * scale, what)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise CellFault(what)


def support_table(families: Sequence[str] = FAMILIES, each: Callable[[Cell], None] | None = None) -> list[Cell]:
    """Every cell of the given families; `each` is told as they come."""
    cells: list[Cell] = []
    for family in families:
        for quantization, attention in BACKENDS:
            model: nn.Module | None = None
            for site in legal_sites():
                status, detail = "tested", ""
                try:
                    model = model or tiny_model(family, quantization, attention)
                    try_cell(model, site)
                except UserError as error:
                    status, detail = "refused", str(error)
                except (RuntimeError, LoradropError) as error:
                    status, detail = "FAILED", str(error)
                cells.append(Cell(family, site, quantization, attention, status, detail))
                if each is not None:
                    each(cells[-1])
    return cells


def format_table(cells: Sequence[Cell]) -> str:
    """Rows family × position × pattern × compensation, a column per backend; then each refusal once."""
    titles = [f"{'plain' if q == 'none' else q}/{a}" for q, a in BACKENDS]
    lines = [f"{'family':<12}{'position':<19}{'pattern':<9}{'compensation':<30}" + "".join(f"{t:<13}" for t in titles)]
    by_row: dict[tuple[str, Site], dict[tuple[str, str], Cell]] = {}
    for cell in cells:
        by_row.setdefault((cell.family, cell.site), {})[cell.quantization, cell.attention] = cell
    for (family, site), found in by_row.items():
        free = site.position == "attention_weights" and not site.stop_gradient
        compensation = site.compensation + (", no stop-gradient" if free else "")
        lines.append(f"{family:<12}{site.position:<19}{site.pattern:<9}{compensation:<30}"
                     + "".join(f"{found[backend].status:<13}" for backend in BACKENDS))
    reasons = dict.fromkeys(cell.detail for cell in cells if cell.status != "tested")
    counts = ", ".join(f"{sum(c.status == s for c in cells)} {s}" for s in ("tested", "refused", "FAILED"))
    return "\n".join([*lines, "", counts, *(f"- {reason}" for reason in reasons)])


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 where a cell failed."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.support.sites", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only these model types")
    chosen = parser.parse_args(argv).family or FAMILIES
    cells: list[Cell] = []
    for family in chosen:
        print(f"trying {family} …", file=sys.stderr, flush=True)
        cells += support_table([family])
    print(format_table(cells))
    return int(any(cell.status == "FAILED" for cell in cells))


if __name__ == "__main__":
    raise SystemExit(main())
