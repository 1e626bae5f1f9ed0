"""`openai-proxy cache import FILE`: store the responses of an export. All lines are checked before one is stored."""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path
from typing import IO

import msgspec

from ...cache.cassette import CassetteLineError, read
from ...cache.stores.intake import ImportResult
from .interface import CommandError
from .local import CacheCommand
from .text import ProgressLine, print_result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="file to read")


async def run(args: argparse.Namespace, command: CacheCommand) -> int:
    """Store the responses. Raises CommandError for a bad line; then nothing is stored."""
    try:
        with args.file.open("rb") as file:
            result = await _import(args, command, file)
    except CassetteLineError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{args.file}: {error.strerror or error}") from None
    line = f"{result.new:,} new, {result.replaced:,} replaced, {result.expired:,} skipped (expired)"
    if result.refused:
        line += f", {result.refused:,} not stored (larger than cache.max_entry, or the store is full)"
    print_result(args, msgspec.structs.asdict(result), [line])
    return 0


async def _import(args: argparse.Namespace, command: CacheCommand, file: IO[bytes]) -> ImportResult:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise CommandError(f"{args.file}: not a regular file; it is read twice")
    count = 0
    with ProgressLine("checking", 0) as progress:
        for _ in read(str(args.file), file):
            count += 1
            progress.step()
    file.seek(0)
    async with command.client(filling=True) as cache:
        with ProgressLine("importing", count) as progress:
            return await cache.add(read(str(args.file), file), progress.step)
