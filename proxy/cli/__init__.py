"""The command line, one module for each command, with `add_arguments(parser)` and `run(args)`, its exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Final

from .. import __version__

COMMANDS: Final = {
    "serve": "run the proxy (the default)",
    "demo": "run the proxy in front of a simulated upstream: no key, no network, no cost",
    "health": "exit with 0 if the running proxy is alive, else with 1",
    "check": "validate the settings and print the effective ones",
    "config": "write a commented config.yaml, or print the JSON Schema of the settings",
    "report": "usage, cost and savings from the ledger",
    "cache": "stored responses: stats, list, show, purge, export, import, explain",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. Raises SystemExit: 2 for bad usage, 0 for `--help`."""
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout is not None:  # it is None if the file descriptor was closed
                sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130  # as shells report a program that SIGINT has ended


def _run(arguments: list[str]) -> int:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "serve")
    command = arguments[0]
    parser = argparse.ArgumentParser(
        prog="openai-proxy", description="A local, OpenAI-compatible caching proxy.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"openai-proxy {__version__}")
    if command not in COMMANDS and not command.startswith("-"):
        commands = "\n".join(f"  {name:<8}{text}" for name, text in COMMANDS.items())
        parser.error(f"{command!r} is not a command{_nearest(command, COMMANDS)}\n\ncommands:\n{commands}")
    commands_parser = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = importlib.import_module(f".{command}", __name__) if command in COMMANDS else None
    for name, text in COMMANDS.items():
        sub = commands_parser.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(parser=sub)
        if module is not None and name == command:
            module.add_arguments(sub)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        flags = re.findall(r"--[a-z-]+", args.parser.format_usage())
        args.parser.error(f"unknown argument {flag}{_nearest(flag, flags) if flag.startswith('-') else ''}")
    assert module is not None
    status: int = module.run(args)
    return status


def _nearest(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name.lower(), names, n=1)
    return f"; did you mean {close[0]}?" if close else ""
