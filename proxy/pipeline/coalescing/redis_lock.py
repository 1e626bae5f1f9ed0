"""Short locks in Redis: `SET NX PX` with a token; only the holder of the token can renew or release the lock.

A command touches one key, so that a cluster can be used, and every key expires. While Redis does not work there are no
locks.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final, Literal, cast

from redis.exceptions import RedisError

from ...system.redis import RedisConnection

_ACQUIRE: Final = """
local held = redis.call('GET', KEYS[1])
if held == ARGV[1] or not held then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 'acquired'
end
return held == '-' and 'unavailable' or 'held'
"""

_RENEW: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

_RELEASE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then return redis.call('DEL', KEYS[1]) end
redis.call('SET', KEYS[1], '-', 'PX', ARGV[2])
return 1
"""


class RedisLockStore:
    """Locks in one Redis. prefix: the start of every key, as for entries; deadline: seconds that a command may take."""

    def __init__(self, link: RedisConnection, prefix: str, deadline: float) -> None:
        self._link = link
        self._start = f"{prefix}:lease:"
        self._deadline = deadline

    def key_of(self, name: str) -> str:
        """Return a lock's Redis key: at most 135 bytes, however long the name is."""
        return self._start + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()

    async def acquire(self, name: str, token: str, seconds: float) -> Literal["acquired", "held", "unavailable"]:
        if self._link.in_doubt:  # the read before it has just waited for Redis in vain
            return "unavailable"
        match await self._run(_ACQUIRE, name, token, seconds):
            case b"acquired":
                return "acquired"
            case b"held":
                return "held"
        return "unavailable"

    async def renew(self, name: str, token: str, seconds: float) -> bool:
        return bool(await self._run(_RENEW, name, token, seconds) == 1)

    async def release(self, name: str, token: str, open_for: float) -> None:
        await self._run(_RELEASE, name, token, open_for)

    async def _run(self, script: str, name: str, token: str, seconds: float) -> Any:
        """Return the script's reply; None if Redis does not work."""
        if not self._link.up:
            return None
        key, milliseconds = self.key_of(name), str(int(seconds * 1000))
        try:
            return await self._link.run(
                lambda: cast("Any", self._link.redis.eval(script, 1, key, token, milliseconds)), self._deadline
            )
        except (RedisError, OSError, TimeoutError):
            return None
