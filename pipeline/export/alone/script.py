"""use.py: the lines that read an export with transformers and peft alone, those of its own case and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_START = '''"""Reproduces the answer to the first test row with {libraries} alone: python use.py{argument}

Ends with 1 where it finds another one. reading.json says what it reads, and what `example` is: put your own row there.
"""

import {modules}
from pathlib import Path

import torch
{imports}

HERE = Path(__file__).resolve().parent
said = json.loads((HERE / "reading.json").read_text(encoding="utf-8"))
row = said["example"]
device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, row["dtype"])
'''
_BASE_FOLDER = '''base = Path(sys.argv[1] if len(sys.argv) > 1 else sys.exit(said["base"]["get"]))
for name, sha256 in said["base"]["files"].items():  # an adapter means nothing on another base
    with (base / name).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            sys.exit(f"{base}: {name} is another base model's. " + said["base"]["get"])
'''
_BASE_HUB = 'base = said["base"]["name"]\n'
_BASE_OWN = "base = HERE  # the adapter is merged into these weights\n"
_QUANTIZED = {
    "none": "",
    "nf4": '''nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
    bnb_4bit_use_double_quant=said["double_quantization"], llm_int8_skip_modules=said["unquantized"] or None,
)
''',
    "int8": '''int8 = BitsAndBytesConfig(
    load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=said["unquantized"] or None
)
''',
}
_LOAD = '''model = {loader}.from_pretrained(
    base, dtype=dtype, device_map={{"": device}},{more}
)
'''
_ADAPTERS = '''model = PeftModel.from_pretrained(model, HERE / said["members"][0], adapter_name="0")
for m, folder in enumerate(said["members"][1:], start=1):
    model.load_adapter(HERE / folder, adapter_name=str(m))
'''
_EVAL = '''model.eval()
tokenizer = AutoTokenizer.from_pretrained(HERE)
'''
_TRAIN = '''for module in model.modules():
    # In eval mode bitsandbytes' 4-bit layers take another kernel on CPUs with AVX512-BF16, which rounds to bfloat16 and
    # gives another number (.656 where .636 was evaluated). In train mode they do not, and nothing in them is random.
    if type(module).__module__.startswith("bitsandbytes."):
        module.train()
'''
_TOKENS = '''

def ids_of(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def following(text):
    """Token ids of an answer behind a prompt: cut out from behind a line break, because many tokenizers put a blank
    before whatever begins a text."""
    line, ids = ids_of("\\n"), ids_of("\\n" + text)
    return ids[len(line):] if ids[: len(line)] == line else ids_of(text)


def token_logs(answer, room):
    """Log-probability of each token of an answer, of which the longest has `room` tokens."""
    prompt = said["lead"] + ids_of(row["prompt"])[-(said["max_tokens"] - len(said["lead"]) - room):]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer], device=device)).logits[0].double().cpu()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(answer)), answer]


def member():
'''
_MEMBER = {
    "choice": '''    """Log-probabilities of the choices."""
    answers = [following(text) for text in row["choices"]]
    if any(a != b and b[: len(a)] == a for a in answers for b in answers):  # one begins another: all are closed
        answers = [ids + [tokenizer.eos_token_id] for ids in answers]
    logs = [token_logs(ids, max(map(len, answers))) for ids in answers]
    return torch.stack([{score} for tokens, text in zip(logs, row["choices"])]).log_softmax(-1)
''',
    "completion": '''    """Log-probabilities of the tokens of the reference answer, its end included."""
    ids, end = following(row["choices"][0]), tokenizer.eos_token_id
    ids = ids if ids[-1:] == [end] else [*ids, end]
    return token_logs(ids, len(ids))
''',
}
_SCORES = {
    "sum": "tokens.sum()", "per_token": "tokens.sum() / len(tokens)",
    "per_character": "tokens.sum() / len(text.strip())",
}
_HEAD = '''

def member():
    """{what}"""
    tokenizer.truncation_side = "left" if row["second"] is None else "right"
    found = tokenizer(row["prompt"], row["second"], truncation="longest_first", max_length=said["max_tokens"])
    names = [name for name in ("input_ids", "token_type_ids") if name in found]
    inputs = {{name: torch.tensor([found[name]], device=device) for name in names}}
    with torch.no_grad():
        return model(**inputs).logits[0].double().cpu(){normalised}
'''
_EACH = '''

outputs = []
for m in range(len(said["members"])):
    model.set_adapter(str(m))
    outputs.append(member())
weights = torch.tensor(said["weights"], dtype=torch.float64)[:, None]
'''
_ONE = '''

outputs, weights = [member()], torch.ones(1, 1, dtype=torch.float64)
'''
_AVERAGE = {
    "probability": "averaged = (torch.stack(outputs) + weights.log()).logsumexp(0)  # of probabilities; scaled later\n",
    "logit": "averaged = (torch.stack(outputs) * weights).sum(0)  # of log-probabilities; scaled later\n",
    "value": "values = (torch.stack(outputs) * weights).sum(0)\n",
}
_SCALE = "values = (averaged.log_softmax(-1) / {temperature}).softmax(-1)  # normalised, divided, normalised again\n"
_END = '''print(json.dumps({"prompt": row["prompt"], "choices": row["choices"], "values": values.tolist()}))
apart = max(abs(a - b) for a, b in zip(values.tolist(), row["values"], strict=True))
if not apart <= row["tolerance"]:
    sys.exit(f"{row['values']} was said of this row: {apart:.4g} apart, more than {row['tolerance']:g}")
'''


def use_script(reading: Mapping[str, Any], trusted: bool) -> str:
    """The script of an export.

    Args:
        reading: content of its reading.json.
        trusted: whether the model comes with code that must run.
    """
    merged, quantization, kind = reading["merged"], reading["quantization"], reading["kind"]
    loader = "AutoModelForCausalLM" if reading["outputs"] is None else "AutoModelForSequenceClassification"
    of_folder = not merged and bool(reading["base"]["files"])
    names = [loader, "AutoTokenizer", *(["BitsAndBytesConfig"] if quantization != "none" else [])]
    more = [
        ("trust_remote_code=True", trusted),
        (f"quantization_config={quantization}", quantization != "none"),
        ('revision=said["base"]["commit"]', not merged and reading["base"]["commit"] is not None),
        ('num_labels=said["outputs"], ignore_mismatched_sizes=True', reading["outputs"] is not None),
    ]
    lines = [
        _START.format(
            libraries="transformers" if merged else "transformers and peft", argument=" BASE" if of_folder else "",
            modules="\nimport ".join([*(["hashlib"] if of_folder else []), "json", "sys"]),
            imports=("" if merged else "from peft import PeftModel\n") + f"from transformers import {', '.join(names)}",
        ),
        _BASE_OWN if merged else _BASE_FOLDER if of_folder else _BASE_HUB,
        _QUANTIZED[quantization],
        _LOAD.format(loader=loader, more="".join(f"\n    {word}," for word, wanted in more if wanted)),
        "" if merged else _ADAPTERS,
        _EVAL,
        "" if quantization == "none" else _TRAIN,
    ]
    if reading["outputs"] is None:
        lines += [_TOKENS, _MEMBER[kind].replace("{score}", _SCORES[reading["choice_score"]])]
    else:
        what = "The number." if kind == "regression" else "Log-probabilities of the choices."
        lines += [_HEAD.format(what=what, normalised="" if kind == "regression" else ".log_softmax(-1)")]
    lines += [_ONE if merged else _EACH, _AVERAGE[reading["average"]]]
    if kind == "choice":
        temperature = 'said["temperature"]' if reading["temperature"] is not None else "1.0"
        lines.append(_SCALE.format(temperature=temperature))
    elif kind == "completion":
        lines.append("values = averaged\n")
    return "".join([*lines, _END])
