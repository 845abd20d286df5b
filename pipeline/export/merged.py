"""The adapter merged into its base: into the weights that the base was published with, or those it was trained on.

merged: W + s·B·A on the base's own 16-bit (or 32-bit) weights: a common model that every tool loads. It is not the
quantized base that was trained and evaluated on, so scores and temperature are given again, on these weights.
merged_dequantized: the same on the 4-bit weights, dequantized: what was evaluated, without bitsandbytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapters.attach import base_modules
from pipeline.adapters.members import Member
from pipeline.adapters.peft_format import StoredAdapter, in_inverse_convention
from pipeline.adapters.spec import layer_number
from pipeline.errors import ConfigError
from pipeline.export.order import Exported, Loaded, Order, ParityError
from pipeline.export.parity import judged, our_logits, probe_prompts, stock_logits
from pipeline.export.peft import write_peft
from pipeline.export.served import served_by
from pipeline.model.held import HeldLinear
from pipeline.model.load import DTYPES, load_skeleton
from pipeline.terminal import say

MERGED, DEQUANTIZED = "merged", "merged_dequantized"
MOST_LOST = 0.1
"""Of an adapter by rounding: the weights of one that moves less than the base's precision resolves are kept in float32.
Eight bits of bfloat16 took 77 % of one of four steps."""


def plan_merged(order: Order) -> list[Exported]:
    """One folder, `merged`.

    Raises:
        ConfigError: what cannot be merged: see `_refuse`.
    """
    _refuse(order)
    return [Exported(MERGED, Member(0))]


def plan_dequantized(order: Order) -> list[Exported]:
    """One folder, `merged_dequantized`.

    Raises:
        ConfigError: as `plan_merged`; a base that is not quantized to 4 bits.
    """
    quantization = order.config.model.quantization
    if quantization != "nf4":
        what = {
            "none": "merges into dequantized weights, and the base of this run is not quantized",
            "int8": "merges into dequantized weights, and an 8-bit base rounds what enters its products, too: no plain"
            " weights compute the same",
        }[quantization]
        raise ConfigError("export.forms", DEQUANTIZED, what, "Ask for merged.")
    _refuse(order)
    return [Exported(DEQUANTIZED, Member(0))]


def _refuse(order: Order) -> None:
    """Refuse what merging would change beside the adapted layers, or has no weights to merge into.

    Raises:
        ConfigError: a base that is stored quantized; an adapted output head that shares its weights with the embedding.
    """
    skeleton = load_skeleton(order.config.model, 2 if order.model_kind == "classifier" else None).model
    description: Any = skeleton.config
    if getattr(description, "quantization_config", None) is not None:
        what = "merges into 16-bit weights, and the base is stored quantized: it has none"
        raise ConfigError("export.forms", list(order.config.export.forms), what, "Ask for adapter, or draws.")
    outside = [name for name in order.plain.matrices if layer_number(name) is None]
    head = getattr(skeleton, "get_output_embeddings", lambda: None)() if outside else None
    tied = getattr(description.get_text_config(), "tie_word_embeddings", False)
    if tied and any(skeleton.get_submodule(name) is head for name in outside):
        what = "would change the embedding too: the adapter is on the output head, which shares its weights with it"
        remedy = "Ask for adapter, or train with adapter.target_modules=all-linear, which leaves the head alone."
        raise ConfigError("export.forms", list(order.config.export.forms), what, remedy)


def write_merged(loaded: Loaded, folder: Path, exported: Sequence[Exported]) -> None:
    """A checkpoint of stock transformers per export.

    Raises:
        ParityError: the merged weights equal those of the base.
    """
    for export in exported:
        dequantized = export.folder == DEQUANTIZED
        dtype = DTYPES[loaded.identity.compute_dtype] if dequantized else "auto"
        model, lost = _merged_model(loaded, dtype, dequantized)
        if lost > MOST_LOST:
            say(f"{export.folder}: in float32, for rounded to {model.dtype} {lost:.0%} of the adapter would be lost")
            model, _ = _merged_model(loaded, torch.float32, dequantized)
        model.config.use_cache = True
        model.save_pretrained(folder / export.folder)
        loaded.task.base.tokenizer.save_pretrained(folder / export.folder)


def _merged_model(loaded: Loaded, dtype: torch.dtype | str, dequantized: bool) -> tuple[Any, float]:
    """The model with the adapter in its weights, and the share of the adapter that rounding to `dtype` takes."""
    model = _stock_model(loaded, dtype)
    if dequantized:
        take_dequantized(model, loaded.adapters.model)
    return model, merge(model, loaded.plain, loaded.adapters.layer_count)


def _stock_model(loaded: Loaded, dtype: torch.dtype | str) -> Any:
    """The base with the weights that it was published with, on the CPU; a classifier with its classes by name."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    common: dict[str, Any] = {"dtype": dtype, "trust_remote_code": loaded.trusted, "revision": loaded.identity.revision}
    classes = loaded.identity.classes
    if classes is None:
        return AutoModelForCausalLM.from_pretrained(loaded.identity.resolved, **common)
    model = AutoModelForSequenceClassification.from_pretrained(
        loaded.identity.resolved, num_labels=classes, ignore_mismatched_sizes=True, **common
    )
    names = loaded.splits.test[0].choices
    if names:
        model.config.id2label = {number: name.strip() for number, name in enumerate(names)}
        model.config.label2id = {name.strip(): number for number, name in enumerate(names)}
    model.config.pad_token_id = loaded.task.base.tokenizer.pad_token_id
    return model


def take_dequantized(model: nn.Module, quantized: nn.Module) -> int:
    """Put the values of 4-bit layers into the layers of the same names; returns how many there are.

    Args:
        quantized: our base, adapters on it or not, its 4-bit weights held dequantized or not.

    Raises:
        ParityError: there is none.
    """
    from bitsandbytes.functional import dequantize_4bit

    count = 0
    for name, module in base_modules(quantized).items():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, HeldLinear):
            values = weight
        elif type(module).__name__ == "Linear4bit":
            values = dequantize_4bit(weight.data, weight.quant_state)
        else:
            continue
        with torch.no_grad():
            model.get_submodule(name).weight.copy_(values)  # type: ignore[operator]
        count += 1
    if not count:
        raise ParityError(f"{DEQUANTIZED}: the base has no 4-bit layer")
    return count


def merge(model: nn.Module, stored: StoredAdapter, layer_count: int) -> float:
    """W <- W + s·B·A in every adapted layer, summed in fp32 and rounded once; trained heads replace those of the model.

    Args:
        layer_count: transformer layers of the model.

    Returns:
        ‖what was added - s·B·A‖ / ‖s·B·A‖ over all layers: the share of the adapter that rounding takes.

    Raises:
        ParityError: no weight has changed.
    """
    spec = in_inverse_convention(stored.spec, list(stored.matrices), layer_count)
    lost = whole = 0.0
    changed = False
    with torch.no_grad():
        for name, (A_RI, B_OR) in stored.matrices.items():
            module = model.get_submodule(name)
            weight: Tensor = module.weight  # type: ignore[assignment]
            delta = spec.scaling_of(name) * (B_OR @ A_RI)
            delta = delta.T if type(module).__name__ == "Conv1D" else delta  # GPT-2's weights are (I, O)
            before = weight.to("cpu", torch.float32)
            rounded = (before + delta).to(weight.dtype)
            added = rounded.to(torch.float32) - before
            weight.copy_(rounded)  # `before` may be the weight itself
            changed = changed or bool(added.any())
            lost, whole = lost + float((added - delta).square().sum()), whole + float(delta.square().sum())
        for name, tensor in stored.head.tensors.items():
            model.get_parameter(name).copy_(tensor)
    if not changed:
        raise ParityError("merged: the weights equal those of the base: there is no adapter, or rounding takes it")
    return float((lost / whole) ** 0.5)


def verify_merged(loaded: Loaded, folder: Path, exported: Sequence[Exported]) -> list[dict[str, Any]]:
    """Stock transformers' logits of each checkpoint, in a clean process.

    `merged_dequantized` is compared with our member; `merged` with stock PEFT's adapter on the same 16-bit base, and
    what it differs by from our member is measured (`from_evaluated`, relative to the adapter's effect).

    Raises:
        ParityError: beyond the tolerance, or an export without effect.
    """
    prompts, device = probe_prompts(loaded), str(loaded.adapters.device)
    ours = our_logits(loaded, prompts, [Member(None), Member(0)])
    effect = float(np.abs(ours[1] - ours[0]).max())
    entries = []
    for export in exported:
        say(f"loading {export.folder} with stock transformers in a clean process")
        identity = replace(
            loaded.task.base.identity, resolved=str(folder / export.folder), revision=None, quantization="none"
        )
        if export.folder == DEQUANTIZED:
            base, noise = ours[0], 0.0
            if identity.compute_dtype != "float32":  # rounded otherwise in one matrix than in two
                stock = stock_logits(loaded.task.base.identity, prompts, device, [], loaded.trusted)["base"]
                noise = 0.0 if identity.classes is not None else float(np.abs(stock - base).max())
            theirs = stock_logits(identity, prompts, device, [], loaded.trusted)["base"]
            entries.append(judged(f"{export.folder}: stock transformers", ours[1], base, theirs, base, noise))
            continue
        exact = replace(identity, compute_dtype="float32")
        theirs = stock_logits(exact, prompts, device, [], loaded.trusted)["base"]
        stock16 = _adapter_on_16_bits(loaded, prompts, device)
        of_adapter, of_base = stock16["adapters"][0], stock16["base"]
        said = judged(f"{export.folder}: stock transformers", of_adapter, of_base, theirs, of_base)
        said["from_evaluated"] = float(np.abs(theirs - ours[1]).max()) / effect
        entries.append({**said, "served": served_by(loaded, folder / export.folder)})
    return entries


def _adapter_on_16_bits(loaded: Loaded, prompts: Sequence[list[int]], device: str) -> dict[str, Any]:
    """What stock PEFT makes of the adapter on the base's own weights, in float32."""
    exact = replace(loaded.task.base.identity, quantization="none", compute_dtype="float32")
    with tempfile.TemporaryDirectory() as scratch:
        write_peft(loaded, Path(scratch), [Exported("adapter", Member(0))])
        return stock_logits(exact, prompts, device, [Path(scratch) / "adapter"], loaded.trusted)
