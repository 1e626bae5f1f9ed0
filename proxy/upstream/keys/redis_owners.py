"""Who made which stored object, shared over Redis by proxies with the same keys.

An id is stored as a digest, and its value has digests of keys and names of clients: neither is a secret. A command
touches one key, so that a cluster can be used.
"""

from __future__ import annotations

import asyncio
from typing import Final

from redis.exceptions import RedisError

from ...system.redis import RedisConnection
from .owner_table import KEPT_FOR

DEADLINE: Final = 0.09
"""Seconds a request waits for a reply, at most; an owner that comes later counts as unknown."""

_PUT_DEADLINE: Final = 2.0


class RedisOwners:
    """`SharedOwners` in Redis. url: a secret; prefix: the start of every key. Raises ValueError, without the URL."""

    def __init__(self, url: str, prefix: str) -> None:
        self.link = RedisConnection(url, DEADLINE, "redis owners", "each proxy knows its own stored objects")
        self._start = f"{prefix}:o2:"

    async def open(self) -> None:
        await self.link.open()

    async def close(self) -> None:
        await self.link.close()

    async def put(self, digests: list[str], owner: str, only_new: bool) -> None:
        value = owner.encode("utf-8", "replace")
        for digest in digests:
            if not self.link.up:
                return
            try:
                await self.link.run(
                    lambda key=self._start + digest: self.link.redis.set(key, value, ex=int(KEPT_FOR), nx=only_new),  # type: ignore[misc]
                    _PUT_DEADLINE,
                )
            except (RedisError, OSError, TimeoutError):
                return

    async def get(self, digests: list[str]) -> dict[str, str]:
        values = await asyncio.gather(*map(self._get, digests)) if self.link.up else []
        return {digest: value for digest, value in zip(digests, values, strict=False) if value is not None}

    async def _get(self, digest: str) -> str | None:
        try:
            value = await self.link.run(lambda: self.link.redis.get(self._start + digest), DEADLINE)
        except (RedisError, OSError, TimeoutError):
            return None
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else None
