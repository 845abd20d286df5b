"""The texts that a run wrote: predictions/generated_SPLIT.jsonl, which `evaluate` writes and `report` reads.

The first line says what they were made from, by whom and in what time; each other line is a text. No right answer
stands in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.config.evaluate import GenerateConfig
from pipeline.errors import RunFolderError
from pipeline.files import read_json_lines, write_text
from pipeline.run_folder.labelled import independent_units
from pipeline.run_folder.members import PredictedMember
from pipeline.run_folder.predictions import EVALUATE_AGAIN, REMEDY
from pipeline.scores.bootstrap import Ints


@dataclass(frozen=True)
class Text:
    """What one system wrote for one prompt."""

    id: str
    """Of the first row with this prompt."""
    system: str
    """Key of a `writers` entry."""
    text: str
    """Without the blanks around it."""
    tokens: int
    """The end among them."""
    log_prob: float
    """Σ log p(token), in nats, of the average of its members."""
    ended: bool
    """Whether it ended by itself, rather than at `max_tokens`."""


@dataclass(frozen=True)
class GeneratedTexts:
    """What every system wrote for the same prompts."""

    made_from: Mapping[str, Any]
    """See `texts_from`."""
    writers: Mapping[str, Sequence[str]]
    """Key of each system -> names of its members."""
    seconds: Mapping[str, float]
    """How long each took."""
    texts: Sequence[Text]


def writers_of(members: Sequence[PredictedMember]) -> dict[str, list[int]]:
    """The systems that write, by their keys in a report: places of their members.

    Base, plain LoRA, the adapter without masks, all of its draws together. None of a comparison, which has many.
    """
    groups: dict[str, list[int]] = {}
    for place, member in enumerate(members):
        groups.setdefault(member.group, []).append(place)
    if "mean_field" not in groups:
        return {}
    found = {group: groups[group][:1] for group in ("base", "plain", "mean_field") if group in groups}
    draws = groups.get("mask_draw", [])
    return found | ({f"masks_{len(draws)}": draws} if len(draws) > 1 else {})


def texts_from(predictions: Mapping[str, Any], settings: GenerateConfig, space: str) -> dict[str, Any]:
    """What texts were made from: what the predictions of the same members are, and how they were searched for.

    Args:
        predictions: `chain.predictions_from`.
        space: `ensemble.average`, in which the members' distributions of the next token are averaged.
    """
    return {**predictions, "settings": settings.model_dump(mode="json"), "average": space}


def asked(row: Any) -> str:
    """What is asked of a row that is answered by a text: rows that share it are one prompt with several references."""
    return json.dumps([row.messages[:-1], row.tools]) if row.messages else str(row.prompt)


def references_of(row: Any) -> list[str]:
    """The right answers of a row."""
    answer = row.messages[-1].get("content") if row.messages else row.completion
    return [text.strip() for text in (answer, *row.references) if isinstance(text, str) and text.strip()]


def distinct_prompts(rows: Iterable[Any], most: int | None) -> list[list[Any]]:
    """The rows of each prompt, in order of appearance, of the first `most` prompts."""
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(asked(row), []).append(row)
    return list(groups.values())[:most]


def write_texts(folder: Path, split: str, generated: GeneratedTexts) -> None:
    """Write folder/generated_SPLIT.jsonl; never half-written."""
    head = {"made_from": dict(generated.made_from), "writers": generated.writers, "seconds": generated.seconds}
    lines = [head, *(asdict(text) for text in generated.texts)]
    content = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    write_text(texts_path(folder, split), content)


def read_texts(folder: Path, split: str) -> GeneratedTexts:
    """Read folder/generated_SPLIT.jsonl.

    Raises:
        RunFolderError: it is missing or damaged, or a system has not written for every prompt.
    """
    path = texts_path(folder, split)
    if not path.is_file():
        raise RunFolderError(str(path), None, "does not exist", REMEDY)
    try:
        head, *lines = read_json_lines(path)
        texts = [Text(**line) for line in lines]
        seconds = {key: float(head["seconds"][key]) for key in head["writers"]}
        found = GeneratedTexts(head["made_from"], head["writers"], seconds, texts)
        prompts = [{text.id for text in texts if text.system == key} for key in found.writers]
        if len(texts) != sum(map(len, prompts)) or not prompts[0] or any(ids != prompts[0] for ids in prompts):
            raise ValueError("the systems have not written for the same prompts")
        if not all(isinstance(text.text, str) and isinstance(text.tokens, int) and text.tokens > 0 for text in texts):
            raise ValueError("a line is no text")
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RunFolderError) as error:
        raise RunFolderError(str(path), None, f"is damaged ({' '.join(str(error).split())})", REMEDY) from error
    return found


def is_written(folder: Path, split: str, made_from: Mapping[str, Any]) -> bool:
    """Whether the texts of a split are there, made from just this."""
    try:
        return read_texts(folder, split).made_from == made_from
    except RunFolderError:
        return False


def texts_path(folder: Path, split: str) -> Path:
    """folder/generated_SPLIT.jsonl."""
    return folder / f"generated_{split}.jsonl"


@dataclass(frozen=True)
class JoinedTexts:
    """What systems wrote, with the references: N prompts, in the order of the test rows."""

    prompts: Sequence[str]
    references: Sequence[Sequence[str]]
    units: Ints | None
    """(N,) as `LabelledSplit.units`."""
    texts: Mapping[str, Sequence[Text]]
    """Key of a system -> its text for each prompt."""
    generated: GeneratedTexts


def read_joined(
    folder: Path, config: RunConfig, rows: Sequence[Any], made_from: Mapping[str, Any],
    members: Sequence[PredictedMember],
) -> JoinedTexts | None:
    """The texts of the test rows with their references; None where none are asked for.

    Args:
        folder: predictions/ of the run.
        made_from: of the predictions of the same members (`chain.predictions_from`).

    Raises:
        RunFolderError: they are missing, damaged, made under other settings, by other members or for other rows.
    """
    settings = config.evaluate.generate
    if settings is None or not writers_of(members):
        return None
    generated = read_texts(folder, "test")
    groups = {group[0].id: group for group in distinct_prompts(rows, settings.rows)}
    texts: dict[str, dict[str, Text]] = {key: {} for key in generated.writers}
    for text in generated.texts:
        texts[text.system][text.id] = text
    wanted = texts_from(made_from, settings, config.ensemble.average)
    if generated.made_from != wanted or any(found.keys() != groups.keys() for found in texts.values()):
        where = str(texts_path(folder, "test"))
        raise RunFolderError(where, None, "was made under other settings, by other members or for other rows",
                             EVALUATE_AGAIN)
    references = {key: [one for row in group for one in references_of(row)] for key, group in groups.items()}
    kept = [key for key in groups if references[key]]  # an answer that only calls a tool has no text
    if not kept:
        raise RunFolderError("evaluate.generate", None, "wrote texts for rows none of which has a text as its answer",
                             "Set it to null.")
    first = [groups[key][0] for key in kept]
    return JoinedTexts(
        [_shown_prompt(row) for row in first], [references[key] for key in kept],
        independent_units([row.unit or row.id for row in first]),
        {key: [found[one] for one in kept] for key, found in texts.items()}, generated,
    )


def _shown_prompt(row: Any) -> str:
    """Of a chat, what was said last before the answer."""
    return row.prompt if not row.messages else str(row.messages[-2]["content"] if len(row.messages) > 1 else "")
