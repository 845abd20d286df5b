"""Tiny random models and tokenizers made on the spot: the same code paths as a real model, in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the film was good bad great awful a fine poor plot actor story and but very not so it is".split()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level; pad = eos, as many real tokenizers have it."""
    special = ["<unk>", "<s>", "</s>", "Review:", "Sentiment:", "positive", "negative"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_llama(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """Two layers, width 64 (a multiple of bitsandbytes' block), grouped-query attention."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A model folder as transformers writes it."""
    tiny_llama(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_data(path: Path, rows: int = 120) -> Path:
    """Sentiment rows decided by one word: learnable in a few steps."""
    lines = []
    for i in range(rows):
        words = [WORDS[(i * 7 + j * 3 + i // 5) % len(WORDS)] for j in range(3 + i % 6)]
        words = [word for word in words if word not in ("good", "bad")] + ["good" if i % 2 else "bad"]
        lines.append(
            json.dumps(
                {"prompt": f"Review: {' '.join(words)} {WORDS[i % 19]} {WORDS[(i // 19) % 19]} Sentiment:",
                 "choices": [" negative", " positive"], "label": i % 2}
            )
        )
    path.write_text("\n".join(lines) + "\n")
    return path
