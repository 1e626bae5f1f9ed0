"""The cache in Redis, shared by processes and machines.

Errors of Redis do not reach requests. A read has a deadline and runs in a task of its own; cancelling the caller does
not interrupt it, so that no connection is left with an unread reply. After a few failures in a row Redis is not asked
until a probe in the background succeeds. Every key expires. A command touches one key, so that a cluster can be used.
Values contain their own key and are checked (`cache/codec.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from ...system.clock import spawn
from ...system.redis import DEADLINE_MAX, RedisConnection, text_of
from ...system.state_changes import Change, state_changed
from ...system.threads import in_thread_if_large
from ..codec import FRAME_SIZE, VERSION, decode, describe, encode, head_size
from ..entry import Entry
from .interface import (
    ALL,
    MAX_PURGES,
    EntryName,
    EntryPage,
    Filter,
    ListedEntry,
    StoreError,
    purge_of,
    purge_text,
)

log = logging.getLogger("proxy.cache")

DEADLINE: Final = 0.09
"""Seconds a request waits for a read, at most."""

MAX_PENDING: Final = 5000
MAX_PENDING_BYTES: Final = 64 * 1024 * 1024
MAX_PREFIX: Final = 64
"""Bytes of `redis.prefix`; a key is then at most 140 bytes long."""

_WRITERS: Final = 4
_REFUSED_PAUSE: Final = 5.0
_ADMIN: Final = 5.0
_CLOSING: Final = 3.0
_MAX_LIFETIME: Final = 10 * 365 * 86400.0
_HEAD_GUESS: Final = 2048
_FORMS: Final = ("json", "sse")
_PURGES_KEPT: Final = 86400
"""Seconds for which purges are kept after the last one: longer than any process stays cut off from Redis."""


class RedisStore:
    """The cache in one Redis.

    url: redis://, rediss:// or unix://; a secret.
    prefix: the start of every key.
    max_entry: bytes of the longest body that is kept.
    grace: seconds for which an entry is kept after its ttl; inf: ten years.
    deadline: seconds that a read may take.
    wall: returns Unix seconds.
    Raises ValueError, without the URL's text, if url or prefix cannot be used.
    """

    def __init__(
        self,
        url: str,
        prefix: str,
        max_entry: int,
        grace: float = 0.0,
        deadline: float = DEADLINE,
        wall: Callable[[], float] = time.time,
    ) -> None:
        if not 0 < len(prefix.encode()) <= MAX_PREFIX:
            raise ValueError(f"redis.prefix: between 1 and {MAX_PREFIX} bytes, found {len(prefix.encode())}")
        self.link = RedisConnection(url, deadline)
        self._redis = self.link.redis
        self._start = f"{prefix}:c{VERSION}:"
        self._pointers = f"{prefix}:b{VERSION}:"
        self._purges = f"{prefix}:purges"
        self._heard = "-"  # the last purge that `purged` returned; "-": none yet
        self._max_entry = max_entry
        self._grace = grace
        self._deadline = deadline
        self._wall = wall
        self._refused_until = 0.0
        self._refused = ""
        self._pending: dict[EntryName, Entry] = {}
        self._pending_bytes = 0
        self._writing: dict[EntryName, Entry] = {}
        self._writers: set[asyncio.Task[None]] = set()
        self._counts = {"hits": 0, "misses": 0, "rejected": 0, "written": 0, "dropped": 0}

    @property
    def up(self) -> bool:
        """Return whether Redis is asked at all; while it is not, everything is a miss at once."""
        return self.link.up

    def key_of(self, name: EntryName) -> str:
        """Return the Redis key of an entry: at most 140 bytes, however long the entry's key is."""
        return self._start + _short(name)

    def pointer_of(self, name: EntryName) -> str:
        """Return the Redis key that names the entry stored last under a key without a partition, and a form."""
        return self._pointers + _short(name)

    async def open(self) -> None:
        await self.link.open()
        with contextlib.suppress(StoreError):
            last = await self._admin(lambda: self._redis.xrevrange(self._purges, count=1))
            self._heard = last[0][0].decode() if last else "-"

    # -- entries ------------------------------------------------------------------------------------------------------

    async def get(self, key: str, form: str, wall: float) -> Entry | None:
        name = (key, form)
        entry = self._pending.get(name) or self._writing.get(name)
        if entry is None and self.link.up:
            entry = await self._read(name)
        if entry is None or not entry.plausible(wall, self._grace):
            self._counts["misses"] += 1
            return None
        self._counts["hits"] += 1
        return entry

    async def get_many(self, keys: Sequence[str], form: str, wall: float) -> list[Entry | None] | None:
        names = [(key, form) for key in keys]
        entries = [self._pending.get(name) or self._writing.get(name) for name in names]
        left = [at for at, entry in enumerate(entries) if entry is None]
        if left and self.link.in_doubt:  # the batch as a whole was just asked for in vain
            return None
        if left:
            # GETs in a pipeline, not an MGET: in a cluster the keys are in different slots.
            pipeline = self._redis.pipeline(transaction=False)
            for at in left:
                pipeline.get(self.key_of(names[at]))
            try:
                blobs = await self.link.run(pipeline.execute, self._deadline)
            except ResponseError as error:
                self.link.complain(f"refuses a read: {error}")
                return None
            except (RedisError, OSError, TimeoutError):
                return None
            decoded = await asyncio.to_thread(_decoded, blobs, [names[at] for at in left])
            for at, blob, entry in zip(left, blobs, decoded, strict=True):
                entries[at] = entry
                if entry is None and isinstance(blob, bytes):
                    await self._rejected(blob)
        found = [entry if entry is not None and entry.plausible(wall, self._grace) else None for entry in entries]
        hits = sum(entry is not None for entry in found)
        self._counts["hits"] += hits
        self._counts["misses"] += len(found) - hits
        return found

    async def newest(self, bare: str, form: str, wall: float) -> Entry | None:
        pointed = await self._value(self.pointer_of((bare, form))) if self.link.up else None
        found = [await self.get(bare, form, wall)]
        if pointed is not None:
            found.append(await self.get(pointed.decode("utf-8", "replace"), form, wall))
        return max(filter(None, found), key=lambda entry: entry.stored_at, default=None)

    async def _value(self, redis_key: str) -> bytes | None:
        try:
            value = await self.link.run(lambda: self._redis.get(redis_key), self._deadline)
        except ResponseError as error:  # Redis works, but this cannot be read: NOPERM, MOVED, WRONGTYPE
            self.link.complain(f"refuses a read: {error}")
            return None
        except (RedisError, OSError, TimeoutError):
            return None
        return value if isinstance(value, bytes) else None

    async def _read(self, name: EntryName) -> Entry | None:
        blob = await self._value(self.key_of(name))
        if blob is None:
            return None
        entry = await in_thread_if_large(len(blob), decode, blob, *name)
        if entry is None:
            await self._rejected(blob)
        return entry

    async def _rejected(self, blob: bytes) -> None:
        self._counts["rejected"] += 1
        if describe(blob) is not None:  # another entry: this may be the reply to another command
            await self.link.drop_connections(busy=True)

    def put(self, entry: Entry) -> bool:
        name, size = (entry.key, entry.form), entry.size
        if len(entry.body) > self._max_entry:
            return False
        self._forget_pending(name)
        full = len(self._pending) >= MAX_PENDING or self._pending_bytes + size > MAX_PENDING_BYTES
        if not self.link.up or full or time.monotonic() < self._refused_until:
            self._counts["dropped"] += 1
            return False
        self._pending[name] = entry
        self._pending_bytes += size
        if len(self._writers) < _WRITERS:
            writer = spawn(self._write_all(), "redis write")
            self._writers.add(writer)
            writer.add_done_callback(self._writers.discard)
        return True

    def _forget_pending(self, name: EntryName) -> Entry | None:
        entry = self._pending.pop(name, None)
        if entry is not None:
            self._pending_bytes -= entry.size
        return entry

    async def _write_all(self) -> None:
        while self._pending:
            name = next(iter(self._pending))
            entry = self._forget_pending(name)
            assert entry is not None
            self._writing[name] = entry
            try:
                await self._write(name, entry)
            finally:
                if self._writing.get(name) is entry:
                    del self._writing[name]

    async def _write(self, name: EntryName, entry: Entry) -> None:
        life = min(entry.expires_at + self._grace - self._wall(), _MAX_LIFETIME)
        if life <= 0 or not self.link.up or time.monotonic() < self._refused_until:
            self._counts["dropped"] += 1
            return
        parts = await in_thread_if_large(len(entry.body), encode, entry)
        blob, redis_key, milliseconds = b"".join(parts), self.key_of(name), max(1, math.ceil(life * 1000))
        try:
            await self.link.run(lambda: self._redis.set(redis_key, blob, px=milliseconds), DEADLINE_MAX)
            if entry.bare:
                pointer = self.pointer_of((entry.bare, entry.form))
                await self.link.run(lambda: self._redis.set(pointer, entry.key, px=milliseconds), DEADLINE_MAX)
        except ResponseError as error:  # OOM, READONLY, MISCONF, NOPERM: only writes pause
            self._counts["dropped"] += 1
            self._refused_until = time.monotonic() + _REFUSED_PAUSE
            if not self._refused:
                text = f"redis cache: takes no entries ({error}); stored responses are still read"
                state_changed(Change("store", "redis cache", "read_only", text, logger=log.name))
            self._refused = str(error)
            if isinstance(error, ReadOnlyError):
                await self.link.drop_connections()  # it has become a replica: look its name up again
        except (RedisError, OSError, TimeoutError):
            self._counts["dropped"] += 1
        else:
            self._counts["written"] += 1
            if self._refused:
                text = "redis cache: takes entries again"
                state_changed(Change("store", "redis cache", "up", text, logger=log.name))
                self._refused = ""

    def touch(self, key: str, form: str) -> None:
        """Do nothing: Redis notes by itself what is used."""

    # -- administration -----------------------------------------------------------------------------------------------

    async def purge(self, which: Filter, dry_run: bool = False) -> int:
        await self.flush()
        dropped, seen, cursor = 0, set[bytes](), -1
        while cursor:
            cursor, keys = await self._scan(which, max(cursor, 0), 1000)
            if which != ALL:  # otherwise everything under our prefix goes, readable or not
                keys = [key for key, _, _ in await self._heads(which, keys)]
            if dry_run:
                seen.update(hashlib.blake2b(key, digest_size=12).digest() for key in keys)
            else:
                dropped += sum(await self._each("unlink", keys))
        if dry_run:
            return len(seen)
        note: dict[Any, Any] = {"which": purge_text(which)}
        await self._admin(lambda: self._redis.xadd(self._purges, note, maxlen=MAX_PURGES, approximate=False))
        await self._admin(lambda: self._redis.expire(self._purges, _PURGES_KEPT))
        return dropped

    async def purged(self) -> list[Filter]:
        heard = self._heard
        try:
            lines = await self._admin(lambda: self._redis.xrange(self._purges, min=heard, count=MAX_PURGES + 1))
        except StoreError:
            return []
        if not lines:
            return []
        self._heard = lines[-1][0].decode()
        if lines[0][0].decode() == heard:
            del lines[0]
        elif heard != "-" and len(lines) >= MAX_PURGES:
            return [ALL]  # some are no longer remembered
        return [purge_of(fields.get(b"which", b"")) for _, fields in lines]

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        await self.flush()
        blobs = await self._each("get", [self.key_of(name).encode() for name in names])
        pairs = [(blob, *name) for blob, name in zip(blobs, names, strict=True) if isinstance(blob, bytes)]
        return await asyncio.to_thread(lambda: [entry for pair in pairs if (entry := decode(*pair)) is not None])

    async def list(self, which: Filter = ALL, after: str = "", limit: int = 500) -> EntryPage:
        if not after:
            await self.flush()
        cursor, keys = await self._scan(which, int(after or 0), limit)
        found = await self._heads(which, keys)
        return EntryPage([ListedEntry(entry, size) for _, entry, size in found], str(cursor) if cursor else "")

    @property
    def errors(self) -> int:
        return self.link.failures

    async def stats(self) -> dict[str, int | str]:
        found: dict[str, int | str] = {**self._counts, "failures": self.link.failures}
        found["state"] = self._refused or self.link.state
        seen, cursor, until = set[bytes](), -1, time.monotonic() + 1.0
        with contextlib.suppress(StoreError):
            while cursor and self.link.up:
                cursor, keys = await self._scan(ALL, max(cursor, 0), 1000)
                seen.update(keys)
                if time.monotonic() > until:
                    return found  # too many to be counted in time
            if self.link.up:
                found["entries"] = len(seen)
        return found

    async def flush(self) -> None:
        while self._writers:
            await asyncio.wait(set(self._writers))

    async def close(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSING):
                await self.flush()
        for writer in self._writers:
            writer.cancel()
        await self.link.close()

    async def _scan(self, which: Filter, cursor: int, count: int) -> tuple[int, Sequence[bytes]]:
        """Return (the next cursor, some keys). With `which.key`: both its forms at once."""
        if which.key is not None:
            return 0, [self.key_of((which.key, form)).encode() for form in _FORMS]
        pattern = re.sub(r"([*?\[\]\\^])", r"\\\1", self._start) + "*"
        reply = await self._admin(lambda: self._redis.scan(cursor, match=pattern, count=count))
        return int(reply[0]), list(reply[1])

    async def _heads(self, which: Filter, keys: Sequence[bytes]) -> Sequence[tuple[bytes, Entry, int]]:
        """Return (key, entry without its body, size) of the entries that match; values of other programs do not."""
        starts = await self._each("getrange", keys, 0, _HEAD_GUESS - 1)
        sizes = await self._each("strlen", keys)
        found = []
        for key, start, size in zip(keys, starts, sizes, strict=True):
            wanted = head_size(start[:FRAME_SIZE]) if isinstance(start, bytes) else None
            if wanted is not None and wanted > len(start) and wanted <= size:
                start = (await self._each("getrange", [key], 0, wanted - 1))[0]
            entry = describe(start) if wanted is not None else None
            if entry is not None and which.matches(entry):
                found.append((key, entry, size))
        return found

    async def _each(self, command: str, keys: Sequence[bytes], *values: int) -> Sequence[Any]:
        """Send one command for each key, together but not as a transaction. Error replies count as empty."""
        if not keys:
            return []

        async def run() -> Sequence[Any]:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.execute_command(command.upper(), key, *values)
                return await pipeline.execute(raise_on_error=False)

        replies = await self._admin(run)
        return [0 if isinstance(reply, Exception) else reply for reply in replies]

    async def _admin(self, command: Callable[[], Awaitable[Any]]) -> Any:
        if not self.link.up:
            raise StoreError(f"redis: {self.link.state}")
        try:
            return await self.link.run(command, _ADMIN)
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreError(f"redis: {text_of(error)}") from None


def _decoded(blobs: Sequence[Any], names: Sequence[EntryName]) -> list[Entry | None]:
    return [decode(blob, *name) if isinstance(blob, bytes) else None for blob, name in zip(blobs, names, strict=True)]


def _short(name: EntryName) -> str:
    key, form = name
    if len(key) > 64 or not key.isascii():
        key = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{key}:{form}"
