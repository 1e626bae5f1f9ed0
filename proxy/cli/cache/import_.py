"""`openai-proxy cache import FILE`: stores the answers of an export. Every line is checked before any is stored."""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path
from typing import IO

import msgspec

from ...cache.cassette import CassetteLineError, read
from .interface import CommandError
from .local import CacheCommand
from .text import ProgressLine, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="the file to read")


async def run(args: argparse.Namespace, session: CacheCommand) -> int:
    """0; 1 for a bad line, which changes nothing."""
    try:
        with args.file.open("rb") as file:
            return await _import(args, session, file)
    except CassetteLineError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{args.file}: {error.strerror or error}") from None


async def _import(args: argparse.Namespace, session: CacheCommand, file: IO[bytes]) -> int:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise CommandError(f"{args.file}: not a file")  # it is read twice
    count = 0
    with ProgressLine("checking", 0) as progress:
        for _ in read(str(args.file), file):
            count += 1
            progress.step()
    file.seek(0)
    async with session.client(filling=True) as cabinet:
        with ProgressLine("importing", count) as progress:
            taken = await cabinet.take(read(str(args.file), file), progress.step)
    line = f"{taken.new:,} new, {taken.replaced:,} replaced, {taken.expired:,} skipped (their time is over)"
    if taken.refused:
        line += f", {taken.refused:,} not stored (larger than cache.max_entry, or the store is full)"
    say(args, msgspec.structs.asdict(taken), [line])
    return 0
