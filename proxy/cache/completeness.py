"""What may be cached: which answers are whole, told afterwards. Contract 7, Cache. Which requests are: `fields`.

An answer is stored only when it is whole. Fields that the checks below do not name may be anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, TypeGuard

WHOLE: Final = frozenset({"stop", "tool_calls", "function_call"})
"""A choice with one of these finish reasons is all there; so is `length` where the request set a limit."""

_TOKEN_LIMITS: Final = ("max_tokens", "max_completion_tokens")
_TERMINAL: Final = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
"""The events after which a Responses stream has nothing more to say."""


def is_deterministic(endpoint: str, document: Mapping[str, Any]) -> bool:
    """Whether equal requests get equal answers: temperature 0 or a seed; embeddings and moderations always.

    An absent temperature is 1, not 0.
    """
    if endpoint in ("embeddings", "moderations"):
        return True
    temperature = document.get("temperature")
    if isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0:
        return True
    return document.get("seed") is not None


def plain_complete(endpoint: str, request: Mapping[str, Any], answer: object) -> str | None:
    """Why a 200 answer is not stored, in a few words; None: it is whole. Both arguments are parsed JSON."""
    if not isinstance(answer, dict):
        return "not an object"
    if answer.get("error") is not None:
        return "error"
    match endpoint:
        case "chat" | "completions":
            return _plain_choices(endpoint, request, answer.get("choices"))
        case "embeddings":
            return _embeddings(request.get("input"), answer.get("data"))
        case "responses":
            return _response(answer)
        case "moderations":
            return _moderations(request.get("input"), answer.get("results"))
    return "unknown endpoint"


def _plain_choices(endpoint: str, request: Mapping[str, Any], choices: object) -> str | None:
    if not isinstance(choices, list):
        return "no choices"
    reasons: dict[int, object] = {}
    filled: set[int] = set()
    for position, choice in enumerate(choices):
        index = choice.get("index", position) if isinstance(choice, dict) else None
        if not _is_index(index) or index in reasons:
            return "malformed choices"
        reasons[index] = choice.get("finish_reason")
        if _has_content(endpoint, choice, "message"):
            filled.add(index)
    return _judge(endpoint, request, reasons, filled)


def _judge(
    endpoint: str, request: Mapping[str, Any], reasons: Mapping[int, object], filled: Collection[int]
) -> str | None:
    """`reasons`: choice index -> finish_reason, None while it has none; `filled`: those with content."""
    if not reasons:
        return "no choices"
    expected = _choices_asked_for(endpoint, request) or len(reasons)
    if len(reasons) != expected or max(reasons) != expected - 1:
        return "choices missing"
    limited = any(request.get(limit) is not None for limit in _TOKEN_LIMITS)
    for index, reason in reasons.items():
        if reason is None:
            return "no finish_reason"
        if not isinstance(reason, str):
            return "malformed choices"
        if reason not in WHOLE and not (reason == "length" and limited):
            return f"finish_reason {_word(reason)}"
        if index not in filled:
            return "empty"
    return None


def _choices_asked_for(endpoint: str, request: Mapping[str, Any]) -> int | None:
    """How many choices there must be, where the request says so: for completions, n for each prompt."""
    n = request.get("n")
    if n is not None and (type(n) is not int or n < 1):
        return None
    prompts = _items(request.get("prompt")) if endpoint == "completions" else 1
    if n is None and prompts in (None, 1):
        return None
    return (prompts or 1) * (n or 1)


def _has_content(endpoint: str, choice: Mapping[str, Any], part: str) -> bool:
    """An answer without text, tool call or refusal is not kept: a retry would only get the same again."""
    if endpoint == "completions":
        return bool(choice.get("text"))
    message = choice.get(part)
    if type(message) is not dict:
        return False
    return bool(
        message.get("content") or message.get("tool_calls") or message.get("refusal") or message.get("function_call")
    )


def _embeddings(texts: object, data: object) -> str | None:
    if not isinstance(data, list) or not data:
        return "no embeddings"
    indexes: set[int] = set()
    for item in data:
        if not isinstance(item, dict):
            return "malformed embeddings"
        index, vector = item.get("index"), item.get("embedding")
        if not _is_index(index) or index in indexes or not isinstance(vector, list | str | bytes) or not vector:
            return "malformed embeddings"
        indexes.add(index)
    expected = _items(texts) or len(indexes)
    if len(indexes) != expected or max(indexes) != expected - 1:
        return "embeddings missing"
    return None


def _response(response: Mapping[str, Any]) -> str | None:
    status = response.get("status")
    if status != "completed":
        return f"status {_word(status)}"
    if response.get("incomplete_details") is not None:
        return "incomplete"
    output = response.get("output")
    if not isinstance(output, list):
        return "no output"
    for item in output:
        if not isinstance(item, dict):
            return "malformed output"
        if item.get("status") not in (None, "completed"):
            return "incomplete"
    return None if any(_is_answer(item) for item in output) else "empty"


def _is_answer(item: Mapping[str, Any]) -> bool:
    """Whether an output item answers: a text or refusal, or any kind of call; reasoning alone does not."""
    if item.get("type") == "reasoning":
        return False
    if item.get("type") != "message":
        return True
    parts = item.get("content")
    return isinstance(parts, list) and any(
        isinstance(part, dict) and bool(part.get("text") or part.get("refusal")) for part in parts
    )


def _moderations(texts: object, results: object) -> str | None:
    if not isinstance(results, list) or not results:
        return "no results"
    if not all(isinstance(result, dict) and result for result in results):
        return "malformed results"
    if isinstance(texts, list) and any(isinstance(text, dict) for text in texts):
        return None  # text and images are judged together: one result for all of them
    if len(results) != (_items(texts) or len(results)):
        return "results missing"
    return None


def _items(texts: object) -> int | None:
    """How many items an `input` or `prompt` is: one text, a list of tokens, or a list of either; None: unclear."""
    if isinstance(texts, str):
        return 1
    if not isinstance(texts, list) or not texts:
        return None
    return 1 if isinstance(texts[0], int) else len(texts)


def _is_index(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _word(value: object) -> str:
    """An upstream's word as it may stand in a header or a log line."""
    if isinstance(value, str) and len(value) <= 32 and value.isascii() and value.isidentifier():
        return value
    return "unknown"
