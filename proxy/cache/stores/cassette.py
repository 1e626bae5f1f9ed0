"""Record and replay: the stores for `cache.cassette` and `cache.mode: replay`, and the cassette file.

A cassette contains keys without the client's partition (`cache/cassette.py`). So what one developer recorded answers
another, and nothing in the file is derived from a credential.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from ...system.clock import Clock
from ..cassette import CassetteLineError, read, write
from ..entry import Entry
from .interface import EntryName, Store
from .memory import MemoryStore
from .tiered import TieredStore

log = logging.getLogger("proxy.cache")

Entries = Mapping[EntryName, Entry]

_LOCK_TRIES: Final = 200
_LOCK_PAUSE: Final = 0.05


class CassetteError(Exception):
    """A cassette that cannot be used. The message names the file, the line and the reason."""


class ReplayStore(TieredStore):
    """Looks up by the key without a partition, and keeps what it found. It does not change the slower store."""

    async def get(self, key: str, form: str, wall: float) -> Entry | None:
        entry = self.memory.get(key, form)
        if entry is None:
            found = await self.newest(key, form, wall)
            if found is not None:
                entry = without_partition(found)
                self.memory.put(entry)
        return entry

    async def get_many(self, keys: Sequence[str], form: str, wall: float) -> list[Entry | None]:
        return [await self.get(key, form, wall) for key in keys]

    async def get_both(self, key: str, form: str, other: str, wall: float) -> tuple[Entry | None, Entry | None]:
        entry = await self.get(key, form, wall)
        return (entry, None) if entry is not None else (None, await self.get(key, other, wall))

    def peek(self, key: str, form: str) -> Entry | None:
        return self.memory.get(key, form)

    def put(self, entry: Entry) -> bool:
        return self.memory.put(entry)

    def sweep(self, wall: float, limit: int = 1000, grace: float = 0.0) -> int:
        return 0

    def load(self, entries: Entries) -> None:
        """Put the entries of a cassette into memory."""
        for entry in entries.values():
            self.memory.put(entry)


class RecordingStore(TieredStore):
    """Notes which entries are found and stored, and merges them into the cassette `file` when it is closed."""

    def __init__(self, memory: MemoryStore, slower: Store | None, file: str, clock: Clock) -> None:
        super().__init__(memory, slower)
        self._file = file
        self._clock = clock
        self._used: dict[EntryName, Entry] = {}

    def load(self, entries: Entries) -> None:
        """Put the entries of the cassette into memory, so that they are hits while they are fresh."""
        for entry in entries.values():
            self.memory.put(entry)

    def peek(self, key: str, form: str) -> Entry | None:
        return self._note(super().peek(key, form))

    async def get(self, key: str, form: str, wall: float) -> Entry | None:
        return self._note(await super().get(key, form, wall))

    async def get_many(self, keys: Sequence[str], form: str, wall: float) -> list[Entry | None]:
        return [self._note(entry) for entry in await super().get_many(keys, form, wall)]

    def put(self, entry: Entry) -> bool:
        kept = super().put(entry)
        if kept:
            self._note(entry)
        return kept

    def _note(self, entry: Entry | None) -> Entry | None:
        if entry is not None:
            self._used[entry.bare or entry.key, entry.form] = entry
        return entry

    async def close(self) -> None:
        await super().close()
        used = {name: without_partition(entry) for name, entry in self._used.items()}
        try:
            async with locked(self._file, self._clock):
                count = await asyncio.to_thread(merge_into, self._file, used)
            log.info("cassette %s: %d responses", self._file, count)
        except (CassetteError, OSError, ValueError) as error:
            log.error("cassette %s: what this run used could not be merged into it: %s", self._file, error)


def without_partition(entry: Entry) -> Entry:
    """Return the entry under its key without a partition."""
    return msgspec.structs.replace(entry, key=entry.bare, bare="") if entry.bare else entry


def open_cassette(store: TieredStore, file: str | None) -> int:
    """Read the cassette into the store and return how many entries it holds. Raises CassetteError.

    To record, the file may be missing, but it must be possible to write it.
    """
    if file is None:
        return 0
    if isinstance(store, ReplayStore):
        held = read_file(file, must_exist=True)
        store.load(held)
        return len(held)
    held = read_file(file)
    folder = _path(file).parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CassetteError(f"{file}: cache.cassette: expected a place to write it to, found none ({folder})")
    if isinstance(store, RecordingStore):
        store.load(held)
    return len(held)


def read_file(file: str, *, must_exist: bool = False) -> dict[EntryName, Entry]:
    """Return the entries by key without a partition: of several clients' entries the newest. Raises CassetteError."""
    try:
        with _path(file).open("rb") as lines:
            return _newest(without_partition(entry) for entry in read(file, lines))
    except FileNotFoundError:
        if must_exist:
            raise CassetteError(f"{file}: cache.cassette: expected a file of recorded answers, found none") from None
        return {}
    except OSError as error:
        raise CassetteError(f"{file}: cache.cassette: expected a readable file, found: {error.strerror}") from None
    except CassetteLineError as error:
        raise CassetteError(str(error)) from None


def merge_into(file: str, used: Entries) -> int:
    """Merge entries into the file and return how many it holds then. The file is replaced as a whole or not at all.

    Nothing is dropped; a newer entry replaces an older one. A line whose response has not changed stays as it is, and a
    file that would not change is not written, so that version control shows only what has changed. Raises
    CassetteError, OSError, or ValueError for an entry that no line can hold.
    """
    held = read_file(file)
    merged = held | {name: entry for name, entry in used.items() if _is_newer(held.get(name), entry)}
    content = b"".join(write(merged.values()))
    path = _path(file)
    if not path.exists() or path.read_bytes() != content:
        _replace(path, content)
    return len(merged)


@contextlib.asynccontextmanager
async def locked(file: str, clock: Clock) -> AsyncIterator[None]:
    """Hold a lock on the folder, so that no lock file is left beside the cassette. Raises OSError."""
    handle = os.open(_path(file).parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(_LOCK_TRIES):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            await clock.sleep(_LOCK_PAUSE)
        yield
    finally:
        os.close(handle)


def _is_newer(held: Entry | None, entry: Entry) -> bool:
    if held is None:
        return True
    same = msgspec.structs.replace(entry, stored_at=held.stored_at) == held
    return not same and entry.stored_at > held.stored_at


def _newest(entries: Iterable[Entry]) -> dict[EntryName, Entry]:
    found: dict[EntryName, Entry] = {}
    for entry in entries:
        name = (entry.key, entry.form)
        if name not in found or entry.stored_at > found[name].stored_at:
            found[name] = entry
    return found


def _replace(path: Path, content: bytes) -> None:
    """Replace the file by one of mode 0600, the mode of all files that the proxy writes."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _path(file: str) -> Path:
    """Return the real path: if the cassette is a link, its target is replaced."""
    return Path(os.path.realpath(os.path.expanduser(file)))
