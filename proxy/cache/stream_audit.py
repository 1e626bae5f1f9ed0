"""Whether a streamed answer is whole and without error, event by event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from ..protocol.sse import data_of, is_usage_chunk, name_of
from .completeness import _TERMINAL, _choices_asked_for, _has_content, _is_index, _judge, plain_complete


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

    def reason_not_stored(self, rest: bytes = b"") -> str | None:
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
