"""The log on standard error, as text or JSON lines. Keys are masked and control characters are escaped."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final, TextIO

import orjson

from ..accounting.receipt import Receipt
from ..cache.entry import Entry
from ..protocol.headers import Raw
from ..protocol.masking import SecretMasker
from ..protocol.routes import printable
from ..protocol.traceparent import traceparent

_SECRET: Final = re.compile(r"sk-[A-Za-z0-9_-]{8,}|(?<=Bearer )\S+")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


FLUSH: Final = 0.05
"""Seconds for which lines are buffered. Warnings and errors are written at once."""


class _Formatter(logging.Formatter):
    def __init__(self, masker: SecretMasker) -> None:
        super().__init__()
        self._masker = masker
        self._second = -1
        self._time = ""

    def time(self, created: float, format_: str) -> str:
        """Return `created` (Unix seconds) as local time; it is formatted once a second."""
        second = int(created)
        if second != self._second:
            self._second, self._time = second, time.strftime(format_, time.localtime(second))
        return self._time

    def clean(self, text: str) -> str:
        """Mask keys and whatever looks like one, and escape control characters.

        This is a second line of defence: no code logs a key on purpose.
        """
        text = self._masker.mask_text(text)
        if text.isascii() and text.isprintable() and "sk-" not in text and "Bearer " not in text:
            return text
        text = text.encode("utf-8", "replace").decode()
        return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", _SECRET.sub("***", text))

    def exception(self, record: logging.LogRecord) -> str:
        """Return the traceback of a record: the only text of several lines."""
        text = self.formatException(record.exc_info) if record.exc_info else ""
        return "".join("\n" + self.clean(line) for line in text.splitlines())


_IN_MESSAGE: Final = frozenset({"endpoint", "model", "status", "kind", "name", "state", "about", "action", "who"})
"""Fields that a text line leaves out if its message contains them."""


class TextFormatter(_Formatter):
    def line(self, created: float, level: str, name: str, message: str, fields: Mapping[str, object]) -> str:
        def is_in_message(name: str, value: object) -> bool:
            return name in _IN_MESSAGE and str(value) in message

        if fields:
            shown = [f"{name}={value}" for name, value in fields.items() if not is_in_message(name, value)]
            message += "  " + " ".join(shown) if shown else ""
        return self.clean(f"{self.time(created, '%H:%M:%S')} {level.lower():7} {message}")

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        text = self.line(record.created, record.levelname, record.name, record.getMessage(), fields)
        return text + self.exception(record)


class JsonFormatter(_Formatter):
    def line(self, created: float, level: str, name: str, message: str, fields: Mapping[str, object]) -> str:
        line = {
            "time": self.time(created, "%Y-%m-%dT%H:%M:%S%z"),
            "level": level.lower(),
            "logger": name,
            "message": message,
            **fields,
        }
        try:
            text = orjson.dumps(line, default=str).decode()
        except TypeError:  # a lone surrogate, or a number of more than 64 bits
            text = json.dumps(line, default=str)
        return self.clean(text)

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        return self.line(record.created, record.levelname, record.name, record.getMessage(), fields)


class _BufferingHandler(logging.Handler):
    """Buffers lines and writes them together, because one write for each line is slow."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._pending: list[logging.LogRecord | tuple[float, str, str, Receipt]] = []
        self._timer: asyncio.TimerHandle | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self._append(record, record.levelno)

    def emit_receipt(self, name: str, level: int, receipt: Receipt) -> None:
        """Write the line of a finished request. It skips LogRecord, which is slow to build."""
        self._append((time.time(), logging.getLevelName(level), name, receipt), level)

    def _append(self, item: logging.LogRecord | tuple[float, str, str, Receipt], level: int) -> None:
        self._pending.append(item)
        if level >= logging.WARNING or len(self._pending) >= 128:
            self.flush()
        elif self._timer is None:
            try:
                self._timer = asyncio.get_running_loop().call_later(FLUSH, self.flush)
            except RuntimeError:  # no event loop is running
                self.flush()

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pending, self._pending = self._pending, []
        lines = []
        for item in pending:
            if isinstance(item, logging.LogRecord):
                try:
                    lines.append(self.format(item) + "\n")
                except Exception:
                    self.handleError(item)
            else:
                created, level, name, receipt = item
                assert isinstance(self.formatter, TextFormatter | JsonFormatter)
                lines.append(self.formatter.line(created, level, name, message(receipt), fields(receipt)) + "\n")
        if lines:
            try:
                self._stream.write("".join(lines))
                self._stream.flush()
            except (OSError, ValueError):  # standard error is closed or full: the proxy goes on without a log
                pass


REPEAT_INTERVAL: Final = 10.0
"""Seconds in which a warning is logged once; the next one says how many were left out."""

_MAX_REPEATS: Final = 1000
_NEVER_LEFT_OUT: Final = frozenset({"proxy.request", "proxy.reload"})
_DIGITS: Final = re.compile(r"[0-9]+")


class RepeatFilter(logging.Filter):
    """Leaves out warnings and errors that were logged within `REPEAT_INTERVAL`, whatever numbers they name.

    Lines of requests and reloads always stand: each is about another one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        repeats: str | None = getattr(record, "repeats", None)
        if (record.levelno < logging.WARNING and repeats is None) or record.name in _NEVER_LEFT_OUT:
            return True
        text = record.getMessage()
        name = record.name, _DIGITS.sub("0", text[:500]) if repeats is None else repeats
        at, left_out = self._seen.get(name, (-math.inf, 0))
        if 0 <= record.created - at < REPEAT_INTERVAL:
            self._seen[name] = at, left_out + 1
            return False
        self._seen[name] = record.created, 0
        self._seen.move_to_end(name)
        if len(self._seen) > _MAX_REPEATS:
            self._seen.popitem(last=False)
        if left_out:
            record.msg, record.args = "%s (and %d more like it)", (text, left_out)
        return True


_buffer: _BufferingHandler | None = None
_root = logging.getLogger()
_log = logging.getLogger("proxy.request")


def log_receipt(receipt: Receipt) -> None:
    """Log one line for a finished request that was not a hit: no prompt, no response, no key."""
    level = logging.WARNING if receipt.status >= 500 else logging.INFO
    if _log.isEnabledFor(level):
        if _buffer is not None and _root.handlers == [_buffer]:  # no other handler wants a LogRecord
            _buffer.emit_receipt(_log.name, level, receipt)
        else:
            _log.log(level, "%s", message(receipt), extra={"fields": fields(receipt)})


def message(receipt: Receipt | Entry) -> str:
    return f"{receipt.endpoint} {printable(receipt.model, 80) or '-'} -> {receipt.status}"


def _nonempty(fields: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None and value != ""}


def fields(receipt: Receipt) -> dict[str, object]:
    """Return the log fields of a receipt, without unknown and empty ones."""
    known = {
        "endpoint": printable(receipt.endpoint, 80),
        "model": printable(receipt.model, 80),
        "status": receipt.status,
        "id": receipt.id,
        "client": receipt.client,
        "cache": receipt.cache,
        "reason": receipt.reason,
        "upstream": receipt.upstream,
        "key": receipt.key,
        "attempts": receipt.attempts,
        "queue_ms": round(receipt.queue_ms, 1),
        "first_byte_ms": None if receipt.first_byte_ms is None else round(receipt.first_byte_ms, 1),
        "total_ms": round(receipt.total_ms, 1),
        "tokens": receipt.usage.total_tokens if receipt.usage else None,
        "cost_usd": receipt.cost_usd,
        "error": receipt.error,
        "upstream_code": receipt.upstream_code,
        "retries": "; ".join(receipt.retries),
        "traceparent": receipt.traceparent,
    }
    return _nonempty(known)


def log_refusal(method: str, path: str, refusal_fields: Mapping[str, object]) -> None:
    """Log one line for a request that was refused before it had a receipt. The fields include `error`, its code."""
    text = f"refused {printable(method, 20)} {printable(path)}: {refusal_fields['error']}"
    _log.info("%s", text, extra={"fields": _nonempty(refusal_fields)})


class HitLog:
    """Logs at most one cache hit a second, the first at once; its field `hits` counts those since the last line."""

    __slots__ = ("_hits", "_next")

    def __init__(self) -> None:
        self._hits = 0
        self._next = 0.0

    def hit(self, id_: str, client: str, entry: Entry, wall: float, headers: Iterable[Raw]) -> None:
        """wall: Unix seconds."""
        self._hits += 1
        if wall < self._next and self._next - wall <= 1.0:  # the clock may be set back
            return
        self._next = wall + 1.0
        if _log.isEnabledFor(logging.INFO):
            hit_fields = {
                "endpoint": entry.endpoint,
                "model": printable(entry.model, 80),
                "status": entry.status,
                "id": id_,
                "client": client,
                "cache": "hit",
                "saved_usd": entry.cost,
                "hits": self._hits,
                "traceparent": traceparent(headers),
            }
            _log.info("%s", message(entry), extra={"fields": _nonempty(hit_fields)})
        self._hits = 0


def print_lines(lines: Iterable[str], format_: str) -> None:
    """Write lines of the start to standard error, whatever the level of the log. format_: text or json."""
    if format_ == "json":
        formatter, now, warning = JsonFormatter(SecretMasker(())), time.time(), "warning: "
        lines = [
            formatter.line(
                now,
                "warning" if line.startswith(warning) else "info",
                "proxy",
                line.removeprefix(warning),
                {},
            )
            for line in lines
        ]
    print("\n".join(lines), file=sys.stderr, flush=True)


def configure(level: str, format_: str, masker: SecretMasker) -> None:
    """Send the records of the proxy and its libraries to standard error. format_: text or json."""
    # Records need no caller, thread or process (Python's Logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    global _buffer
    handler = _buffer = _BufferingHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(masker) if format_ == "json" else TextFormatter(masker))
    root = logging.getLogger()
    handler.addFilter(RepeatFilter())
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("proxy").setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.ERROR)
