"""`openai-proxy cache export FILE`: stored answers as sorted JSON lines (core/cassette.py), fit to be committed."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO

from ...cache.cassette import write
from ...cache.stores.interface import EntryName
from .interface import CacheClient, CommandError
from .local import CacheCommand
from .text import ProgressLine, add_filters, say, wanted_of

_FEW = 500
_FEW_BYTES = 4 * 1024 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="the file to write; one that is there is replaced")
    add_filters(parser)


async def run(args: argparse.Namespace, session: CacheCommand) -> int:
    """0. The file is there only when it is whole."""
    count = 0
    async with session.client() as cabinet:
        names: dict[EntryName, int] = {}
        async for page in cabinet.list(wanted_of(args)):
            names.update(((card["key"], card["form"]), card["size"]) for card in page)
        try:
            with replacing(args.file) as file, ProgressLine("exporting", len(names)) as progress:
                async for lines in _lines(cabinet, names):
                    file.writelines(lines)
                    count += len(lines)
                    progress.step(len(lines))
        except OSError as error:
            raise CommandError(f"{args.file}: {error.strerror or error}") from None
    entries = "entry" if count == 1 else "entries"
    say(args, {"exported": count, "file": str(args.file)}, [f"{count:,} {entries} exported to {args.file}"])
    return 0


async def _lines(cabinet: CacheClient, names: dict[EntryName, int]) -> AsyncIterator[list[bytes]]:
    """The lines in order, a few at a time."""
    few: list[EntryName] = []
    size = 0
    for name in sorted(names):
        few.append(name)
        size += names[name]
        if len(few) >= _FEW or size >= _FEW_BYTES:
            yield list(write(await cabinet.read(few)))
            few, size = [], 0
    if few:
        yield list(write(await cabinet.read(few)))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file, mode 0600, which takes the place of `path` when all went well. Raises OSError."""
    target = os.path.realpath(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(target)}.", dir=os.path.dirname(target))
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
