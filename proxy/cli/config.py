"""`openai-proxy config`: writes a commented `config.yaml`, or prints the JSON Schema of the settings."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Final

from ..config.loader import AUTOMATIC
from ..config.manual import config_yaml, json_schema

SUBCOMMANDS: Final = {
    "init": "write a config.yaml with every setting, its default and what it means",
    "schema": "print the JSON Schema of the settings, for editors",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    added = {
        name: subcommands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for name, text in SUBCOMMANDS.items()
    }
    added["init"].add_argument(
        "file", metavar="FILE", type=Path, nargs="?", default=Path(AUTOMATIC), help=f"default: {AUTOMATIC}"
    )
    added["init"].add_argument("--force", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    """Return 0; 1 if the file exists or cannot be written."""
    if args.subcommand == "schema":
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return 0
    try:
        with args.file.open("w" if args.force else "x", encoding="utf-8") as file:
            file.write(config_yaml())
    except FileExistsError:
        print(f"{args.file} exists: give another name, or --force to replace it", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{args.file} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"wrote {args.file}")
    return 0
