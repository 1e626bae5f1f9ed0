"""Short leases in Redis: `SET NX PX` with a token, given back and renewed by whoever holds that token alone.

One key an operation, so any cluster will do; every key has a lifetime. Trouble means that there are no leases.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final, Literal, cast

from redis.exceptions import RedisError

from ...system.redis import RedisConnection

_TAKE: Final = """
local held = redis.call('GET', KEYS[1])
if held == ARGV[1] or not held then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 'mine'
end
return held == '-' and 'open' or 'theirs'
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
    """prefix: of every key, as for the entries; deadline: seconds an operation may take."""

    def __init__(self, link: RedisConnection, prefix: str, deadline: float) -> None:
        self._link = link
        self._start = f"{prefix}:lease:"
        self._deadline = deadline

    def key_of(self, name: str) -> str:
        """At most 160 bytes, whatever the name."""
        return self._start + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()

    async def acquire(self, name: str, token: str, seconds: float) -> Literal["mine", "theirs", "open"]:
        if self._link.in_doubt:  # the read before it has waited for Redis in vain: once is enough
            return "open"
        said = await self._run(_TAKE, name, token, seconds)
        if said in (b"mine", b"theirs"):
            return "mine" if said == b"mine" else "theirs"
        return "open"

    async def renew(self, name: str, token: str, seconds: float) -> bool:
        return bool(await self._run(_RENEW, name, token, seconds) == 1)

    async def release(self, name: str, token: str, open_for: float) -> None:
        await self._run(_RELEASE, name, token, open_for)

    async def _run(self, script: str, name: str, token: str, seconds: float) -> Any:
        """None where Redis is in trouble."""
        if not self._link.up:
            return None
        key, milliseconds = self.key_of(name), str(int(seconds * 1000))
        try:
            return await self._link.run(
                lambda: cast("Any", self._link.redis.eval(script, 1, key, token, milliseconds)), self._deadline
            )
        except (RedisError, OSError, TimeoutError):
            return None
