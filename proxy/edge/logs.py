"""Logging: text for people or JSON lines for machines, on standard error, control characters escaped, keys masked."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
from typing import Any, Final, TextIO

import orjson

from ..core.headers import Masker

_SECRET: Final = re.compile(r"sk-[A-Za-z0-9_-]{8,}|(?<=Bearer )\S+")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


FLUSH: Final = 0.05
"""Seconds for which lines are gathered before they are written together; warnings and worse are written at once."""


class _Formatter(logging.Formatter):
    def __init__(self, masker: Masker) -> None:
        super().__init__()
        self._masker = masker
        self._second = -1
        self._time = ""

    def time(self, record: logging.LogRecord, format_: str) -> str:
        """The record's time, made once a second."""
        second = int(record.created)
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


class Text(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        fields: dict[str, Any] = getattr(record, "fields", {})
        if fields:
            text += "  " + " ".join(f"{name}={value}" for name, value in fields.items())
        text = self.clean(f"{self.time(record, '%H:%M:%S')} {record.levelname.lower():7} {text}")
        return text + self.exception(record)


class Json(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.time(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            text = orjson.dumps(line, default=str).decode()
        except TypeError:  # a lone surrogate, or a number of more than 64 bits
            text = json.dumps(line, default=str)
        return self.clean(text)


class _Gathering(logging.Handler):
    """Writes lines together: a write for each would cost a request more than all else that is done for it."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: list[str] = []
        self._timer: asyncio.TimerHandle | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record))
        except Exception:
            self.handleError(record)
            return
        if record.levelno >= logging.WARNING:
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
        if self._lines:
            lines, self._lines = self._lines, []
            try:
                self._stream.write("\n".join(lines) + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads the log any more: serving goes on
                pass


def configure(level: str, format_: str, masker: Masker) -> None:
    """Sends the proxy's and its libraries' records to standard error."""
    # What no line of ours tells need not be found out for each record (the logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = _Gathering(sys.stderr)
    handler.setFormatter(Json(masker) if format_ == "json" else Text(masker))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("proxy").setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.ERROR)
