"""`openai-proxy cache list`: the stored answers, newest first."""

from __future__ import annotations

import argparse
import heapq
from decimal import Decimal

from .interface import EntrySummary
from .local import CacheCommand
from .text import ProgressLine, add_filters, cut, duration, say, size, table, wanted_of

_HEADS = ("KEY", "FORM", "ENDPOINT", "MODEL", "AGE", "LEFT", "SIZE", "SAVES")
_RIGHT = ("AGE", "LEFT", "SIZE", "SAVES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_filters(parser)
    parser.add_argument("--limit", type=_limit, default=50, metavar="N", help="so many, 0 for all (default: 50)")


async def run(args: argparse.Namespace, session: CacheCommand) -> int:
    """0."""
    cards: list[EntrySummary] = []
    count = 0
    async with session.client() as cabinet:
        total = int((await cabinet.facts()).get("entries", 0))
        with ProgressLine("listing", total) as progress:
            async for page in cabinet.list(wanted_of(args)):
                cards += page
                count += len(page)
                if args.limit and len(cards) > 4 * args.limit:
                    cards = _newest(cards, args.limit)
                progress.step(len(page))
    cards = _newest(cards, args.limit or len(cards))
    rows = [
        (
            *(cut(card["key"][:10], 10), card["form"], card["endpoint"], cut(card["model"], 16)),
            *(duration(card["age_s"]), duration(card["ttl_left_s"]), size(card["size"])),
            f"{Decimal(card['saves_usd']):.6f}" if card["saves_usd"] else "unknown",
        )
        for card in cards
    ]
    more = f"{len(cards):,} of {count:,} shown: --limit 0 shows all" if len(cards) < count else f"{count:,} entries"
    say(args, cards, [*table(_HEADS, rows, _RIGHT), more] if rows else [more])
    return 0


def _newest(cards: list[EntrySummary], limit: int) -> list[EntrySummary]:
    return heapq.nsmallest(limit, cards, key=lambda card: (card["age_s"], card["key"], card["form"]))


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}")
    return int(text)
