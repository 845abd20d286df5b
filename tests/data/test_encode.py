"""Tokens and supervision, on tokenizers built here: byte-level, and SentencePiece-like with BOS and EOS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data.encode import (
    IGNORE_INDEX,
    Encoded,
    begins_another,
    encode_candidates,
    encode_training,
    encode_training_rows,
    supervised_share,
)
from pipeline.data.rows import Row
from pipeline.errors import DataError
from pipeline.support.tiny import CHATML, CORPUS, byte_level_tokenizer, word_tokenizer

THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else 'seen' }}")
WITH_TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}" + CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}<call>{{ m.tool_calls | tojson }}</call>{% endif %}"
)
STRICT = "{% if messages|length > 2 %}{{ raise_exception('Only one exchange') }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama-2-like: a blank before every text, BOS before and EOS behind it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [word for line in CORPUS for word in line.split()]
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>")


REVIEW = Row("r", "Review: a fine film\nSentiment:", (" negative", " positive"), 1)


def supervised_text(encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Decoded stretches of supervised tokens."""
    stretches: list[list[int]] = []
    for before, label in zip((IGNORE_INDEX, *encoded.labels), encoded.labels, strict=False):
        if label != IGNORE_INDEX:
            if before == IGNORE_INDEX:
                stretches.append([])
            stretches[-1].append(label)
    return [str(tokenizer.decode(stretch)) for stretch in stretches]


def check_labels(encoded: Encoded) -> None:
    assert len(encoded.labels) == len(encoded.input_ids) and encoded.labels[0] == IGNORE_INDEX
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))


def test_a_choice_row_supervises_its_right_choice_only(byte_level: PreTrainedTokenizerFast) -> None:
    encoded = encode_training(REVIEW, byte_level, 64)
    check_labels(encoded)
    assert supervised_text(encoded, byte_level) == [" positive"]
    assert byte_level.decode(encoded.input_ids) == "Review: a fine film\nSentiment: positive"
    assert encoded.example == "r" and encoded.supervised == len(byte_level(" positive")["input_ids"])


def test_candidates_share_their_prompt_tokens(byte_level: PreTrainedTokenizerFast) -> None:
    negative, positive = encode_candidates(REVIEW, byte_level, 64)
    prompt = tuple(byte_level(REVIEW.prompt)["input_ids"])
    assert negative.input_ids[: len(prompt)] == positive.input_ids[: len(prompt)] == prompt
    assert set(negative.labels[: len(prompt)]) == {IGNORE_INDEX}
    assert supervised_text(negative, byte_level) == [" negative"]
    assert positive == encode_training(REVIEW, byte_level, 64)


@given(st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=2, max_size=5))
def test_one_answer_begins_another(answers: list[list[int]]) -> None:
    wanted = any(a and len(a) < len(b) and b[: len(a)] == a for a in answers for b in answers)
    assert begins_another(answers) == wanted


def test_an_end_closes_all_choices_where_one_begins_another(byte_level: PreTrainedTokenizerFast) -> None:
    row = Row("r", "Answer:", (" 12", " no", " 1"), 2)
    candidates = encode_candidates(row, byte_level, 64)
    assert [supervised_text(one, byte_level) for one in candidates] == [[" 12<|im_end|>"], [" no<|im_end|>"],
                                                                       [" 1<|im_end|>"]]
    assert encode_training(row, byte_level, 64) == candidates[2]
    longest = max(len(one.input_ids) for one in candidates)
    cut = encode_candidates(row, byte_level, longest - 1)
    assert max(len(one.input_ids) for one in cut) == longest - 1, "the end is part of the answer that has to fit"
    apart = encode_candidates(Row("r", "Answer:", (" 12", " no", " 21"), 2), byte_level, 64)
    assert [supervised_text(one, byte_level) for one in apart] == [[" 12"], [" no"], [" 21"]]


def test_what_counts_are_tokens_not_letters() -> None:
    words = word_tokenizer(["<unk>", "</s>", "Answer:", "1", "12"], unk_token="<unk>", eos_token="</s>")
    for choices, ends in (((" 1", " 12"), False), ((" 1", " 1 12"), True)):
        for one in encode_candidates(Row("r", "Answer:", choices, 0), words, 64):
            check_labels(one)
            assert (one.labels[-1] == 1) == ends


def test_bos_where_the_tokenizer_adds_it_and_no_eos_inside(sentencepiece: PreTrainedTokenizerFast) -> None:
    encoded = encode_training(REVIEW, sentencepiece, 64)
    whole = sentencepiece(REVIEW.prompt + REVIEW.choices[1])["input_ids"]
    assert whole[0] == 1 and whole[-1] == 2
    assert list(encoded.input_ids) == whole[:-1], "the answer meets the prompt as in one text: no second blank"
    check_labels(encoded)


def test_no_blank_appears_before_an_answer_without_one(sentencepiece: PreTrainedTokenizerFast) -> None:
    assert sentencepiece("yes")["input_ids"] == sentencepiece(" yes")["input_ids"], "the trap is there"
    encoded = encode_training(Row("r", "Answer:", completion="yes"), sentencepiece, 64)
    assert sentencepiece.decode(list(encoded.input_ids)) == "<s> Answer:yes</s>"


def test_an_answer_that_begins_with_a_line_break(byte_level: PreTrainedTokenizerFast) -> None:
    assert len(byte_level("\n\n")["input_ids"]) == 1
    encoded = encode_training(Row("r", "Question:", completion="\nyes"), byte_level, 64)
    assert supervised_text(encoded, byte_level) == ["\nyes<|im_end|>"]


def test_a_completion_ends_with_one_eos(byte_level: PreTrainedTokenizerFast) -> None:
    for completion in (" nobody knows", " nobody knows<|im_end|>"):
        encoded = encode_training(Row("r", "Answer:", completion=completion), byte_level, 64)
        check_labels(encoded)
        assert supervised_text(encoded, byte_level) == [" nobody knows<|im_end|>"]
        assert encode_candidates(Row("r", "Answer:", completion=completion), byte_level, 64) == [encoded]


def test_eos_inside_a_prompt_is_no_reason_to_supervise_or_mask(byte_level: PreTrainedTokenizerFast) -> None:
    row = Row("r", "yes<|im_end|> no<|im_end|>", completion=" yes<|im_end|> no")
    encoded = encode_training(row, byte_level, 64)
    assert supervised_text(encoded, byte_level) == [" yes<|im_end|> no<|im_end|>"]


def test_the_prompt_is_cut_from_its_beginning_and_bos_stays(sentencepiece: PreTrainedTokenizerFast) -> None:
    review = Row("r", REVIEW.prompt, (" negative and dull film", " positive"), 1)
    whole = encode_candidates(review, sentencepiece, 64)
    assert whole[0].supervised > whole[1].supervised
    longest = max(len(e.input_ids) for e in whole)
    prompt = len(whole[0].input_ids) - whole[0].supervised
    for max_tokens in range(longest - prompt + 2, longest + 1):
        cut = encode_candidates(review, sentencepiece, max_tokens)
        assert max(len(e.input_ids) for e in cut) == max_tokens
        for before, after in zip(whole, cut, strict=True):
            assert after.input_ids[0] == 1
            kept = len(after.input_ids) - 1
            assert after.input_ids[1:] == before.input_ids[-kept:] and after.supervised == before.supervised
        shared = {e.input_ids[: len(e.input_ids) - e.supervised] for e in cut}
        assert len(shared) == 1, "one prompt for all choices"
        assert encode_training(review, sentencepiece, max_tokens) == cut[1]


def test_an_answer_that_does_not_fit_is_refused_with_the_number_that_does(byte_level: PreTrainedTokenizerFast) -> None:
    row = Row("r9", "Answer:", completion=" nobody knows" * 20)
    with pytest.raises(DataError, match=r"max_tokens = 8: row r9 has an answer of \d+ tokens; .* never cut") as bad:
        encode_training(row, byte_level, 8)
    needed = int(str(bad.value).partition("Set data.max_tokens=")[2].split()[0])
    assert len(encode_training(row, byte_level, needed).input_ids) == needed
    with pytest.raises(DataError):
        encode_training(row, byte_level, needed - 1)
    fits = Row("ok", "Answer:", completion=" yes")
    longer = Row("r10", "Answer:", completion=" nobody knows" * 21)
    longer = replace(longer, where="rows.jsonl:7")
    with pytest.raises(DataError, match=r"2 of 3 rows have longer answers: row r9, row r10 \(rows\.jsonl:7\);"):
        encode_training_rows([row, fits, longer], byte_level, 8)
    with pytest.raises(DataError, match=r"4 of 4 rows .*: row r9, row r10 \(rows\.jsonl:7\), row r9, …;"):
        encode_training_rows([row, longer] * 2, byte_level, 8)
    with pytest.raises(DataError, match="row r9"):
        encode_training_rows([row, fits], byte_level, 8)


def chat(*turns: tuple[str, str]) -> Row:
    return Row("c", messages=tuple({"role": role, "content": content} for role, content in turns))


TWO_TURNS = chat(("user", "hello"), ("assistant", "hello there "), ("user", "\nmore"), ("assistant", "\nyes"))


def test_chat_supervises_assistant_turns_with_their_end_mark(byte_level: PreTrainedTokenizerFast) -> None:
    encoded = encode_training(TWO_TURNS, byte_level, 256)
    check_labels(encoded)
    assert supervised_text(encoded, byte_level) == ["hello there <|im_end|>", "\nyes<|im_end|>"]
    rendered = byte_level.apply_chat_template(list(TWO_TURNS.messages), tokenize=False)
    assert byte_level.decode(encoded.input_ids) == rendered.rstrip()
    assert encode_candidates(TWO_TURNS, byte_level, 256) == [encoded]


def test_the_first_answer_follows_exactly_the_generation_prompt(byte_level: PreTrainedTokenizerFast) -> None:
    encoded = encode_training(TWO_TURNS, byte_level, 256)
    prompt = byte_level.apply_chat_template(list(TWO_TURNS.messages[:1]), add_generation_prompt=True)["input_ids"]
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    assert list(encoded.input_ids[:first]) == prompt


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["hi", "more?\n", "x y"]), st.text("ab \n", min_size=1).filter(str.strip)),
                min_size=1, max_size=4))
def test_chat_masks_match_an_independent_count(
    byte_level: PreTrainedTokenizerFast, exchanges: list[tuple[str, str]]
) -> None:
    row = chat(*(turn for user, answer in exchanges for turn in (("user", user), ("assistant", answer))))
    encoded = encode_training(row, byte_level, 1000)
    assert supervised_text(encoded, byte_level) == [f"{answer}<|im_end|>" for _, answer in exchanges]


@pytest.fixture
def with_template(byte_level: PreTrainedTokenizerFast) -> Callable[[str | None], PreTrainedTokenizerFast]:
    def build(template: str | None) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=byte_level.backend_tokenizer, eos_token="<|im_end|>", chat_template=template)

    return build


Templated = Callable[[str | None], PreTrainedTokenizerFast]


def test_a_generation_prompt_that_opens_a_thought_is_masked_or_refused(with_template: Templated) -> None:
    tokenizer = with_template(THINKING)
    thought = chat(("user", "hello"), ("assistant", "<think>\nhm</think>yes"))
    assert supervised_text(encode_training(thought, tokenizer, 256), tokenizer) == ["hm</think>yes<|im_end|>"]
    with pytest.raises(DataError, match=r"messages\[1\].*behind its generation prompt.*<think>.*Begin the answer"):
        encode_training(chat(("user", "hello"), ("assistant", "yes")), tokenizer, 256)


def test_templates_that_rewrite_earlier_turns_are_refused(with_template: Templated) -> None:
    tokenizer = with_template(FORGETFUL)
    encode_training(chat(("user", "hello"), ("assistant", "yes")), tokenizer, 256)
    with pytest.raises(DataError, match=r"row c: messages\[3\].*earlier assistant turn differently.*Give one row"):
        encode_training(TWO_TURNS, tokenizer, 256)


def test_what_a_template_refuses_is_named(with_template: Templated) -> None:
    with pytest.raises(DataError, match=r"row c: messages: is refused by the model's chat template \(Only one"):
        encode_training(TWO_TURNS, with_template(STRICT), 256)
    with pytest.raises(DataError, match="has no chat template. Use an instruction-tuned model"):
        encode_training(TWO_TURNS, with_template(None), 256)


def test_a_long_chat_keeps_its_last_answer_whole(byte_level: PreTrainedTokenizerFast) -> None:
    whole = encode_training(TWO_TURNS, byte_level, 256)
    last = len(byte_level("\nyes<|im_end|>")["input_ids"])
    for max_tokens in range(last + 1, len(whole.input_ids)):
        cut = encode_training(TWO_TURNS, byte_level, max_tokens)
        check_labels(cut)
        assert cut.input_ids == whole.input_ids[-max_tokens:] and cut.labels[1:] == whole.labels[1 - max_tokens :]
        assert cut.labels[-last:] == whole.labels[-last:]
    with pytest.raises(DataError, match=f"data.max_tokens = {last}: .*Set data.max_tokens={last + 1}"):
        encode_training(TWO_TURNS, byte_level, last)


def test_the_share_of_supervised_tokens() -> None:
    rows = [Encoded("a", (1, 2, 3, 4), (IGNORE_INDEX, IGNORE_INDEX, 3, 4)), Encoded("b", (1, 2), (IGNORE_INDEX, 2))]
    assert supervised_share(rows) == 0.5
    with pytest.raises(DataError, match="no token of its 1 training rows is supervised.*data.template"):
        supervised_share([Encoded("a", (1, 2), (IGNORE_INDEX, IGNORE_INDEX))])


def test_texts_without_tokens_and_tokenizers_without_eos_are_refused(byte_level: PreTrainedTokenizerFast) -> None:
    words = Tokenizer(models.WordLevel({"yes": 0, "no": 1}))
    words.normalizer = normalizers.Replace("perhaps", "")
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert supervised_text(encode_training(Row("r", "no", (" no", " yes"), 1), tokenizer, 9), tokenizer) == ["yes"]
    with pytest.raises(DataError, match="row r = 'perhaps': has no tokens"):
        encode_training(Row("r", "no", (" no", "perhaps"), 0), tokenizer, 9)
    with pytest.raises(DataError, match="model.path: its tokenizer has no eos token.*Set eos_token"):
        encode_training(Row("r", "no", completion="yes"), tokenizer, 9)
    with pytest.raises(DataError, match="no eos token, so the choices of row r, of which one begins another.*Set eos"):
        encode_training(Row("r", "no", (" no", " no yes"), 0), tokenizer, 9)


# --- tools ------------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = (
    {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "two"}, {"role": "assistant", "content": "Two"},
)


def test_tools_and_their_calls_are_rendered_by_the_chat_template_or_refused_by_name(
    byte_level: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row("r", messages=CALLING, tools=({"type": "function", "function": {"name": "add"}},))
    with pytest.raises(DataError, match=r"row r: tools: is not rendered by the model's chat template.*knows tools"):
        encode_training(row, byte_level, 512)
    with pytest.raises(DataError, match=r"row r: messages\[1\].tool_calls: is not rendered"):
        encode_training(Row("r", messages=CALLING), byte_level, 512)
    monkeypatch.setattr(byte_level, "chat_template", WITH_TOOLS)
    text = byte_level.decode(encode_training(row, byte_level, 1024).input_ids)
    assert text.startswith("<tools>") and '<call>[{"type"' in text
    learnt = supervised_text(encode_training(row, byte_level, 1024), byte_level)
    assert len(learnt) == 2 and learnt[0].startswith("<call>") and learnt[1].startswith("Two")
    mute = WITH_TOOLS.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' else '' }}")
    monkeypatch.setattr(byte_level, "chat_template", mute)
    with pytest.raises(DataError, match=r"row r: messages\[2\] of the role tool: is not rendered"):
        encode_training(row, byte_level, 1024)
