"""Runs alone, in a process of its own, with llama.cpp (the package xllamacpp) only: imports nothing of this package.

    python -I stock.py JOB.json

JOB: {"model": FILE.gguf, "adapters": [FILE.gguf or null], "input_ids": [[...], ...], "texts": [...], "context": int,
"vocabulary": V, "threads": int, "out": FILE.npz}
Writes `log_probabilities` (K, N, V): of the token behind each prompt, with each adapter (null: none), and `by_text`
(N', V): behind each text, as llama.cpp cuts it, with the first adapter.
"""

import json
import sys

import numpy as np
import xllamacpp


def main(job_path: str) -> None:
    """Load the model with every adapter, and write what it says."""
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    found = []
    by_text = np.zeros((0, job["vocabulary"]))
    for number, adapter in enumerate(job["adapters"]):
        server = xllamacpp.Server(settings(job, adapter))
        found.append([next_token(server, ids, job["vocabulary"]) for ids in job["input_ids"]])
        if number == 0 and job["texts"]:
            by_text = np.stack([next_token(server, text, job["vocabulary"]) for text in job["texts"]])
        del server
    np.savez(job["out"], log_probabilities=np.array(found), by_text=by_text, version=np.array(xllamacpp.__version__))


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


def next_token(server: "xllamacpp.Server", prompt: list | str, vocabulary: int) -> np.ndarray:
    """(V,) log-probabilities of the token behind a prompt."""
    answer = server.handle_completions({
        "prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": 1.0, "samplers": [], "seed": 1,
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
