"""`openai-proxy cache show KEY`: one stored response, in every form it is stored in."""

from __future__ import annotations

import argparse

from ...cache.entry import Entry
from ...cache.listing import listing
from ...system.clock import SYSTEM_CLOCK
from .interface import CommandError, EntrySummary, find_key
from .local import CacheCommand
from .text import add_key, cut, duration, print_result, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_key(parser, "key")
    parser.add_argument("--body", action="store_true", help="print the bodies too")


async def run(args: argparse.Namespace, command: CacheCommand) -> int:
    """Print the entry. Raises CommandError if no key, or more than one, begins so."""
    async with command.client() as cache:
        key = await find_key(cache, args.key)
        entries = sorted(await cache.read([(key, "json"), (key, "sse")]), key=lambda entry: entry.form)
    if not entries:
        raise CommandError(f"the response with the key {key!r} cannot be read")
    wall = SYSTEM_CLOCK.wall()
    forms, lines = [], [f"key: {cut(key, 120)}"]
    for entry in entries:
        summary = listing(entry, entry.size, wall)
        forms.append(summary | ({"body": entry.body.decode("utf-8", "replace")} if args.body else {}))
        lines += ["", *_lines(summary, entry)]
        if args.body:
            lines += ["", _shown(entry.body)]
    print_result(args, {"key": key, "forms": forms}, lines)
    return 0


def _lines(summary: EntrySummary, entry: Entry) -> list[str]:
    usage = entry.usage
    tokens = "unknown" if usage is None else f"{usage.prompt_tokens} prompt, {usage.completion_tokens} completion"
    left = summary["ttl_left_s"]
    values = {
        "form": summary["form"],
        "endpoint": summary["endpoint"],
        "model": summary["model"],
        "answered by": summary["answer_model"] or "unknown",
        "namespace": summary["namespace"] or "none",
        "tags": ", ".join(summary["tags"]) or "none",
        "stored": f"{summary['stored_at']}, {duration(summary['age_s'])} ago",
        "lifetime": f"{duration(left)} left" if left >= 0 else "expired",
        "size": f"{size(summary['size'])}, {size(len(entry.body))} of it the body",
        "tokens": tokens,
        "a hit saves": f"{entry.cost} USD" if entry.cost is not None else "unknown",
        "sampled": "yes" if entry.sampled else "no",
    }
    return [f"  {name + ':':<13}{cut(str(value), 120)}" for name, value in values.items()]


def _shown(body: bytes) -> str:
    """Escape control characters: no response may control the terminal."""
    text = body.decode("utf-8", "replace")
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
