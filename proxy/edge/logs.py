"""Logging: text for people or JSON lines for machines, on standard error, control characters escaped, keys masked."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any, Final

import orjson

from ..core.headers import Masker

_SECRET: Final = re.compile(r"sk-[A-Za-z0-9_-]{8,}|(?<=Bearer )\S+")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class _Formatter(logging.Formatter):
    def __init__(self, masker: Masker) -> None:
        super().__init__()
        self._masker = masker

    def clean(self, text: str) -> str:
        """Second line of defence: no key is ever given to the log, and what looks like one is masked all the same."""
        text = self._masker.mask(text.encode("utf-8", "replace")).decode()
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
        text = self.clean(f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():7} {text}")
        return text + self.exception(record)


class Json(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return self.clean(orjson.dumps(line, default=str).decode())


def configure(level: str, format_: str, masker: Masker) -> None:
    """Sends the proxy's and its libraries' records to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json(masker) if format_ == "json" else Text(masker))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("proxy").setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.ERROR)
