"""`openai-proxy cache`: the stored answers. One file a subcommand: `add_arguments(parser)`, `run(args, session)`.

They open the configured store themselves, beside any proxy that uses it, or ask a running proxy (`--url`).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import sys
from collections.abc import Mapping
from typing import Final

from ...cache.stores.interface import StoreError
from ..common import USAGE_ERROR, add_config_arguments, load_from_args
from .interface import CommandError, UsageError
from .local import CacheCommand

SUBCOMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "stats": ("stats", "how many answers are stored, of which models, and what hits on them save"),
    "list": ("list", "the stored answers, newest first"),
    "show": ("show", "one stored answer, in every form it is stored in"),
    "purge": ("purge", "drop stored answers, from the memory of running proxies too"),
    "export": ("export", "write stored answers to a file of sorted JSON lines, without keys"),
    "import": ("import_", "store the answers of such a file"),
    "explain": ("explain", "the key of a request, and how it differs from the nearest stored one"),
}
"""Subcommand -> its module here, and what it is for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, (module, text) in SUBCOMMANDS.items():
        sub = subcommands.add_parser(name, help=text, description=text, allow_abbrev=False)
        importlib.import_module(f".{module}", __name__).add_arguments(sub)
        sub.add_argument(
            "--format", choices=("table", "json"), default="table", help="for people or for programs (default: table)"
        )
        sub.add_argument(
            "--url", metavar="URL", help="ask the proxy that runs there, e.g. http://127.0.0.1:8484, not its store"
        )
        add_config_arguments(sub)


def run(args: argparse.Namespace) -> int:
    """0; 1 where it could not be done. Raises SystemExit(2) for bad usage or settings that cannot be used."""
    # Upstreams and keys of theirs are not needed, so whatever is wrong with them does not matter.
    session = CacheCommand(load_from_args(args, upstream="").settings, args.url)
    module = importlib.import_module(f".{SUBCOMMANDS[args.subcommand][0]}", __name__)
    logging.getLogger("proxy").setLevel(logging.ERROR)  # what a store warns of, it also raises here
    try:
        status: int = asyncio.run(module.run(args, session))
    except UsageError as error:
        print(f"openai-proxy cache {args.subcommand}: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    except (CommandError, StoreError) as error:
        print(f"openai-proxy cache {args.subcommand}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status
