"""Scores of generated texts against sacrebleu's and torchmetrics' own, on whole corpora and on resampled ones."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from pipeline.scores.bootstrap import bootstrap_interval
from pipeline.scores.generated import is_arithmetic, last_number, normalized, text_scores

WORDS = ["The", "Alimentum", "is", "a", "pub", "near", "Burger King,", "city centre.", "£20-25", "family-friendly"]


def corpus(seed: int, prompts: int = 12) -> tuple[list[str], list[list[str]]]:
    """Texts that share words with one to four references; one is empty, one is right, one is of other letters."""
    random = np.random.default_rng(seed)
    draw = lambda: " ".join(random.choice(WORDS, random.integers(1, 14)))  # noqa: E731
    texts = [draw() for _ in range(prompts)]
    references = [[draw() for _ in range(random.integers(1, 5))] for _ in range(prompts)]
    texts[0], references[1][0], texts[2] = "", texts[1], "日本語 のテキスト…"
    return texts, references


def padded(references: list[list[str]]) -> Any:
    """As sacrebleu wants them: a document per reference, None where a prompt has fewer."""
    most = max(map(len, references))
    return [[one[n] if n < len(one) else None for one in references] for n in range(most)]


@pytest.mark.parametrize("seed", range(4))
def test_corpus_scores_are_those_of_sacrebleu(seed: int) -> None:
    texts, references = corpus(seed)
    found = text_scores(texts, references)
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        assert found[name].point() == pytest.approx(metric.corpus_score(texts, padded(references)).score, abs=1e-9)
    weights = np.random.default_rng(seed).multinomial(len(texts), [1 / len(texts)] * len(texts), size=5).astype(float)
    for row, weight in enumerate(weights):
        drawn = [n for n, times in enumerate(weight.astype(int)) for _ in range(times)]
        again, theirs = [texts[n] for n in drawn], padded([references[n] for n in drawn])
        for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
            wanted = metric.corpus_score(again, theirs).score
            assert found[name].resampled(weights)[row] == pytest.approx(wanted, abs=1e-9)


def lcs(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, by its recursion."""
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return lcs(first[:-1], second[:-1]) + 1
    return max(lcs(first[:-1], second), lcs(first, second[:-1]))


def test_rouge_takes_the_best_reference_and_needs_no_download() -> None:
    texts = ["the pub is near the river", "nothing in common", ""]
    references = [["a pub near the river", "river the near is pub the", "x"], ["!!"], ["empty"]]
    wanted = []
    for text, right in zip(texts, references, strict=True):
        best = 0.0
        for one in right:
            ours, theirs = text.split(), one.replace("!", "").split()
            best = max(best, 2.0 * lcs(ours, theirs) / max(1, len(ours) + len(theirs)))
        wanted.append(best)
    assert text_scores(texts, references)["rouge_l"].point() == pytest.approx(100.0 * np.mean(wanted), abs=1e-4)


def test_exact_match_and_intervals() -> None:
    texts = ["  The answer: YES! ", "no", "3.5", "35"]
    references = [["the answer yes"], ["yes", "No."], ["35"], ["3.5"]]
    found = text_scores(texts, references)
    assert found["exact_match"].point() == 50.0
    assert "number" not in found, "yes and no are no numbers"
    for score in found.values():
        interval = bootstrap_interval(score, 4, 200)
        assert interval.low <= interval.value <= interval.high and interval.low < interval.high
    assert normalized("“Ｈello”,  World…") == "hello world"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 + 4 = 7 apples.\n#### 7", "7"), ("#### 1,250 and not 8", "1250"), ("so it is $1,234.50.", "1234.5"),
        ("The answer is −5", "-5"), ("pages 5-6", "6"), ("from 10 to 12%", "12"), (".5 of it", "0.5"), ("1,2,3", "3"),
        ("x = -0.25", "-0.25"), ("12,345,678 people", "12345678"), ("none", None), ("#### none, of 5", "5"),
        ("2.", "2"), ("v1.2.3", "3"), ("(3)-4", "4"), ("= +8", "8"), ("#### \n", None), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_scored_where_every_prompt_has_one() -> None:
    assert all(map(is_arithmetic, ["7", "$1,250", "12 apples", "3 + 4 = 7\n#### 7", "-3.5%", "about\n#### 1,000"]))
    assert not any(map(is_arithmetic, ["5 out of 5", "none", "It costs £20-25 here.", "####", "12 red apples"]))
    found = text_scores(["I think 1250.", "#### 7 apples", "eight"], [["$1,250"], ["3 + 4 = 7\n#### 7"], ["8"]])
    assert found["number"].point() == pytest.approx(200 / 3)
