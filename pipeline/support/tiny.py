"""Small random models, their tokenizers and rows, made on the spot: the code paths of real ones, in milliseconds.

The tables of what the product carries, its benchmarks and its tests try it on these. A table names the shape of every
model family; one function builds a random model of any shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, POSITIONS = 1, 64
"""Of the encoders."""
_WIDTH_64 = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2,
}
"""A width that is a multiple of bitsandbytes' block."""
_MARKS = {"bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_WIDTH_64, **_MARKS, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 2}
_ENCODER = {**_WIDTH_64, "max_position_embeddings": POSITIONS, "pad_token_id": PAD}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_DECODER, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **_DECODER},
    "qwen3": {"model_type": "qwen3", **_DECODER, "head_dim": 16, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_DECODER, "sliding_window": 4},
    "gpt2": {
        "model_type": "gpt2", **_MARKS, "vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "initializer_range": 0.2,
    },
    "gemma2": {"model_type": "gemma2", **_DECODER, "head_dim": 16, "sliding_window": 4},
    "mixtral": {"model_type": "mixtral", **_DECODER, "num_local_experts": 2},
}
"""family -> shape, as its config.json says it; dropout stays at the family's own rate."""
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **_ENCODER},
    "roberta": {"model_type": "roberta", **_ENCODER},
    "electra": {"model_type": "electra", **_ENCODER, "embedding_size": 64},
    "mpnet": {"model_type": "mpnet", **_ENCODER},
    "distilbert": {
        "model_type": "distilbert", "vocab_size": 64, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4,
        "max_position_embeddings": POSITIONS, "pad_token_id": PAD,
    },
    "deberta": {"model_type": "deberta-v2", **_ENCODER},  # without relative positions
    "deberta-v2": {
        "model_type": "deberta-v2", **_ENCODER, "relative_attention": True, "position_buckets": 16,
        "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    },
    "deberta-v3": {  # what microsoft/deberta-v3-base sets, with fewer buckets than the tests have tokens
        "model_type": "deberta-v2", **_ENCODER, "relative_attention": True, "position_buckets": 8,
        "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm",
        "position_biased_input": False, "type_vocab_size": 0, "layer_norm_eps": 1e-7,
    },
}
"""Encoders, likewise."""
WORDS = (
    "the", "film", "was", "good", "bad", "great", "awful", "a", "fine", "poor", "plot", "actor", "story", "and", "but",
    "very", "not", "so", "it", "is",
)
PROMPT_WORDS = ("Review:", "Sentiment:", "positive", "negative")
CORPUS = [
    "Review: a fine film\nSentiment: positive", "Review: a dull film\nSentiment: negative",
    "Question: who wrote it? Answer: nobody knows", "system user assistant hello there more", "yes no yes and no",
    "one\n\ntwo\n\nthree",
]
"""What the byte-level tokenizer is trained on."""
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_model(
    shape: Mapping[str, Any], head: Any = AutoModelForCausalLM, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model in evaluation mode; `shape` is the content of its config.json, `head` an Auto class of transformers."""
    torch.manual_seed(seed)
    return head.from_config(AutoConfig.for_model(**shape), dtype=dtype).eval()


def tiny_decoder(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A language model of a family of `DECODERS`."""
    return random_model({**DECODERS[family], **changes}, seed=seed)


def tiny_llama(seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """The model of most tests: grouped-query attention, tied embeddings."""
    return tiny_decoder("llama", seed, num_hidden_layers=layers)


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    """Its linears are transposed Conv1D modules; no dropout of its own."""
    return tiny_decoder("gpt2", seed, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def tiny_encoder(family: str = "bert", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """An encoder of a family of `ENCODERS`, without a head; `FAMILY-mlm` has that of its pretraining, and no pooler."""
    name = family.removesuffix("-mlm")
    head = AutoModel if name == family else AutoModelForMaskedLM
    return random_model({**ENCODERS[name], **changes}, head, seed)


def word_tokenizer(words: Sequence[str], frame: Any = None, **marks: str) -> PreTrainedTokenizerFast:
    """A token per word; `frame` puts marks around a text, `marks` says which words are unk_token, pad_token, …"""
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=marks["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if frame is not None:
        tokenizer.post_processor = frame
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, for decoders; pad = eos, as many real tokenizers have it."""
    words = ["<unk>", "<s>", "</s>", *PROMPT_WORDS, *WORDS]
    return word_tokenizer(words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, for encoders: [CLS] text [SEP]."""
    frame = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *PROMPT_WORDS, *WORDS]
    return word_tokenizer(words, frame, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-3-like: line breaks in a row become one token; the end-of-turn mark is eos and pad too; a chat template."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s?[^\s]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


def write_tiny_model(folder: Path, family: str = "llama") -> Path:
    """The folder of a decoder and its tokenizer."""
    tiny_decoder(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_encoder(folder: Path, family: str = "bert", **changes: Any) -> Path:
    """The folder of an encoder and its tokenizer."""
    tiny_encoder(family, **changes).save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_data(path: Path, rows: int = 120) -> Path:
    """Sentiment rows decided by one word: learnable in a few steps."""
    lines = []
    for i in range(rows):
        words = [WORDS[(i * 7 + j * 3 + i // 5) % len(WORDS)] for j in range(3 + i % 6)]
        words = [word for word in words if word not in ("good", "bad")] + ["good" if i % 2 else "bad"]
        prompt = f"Review: {' '.join(words)} {WORDS[i % 19]} {WORDS[(i // 19) % 19]} Sentiment:"
        lines.append(json.dumps({"prompt": prompt, "choices": [" negative", " positive"], "label": i % 2}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
