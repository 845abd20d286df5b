"""Scores of generated texts against their references, in percent: of N prompts, each with one reference or more.

BLEU and chrF are sacrebleu's scores of the whole corpus, from the counts that each prompt adds to it: a resample of
prompts is scored by the sum of theirs. ROUGE-L (F1, as torchmetrics computes it, without stemming), exact match and the
number of an arithmetic answer are means over prompts; each prompt counts with its best reference.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from pipeline.scores.bootstrap import Floats, RowMean, Statistic

MARK = "####"
"""Before the result of a worked answer, in GSM8K and data made after it."""
_SIGN = r"(?:(?<![\w.)])[-+])?"
_NUMBER = re.compile(rf"{_SIGN}(?:(?:\d{{1,3}}(?:,\d{{3}})+(?![\d,])|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)")
_BARE = re.compile(r"[^\w\s]*\s*NUMBER\s*[^\w\s]*\s*\w*\W*")
"""A number with a sign of currency, and one word for its unit."""


@dataclass(frozen=True)
class CorpusScore:
    """A score of counts that add up over prompts."""

    counts: Floats
    """(N, S)."""
    score: Callable[[Any], float]
    """Of (S,) added counts."""

    def point(self) -> float:
        """The score of all."""
        return self.score(self.counts.sum(axis=0).tolist())

    def resampled(self, weights: Floats) -> Floats:
        """Scores under weights (R, N): (R,)."""
        return np.array([self.score(counts.tolist()) for counts in weights @ self.counts])


def text_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Statistic]:
    """`bleu`, `chrf`, `rouge_l`, `exact_match`, and `number` where every prompt has an arithmetic answer.

    Args:
        texts: one per prompt.
        references: of each prompt, at least one.
    """
    from sacrebleu.metrics import BLEU, CHRF
    from torchmetrics.functional.text import rouge_score

    rouge = [
        float(rouge_score(text, [list(right)], accumulate="best", rouge_keys="rougeL")["rougeL_fmeasure"])
        for text, right in zip(texts, references, strict=True)
    ]
    exact = [
        normalized(text) in {normalized(one) for one in right} for text, right in zip(texts, references, strict=True)
    ]
    found: dict[str, Statistic] = {
        "bleu": _corpus(BLEU(force=True), texts, references), "chrf": _corpus(CHRF(), texts, references),
        "rouge_l": _percent(rouge), "exact_match": _percent(exact),
    }
    if all(any(map(is_arithmetic, right)) for right in references):
        pairs = zip(texts, references, strict=True)
        found["number"] = _percent([
            (number := last_number(text)) is not None and number in {last_number(one) for one in right}
            for text, right in pairs
        ])
    return found


def normalized(text: str) -> str:
    """Without case, punctuation (but inside of numbers) and runs of blanks."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)", " ", plain).split())


def last_number(text: str) -> Decimal | None:
    """The number that an arithmetic answer ends with: the first behind `####`, else the last of the text.

    Commas between thousands, signs of currency and units do not count: "$1,250.50 a year" is 1250.5.
    """
    _, marked, behind = unicodedata.normalize("NFKC", text).replace("\u2212", "-").rpartition(MARK)
    found = _NUMBER.findall(behind)
    if not found:
        return None
    return Decimal((found[0] if marked else found[-1]).replace(",", ""))


def is_arithmetic(reference: str) -> bool:
    """Whether a right answer is a number: it has the mark of a result, or nothing but a number and its unit."""
    if last_number(reference) is None:
        return False
    return MARK in reference or _BARE.fullmatch(_NUMBER.sub("NUMBER", reference.strip())) is not None


def _percent(values: Sequence[float | bool]) -> RowMean:
    return RowMean(100.0 * np.array([values], dtype=np.float64))


def _corpus(metric: Any, texts: Sequence[str], references: Sequence[Sequence[str]]) -> CorpusScore:
    """Of a metric of sacrebleu, by the methods that its own tests of significance resample with."""
    counts = [
        metric._extract_corpus_statistics([text], [[one] for one in right])[0]
        for text, right in zip(texts, references, strict=True)
    ]
    return CorpusScore(
        np.array(counts, dtype=np.float64), lambda total: float(metric._compute_score_from_stats(total).score)
    )
