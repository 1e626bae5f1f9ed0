"""`openai-proxy cache purge`: delete stored responses, also from the memory of running proxies."""

from __future__ import annotations

import argparse

from ...protocol.routes import printable
from .interface import UsageError, find_key
from .local import CacheCommand
from .text import add_filters, add_key, filters_from, print_result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_filters(parser)
    add_key(parser, "--key")
    parser.add_argument("--all", action="store_true", help="purge everything; no filters are allowed")
    parser.add_argument("--dry-run", action="store_true", help="count the entries, delete none")


async def run(args: argparse.Namespace, command: CacheCommand) -> int:
    """Purge, and print the number. Raises UsageError unless either filters or --all are given."""
    filters = filters_from(args)
    filtered = bool(filters or args.key)
    if filtered == args.all:
        raise UsageError("--all goes without filters" if filtered else "a purge needs a filter, or --all")
    async with command.client() as cache:
        if args.key:
            filters["key"] = await find_key(cache, args.key)
        count = await cache.purge(filters, args.dry_run)
    what = f"{count:,} {'entry' if count == 1 else 'entries'}"
    line = f"{what} would be purged (dry run)" if args.dry_run else f"{what} purged"
    if not count:
        shown = ", ".join(f"{name} {value}" for name, value in filters.items())
        line = f"nothing matches: {printable(shown) or 'nothing is stored'}"
    print_result(args, {"purged": count, "dry_run": args.dry_run}, [line])
    return 0
