"""The default data: sentences with human ratings, of four domains, from a source distribution of the Python index.

Hutto & Gilbert (ICWSM 2014) had each of 10,605 sentences from film reviews (after Pang & Lee, 2004), 3,708 from reviews
of products at Amazon (after Hu & Liu, 2004), 5,190 from editorials of the New York Times and 4,200 tweets rated by
about twenty people in [-4, 4]. The task here is the sign of the mean rating: of films, and, asked in the same words, of
the other three, which thus are what a run on films meets elsewhere (`evaluate.also`). How many people gave a sentence
each sign comes with it, for scores of agreement.
"""

from __future__ import annotations

import html
import json
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.data import EMBEDDED_DATA, EMBEDDED_SETS
from pipeline.errors import ConfigError, RunFolderError
from pipeline.fetch import EMBEDDED_PREFIX, alone, cache_folder, fetch_distribution, is_embedded
from pipeline.files import read_json_lines, write_text

__all__ = ["embedded_rows", "is_cached", "is_embedded", "read_sentences"]

PROMPT = "Review: {text}\nSentiment:"
"""Of every domain: what differs is the text."""
CHOICES = (" negative", " positive")
"""In label order; each is a single token of the default model."""
NEUTRAL_BELOW = 0.5
"""|mean rating| under this is no clear sign: such sentences are left out."""

SDIST = {
    "name": "vaderSentiment",
    "version": "3.3.2",
    "sha256": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "filename": "vaderSentiment-3.3.2.tar.gz",
}
INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"


class Ratings(NamedTuple):
    """Two files of the archive."""

    name: str
    """What they begin with."""
    sentences: int
    """In each of them."""
    documents: bool = False
    """Whether ids are DOCUMENT_SENTENCE: sentences of one review or editorial are one unit."""

    @property
    def files(self) -> tuple[str, str]:
        """The sentences with their means; the single ratings."""
        return f"{self.name}_GroundTruth.txt", f"{self.name}_anonDataRatings.txt"


RATINGS = dict(zip(EMBEDDED_SETS, (
    Ratings("movieReviewSnippets", 10_605),
    Ratings("amazonReviewSnippets", 3_708, documents=True),
    Ratings("nytEditorialSnippets", 5_190, documents=True),
    Ratings("tweets", 4_200),
), strict=True))  # fmt: skip


def embedded_rows(path: str) -> list[dict[str, Any]]:
    """All rows `{id, prompt, choices, label, label_counts}` of `embedded:NAME`, in the order of the source, with the
    `unit` (document) where there are documents; splitting is not done.

    Raises:
        ConfigError: no embedded data of that name.
        SetupError: the package cannot be fetched.
    """
    if path not in RATINGS:
        raise ConfigError("data.path", path, "is not embedded data", f"Known: {', '.join(EMBEDDED_SETS)}.")
    return classification_rows(read_sentences(path), path.removeprefix(EMBEDDED_PREFIX), RATINGS[path].documents)


def read_sentences(path: str = EMBEDDED_DATA) -> list[dict[str, Any]]:
    """Raw sentences `{id: str, text: str, rating: float, signs: [int, int]}`, rating in [-4, 4], signs the people who
    rated below and above 0; parsed once, then from the cache.

    Raises:
        SetupError: the package cannot be fetched.
    """
    cached, source = _cached(path), RATINGS[path]
    rows = _read_cached(cached)
    if len(rows) != source.sentences:
        with alone(cached):
            sdist = fetch_distribution(SDIST["name"], SDIST["version"], SDIST["sha256"], "sdist", SDIST["filename"])
            rows = parse_ratings(*read_inner_files(sdist, source.files))
            write_text(cached, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def is_cached(path: str) -> bool:
    """Whether `read_sentences` finds the rows of `embedded:NAME` in the cache."""
    return _cached(path).is_file()


def _cached(path: str) -> Path:
    return cache_folder() / "data" / f"{path.removeprefix(EMBEDDED_PREFIX)}-2.jsonl"


def classification_rows(sentences: list[dict[str, Any]], name: str, documents: bool = False) -> list[dict[str, Any]]:
    """Rows of the sign of the rating: clear signs only, the first of each group of equal texts."""
    rows, seen = [], set()
    for sentence in sentences:
        text = normalized(sentence["text"])
        if abs(sentence["rating"]) < NEUTRAL_BELOW or text in seen:
            continue
        seen.add(text)
        row = {
            "id": f"{name}-{sentence['id']}",
            "prompt": PROMPT.replace("{text}", sentence["text"]),
            "choices": list(CHOICES),
            "label": int(sentence["rating"] > 0),
            "label_counts": sentence["signs"],
        }
        rows.append({**row, "unit": f"{name}-{sentence['id'].partition('_')[0]}"} if documents else row)
    return rows


def normalized(text: str) -> str:
    """Lower case, words only: texts that differ in punctuation or case are duplicates."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read_inner_files(sdist: Path, names: tuple[str, ...]) -> list[str]:
    """The texts of files that lie in an archive in the archive; one of them begins with a byte-order mark."""
    with tarfile.open(sdist) as outer:
        inner_name = next(name for name in outer.getnames() if name.endswith("/" + INNER_ARCHIVE))
        with tarfile.open(fileobj=outer.extractfile(inner_name)) as inner:
            there = {name.rpartition("/")[2]: name for name in inner.getnames()}
            files = [inner.extractfile(there[name]) for name in names]
            return [file.read().decode("utf-8-sig") for file in files if file is not None]


def parse_ratings(text: str, raters: str) -> list[dict[str, Any]]:
    """Lines `id TAB mean rating TAB sentence`; HTML entities are resolved and runs of blanks made one.

    Args:
        raters: lines `id TAB mean TAB standard deviation TAB [rating, …]` of the same sentences.
    """
    ratings = {line.split("\t")[0]: json.loads(line.split("\t")[3]) for line in raters.splitlines() if line.strip()}
    rows = []
    for line in text.split("\n"):  # splitlines() would also cut at characters that occur inside sentences
        if line.strip():
            number, rating, sentence = line.rstrip("\r").split("\t")
            signs = [sum(one < 0 for one in ratings[number]), sum(one > 0 for one in ratings[number])]
            text_of = " ".join(html.unescape(sentence).split())
            rows.append({"id": number, "text": text_of, "rating": float(rating), "signs": signs})
    return rows


def _read_cached(path: Path) -> list[dict[str, Any]]:
    try:
        return list(read_json_lines(path))
    except (OSError, RunFolderError):
        return []
