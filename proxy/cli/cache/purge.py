"""`openai-proxy cache purge`: drops stored answers, and tells running proxies to forget them."""

from __future__ import annotations

import argparse

from .interface import UsageError, find_key
from .local import CacheCommand
from .text import add_filters, add_key, say, wanted_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_filters(parser)
    add_key(parser, "--key")
    parser.add_argument("--all", action="store_true", help="everything, in place of filters")
    parser.add_argument("--dry-run", action="store_true", help="count only")


async def run(args: argparse.Namespace, session: CacheCommand) -> int:
    """0. Raises UsageError where neither filters nor --all are given, or both."""
    wanted = wanted_of(args)
    filtered = bool(wanted or args.key)
    if filtered == args.all:
        raise UsageError("--all goes without filters" if filtered else "a purge needs a filter, or --all")
    async with session.client() as cabinet:
        if args.key:
            wanted["key"] = await find_key(cabinet, args.key)
        count = await cabinet.purge(wanted, args.dry_run)
    what = f"{count:,} {'entry' if count == 1 else 'entries'}"
    line = f"{what} would be purged (dry run)" if args.dry_run else f"{what} purged"
    say(args, {"purged": count, "dry_run": args.dry_run}, [line])
    return 0
