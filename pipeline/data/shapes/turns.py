"""Chats as people have them -> turns {role, content}: OpenAI and TRL messages, ShareGPT, tool calls, content parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from json import JSONDecodeError
from typing import Any, TypeGuard

from pipeline.data.formats.json_text import JsonFault, decode_json
from pipeline.data.rows import whole_text
from pipeline.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bard": "assistant", "bing": "assistant", "model": "assistant", "bot": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "function_call",
}
"""Who speaks, as ShareGPT and its followers write it -> the role."""


def with_messages(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """`values` with a column `messages`, where `conversations` or a conversational prompt and completion hold one."""
    if values.get("messages") is not None:
        return values
    conversation, field = from_json(values.get("conversations"), where), f"{where}: conversations"
    if isinstance(conversation, list | tuple):
        turns = [_from_sharegpt(turn, f"{field}[{i}]") for i, turn in enumerate(conversation)]
        system = values.get("system")
        if isinstance(system, str) and system.strip() and turns and turns[0].get("role") != "system":
            turns.insert(0, {"role": "system", "content": system})
        return {**values, "messages": turns}
    prompt, completion = values.get("prompt"), values.get("completion")
    if is_turns(prompt) and is_turns(completion):
        return {**values, "messages": [*prompt, *completion]}
    return values


def is_turns(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list of turns, by its first entry."""
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping) and (
        "role" in value[0] or "from" in value[0]
    )


def messages_of(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The turns of a chat that ends with an answer. Raises `DataError` for what can be none."""
    field = f"{where}: messages"
    value = from_json(value, field)
    if not isinstance(value, list | tuple) or not value:
        raise DataError(field, value, "must be a list of {role, content}", "Give a user and an assistant turn.")
    turns = tuple(_turn(turn, f"{field}[{i}]") for i, turn in enumerate(value))
    if turns[-1]["role"] != "assistant":
        raise DataError(
            field, turns[-1]["role"], "must end with an assistant turn, the one to be learnt", "Cut what follows it."
        )
    if turns[0]["role"] == "assistant":
        raise DataError(field, "assistant", "must not begin with an assistant turn", "Add what it answers.")
    return turns


def tools_of(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """The functions that the assistant may call, as JSON schemas; none where the column is empty."""
    field, value = f"{where}: tools", values.get("tools")
    value = from_json(value, field)
    if value is None or value == "" or value == [] or value == ():
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(field, value, "must be a list of functions (JSON schemas)", "Mend it, or leave the column out.")
    return tuple(dict(tool) for tool in value)


def from_json(value: Any, field: str) -> Any:
    """Lists in a CSV cell are written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return decode_json(value)
        except JSONDecodeError:
            return value
        except JsonFault as error:
            raise DataError(field, value, str(error), "Mend the value, or leave the row out.") from error
    return value


def _turn(turn: Any, field: str) -> dict[str, Any]:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
    calls = _calls(turn.get("tool_calls"), f"{field}.tool_calls") if isinstance(turn, Mapping) else []
    if isinstance(content, list | tuple):
        content = _joined(content, f"{field}.content")
    elif content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(field, turn, "must be {role, content} with two texts", "Rename the keys.")
    if role not in ROLES:
        raise DataError(f"{field}.role", role, f"must be one of {', '.join(ROLES)}", "Rename the role.")
    if role == "assistant" and not content.strip() and not calls:
        raise DataError(f"{field}.content", content, "is empty", "Fill in the answer, or leave the row out.")
    found: dict[str, Any] = {"role": role, "content": whole_text(content, f"{field}.content")}
    if calls:
        found["tool_calls"] = calls
    if role == "tool":
        found |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    return found


def _joined(parts: list[Any] | tuple[Any, ...], field: str) -> str:
    """The text of content parts; what is no text (a picture, a sound) is refused by its name."""
    texts = []
    for i, part in enumerate(parts):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise DataError(
                f"{field}[{i}]", kind, "is a content part that is no text, and text alone is trained here",
                "Leave the row out, or put what the part says into words.",
            )
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any, field: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates want them: arguments as an object, which OpenAI writes as JSON text."""
    if calls is None or (isinstance(calls, list | tuple) and not calls):
        return []
    found = []
    for i, call in enumerate(calls if isinstance(calls, list | tuple) else [calls]):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{field}[{i}]", call, "must be {function: {name, arguments}}", "Rename the keys.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = decode_json(arguments or "{}")
            except (JSONDecodeError, JsonFault) as error:
                raise DataError(f"{field}[{i}]", arguments, f"has arguments that are no JSON ({error})", "Mend them."
                                ) from error
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _from_sharegpt(turn: Any, field: str) -> Any:
    """A turn {from, value} as {role, content}; one that has a role already as it is."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    role = SHAREGPT_ROLES.get(str(turn["from"]).strip().lower())
    if role is None:
        raise DataError(
            f"{field}.from", turn["from"], f"must be one of {', '.join(SHAREGPT_ROLES)}", "Rename who speaks."
        )
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _written_calls(turn.get("value"), field)}
    return {"role": role, "content": turn.get("value")}


def _written_calls(text: Any, field: str) -> Any:
    try:
        return decode_json(text) if isinstance(text, str) else text
    except (JSONDecodeError, JsonFault) as error:
        raise DataError(f"{field}.value", text, f"is a function call that is no JSON ({error})", "Mend it.") from error
