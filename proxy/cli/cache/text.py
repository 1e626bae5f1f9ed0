"""Text output: tables within 80 columns, sizes, times and progress; and the filters of several subcommands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

import orjson

from ...protocol.durations import parse_duration
from ...protocol.routes import ENDPOINTS, printable
from ...system.clock import SYSTEM_CLOCK
from .interface import FilterArguments

_ENDPOINTS: Final = tuple(ENDPOINTS.values())
_BAR_WIDTH: Final = 24
_REFRESH: Final = 0.1
"""Seconds between two updates of a progress line."""

_UNITS: Final = (("d", 86400), ("h", 3600), ("m", 60))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> list[str]:
    """Return the lines of a table. right: heads of the right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if head in right else text.ljust(width)
            for head, text, width in zip(heads, row, widths, strict=True)
        ).rstrip()
        for row in (heads, *rows)
    ]


def cut(text: str, width: int) -> str:
    """Return `text` with control characters escaped, cut to `width` characters."""
    shown = printable(text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def size(count: float) -> str:
    """Format a number of bytes: `512 B`, `1.5 KiB`."""
    units = ["B", "KiB", "MiB", "GiB"]
    while count >= 1000 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"


def duration(seconds: int) -> str:
    """Format a duration: `45s`, `12m`, `3h`, `9d`; `expired` below 0."""
    if seconds < 0:
        return "expired"
    for unit, length in _UNITS:
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def print_result(args: argparse.Namespace, document: object, lines: Sequence[str]) -> None:
    """Print the lines, or with `--format json` the document."""
    if args.format == "json":
        print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
    else:
        print("\n".join(lines))


class ProgressLine:
    """A progress bar on stderr if that is a terminal. total: 0 if unknown."""

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._shown = sys.stderr.isatty()
        self._next = 0.0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown and self._next:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def step(self, count: int = 1) -> None:
        self._done += count
        if self._shown and (now := SYSTEM_CLOCK.monotonic()) >= self._next:
            self._next = now + _REFRESH
            sys.stderr.write(f"\r{self.line()}\x1b[K")
            sys.stderr.flush()

    def line(self) -> str:
        if not self._total:
            return f"{self._label} {self._done:,}"
        share = min(1.0, self._done / self._total)
        full = int(share * _BAR_WIDTH)
        return f"{self._label} [{'#' * full}{'.' * (_BAR_WIDTH - full)}] {share:4.0%} of {self._total:,}"


# --- filters ----------------------------------------------------------------------------------------------------------


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Add the filters of a purge (docs/caching.md). An entry must match all that are given."""
    parser.add_argument("--model", type=_text, metavar="NAME", help="requested model, or a glob: gpt-4o*")
    parser.add_argument("--endpoint", type=_endpoint, metavar="NAME", help=f"{', '.join(_ENDPOINTS)}, or a glob")
    parser.add_argument("--namespace", type=_text, metavar="NAME", help="namespace, or a glob; '' for none")
    parser.add_argument("--tag", type=_text, metavar="NAME:VALUE", help="one of the tags, or a glob: team:*")
    parser.add_argument("--older-than", type=_age, metavar="AGE", help="stored longer ago: 7d, 12h, 90 (seconds)")


def filters_from(args: argparse.Namespace) -> dict[str, str | float]:
    given: FilterArguments = {
        name: getattr(args, name) for name in ("model", "endpoint", "namespace", "tag", "older_than")
    }
    return {name: value for name, value in given.items() if value is not None}


def add_key(parser: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    parser.add_argument(name, metavar="KEY", type=_key, help="cache key, or an unambiguous prefix of it", **settings)


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("expected UTF-8") from None
    return text


def _endpoint(text: str) -> str:
    if not any(fnmatchcase(name, text) for name in _ENDPOINTS):
        raise argparse.ArgumentTypeError(f"invalid choice: choose from {', '.join(_ENDPOINTS)}, or a glob of them")
    return text


def _key(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a key or a prefix of it, found ''")
    return _text(text)


def _age(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected {error}, found {text!r}") from None
