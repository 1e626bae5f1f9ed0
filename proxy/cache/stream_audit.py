"""Whether a streamed response is complete and without error, event by event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from ..protocol.sse import data_of, is_usage_chunk, name_of
from .completeness import _TERMINAL, _choices_asked_for, _has_content, _is_index, _judge, plain_complete


class StreamAudit:
    """Reads the events of a streamed 200 response and says at its end whether it was complete.

    Every event is parsed: orjson takes 0.8 µs for a usual chunk, less than byte tests that could replace it. Accounting
    reads these attributes, whether the stream is complete or not:

    usage: the last usage object, wherever the provider puts it (a chunk of its own, beside choices, inside a choice,
    Groq's `x_groq`, a response). model, service_tier: of the response. error: there was an error event. output, tools,
    tool_usage: of a Responses stream; they show the calls that are billed. text_bytes: UTF-8 bytes of text so far.
    usage_span: where in the stream the usage chunk is (from, to), None if there is none.
    """

    __slots__ = (
        "_completed",
        "_done",
        "_endpoint",
        "_fault",
        "_finish_reasons",
        "_offset",
        "_request",
        "_terminal_seen",
        "_with_content",
        "error",
        "model",
        "output",
        "service_tier",
        "text_bytes",
        "tool_usage",
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
        self._terminal_seen = False
        self._completed: Mapping[str, Any] | None = None
        self._finish_reasons: dict[int, object] = {}
        self._with_content: set[int] = set()
        self.usage: Mapping[str, Any] | None = None
        self.usage_span: tuple[int, int] | None = None
        self.model: str | None = None
        self.service_tier: str | None = None
        self.text_bytes = 0
        self.output: object = None
        self.tools: object = None
        self.tool_usage: object = None
        self.error = False

    def event(self, event: bytes) -> None:
        """Read one complete event, as `Splitter` returns them; all of them, in order. Never raises."""
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
        # `data: ` and the line ends are 8 bytes: only a longer event has room for a name.
        if chunk.get("error") is not None or (len(event) - len(data) > 8 and name_of(event) == b"error"):
            self._fail_with_error()
        if self._endpoint == "responses":
            self._response_event(chunk)
        else:
            self._chunk(chunk, start)

    def reason_not_stored(self, rest: bytes = b"") -> str | None:
        """Return why the stream is not stored, or None if it is complete. rest: bytes after the last event."""
        if self._fault is not None:
            return self._fault
        if rest.strip(b"\r\n"):
            return "cut"
        if self._endpoint in ("chat", "completions"):
            if not self._done:
                return "no [DONE]"
            return _judge(self._endpoint, self._request, self._finish_reasons, self._with_content)
        if self._endpoint == "responses":
            if self._completed is None:
                return "no response.completed"
            return plain_complete("responses", self._request, self._completed)
        return "not a streamed endpoint"

    @property
    def billed(self) -> dict[str, object]:
        """What of the stream `usage_of` reads."""
        return {"usage": self.usage, "output": self.output, "tools": self.tools, "tool_usage": self.tool_usage}

    @property
    def done(self) -> bool:
        """Whether `[DONE]` was seen."""
        return self._done

    @property
    def ended(self) -> bool:
        """Whether the stream has ended by its own sign: `[DONE]`, or the terminal event of a Responses stream."""
        return self._terminal_seen if self._endpoint == "responses" else self._done

    def truncated(self, rest: bytes = b"") -> bool:
        """Return whether the stream was cut, which the client is told; other oddities are only passed on."""
        if self.error or self._done:
            return False
        if rest.strip(b"\r\n"):
            return True
        if self._endpoint == "responses":
            return not self._terminal_seen
        expected = _choices_asked_for(self._endpoint, self._request) or 1
        return len(self._finish_reasons) < expected or not all(self._finish_reasons.values())

    def _fail(self, reason: str) -> None:
        self._fault = self._fault or reason

    def _fail_with_error(self) -> None:
        self.error = True
        self._fail("error event")

    def _read_fields(self, source: Mapping[str, Any]) -> None:
        usage, model, tier = source.get("usage"), source.get("model"), source.get("service_tier")
        if type(usage) is dict:
            self.usage = usage
        if self.model is None and type(model) is str and model:
            self.model = model  # Azure's first chunk has an empty one
        if type(tier) is str:
            self.service_tier = tier
        if self._endpoint == "responses":
            self.output, self.tools = source.get("output"), source.get("tools")
            self.tool_usage = source.get("tool_usage")

    def _chunk(self, chunk: dict[str, Any], start: int) -> None:
        """Read a chat or completions chunk. The commonest, a known choice that goes on, costs least."""
        self._read_fields(chunk)
        groq = chunk.get("x_groq")
        if type(groq) is dict and type(groq.get("usage")) is dict:
            self.usage = groq["usage"]
        choices = chunk.get("choices")
        if not choices and is_usage_chunk(chunk):
            self._found_usage_chunk(start)
        if choices is None:
            return
        if type(choices) is not list:
            self._fail("malformed choices")
            return
        for position, choice in enumerate(choices):
            index = choice.get("index", position) if type(choice) is dict else None
            if not _is_index(index):
                self._fail("malformed choices")
                continue
            # Some providers write "" for null, and Azure sends filter results after the finish.
            self._finish_reasons[index] = choice.get("finish_reason") or self._finish_reasons.get(index)
            if index not in self._with_content and _has_content(self._endpoint, choice, "delta"):
                self._with_content.add(index)
            if type(choice.get("usage")) is dict:
                self.usage = choice["usage"]
            self.text_bytes += _text_bytes(choice)

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
            self._read_fields(response)
            if kind == "response.completed":
                self._completed = response
        elif type(delta := event.get("delta")) is str:
            self.text_bytes += len(delta.encode("utf-8", "surrogatepass"))
        if kind in _TERMINAL:
            self._terminal_seen = True
        if kind in ("error", "response.failed"):
            self._fail_with_error()


def _text_bytes(choice: Mapping[str, Any]) -> int:
    """Return the UTF-8 bytes of text in a chunk's choice: its text, or the texts and tool calls of its delta."""
    delta = choice.get("delta")
    if type(delta) is not dict:
        text = choice.get("text")
        return len(text.encode("utf-8", "surrogatepass")) if type(text) is str else 0
    size = 0
    for name, value in delta.items():
        if type(value) is str and name != "role":
            size += len(value.encode("utf-8", "surrogatepass"))
        elif name == "tool_calls" and type(value) is list:
            for call in value:
                function = call.get("function") if type(call) is dict else None
                if type(function) is dict:
                    size += sum(len(part) for part in function.values() if type(part) is str)
    return size
