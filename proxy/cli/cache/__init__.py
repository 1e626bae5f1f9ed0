"""`openai-proxy cache`: one module for each subcommand, with `add_arguments(parser)` and `run(args, command)`.

A subcommand opens the configured store itself, also while a proxy uses it, or asks a running proxy (`--url`).
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
    "stats": ("stats", "number, size and possible savings of the stored responses, by model"),
    "list": ("list", "list the stored responses, newest first"),
    "show": ("show", "show one stored response"),
    "purge": ("purge", "delete stored responses, also from the memory of running proxies"),
    "export": ("export", "write stored responses to a file of sorted JSON lines"),
    "import": ("import_", "store the responses of an exported file"),
    "explain": ("explain", "show a request's cache key and the nearest stored request"),
}
"""Subcommand to its module and its help text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, (module, text) in SUBCOMMANDS.items():
        sub = subcommands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(parser=sub)
        importlib.import_module(f".{module}", __name__).add_arguments(sub)
        sub.add_argument("--format", choices=("table", "json"), default="table", help="output format (default: table)")
        sub.add_argument(
            "--url", metavar="URL", help="ask the running proxy at this address, e.g. http://127.0.0.1:8484"
        )
        add_config_arguments(sub)


def run(args: argparse.Namespace) -> int:
    """Run a subcommand. Return 1 if it fails. Raises SystemExit(2) for bad usage or unusable settings."""
    # Upstreams and keys are not needed, so mistakes in them do not matter.
    command = CacheCommand(load_from_args(args, upstream="").settings, args.url)
    module = importlib.import_module(f".{SUBCOMMANDS[args.subcommand][0]}", __name__)
    logging.getLogger("proxy").setLevel(logging.ERROR)  # a store also raises what it warns of
    try:
        status: int = asyncio.run(module.run(args, command))
    except UsageError as error:
        print(f"openai-proxy cache {args.subcommand}: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    except (CommandError, StoreError) as error:
        print(f"openai-proxy cache {args.subcommand}: {error}", file=sys.stderr)
        return 1
    return status
