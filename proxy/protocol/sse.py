"""Server-sent events as bytes: where one ends, what it carries, and how the usage chunk is taken out.

The rules are those of the HTML standard, section 9.2.6: a line ends with LF, CRLF or CR and nothing else (U+0085 and
U+2028 are text), a blank line ends an event, `data` lines are joined with LF, one space after the colon is dropped.
Nothing here decodes text, so a character that is split between two reads stays whole. A line may have any length.
"""

from __future__ import annotations

import re

import orjson

# Two line ends in a row. `\r(?!\n)` keeps a CRLF from being read as a CR line followed by an LF line.
_LINE_END = rb"(?:\r\n|\n|\r(?!\n))"
_BLANK_LINE = re.compile(_LINE_END + _LINE_END)
_LINES = re.compile(rb"\r\n|\n|\r")
_CR = 0x0D
_MAX_TERMINATOR = 4  # CR LF CR LF
_BOM = b"\xef\xbb\xbf"
_FIELDS = (b"data:", b"event:", b"id:", b"retry:")

_SOME_USAGE = re.compile(rb'"usage"\s*:\s*\{')
# Not after a backslash: there it would be the end of some other, longer name.
_SOME_CHOICE = re.compile(rb'(?<!\\)"choices"\s*:\s*\[\s*[^\s\]]')
_SOME_CHOICE_REACH = 64  # how far back a match may begin in what was searched before
_MAX_HELD = 64 * 1024


def begins_stream(start: bytes) -> bool | None:
    """Return whether a body is a stream of events, by its first bytes; None: they are too few to tell."""
    start = start[3:] if start.startswith(_BOM) else start
    start = start.lstrip(b"\r\n")
    if not start or start == _BOM[: len(start)]:
        return None
    if start.startswith((b":", *_FIELDS)):
        return True
    return None if any(field.startswith(start) for field in _FIELDS) else False


class Splitter:
    """Splits a stream of bytes into complete events, however the bytes arrive.

    The events and `rest` together are the input; further blank lines belong to the event after them. Work is linear in
    the input. Memory is that of the current event, without a limit: the caller sets one.
    """

    __slots__ = ("_buffer", "_has_cr", "_scan")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scan = 0  # no event ends before this place
        self._has_cr = False  # nearly every stream uses LF alone, and looking for that is ten times as fast

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the events that `chunk` completes, each with the blank line that ends it.

        A CR at the end of `chunk` may be half a CRLF, so an event that it would end waits for the next chunk.
        """
        data: bytes | bytearray
        if self._buffer:
            self._buffer += chunk
            data = self._buffer
        else:
            data = chunk
        if not self._has_cr:
            self._has_cr = b"\r" in chunk
        events: list[bytes] = []
        start = 0
        if self._has_cr:
            for blank in _BLANK_LINE.finditer(data, self._scan):
                end = blank.end()
                if end == len(data) and data[-1] == _CR:
                    break
                events.append(bytes(data[start:end]))
                start = end
        else:
            end = data.find(b"\n\n", self._scan) + 2
            while end > 1:
                events.append(bytes(data[start:end]))
                start = end
                end = data.find(b"\n\n", start) + 2
        if data is chunk:
            if start < len(chunk):
                self._buffer += chunk[start:]
        elif start:
            del self._buffer[:start]
        self._scan = max(0, len(self._buffer) - _MAX_TERMINATOR + 1)
        return events

    def finish(self) -> list[bytes]:
        """Return, at the end of the stream, the event that waited only for the LF of a possible CRLF."""
        if not self._buffer or self._buffer[-1] != _CR or not _BLANK_LINE.search(self._buffer, self._scan):
            return []
        event = bytes(self._buffer)
        self._take_rest()
        return [event]

    @property
    def at_boundary(self) -> bool:
        """Whether another event may be inserted after what was fed so far. Unlike `rest` it copies nothing."""
        return len(self._buffer) <= _MAX_TERMINATOR and not self._buffer.strip(b"\r\n")

    @property
    def held(self) -> int:
        """The size of the event that is not complete yet, in bytes."""
        return len(self._buffer)

    @property
    def rest(self) -> bytes:
        """The bytes after the last complete event."""
        return bytes(self._buffer)

    def _take_rest(self) -> bytes:
        rest = bytes(self._buffer)
        self._buffer.clear()
        self._scan = 0
        return rest


def data_of(event: bytes) -> bytes | None:
    """Return the payload of an event: its `data` lines joined with LF; None if it has none (a comment, say)."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event[6:-2]
    return _field(event, b"data")


def name_of(event: bytes) -> bytes:
    """Return the value of the `event` field (of several the last one); b"" if there is none."""
    if event.startswith(b"data:") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return b""
    value = _field(event, b"event")
    return b"" if value is None else value.rsplit(b"\n", 1)[-1]


def _field(event: bytes, field: bytes) -> bytes | None:
    values: list[bytes] = []
    for line in _LINES.split(event.removeprefix(_BOM)):
        name, _, value = line.partition(b":")
        if name == field:
            values.append(value.removeprefix(b" "))
    return b"\n".join(values) if values else None


def is_usage_chunk(chunk: object) -> bool:
    """Return whether a parsed chunk is the one that `stream_options.include_usage` adds: no choices, a usage object.

    OpenAI writes `"choices": []`; other providers write null or leave it out.
    Azure's first chunk (no choices, `prompt_filter_results`) has no usage; some providers put usage beside
    choices; an error is the client's to see, whatever stands beside it.
    """
    return (
        isinstance(chunk, dict)
        and not chunk.get("choices")
        and isinstance(chunk.get("usage"), dict)
        and chunk.get("error") is None
    )


def is_usage_event(event: bytes) -> bool:
    """Return the same for a complete event. Byte tests avoid most parsing; they miss only names with escapes."""
    if b'"usage"' not in event or not _SOME_USAGE.search(event):
        return False
    data = data_of(event)
    if data is None:
        return False
    try:
        return is_usage_chunk(orjson.loads(data))
    except orjson.JSONDecodeError:
        return False


class UsageFilter:
    """Takes the usage chunk out of a chat or completions stream if only the proxy asked for it.

    Everything else is forwarded unchanged and at once, except that the beginning of an event is held while it could
    still be the usage chunk: until a choice is seen in it, or 64 KiB. In doubt, bytes are forwarded.
    """

    __slots__ = ("_forwarding", "_searched", "_splitter", "_tail", "removed")

    def __init__(self) -> None:
        self._splitter = Splitter()
        self._forwarding = False  # the current event is not the usage chunk and its beginning was forwarded
        self._tail = b""  # the end of what was forwarded of it, where its blank line may begin
        self._searched = 0  # how much of the held bytes was searched for a choice
        self.removed = b""
        """The event that was taken out, b"" if none. Several are joined; no known provider sends more than one."""

    @property
    def at_boundary(self) -> bool:
        """Whether another event may be inserted after what was forwarded so far."""
        return not self._forwarding

    def feed(self, chunk: bytes) -> bytes:
        """Return what may go to the client now."""
        out: list[bytes] = []
        if self._forwarding:
            end = self._end_of_forwarded(chunk)
            if end is None:
                return chunk
            out.append(chunk[:end])
            chunk = chunk[end:]
        for event in self._splitter.feed(chunk):
            self._searched = 0
            if is_usage_event(event):
                self.removed += event
            else:
                out.append(event)
        if self._is_no_usage_chunk():
            self._start_forwarding(out)
        return out[0] if len(out) == 1 else b"".join(out)

    def finish(self) -> bytes:
        """Return, at the end of the stream, the held beginning of an event that was never completed."""
        out: list[bytes] = []
        for event in self._splitter.finish():
            if is_usage_event(event):
                self.removed += event
            else:
                out.append(event)
        rest = self._splitter._take_rest()
        if rest:
            self._forwarding = self._forwarding or bool(rest.strip(b"\r\n"))
            out.append(rest)
        return b"".join(out)

    def _is_no_usage_chunk(self) -> bool:
        held = self._splitter._buffer
        if not held:
            return False
        if len(held) > _MAX_HELD:
            return True
        start = max(0, self._searched - _SOME_CHOICE_REACH)
        self._searched = len(held)
        choice = _SOME_CHOICE.search(held, start)
        # A second brace may open an inner object with `choices` of its own.
        return choice is not None and held.count(b"{", 0, choice.start()) == 1

    def _start_forwarding(self, out: list[bytes]) -> None:
        held = self._splitter._take_rest()
        out.append(held)
        self._forwarding = True
        self._tail = held[1 - _MAX_TERMINATOR :]
        self._searched = 0

    def _end_of_forwarded(self, chunk: bytes) -> int | None:
        """Return how much of `chunk` belongs to the event being forwarded; None if all of it and more to come."""
        data = self._tail + chunk
        blank = _BLANK_LINE.search(data)
        if blank is None or (blank.end() == len(data) and data[-1] == _CR):
            self._tail = data[1 - _MAX_TERMINATOR :]
            return None
        self._forwarding = False
        return blank.end() - len(self._tail)
