"""`openai-proxy serve`: run the proxy."""

from __future__ import annotations

import argparse
import asyncio

from .common import add_config_arguments, load_from_args, read_from_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped. Raises SystemExit(2) if the settings are unusable."""
    loaded = load_from_args(args)
    from ..lifecycle import serve  # not earlier: mistakes in the settings are reported without loading the server

    return asyncio.run(serve(loaded, lambda in_force: read_from_args(args, in_force=in_force)))
