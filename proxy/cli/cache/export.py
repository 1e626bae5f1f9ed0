"""`openai-proxy cache export FILE`: write stored responses as sorted JSON lines, ready for version control."""

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
from .text import ProgressLine, add_filters, filters_from, print_result

_BATCH = 500
_BATCH_BYTES = 4 * 1024 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="file to write; an existing one is replaced")
    add_filters(parser)


async def run(args: argparse.Namespace, command: CacheCommand) -> int:
    """Write the file; a file that is not complete never takes its place."""
    count = 0
    async with command.client() as cache:
        names: dict[EntryName, int] = {}
        async for page in cache.list(filters_from(args)):
            names.update(((entry["key"], entry["form"]), entry["size"]) for entry in page)
        try:
            with replacing(args.file) as file, ProgressLine("exporting", len(names)) as progress:
                async for lines in _lines(cache, names):
                    file.writelines(lines)
                    count += len(lines)
                    progress.step(len(lines))
        except OSError as error:
            raise CommandError(f"{args.file}: {error.strerror or error}") from None
    entries = "entry" if count == 1 else "entries"
    print_result(args, {"exported": count, "file": str(args.file)}, [f"{count:,} {entries} exported to {args.file}"])
    return 0


async def _lines(cache: CacheClient, names: dict[EntryName, int]) -> AsyncIterator[list[bytes]]:
    """Yield the lines in order, in batches."""
    batch: list[EntryName] = []
    size = 0
    for name in sorted(names):
        batch.append(name)
        size += names[name]
        if len(batch) >= _BATCH or size >= _BATCH_BYTES:
            yield list(write(await cache.read(batch)))
            batch, size = [], 0
    if batch:
        yield list(write(await cache.read(batch)))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file, mode 0600; it replaces `path` unless an exception is raised. Raises OSError."""
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
