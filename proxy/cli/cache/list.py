"""`openai-proxy cache list`: the stored responses, newest first."""

from __future__ import annotations

import argparse
import heapq
from decimal import Decimal

from .interface import EntrySummary
from .local import CacheCommand
from .text import ProgressLine, add_filters, cut, duration, filters_from, print_result, size, table

_HEADS = ("KEY", "FORM", "ENDPOINT", "MODEL", "AGE", "LEFT", "SIZE", "SAVES")
_RIGHT = ("AGE", "LEFT", "SIZE", "SAVES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_filters(parser)
    parser.add_argument("--limit", type=_limit, default=50, metavar="N", help="at most N, 0 for all (default: 50)")


async def run(args: argparse.Namespace, command: CacheCommand) -> int:
    """Print the list."""
    entries: list[EntrySummary] = []
    count = 0
    async with command.client() as cache:
        total = int((await cache.facts()).get("entries", 0))
        with ProgressLine("listing", total) as progress:
            async for page in cache.list(filters_from(args)):
                entries += page
                count += len(page)
                if args.limit and len(entries) > 4 * args.limit:
                    entries = _newest(entries, args.limit)
                progress.step(len(page))
    entries = _newest(entries, args.limit or len(entries))
    rows = [
        (
            cut(entry["key"][:10], 10),
            entry["form"],
            entry["endpoint"],
            cut(entry["model"], 16),
            duration(entry["age_s"]),
            duration(entry["ttl_left_s"]),
            size(entry["size"]),
            f"{Decimal(entry['saves_usd']):.6f}" if entry["saves_usd"] else "unknown",
        )
        for entry in entries
    ]
    more = f"{len(entries):,} of {count:,} shown; --limit 0 shows all" if len(entries) < count else f"{count:,} entries"
    print_result(args, entries, [*table(_HEADS, rows, _RIGHT), more] if rows else [more])
    return 0


def _newest(entries: list[EntrySummary], limit: int) -> list[EntrySummary]:
    return heapq.nsmallest(limit, entries, key=lambda entry: (entry["age_s"], entry["key"], entry["form"]))


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}")
    return int(text)
