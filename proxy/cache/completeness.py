"""Whether a plain response is complete and may be stored (`docs/caching.md`). `fields` decides which requests may be.

Fields that the checks below do not name may have any value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, TypeGuard

COMPLETE_REASONS: Final = frozenset({"stop", "tool_calls", "function_call"})
"""Finish reasons of a complete choice. So is `length` if the request set a limit."""

_TOKEN_LIMITS: Final = ("max_tokens", "max_completion_tokens")
_TERMINAL: Final = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
"""The last events of a Responses stream."""


def is_deterministic(endpoint: str, document: Mapping[str, Any]) -> bool:
    """Return whether equal requests get equal responses: temperature 0 or a seed; embeddings and moderations always.

    An absent temperature is 1, not 0.
    """
    if endpoint in ("embeddings", "moderations"):
        return True
    temperature = document.get("temperature")
    if isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0:
        return True
    return document.get("seed") is not None


def plain_complete(endpoint: str, request: Mapping[str, Any], answer: object) -> str | None:
    """Return why a 200 response is not stored, in a few words; None if it is complete. Both are parsed JSON."""
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
    """Return why these choices are incomplete. reasons: index -> finish_reason or None; filled: those with content."""
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
        if reason not in COMPLETE_REASONS and not (reason == "length" and limited):
            return f"finish_reason {_word(reason)}"
        if index not in filled:
            return "empty"
    return None


def _choices_asked_for(endpoint: str, request: Mapping[str, Any]) -> int | None:
    """Return how many choices there must be (for completions, n for each prompt); None if the request does not say."""
    n = request.get("n")
    if n is not None and (type(n) is not int or n < 1):
        return None
    prompts = _items(request.get("prompt")) if endpoint == "completions" else 1
    if n is None and prompts in (None, 1):
        return None
    return (prompts or 1) * (n or 1)


def _has_content(endpoint: str, choice: Mapping[str, Any], part: str) -> bool:
    """Return whether a choice has text, a tool call or a refusal. An empty one is not stored, so that a retry helps."""
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
    """Return whether an output item is a text, a refusal or any kind of call, not reasoning alone."""
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
    """Return how many items an `input` or `prompt` has: a text, a token array, or a list of either; None if unclear."""
    if isinstance(texts, str):
        return 1
    if not isinstance(texts, list) or not texts:
        return None
    return 1 if isinstance(texts[0], int) else len(texts)


def _is_index(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _word(value: object) -> str:
    """Return an upstream's word if it is fit for a header or a log line, else `unknown`."""
    if isinstance(value, str) and len(value) <= 32 and value.isascii() and value.isidentifier():
        return value
    return "unknown"
