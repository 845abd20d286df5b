"""Runs alone, in a process of its own, with llama.cpp (the package xllamacpp) only: imports nothing of this package.

    python -I stock.py JOB.json

JOB: {"model": FILE.gguf, "adapters": [FILE.gguf or null], "input_ids": [[...], ...], "texts": [[text, [ids]], ...],
"context": int, "vocabulary": V, "threads": int, "out": FILE.npz}
Writes `log_probabilities` (K, N, V): of the token behind each prompt, with each adapter (null: none), and `text_gaps`:
the largest difference between what it says behind a text, which it cuts itself, and behind the ids that go with it.
"""

import json
import sys

import numpy as np
import xllamacpp

SHOWN = 64
"""Likeliest tokens by which a text is compared with its ids."""


def main(job_path: str) -> None:
    """Load the model with every adapter, and write what it says."""
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    size = job["vocabulary"]
    found = []
    gaps = []
    for number, adapter in enumerate(job["adapters"]):
        server = xllamacpp.Server(settings(job, adapter))
        found.append([next_token(server, ids, size) for ids in job["input_ids"]])
        for text, ids in job["texts"] if number == 0 else []:
            answers = [next_token(server, prompt, size, SHOWN) for prompt in (text, ids)]
            both = np.isfinite(answers).all(0)
            gaps.append(np.abs(answers[0] - answers[1])[both].max(initial=0.0) if both.sum() > SHOWN // 2 else np.inf)
        del server
    np.savez(job["out"], log_probabilities=np.array(found), text_gaps=np.array(gaps or [0.0]))


def settings(job: dict, adapter: str | None) -> "xllamacpp.CommonParams":
    """One request at a time, in fp32 where llama.cpp has a choice, nothing over the network."""
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = job["context"]
    params.n_batch = params.n_ubatch = job["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    params.offline = True
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    return params


def next_token(server: "xllamacpp.Server", prompt: list | str, vocabulary: int, shown: int | None = None) -> np.ndarray:
    """(V,) log-probabilities of the token behind a prompt; -inf of all but the `shown` likeliest."""
    answer = server.handle_completions({
        "prompt": prompt, "n_predict": 1, "n_probs": shown or vocabulary, "temperature": 1.0, "samplers": [], "seed": 1,
        "cache_prompt": False, "post_sampling_probs": False,
    })
    answer = json.loads(answer) if isinstance(answer, str) else answer
    choice = answer["choices"][0] if "choices" in answer else answer
    first = (choice.get("completion_probabilities") or choice["logprobs"]["content"])[0]
    row = np.full(vocabulary, -np.inf)
    for token in first["top_logprobs"]:
        row[token["id"]] = token["logprob"]
    return row


if __name__ == "__main__":
    main(sys.argv[1])
