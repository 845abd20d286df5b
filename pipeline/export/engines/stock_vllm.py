"""Runs alone, with vLLM only, by the Python that has it: imports nothing of this package.

    python -I stock_vllm.py JOB.json

JOB: {"base": folder, "adapters": [folders], "input_ids": [[...], ...], "vocabulary": V, "rank": int, "out": FILE.npz}
Writes `log_probabilities` (1 + K, N, V) of the token behind each prompt: of the base alone, then with each adapter; and
`version`.
"""

import json
import os
import sys

os.environ.update({
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
})  # fmt: skip

import numpy as np
import vllm
from vllm.lora.request import LoRARequest


def main(job_path: str) -> None:
    """Serve every prompt with every adapter, and write what the engine says."""
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    longest = max(map(len, job["input_ids"]))
    engine = vllm.LLM(
        model=job["base"], dtype="float32", enforce_eager=True, enable_lora=True, max_lora_rank=job["rank"],
        max_model_len=longest + 8, max_logprobs=-1, max_num_seqs=4, enable_prefix_caching=False,
    )
    asked = vllm.SamplingParams(max_tokens=1, temperature=1.0, logprobs=-1, seed=0)
    prompts = [{"prompt_token_ids": ids} for ids in job["input_ids"]]
    found = np.full((1 + len(job["adapters"]), len(prompts), job["vocabulary"]), -np.inf)
    for k, folder in enumerate([None, *job["adapters"]]):
        request = None if folder is None else LoRARequest(f"adapter{k}", k, folder)
        for n, answer in enumerate(engine.generate(prompts, asked, lora_request=request, use_tqdm=False)):
            for token, said in answer.outputs[0].logprobs[0].items():
                found[k, n, token] = said.logprob
    np.savez(job["out"], log_probabilities=found, version=np.array(vllm.__version__))


if __name__ == "__main__":
    main(sys.argv[1])
