"""`openai-proxy report`: usage, cost and savings from the ledger. A proxy may run and write to it meanwhile."""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import orjson

from ..accounting.ledger.reader import LedgerMissing, Span, report, what_if
from ..accounting.ledger.reporting import BY, WhatIf, parse_moment
from ..system.clock import SYSTEM_CLOCK
from .cache.text import cut, table
from .common import add_config_arguments, load_from_args

_WIDTH: Final = 22
"""Width of the first column; the numbers beside it fill a line of 80."""

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by",
        action="append",
        choices=BY,
        metavar="WHAT",
        help=f"one row for each {', '.join(BY[:-1])} or {BY[-1]} (default: day); repeat it for pairs",
    )
    parser.add_argument("--since", type=_moment, metavar="WHEN", help="7d, 2026-11-01 or 2026-11-01T12:00 (UTC)")
    parser.add_argument("--until", type=_moment, metavar="WHEN", help="up to and without this time; as --since")
    parser.add_argument(
        "--what-if",
        type=_what_if,
        metavar="CACHE",
        help="estimate the cost with another cache: ttl=7d, when=deterministic, or both separated by a comma",
    )
    parser.add_argument(
        "--format", choices=("table", "json", "csv"), default="table", help="output format (default: table)"
    )
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report. Return 1 if there is no ledger. Raises SystemExit(2) if the settings are unusable."""
    settings = load_from_args(args, upstream="").settings  # mistakes in the upstreams do not matter here
    path, span = Path(os.path.expanduser(settings.ledger.path)), Span(args.since, args.until)
    by = list(dict.fromkeys(args.by or ["day"]))
    try:
        if args.what_if is not None:
            comparison = what_if(path, span, args.what_if)
            _print(args, [comparison], _comparison(comparison))
            return 0
        rows, total = report(path, by, span)
    except LedgerMissing as error:
        print(f"openai-proxy report: {error}; --config names other settings", file=sys.stderr)
        return 1
    _print(args, rows, _tables(by, rows, total), [*by, *total])
    return 0


def _print(args: argparse.Namespace, rows: Sequence[Row], lines: Sequence[str], names: Sequence[str] = ()) -> None:
    if args.format == "json":
        print(orjson.dumps(rows if args.what_if is None else rows[0], option=orjson.OPT_INDENT_2).decode())
    elif args.format == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, names or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        print(text.getvalue(), end="")
    else:
        print("\n".join(lines))


def _cell(value: object) -> object:
    """Return a value for a spreadsheet. Text that begins like a formula gets an apostrophe."""
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


# --- tables -----------------------------------------------------------------------------------------------------------


def _tables(by: Sequence[str], rows: Sequence[Row], total: Row) -> list[str]:
    if not rows:
        return ["no requests in this period; --since and --until choose another"]
    named = [(_name([row[name] for name in by]), row) for row in rows]
    if len(rows) > 1:
        named.append(("total", total))
    head = cut("/".join(by).upper(), _WIDTH)
    money = [
        (
            name,
            _count(row["requests"]),
            _count(row["hits"]),
            f"{row['hit_rate']:.0%}",
            _count(row["total_tokens"]),
            _dollars(row["cost_usd"]),
            _dollars(row["saved_usd"]),
            _count(row["errors"]),
        )
        for name, row in named
    ]
    heads = (head, "REQS", "HITS", "RATE", "TOKENS", "COST USD", "SAVED USD", "ERRS")
    shown = ("p50_ms", "p95_ms", "p99_ms", "first_byte_p50_ms", "first_byte_p95_ms", "first_byte_p99_ms")
    times = [(name, *(_time(row[column]) for column in shown)) for name, row in named]
    time_heads = (head, "P50", "P95", "P99", "FIRST P50", "FIRST P95", "FIRST P99")
    lines = [*table(heads, money, heads[1:]), "", *table(time_heads, times, time_heads[1:])]
    if total["unknown_cost"]:
        some = "1 request has" if total["unknown_cost"] == 1 else f"{total['unknown_cost']:,} requests have"
        lines += ["", f"{some} no known cost, so COST USD is without them: see cost.prices"]
    return lines


def _comparison(row: Row) -> list[str]:
    rows = [
        (
            name,
            f"{row['requests']:,}",
            f"{row[prefix + 'hits']:,}",
            f"{row[prefix + 'hit_rate']:.1%}",
            _dollars(row[prefix + "cost_usd"]),
            _dollars(row[prefix + "saved_usd"]),
        )
        for name, prefix in (("as it was", ""), ("what if", "what_if_"))
    ]
    heads = ("", "REQUESTS", "HITS", "RATE", "COST USD", "SAVED USD")
    return [*table(heads, rows, heads[1:]), "", "Only cacheable requests are counted."]


def _name(values: Sequence[str | None]) -> str:
    """Return the text of the first column; `-` stands for a value that the requests do not have."""
    width = (_WIDTH - len(values) + 1) // len(values)
    return "/".join(cut(value, width) if value is not None else "-" for value in values)


def _count(number: int) -> str:
    """Format a count with at most six characters: 99,999, 999k, 1.2M."""
    if number < 100_000:
        return f"{number:,}"
    for size, unit in ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")):
        if number < size * 999.5:
            shown = number / size
            return f"{shown:.1f}{unit}" if shown < 99.95 else f"{shown:.0f}{unit}"
    return f"{number:.0e}"


def _dollars(text: str) -> str:
    """Format USD with at most nine characters up to 999,999 USD; smaller amounts have more decimals."""
    amount = Decimal(text)
    if not amount:
        return "0"
    if amount < Decimal("0.0001"):
        return "<0.0001"
    return f"{amount:.4f}" if amount < 1000 else f"{amount:.2f}"


def _time(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    if milliseconds < 10:
        return f"{milliseconds:.1f} ms"
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


# --- arguments --------------------------------------------------------------------------------------------------------


def _moment(text: str) -> float:
    try:
        return parse_moment(text, SYSTEM_CLOCK.wall())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected {error}, found {text!r}") from None


def _what_if(text: str) -> WhatIf:
    try:
        return WhatIf.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected {error}, found {text!r}") from None
