"""Which upstream key created which stored object, shared over Redis by proxies with the same keys.

An id is stored as a digest, and its value is a key's label: neither is a secret. A command touches one key, so that a
cluster can be used.
"""

from __future__ import annotations

import hashlib
from typing import Final

from redis.exceptions import RedisError

from ...system.redis import RedisConnection
from .stored_objects import KEPT_FOR

DEADLINE: Final = 0.09
"""Seconds a request waits for a reply, at most; a label that comes later counts as unknown."""

_PUT_DEADLINE: Final = 2.0
_MAX_IDS: Final = 8


class RedisOwners:
    """`SharedOwners` in Redis. url: a secret; prefix: the start of every key. Raises ValueError, without the URL."""

    def __init__(self, url: str, prefix: str) -> None:
        self.link = RedisConnection(url, DEADLINE)
        self._start = f"{prefix}:o1:"

    async def open(self) -> None:
        await self.link.open()

    async def close(self) -> None:
        await self.link.close()

    def _key(self, id_: str) -> str:
        return self._start + hashlib.sha256(id_.encode("utf-8", "surrogatepass")).hexdigest()[:40]

    async def put(self, ids: list[str], label: str) -> None:
        for id_ in ids:
            if not self.link.up:
                return
            key = self._key(id_)
            try:
                await self.link.run(lambda key=key: self.link.redis.set(key, label, ex=int(KEPT_FOR)), _PUT_DEADLINE)  # type: ignore[misc]
            except (RedisError, OSError, TimeoutError):
                return

    async def get(self, ids: list[str]) -> str | None:
        for id_ in ids[:_MAX_IDS]:
            if not self.link.up:
                return None
            key = self._key(id_)
            try:
                value = await self.link.run(lambda key=key: self.link.redis.get(key), DEADLINE)  # type: ignore[misc]
            except (RedisError, OSError, TimeoutError):
                return None
            if isinstance(value, bytes):
                return value.decode("utf-8", "replace")
        return None
