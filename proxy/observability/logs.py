"""Logging: text for people or JSON lines for machines, on standard error, control characters escaped, keys masked."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
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
"""Seconds for which lines are gathered before they are written together; warnings and worse are written at once."""


class _Formatter(logging.Formatter):
    def __init__(self, masker: SecretMasker) -> None:
        super().__init__()
        self._masker = masker
        self._second = -1
        self._time = ""

    def time(self, created: float, format_: str) -> str:
        """Made once a second."""
        second = int(created)
        if second != self._second:
            self._second, self._time = second, time.strftime(format_, time.localtime(second))
        return self._time

    def clean(self, text: str) -> str:
        """Second line of defence: no key is ever given to the log, and what looks like one is masked all the same."""
        text = self._masker.mask_text(text)
        if text.isascii() and text.isprintable() and "sk-" not in text and "Bearer " not in text:
            return text
        text = text.encode("utf-8", "replace").decode()
        return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", _SECRET.sub("***", text))

    def exception(self, record: logging.LogRecord) -> str:
        """The traceback, the only text of several lines."""
        text = self.formatException(record.exc_info) if record.exc_info else ""
        return "".join("\n" + self.clean(line) for line in text.splitlines())


_SAID: Final = frozenset({"endpoint", "model", "status"})
"""Fields that a line for people need not tell where its message does."""


class TextFormatter(_Formatter):
    def line(self, created: float, level: str, name: str, message: str, fields: Mapping[str, object]) -> str:
        def said(name: str, value: object) -> bool:
            return name in _SAID and str(value) in message

        if fields:
            message += "  " + " ".join([f"{name}={value}" for name, value in fields.items() if not said(name, value)])
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
    """Writes lines together: a write for each would cost a request more than all else that is done for it."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._held: list[logging.LogRecord | tuple[float, str, str, Receipt]] = []
        self._timer: asyncio.TimerHandle | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self._hold(record, record.levelno)

    def receipt(self, name: str, level: int, receipt: Receipt) -> None:
        """A request's line, without a LogRecord, which costs more than the line."""
        self._hold((time.time(), logging.getLevelName(level), name, receipt), level)

    def _hold(self, one: logging.LogRecord | tuple[float, str, str, Receipt], level: int) -> None:
        self._held.append(one)
        if level >= logging.WARNING or len(self._held) >= 128:
            self.flush()
        elif self._timer is None:
            try:
                self._timer = asyncio.get_running_loop().call_later(FLUSH, self.flush)
            except RuntimeError:  # before the loop runs, and after
                self.flush()

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        held, self._held = self._held, []
        lines = []
        for one in held:
            if isinstance(one, logging.LogRecord):
                try:
                    lines.append(self.format(one) + "\n")
                except Exception:
                    self.handleError(one)
            else:
                created, level, name, receipt = one
                assert isinstance(self.formatter, TextFormatter | JsonFormatter)
                lines.append(self.formatter.line(created, level, name, message(receipt), fields(receipt)) + "\n")
        if lines:
            try:
                self._stream.write("".join(lines))
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads the log any more: serving goes on
                pass


_gathering: _BufferingHandler | None = None
_root = logging.getLogger()
_log = logging.getLogger("proxy.request")


def log_receipt(receipt: Receipt) -> None:
    """The one line a request that was not a hit gets in the log. No prompt, no answer, no key."""
    level = logging.WARNING if receipt.status >= 500 else logging.INFO
    if _log.isEnabledFor(level):
        if _gathering is not None and _root.handlers == [_gathering]:  # nobody else wants records
            _gathering.receipt(_log.name, level, receipt)
        else:
            _log.log(level, "%s", message(receipt), extra={"fields": fields(receipt)})


def message(receipt: Receipt) -> str:
    return _message(receipt.endpoint, receipt.model, receipt.status)


def _message(endpoint: str, model: str, status: int) -> str:
    return f"{endpoint} {printable(model, 80) or '-'} -> {status}"


def _known(told: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in told.items() if value is not None and value != ""}


def fields(receipt: Receipt) -> dict[str, object]:
    """What a log line tells of a receipt: only what is known."""
    told = {
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
        "traceparent": receipt.traceparent,
    }
    return _known(told)


def log_refusal(id_: str, method: str, path: str, code: str, status: int, client: str, trace: str) -> None:
    """The line of a request that was turned away before it became a call. trace: its `traceparent`."""
    told = {"status": status, "id": id_, "client": client, "error": code, "traceparent": trace}
    text = f"refused {printable(method, 20)} {printable(path)}: {code}"
    _log.info("%s", text, extra={"fields": _known(told)})


class HitLog:
    """Hits are many and cheap, so one a second has its line, the first at once; `hits`: so many since the last one."""

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
            told = {
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
            text = _message(entry.endpoint, entry.model, entry.status)
            _log.info("%s", text, extra={"fields": _known(told)})
        self._hits = 0


def configure(level: str, format_: str, masker: SecretMasker) -> None:
    """Sends the proxy's and its libraries' records to standard error."""
    # What no line of ours tells need not be found out for each record (the logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    global _gathering
    handler = _gathering = _BufferingHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(masker) if format_ == "json" else TextFormatter(masker))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("proxy").setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.ERROR)
