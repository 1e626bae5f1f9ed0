"""What may be cached: which answers are whole, told afterwards. Contract 7, Cache. Which requests are: `fields`.

An answer is stored only when it is whole. Fields that the checks below do not name may be anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, TypeGuard

import orjson

from .sse import data_of, is_usage_chunk, name_of

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


class StreamAudit:
    """Watches the events of a streamed 200 answer and says at its end whether it was whole.

    Every event is parsed: orjson takes 0.8 µs for a usual chunk, which is less than the byte tests that could
    prove it harmless. What is learnt on the way, for accounting, whether the stream is whole or not:

    usage: the last usage object, wherever the provider puts it (a chunk of its own, beside choices, inside a
    choice, Groq's `x_groq`, a response); model: the answer's; service_tier; error: an error event was seen;
    output, tools: of a response: they tell of calls that are billed; said: UTF-8 bytes of text so far; usage_span:
    where in the stream the usage chunk lies (from, to), None where there is none.
    """

    __slots__ = (
        "_completed",
        "_done",
        "_ended",
        "_endpoint",
        "_fault",
        "_filled",
        "_offset",
        "_reasons",
        "_request",
        "error",
        "model",
        "output",
        "said",
        "service_tier",
        "tools",
        "usage",
        "usage_span",
    )

    def __init__(self, endpoint: str, request: Mapping[str, Any]) -> None:
        self._endpoint = endpoint
        self._request = request
        self._offset = 0
        self._fault: str | None = None
        self._done = False
        self._ended = False
        self._completed: Mapping[str, Any] | None = None
        self._reasons: dict[int, object] = {}
        self._filled: set[int] = set()
        self.usage: Mapping[str, Any] | None = None
        self.usage_span: tuple[int, int] | None = None
        self.model: str | None = None
        self.service_tier: str | None = None
        self.said = 0
        self.output: object = None
        self.tools: object = None
        self.error = False

    def event(self, event: bytes) -> None:
        """One complete event as the Splitter gives it; all of them, in order. Never raises."""
        start = self._offset
        self._offset += len(event)
        data = data_of(event)
        if data is None:
            return
        if self._done:
            self._fail("data after [DONE]")
        if data.strip() == b"[DONE]":
            self._done = True
            return
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            self._fail("event not JSON")
            return
        if type(chunk) is not dict:
            self._fail("event not an object")
            return
        # `data: ` and the line ends are 8 bytes: only an event with more has room for a name.
        if chunk.get("error") is not None or (len(event) - len(data) > 8 and name_of(event) == b"error"):
            self._fail_with_error()
        if self._endpoint == "responses":
            self._response_event(chunk)
        else:
            self._chunk(chunk, start)

    def verdict(self, rest: bytes = b"") -> str | None:
        """Why the stream is not stored, in a few words; None: it is whole. `rest`: what the last event left."""
        if self._fault is not None:
            return self._fault
        if rest.strip(b"\r\n"):
            return "cut"
        if self._endpoint in ("chat", "completions"):
            if not self._done:
                return "no [DONE]"
            return _judge(self._endpoint, self._request, self._reasons, self._filled)
        if self._endpoint == "responses":
            if self._completed is None:
                return "no response.completed"
            return plain_complete("responses", self._request, self._completed)
        return "not a streamed endpoint"

    @property
    def done(self) -> bool:
        """`[DONE]` was seen."""
        return self._done

    @property
    def over(self) -> bool:
        """The stream has said all it has to say: `[DONE]`, or the terminal event of a Responses stream."""
        return self._ended if self._endpoint == "responses" else self._done

    def truncated(self, rest: bytes = b"") -> bool:
        """Whether it stopped before its end: to be told to the client, where what is merely odd is passed on."""
        if self.error or self._done:
            return False
        if rest.strip(b"\r\n"):
            return True
        if self._endpoint == "responses":
            return not self._ended
        expected = _choices_asked_for(self._endpoint, self._request) or 1
        return len(self._reasons) < expected or not all(self._reasons.values())

    def _fail(self, reason: str) -> None:
        self._fault = self._fault or reason

    def _fail_with_error(self) -> None:
        self.error = True
        self._fail("error event")

    def _learn(self, source: Mapping[str, Any]) -> None:
        usage, model, tier = source.get("usage"), source.get("model"), source.get("service_tier")
        if type(usage) is dict:
            self.usage = usage
        if self.model is None and type(model) is str and model:
            self.model = model  # Azure's first chunk has an empty one
        if type(tier) is str:
            self.service_tier = tier
        if self._endpoint == "responses":
            self.output, self.tools = source.get("output"), source.get("tools")

    def _chunk(self, chunk: dict[str, Any], start: int) -> None:
        """A chat or completions chunk. Most say nothing new, and a known choice that goes on costs least."""
        self._learn(chunk)
        groq = chunk.get("x_groq")
        if type(groq) is dict and type(groq.get("usage")) is dict:
            self.usage = groq["usage"]
        choices = chunk.get("choices")
        if choices is None:
            return
        if type(choices) is not list:
            self._fail("malformed choices")
            return
        if not choices and is_usage_chunk(chunk):
            self._found_usage_chunk(start)
        for position, choice in enumerate(choices):
            index = choice.get("index", position) if type(choice) is dict else None
            if not _is_index(index):
                self._fail("malformed choices")
                continue
            # Some providers write "" for null, and Azure sends filter results after the finish.
            self._reasons[index] = choice.get("finish_reason") or self._reasons.get(index)
            if index not in self._filled and _has_content(self._endpoint, choice, "delta"):
                self._filled.add(index)
            if type(choice.get("usage")) is dict:
                self.usage = choice["usage"]
            self.said += _said(choice)

    def _found_usage_chunk(self, start: int) -> None:
        if self.usage_span is None:
            self.usage_span = (start, self._offset)
        elif self.usage_span[1] == start:
            self.usage_span = (self.usage_span[0], self._offset)
        else:
            self._fail("several usage chunks")

    def _response_event(self, event: dict[str, Any]) -> None:
        if self._completed is not None:
            self._fail("data after response.completed")
        kind, response = event.get("type"), event.get("response")
        if type(response) is dict:
            self._learn(response)
            if kind == "response.completed":
                self._completed = response
        elif type(delta := event.get("delta")) is str:
            self.said += len(delta.encode("utf-8", "surrogatepass"))
        if kind in _TERMINAL:
            self._ended = True
        if kind in ("error", "response.failed"):
            self._fail_with_error()


def _said(choice: Mapping[str, Any]) -> int:
    """UTF-8 bytes of what a chunk's choice says: its text, or whatever of its delta is text, and calls of tools."""
    delta = choice.get("delta")
    if type(delta) is not dict:
        text = choice.get("text")
        return len(text.encode("utf-8", "surrogatepass")) if type(text) is str else 0
    said = 0
    for name, value in delta.items():
        if type(value) is str and name != "role":
            said += len(value.encode("utf-8", "surrogatepass"))
        elif name == "tool_calls" and type(value) is list:
            for call in value:
                function = call.get("function") if type(call) is dict else None
                if type(function) is dict:
                    said += sum(len(part) for part in function.values() if type(part) is str)
    return said


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
