"""`openai-proxy cache show KEY`: one stored answer, in every form it is stored in."""

from __future__ import annotations

import argparse
from typing import Any

from ...cache.entry import Entry
from ...cache.listing import listing
from ...system.clock import SYSTEM_CLOCK
from .interface import CommandError, find_key
from .local import CacheCommand
from .text import add_key, cut, duration, say, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_key(parser, "key")
    parser.add_argument("--body", action="store_true", help="the answers themselves too")


async def run(args: argparse.Namespace, session: CacheCommand) -> int:
    """0; 1 where no key, or more than one, begins so."""
    async with session.client() as cabinet:
        key = await find_key(cabinet, args.key)
        found = sorted(await cabinet.read([(key, "json"), (key, "sse")]), key=lambda entry: entry.form)
    if not found:
        raise CommandError(f"the answer with the key {key!r} cannot be read")
    wall = SYSTEM_CLOCK.wall()
    cards = [listing(entry, entry.size, wall) for entry in found]
    forms = [
        card | ({"body": entry.body.decode("utf-8", "replace")} if args.body else {})
        for card, entry in zip(cards, found, strict=True)
    ]
    lines = [f"key: {cut(key, 120)}"]
    for card, entry in zip(cards, found, strict=True):
        lines += ["", *_lines(card, entry)]
        if args.body:
            lines += ["", _shown(entry.body)]
    say(args, {"key": key, "forms": forms}, lines)
    return 0


def _lines(card: dict[str, Any], entry: Entry) -> list[str]:
    usage = entry.usage
    tokens = "unknown" if usage is None else f"{usage.prompt_tokens} prompt, {usage.completion_tokens} completion"
    left = card["ttl_left_s"]
    values = {
        "form": card["form"],
        "endpoint": card["endpoint"],
        "model": card["model"],
        "answered by": card["answer_model"] or "unknown",
        "namespace": card["namespace"] or "none",
        "tags": ", ".join(card["tags"]) or "none",
        "stored": f"{card['stored_at']}, {duration(card['age_s'])} ago",
        "lifetime": f"{duration(left)} left" if left >= 0 else "over",
        "size": f"{size(card['size'])}, {size(len(entry.body))} of it the body",
        "tokens": tokens,
        "a hit saves": f"{entry.cost} USD" if entry.cost is not None else "unknown",
        "sampled": "yes" if entry.sampled else "no",
    }
    return [f"  {name + ':':<13}{cut(str(value), 120)}" for name, value in values.items()]


def _shown(body: bytes) -> str:
    """Nothing in an answer may give orders to the terminal."""
    text = body.decode("utf-8", "replace")
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
