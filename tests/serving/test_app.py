"""The routes over a real ensemble of a tiny model: what they answer, and the status of everything that is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from helpers.serving import MEMBERS, Server, Slow, tiny_ensemble

from pipeline.data.rows import Row
from pipeline.ensemble.ensemble import Answer, Ensemble, as_dict
from pipeline.ensemble.readout import Readout
from pipeline.errors import RunFolderError

KEY = "0123456789abcdef-secret"
ROWS = [
    {"prompt": "Review: a fine film\nSentiment:", "choices": [" positive", " negative"]},
    {"prompt": "Question: who wrote it? Answer:"}, {"id": "named", "prompt": "one"},
]


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return tiny_ensemble()


@pytest.fixture(scope="module")
def server(ensemble: Ensemble) -> Iterator[Server]:
    found = Server(ensemble, body_bytes=4096, body_seconds=0.2, tokens=200, new_tokens=60, rows=4)
    yield found
    found.service.close()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


def test_rows_are_answered_as_predict_answers_them(ensemble: Ensemble, server: Server) -> None:
    said = server.post("/v1/classify", {"rows": ROWS, "members": True}).json()
    for answer, expected in zip(said["answers"], ensemble.predict(ROWS), strict=True):
        assert isinstance(expected, Answer)
        plain = json.loads(json.dumps(as_dict(expected)))
        assert [answer[name] for name in ("id", "choice", "index")] == [plain[n] for n in ("id", "choice", "index")]
        for name in ("probabilities", "entropy", "mutual_information", "spread"):
            np.testing.assert_allclose(answer[name], plain[name], rtol=0, atol=1e-6)
        assert np.shape(answer["members"]) == (3, 2)
        np.testing.assert_allclose(np.std(answer["members"], axis=0), answer["spread"], atol=1e-6)
    assert said["answers"][0]["choices"] == ["positive", "negative"] and said["answers"][1]["choices"] == ["yes", "no"]
    assert said["abstention"] == {"reason": said["abstention"]["reason"]} and "export" in said["abstention"]["reason"]
    text = server.post("/v1/classify", {"text": ROWS[1]["prompt"]}).json()["answers"]
    assert len(text) == 1 and text[0]["probabilities"] == pytest.approx(said["answers"][1]["probabilities"], abs=1e-6)
    assert "members" not in text[0]
    assert len(server.post("/v1/classify", {"text": ["one", "two"]}).json()["answers"]) == 2


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/v1/classify", {"text": "a", "model": "other"}, 404, "model_not_found", "model"),
        ("/v1/classify", {"txt": "a"}, 400, "unsupported_parameter", "txt"),
        ("/v1/classify", {}, 400, "invalid_rows", "rows"),
        ("/v1/classify", {"rows": [{"label": 1}]}, 400, "invalid_rows", None),
        ("/v1/classify", {"text": ["a"] * 5}, 400, "too_many_rows", "rows"),
        ("/v1/classify", {"text": ["one two " * 60] * 4}, 400, "too_many_tokens", "rows"),
        ("/v1/classify", [1], 400, "invalid_value", None),
        ("/v1/completions", {"prompt": "a", "n": 2}, 400, "unsupported_value", "n"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {}}, 400, "unsupported_parameter", "logit_bias"),
        ("/v1/completions", {"prompt": "a", "presence_penalty": 0.5}, 400, "invalid_value", "presence_penalty"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "invalid_value", "temperature"),
        ("/v1/completions", {"prompt": "a", "logprobs": 6}, 400, "invalid_value", "logprobs"),
        ("/v1/completions", {"prompt": 5}, 400, "invalid_value", "prompt"),
        ("/v1/completions", {"prompt": [[]]}, 400, "invalid_value", "prompt"),
        ("/v1/completions", {"prompt": [4000]}, 400, "invalid_value", "prompt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 61}, 400, "too_many_tokens", "max_tokens"),
        ("/v1/completions", {"prompt": [5] * 90, "max_tokens": 60}, 400, "context_length_exceeded", "max_tokens"),
        ("/v1/completions", {"prompt": ["a"] * 5, "max_tokens": 50}, 400, "too_many_tokens", "prompt"),
        ("/v1/chat/completions", {"messages": []}, 400, "invalid_value", "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": []}, 400,
         "unsupported_parameter", "tools"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, 400, "unsupported_value",
         "messages"),
        ("/v1/nothing", {}, 404, None, None),
    ],
)
def test_what_is_refused_is_refused_by_name(
    server: Server, path: str, body: Any, status: int, code: str | None, param: str | None
) -> None:
    error = error_of(server.post(path, body), status)
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    if param is not None:
        assert error["param"] == param and param in error["message"]


def test_malformed_large_and_slow_bodies_have_their_status(server: Server) -> None:
    sent = {"content": b'{"text": ', "headers": {"content-type": "application/json"}}
    assert error_of(server.post("/v1/classify", **sent), 400)["code"] == "invalid_json"
    plain = {"content": b'{"text": "a"}', "headers": {"content-type": "text/plain"}}  # what a page elsewhere may send
    error_of(server.post("/v1/classify", **plain), 400)
    assert error_of(server.post("/v1/classify", {"text": "a" * 5000}), 413)["code"] == "body_too_large"

    async def drops(wait: float) -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 100
            await asyncio.sleep(wait)

    assert error_of(server.post("/v1/classify", content=drops(0.0)), 413)["code"] == "body_too_large"
    slow = server.post("/v1/classify", content=drops(0.1))
    assert error_of(slow, 408)["code"] == "slow_body" and slow.headers["connection"] == "close"
    assert error_of(server.get("/v1/classify"), 405)["code"] is None


def test_nobody_is_let_in_without_the_key(ensemble: Ensemble) -> None:
    server = Server(ensemble, key=KEY)
    shown = {"authorization": f"Bearer {KEY}"}
    for wrong in (None, "", KEY, "Bearer ", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xe4"):
        headers = {} if wrong is None else {"authorization": wrong.encode("latin-1")}
        refused = server.post("/v1/classify", {"text": "one"}, headers=headers)
        assert error_of(refused, 401)["code"] == "invalid_api_key" and refused.headers["www-authenticate"] == "Bearer"
    assert server.get("/metrics").status_code == server.get("/v1/models").status_code == 401
    assert server.get("/v1/models", headers=shown).json()["data"][0]["id"] == "tiny"
    assert server.post("/v1/classify", {"text": "one"}, headers=shown).status_code == 200
    page = server.get("/")
    assert page.status_code == server.get("/healthz").status_code == server.get("/readyz").status_code == 200
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text
    counts = server.get("/metrics", headers=shown).text
    assert 'loradrop_requests_total{route="/v1/classify",status="401"} 7' in counts
    assert 'loradrop_request_seconds_count{route="/v1/classify"} 8' in counts and "loradrop_rows_total 1" in counts
    assert "loradrop_members 3" in counts
    server.service.close()
    assert server.get("/readyz").status_code == 503
    assert error_of(server.post("/v1/classify", {"text": "one"}, headers=shown), 503)["code"] == "overloaded"


def test_a_run_on_free_text_writes_and_does_not_choose(ensemble: Ensemble) -> None:
    form = replace(ensemble.form, kind="chat", choices=None)
    free = replace(ensemble, form=form, readout=Readout((0, 3, None), "probability", None, "completion"))
    server = Server(free)
    assert error_of(server.post("/v1/classify", {"text": "a"}), 404)["code"] == "not_available"
    said = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3})
    assert said.status_code == 200 and said.json()["usage"]["completion_tokens"] <= 3
    assert server.get("/v1/about").json()["kind"] == "chat"
    with pytest.raises(RunFolderError, match="answers in free text"):
        free.answers([Row("a", "text", (" yes", " no"))])
    server.service.close()


def test_a_full_queue_a_late_answer_and_a_client_that_leaves(ensemble: Ensemble) -> None:
    server = Server(ensemble, waiting=2, seconds=0.4, gather_ms=0)
    slow = Slow(server.service)

    async def crowd(client: httpx.AsyncClient) -> list[httpx.Response]:
        first = asyncio.ensure_future(client.post("/v1/classify", json={"text": "first"}))
        while not slow.passes:
            await asyncio.sleep(0.001)
        others = [asyncio.ensure_future(client.post("/v1/classify", json={"text": text})) for text in "abc"]
        return list(await asyncio.gather(first, *others))

    first, *others = server.run(crowd)
    assert error_of(first, 504)["code"] == "timeout"
    assert sorted(one.status_code for one in others) == [503, 504, 504]
    full = next(one for one in others if one.status_code == 503)
    assert full.headers["retry-after"] == "1" and full.json()["error"]["type"] == "server_error"
    assert server.service.worker.waiting == 0, "nobody waits for them any more"

    async def leaves(client: httpx.AsyncClient) -> int:
        """A client whose connection ends while it waits: its job is never begun."""
        told = [{"type": "http.request", "body": b'{"text": "gone"}', "more_body": False}, {"type": "http.disconnect"}]

        async def receive() -> dict[str, Any]:
            return told.pop(0)

        async def send(event: Any) -> None:
            sent.append(event)

        sent: list[dict[str, Any]] = []
        scope = {
            "type": "http", "method": "POST", "path": "/v1/classify", "raw_path": b"/v1/classify", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
        }
        await server.app(scope, receive, send)
        return int(sent[0]["status"])

    assert server.run(leaves) == 499 and server.service.worker.waiting == 0
    slow.go.set()
    assert server.post("/v1/classify", {"text": "after"}).status_code == 200
    assert len(slow.passes) == 2, "what nobody waited for was not computed"
    server.service.close()


def test_a_pass_that_fails_ends_its_requests_and_no_others(ensemble: Ensemble) -> None:
    server = Server(ensemble)
    answer, decode = server.service.worker._answer, server.service.worker._decode

    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    server.service.worker._answer = broken
    assert error_of(server.post("/v1/classify", {"text": "a"}), 500)["code"] == "failed"
    server.service.worker._answer = answer
    assert server.post("/v1/classify", {"text": "a"}).status_code == 200
    assert decode is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "step", broken)
        failed = server.post("/v1/completions", {"prompt": "a", "temperature": 0})
        assert error_of(failed, 500)["type"] == "server_error"
    assert server.post("/v1/completions", {"prompt": "a"}).status_code == 200
    server.service.close()


def test_one_row_given_by_many_and_one_id_given_to_two_rows(ensemble: Ensemble) -> None:
    """Rows of one pass have ids of their own: the same row is computed once, another one of that id in a later pass."""
    server = Server(ensemble)
    slow = Slow(server.service)
    bodies = [{"rows": {"id": "7", "prompt": text}} for text in ("one", "two", "one", "three")]

    async def crowd(client: httpx.AsyncClient) -> list[httpx.Response]:
        blocked = asyncio.ensure_future(client.post("/v1/classify", json={"text": "first"}))
        while not slow.passes:
            await asyncio.sleep(0.001)
        others = [asyncio.ensure_future(client.post("/v1/classify", json=body)) for body in bodies]
        while server.service.worker.waiting < len(bodies):
            await asyncio.sleep(0.001)
        slow.go.set()
        return list(await asyncio.gather(blocked, *others))

    found = [one.json()["answers"][0] for one in server.run(crowd)[1:]]
    for body, answer in zip(bodies, found, strict=True):
        (expected,) = ensemble.predict([body["rows"]])
        np.testing.assert_allclose(answer["probabilities"], expected.probabilities, atol=1e-6)
    assert slow.passes[1:] == [["7"], ["7"], ["7"]]
    server.service.close()


def next_token(ensemble: Ensemble, ids: list[int]) -> torch.Tensor:
    """(V,) float64 probabilities: each member in a pass of its own over the whole sequence, averaged."""
    adapters, found = ensemble.adapters, []
    for member in MEMBERS:
        with adapters.axis.active(adapters.plan([member], 1, ensemble.task.passes.key)), torch.no_grad():
            logits = adapters.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        found.append(logits.softmax(-1))
    return torch.stack(found).mean(0)


def test_completions_follow_the_members_average(ensemble: Ensemble, server: Server) -> None:
    tokenizer = ensemble.task.base.tokenizer
    prompts = ["Review: a fine film\nSentiment:", "Question: who"]
    asked = {"prompt": prompts, "max_tokens": 6, "temperature": 0, "logprobs": 3}
    said = server.post("/v1/completions", asked).json()
    assert said["object"] == "text_completion" and [one["index"] for one in said["choices"]] == [0, 1]
    written = 0
    for prompt, choice in zip(prompts, said["choices"], strict=True):
        ids, logs = list(tokenizer(prompt)["input_ids"]), choice["logprobs"]
        for place, (token, log_prob) in enumerate(zip(logs["tokens"], logs["token_logprobs"], strict=True)):
            expected = next_token(ensemble, ids)
            best = int(expected.argmax())
            assert log_prob == pytest.approx(float(expected[best].log()), abs=1e-4)
            top = sorted(expected.topk(3).values.log().tolist())
            assert sorted(logs["top_logprobs"][place].values()) == pytest.approx(top, abs=1e-4)
            ids.append(best)
            assert token in (tokenizer.decode([best]), tokenizer.convert_ids_to_tokens(best))
        assert choice["text"] == tokenizer.decode(ids[len(tokenizer(prompt)["input_ids"]) :])
        assert choice["finish_reason"] == "length" and len(logs["tokens"]) == 6
        written += 6
    assert said["usage"]["completion_tokens"] == written
    asked["prompt"] = [tokenizer(one)["input_ids"] for one in prompts]
    by_ids = server.post("/v1/completions", asked).json()
    assert [one["text"] for one in by_ids["choices"]] == [one["text"] for one in said["choices"]]


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_seed_decides_stop_texts_cut_and_a_stream_says_the_same(server: Server) -> None:
    asked = {"prompt": "Question: who wrote it?", "max_tokens": 14, "seed": 3, "logprobs": 0}
    first = server.post("/v1/completions", asked).json()["choices"][0]
    assert server.post("/v1/completions", asked).json()["choices"][0] == first
    assert server.post("/v1/completions", {**asked, "seed": 4}).json()["choices"][0]["text"] != first["text"]
    streamed = events(server.post("/v1/completions", {**asked, "stream": True}).text)
    assert len(streamed) > 5 and "".join(one["choices"][0]["text"] for one in streamed) == first["text"]
    assert streamed[-1]["choices"][0]["finish_reason"] == first["finish_reason"]
    logs = [log for one in streamed for log in one["choices"][0]["logprobs"]["token_logprobs"]]
    assert logs == pytest.approx(first["logprobs"]["token_logprobs"], abs=1e-6)

    text = first["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    assert len(stop) == 3
    cut = server.post("/v1/completions", {**asked, "stop": stop}).json()["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (text[: text.index(stop)], "stop")
    parts = events(server.post("/v1/completions", {**asked, "stop": ["never said", stop], "stream": True}).text)
    assert "".join(one["choices"][0]["text"] for one in parts) == text[: text.index(stop)], "held back in time"


def test_chats_are_rendered_by_the_models_template(ensemble: Ensemble, server: Server) -> None:
    parts_of_text = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": parts_of_text}]
    asked: dict[str, Any] = {"messages": messages, "max_completion_tokens": 5, "temperature": 0, "logprobs": True}
    asked["top_logprobs"] = 2
    said = server.post("/v1/chat/completions", asked).json()
    choice, tokenizer = said["choices"][0], ensemble.task.base.tokenizer
    plain = [messages[0], {"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    by_text = server.post("/v1/completions", {"prompt": text, "max_tokens": 5, "temperature": 0, "logprobs": 2}).json()
    assert choice["message"]["content"] == by_text["choices"][0]["text"] and said["object"] == "chat.completion"
    entries = choice["logprobs"]["content"]
    found = [one["logprob"] for one in entries]
    assert found == pytest.approx(by_text["choices"][0]["logprobs"]["token_logprobs"], abs=1e-5)
    assert all(len(one["top_logprobs"]) == 2 and bytes(one["bytes"]).decode() == one["token"] for one in entries)
    parts = events(server.post("/v1/chat/completions", {
        **asked, "stream": True, "stream_options": {"include_usage": True}
    }).text)
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant" and parts[-1]["usage"] == said["usage"]
    assert "".join(one["choices"][0]["delta"]["content"] for one in parts[:-1]) == choice["message"]["content"]
