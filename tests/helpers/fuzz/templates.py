"""data.template and what else turns columns into rows."""

from __future__ import annotations

import json
from random import Random

from helpers.fuzz.case import Case, Item
from helpers.fuzz.material import ROWS, SETTINGS, row
from helpers.fuzz.values import SCALARS, TEXTS, json_value

OTHERS = ("splits", "evaluation", "train_rows", "test_rows", "seed")
PARTS = ("prompt", "second", "choices", "label", "score", "completion")
TEMPLATES: tuple[dict[str, object], ...] = (
    {"prompt": "{prompt} Answer:", "choices": [" no", " yes"], "label": "label"},
    {"prompt": "{text}", "completion": "{answer}"},
    {"prompt": "{text}", "score": "number"},
    {"prompt": "{choices[0]} or {choices[1]}?", "choices": ["{choices[0]}", "{choices[1]}"], "label": "label"},
    {"prompt": "{text}", "second": "{answer}", "score": "number"},
)


def make(random: Random) -> Case:
    rows = [{**row(i), "text": f"text {i}", "answer": f"answer {i}", "number": i / 3} for i in range(ROWS)]
    lines = [json.dumps(one) for one in rows]
    if random.random() < 0.3:
        place = random.randrange(ROWS)
        found = {key: json.dumps(value) for key, value in rows[place].items()}
        found[random.choice(list(found))] = json_value(random)
        lines[place] = f"{{{', '.join(f'{json.dumps(key)}: {value}' for key, value in found.items())}}}"
    template = json.loads(json.dumps(random.choice(TEMPLATES)))
    for _ in range(random.choice((0, 1, 1, 2))):
        part = random.choice(PARTS)
        match random.randrange(4):
            case 0:
                template.pop(part, None)
            case 1 if isinstance(template.get("choices"), list):
                template["choices"][0] = random.choice(TEXTS)
            case _:
                template[part] = random.choice(TEXTS)
    words = [f"data.template={json.dumps(template)}"]
    if random.random() < 0.2:
        words.append(f"data.template.{random.choice(PARTS)}={random.choice(SCALARS)}")
    if random.random() < 0.2:
        words.append(f"data.{random.choice(OTHERS)}={random.choice(SCALARS)}")
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")
    argv = ("--dry-run", "train", "--run-dir", "run", *SETTINGS, "data.path=rows.jsonl", *words)
    return Case("templates", argv, (Item("rows.jsonl", "bytes", content),))
