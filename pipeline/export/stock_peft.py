"""Runs alone, in a process of its own, with stock transformers and PEFT only: imports nothing of this package.

    python -I stock_peft.py JOB.json

JOB: {"base": path, "quantization": "nf4"|"int8"|"none", "double_quantization": bool, "compute_dtype": str,
"device": str, "trust_remote_code": bool, "classes": int|None, "unquantized": [patterns], "adapters": [folders],
"input_ids": [[...], ...], "out": FILE.npz}
Writes `base` (N, V) and `adapters` (K, N, V), K may be 0: logits behind the last token of each prompt; with
`classes`, those of the classification head (the base's own is then untrained).
"""

import contextlib
import json
import sys

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig


def main(job_path: str) -> None:
    """Load the base and every adapter with stock tools, and write their logits."""
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    torch.manual_seed(0)  # an untrained head
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)  # as the pipeline does: the same kernels on both sides
    dtype = getattr(torch, job["compute_dtype"])
    quantization = None
    skip = job["unquantized"] or None
    if job["quantization"] == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=job["double_quantization"], llm_int8_skip_modules=skip,
        )
    elif job["quantization"] == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=skip)
    settings = {
        "dtype": dtype, "quantization_config": quantization, "device_map": {"": job["device"]},
        "trust_remote_code": job["trust_remote_code"],
    }
    if job["classes"] is None:
        base = AutoModelForCausalLM.from_pretrained(job["base"], **settings)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(
            job["base"], num_labels=job["classes"], ignore_mismatched_sizes=True, **settings
        )
    model = base
    for k, folder in enumerate(job["adapters"]):
        if k:
            model.load_adapter(folder, adapter_name=f"adapter{k}")
        else:
            model = PeftModel.from_pretrained(base, folder, adapter_name="adapter0")
    model.eval()
    for module in model.modules():
        # An eval-mode 4-bit layer takes a bfloat16 kernel on CPUs with AVX512-BF16: another precision, not another
        # adapter. In training mode it computes what it was trained with; no dropout is involved.
        if type(module).__module__.startswith("bitsandbytes."):
            module.train()
    with torch.no_grad():
        with model.disable_adapter() if job["adapters"] else contextlib.nullcontext():
            base_logits = prompt_logits(model, job["input_ids"], job["device"])
        adapter_logits = []
        for k in range(len(job["adapters"])):
            model.set_adapter(f"adapter{k}")
            adapter_logits.append(prompt_logits(model, job["input_ids"], job["device"]))
    np.savez(job["out"], base=base_logits, adapters=np.array(adapter_logits))


def prompt_logits(model: torch.nn.Module, prompts: list, device: str) -> np.ndarray:
    """(N, V) logits behind each prompt, or (N, C); one prompt at a time, so that padding plays no part."""
    rows = [model(torch.tensor([ids], device=device)).logits[0].float().cpu().numpy() for ids in prompts]
    return np.stack([row[-1] if row.ndim == 2 else row for row in rows])


if __name__ == "__main__":
    main(sys.argv[1])
