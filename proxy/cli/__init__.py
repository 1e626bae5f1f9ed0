"""The command line: one file a command. Each module has `add_arguments(parser)` and `run(args) -> exit status`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

from .. import __version__

COMMANDS: Final = {
    "serve": "run the proxy (the default)",
    "demo": "run the proxy in front of a simulated upstream: no key, no network, no cost",
    "health": "ask the running proxy whether it is alive",
    "check": "validate the settings and show the effective ones",
    "report": "usage, cost and savings from the ledger",
    "cache": "the stored answers: count, list, show, purge, export, import",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status. argparse exits with 2 on bad usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0] not in COMMANDS and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "serve")
    parser = argparse.ArgumentParser(
        prog="openai-proxy", description="A local, OpenAI-compatible caching proxy.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"openai-proxy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = importlib.import_module(f".{arguments[0]}", __name__) if arguments[0] in COMMANDS else None
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if module is not None and name == arguments[0]:
            module.add_arguments(sub)
    args = parser.parse_args(arguments)
    assert module is not None
    try:
        status: int = module.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `openai-proxy check | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
