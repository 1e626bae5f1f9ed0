"""`openai-proxy report`: usage, cost and savings from the ledger, beside a proxy that writes to it or without one."""

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
"""Columns for what the report is by; the numbers beside it fill a line of 80."""

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by", action="append", choices=BY, help="what a row is for (default: day); twice: for each pair"
    )
    parser.add_argument("--since", type=_moment, metavar="WHEN", help="7d, 2026-11-01 or 2026-11-01T12:00 (UTC)")
    parser.add_argument("--until", type=_moment, metavar="WHEN", help="up to, not including; as --since")
    parser.add_argument(
        "--what-if",
        type=_what_if,
        metavar="CACHE",
        help="what another cache would have done: ttl=7d, when=deterministic, or both with a comma",
    )
    parser.add_argument(
        "--format",
        choices=("table", "json", "csv"),
        default="table",
        help="for people or for programs (default: table)",
    )
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """0; 1 where there is no ledger. Raises SystemExit(2) for settings that cannot be used."""
    settings = load_from_args(args, upstream="").settings  # whatever is wrong with upstreams does not matter here
    path, span = Path(os.path.expanduser(settings.ledger.path)), Span(args.since, args.until)
    by = list(dict.fromkeys(args.by or ["day"]))
    try:
        if args.what_if is not None:
            found = what_if(path, span, args.what_if)
            _say(args, [found], _comparison(found))
            return 0
        rows, total = report(path, by, span)
    except LedgerMissing as error:
        print(f"openai-proxy report: {error}", file=sys.stderr)
        return 1
    _say(args, rows, _tables(by, rows, total), [*by, *total])
    return 0


def _say(args: argparse.Namespace, rows: Sequence[Row], lines: Sequence[str], names: Sequence[str] = ()) -> None:
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
    """A value for a spreadsheet, which takes a text that begins like a formula for one."""
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


# --- tables -----------------------------------------------------------------------------------------------------------


def _tables(by: Sequence[str], rows: Sequence[Row], total: Row) -> list[str]:
    if not rows:
        return ["no requests in this time"]
    named = [(_name([row[name] for name in by]), row) for row in rows]
    if len(rows) > 1:
        named.append(("total", total))
    head = cut("/".join(by).upper(), _WIDTH)
    money = [
        (
            *(
                name,
                _count(row["requests"]),
                _count(row["hits"]),
                f"{row['hit_rate']:.0%}",
                _count(row["total_tokens"]),
            ),
            *(_dollars(row["cost_usd"]), _dollars(row["saved_usd"]), _count(row["errors"])),
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
        lines += ["", f"{some} no known cost: COST USD is without them"]
    return lines


def _comparison(found: Row) -> list[str]:
    rows = [
        (
            *(name, f"{found['requests']:,}", f"{found[at + 'hits']:,}", f"{found[at + 'hit_rate']:.1%}"),
            *(_dollars(found[at + "cost_usd"]), _dollars(found[at + "saved_usd"])),
        )
        for name, at in (("as it was", ""), ("what if", "what_if_"))
    ]
    heads = ("", "REQUESTS", "HITS", "RATE", "COST USD", "SAVED USD")
    return [*table(heads, rows, heads[1:]), "", "Only requests that could have been cached are counted here."]


def _name(values: Sequence[str | None]) -> str:
    """What a row is for, in its column; `-` for what a request does not have."""
    width = (_WIDTH - len(values) + 1) // len(values)
    return "/".join(cut(value, width) if value is not None else "-" for value in values)


def _count(number: int) -> str:
    """At most six characters: 99,999, 999k, 1.2M."""
    if number < 100_000:
        return f"{number:,}"
    for size, unit in ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")):
        if number < size * 999.5:
            shown = number / size
            return f"{shown:.1f}{unit}" if shown < 99.95 else f"{shown:.0f}{unit}"
    return f"{number:.0e}"


def _dollars(text: str) -> str:
    """Nine characters at most up to 999,999 USD: more places for less."""
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
