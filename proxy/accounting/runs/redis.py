"""Named runs shared over Redis.

A run has two keys: its numbers, and its processes' shares; a third lists the clients that have a run of this name. All
have one hash tag, so that a script touches one slot of a cluster, and expire `LIFETIME` after they were last used. A
process writes its whole share each time, never a difference, so what is sent twice because a reply was lost counts
once. Nothing here raises: within `DEADLINE` there is a result, or None.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, cast

import msgspec
from redis.exceptions import RedisError, ResponseError

from ...system.redis import RedisConnection
from .run import MAX_KEYS, Run, RunShare, rounded_up

DEADLINE: Final = 0.09
"""Seconds a request waits for each of at most two replies."""

LIFETIME: Final = 7 * 86400
"""Seconds for which a run is remembered after its last request."""

_MAX_SHARES: Final = 1000
_MAX_CLIENTS: Final = 1000
_READ_TIMEOUT: Final = 2.0
_NANO: Final = 9

# KEYS: numbers. ARGV: request, 1 for a retry, the least number, lifetime, most fields. -1: no room.
_NUMBER: Final = """
local count = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '-1')
if ARGV[2] == '1' then
  local in_flight
  for n = 0, math.min(count, 10000) - 1 do
    local state = redis.call('HGET', KEYS[1], ARGV[1] .. ':' .. n)
    if state == 'ended' then
      redis.call('HSET', KEYS[1], ARGV[1] .. ':' .. n, 'open')
      return n
    end
    if state and not in_flight then in_flight = n end
  end
  if in_flight then return in_flight end
end
if count < 0 then
  if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[5]) then return -1 end
  redis.call('HINCRBY', KEYS[1], 'requests', 1)
end
local n = math.max(count, tonumber(ARGV[3]))
redis.call('HSET', KEYS[1], ARGV[1], n + 1, ARGV[1] .. ':' .. n, 'open')
redis.call('EXPIRE', KEYS[1], ARGV[4])
return n
"""

# KEYS: numbers. ARGV: request:number, 1 for delivered, lifetime.
_ENDED: Final = """
if ARGV[2] == '1' then
  redis.call('HDEL', KEYS[1], ARGV[1])
elseif redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then
  redis.call('HSET', KEYS[1], ARGV[1], 'ended')
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
"""

# KEYS: shares, clients. ARGV: process, its share, its seq, lifetime, owner, client, now, before, after, limit or '',
# most shares, most clients. Money in 10^-9 USD; the rule is Run.room_for's. Returns whether it fits, and all shares as
# they were.
_SHARE: Final = """
local all = redis.call('HGETALL', KEYS[1])
local taken, known, newer = 0, false, false
for i = 1, #all, 2 do
  local seq, spent, held, till = string.match(all[i + 1], '^(%d+) (%d+) (%d+) (%S+) ')
  if all[i] == ARGV[1] then
    known = true
    newer = tonumber(seq) >= tonumber(ARGV[3])
  else
    taken = taken + tonumber(spent)
    if tonumber(ARGV[7]) < tonumber(till) then taken = taken + tonumber(held) end
  end
end
if ARGV[10] ~= '' then
  local limit, before = tonumber(ARGV[10]), taken + tonumber(ARGV[8])
  if before >= limit or (before > 0 and taken + tonumber(ARGV[9]) > limit) then return {0, all} end
end
if not newer and (known or #all / 2 < tonumber(ARGV[11])) then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
if redis.call('HLEN', KEYS[2]) < tonumber(ARGV[12]) then redis.call('HSET', KEYS[2], ARGV[5], ARGV[6]) end
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return {1, all}
"""


@dataclass(frozen=True, slots=True)
class RedisKnownRun:
    """One client's run as it is shared. shares: by process; keys: the number of distinct requests."""

    client: str
    shares: Mapping[str, RunShare]
    keys: int


class RedisRuns:
    """Runs in one Redis.

    link: opened and closed here unless it is `borrowed`.
    prefix: the start of every key, at most 64 bytes.
    deadline: seconds a reply may take.
    """

    def __init__(
        self,
        link: RedisConnection,
        prefix: str,
        wall: Callable[[], float],
        *,
        borrowed: bool = False,
        deadline: float = DEADLINE,
    ) -> None:
        self._link = link
        self._prefix = prefix
        self._wall = wall
        self._borrowed = borrowed
        self._deadline = deadline
        self._number = link.redis.register_script(_NUMBER)
        self._ended = link.redis.register_script(_ENDED)
        self._share = link.redis.register_script(_SHARE)

    async def open(self) -> None:
        if not self._borrowed:
            await self._link.open()

    async def close(self) -> None:
        if not self._borrowed:
            await self._link.close()

    def keys_of(self, name: str, owner: str) -> tuple[str, str, str]:
        """Return the Redis keys of a run, for numbers, shares and clients, each of at most 137 bytes."""
        tag = f"{self._prefix}:r1:{{{hashlib.sha256(name.encode()).hexdigest()[:32]}}}"
        return f"{tag}:{owner}:n", f"{tag}:{owner}:s", f"{tag}:c"

    async def number(self, run: Run, key: str, retry: bool) -> int | None:
        numbers, _, _ = self.keys_of(run.name, run.owner)
        args: list[str | int] = [key[:32], int(retry), run.count(key), LIFETIME, 2 * MAX_KEYS]
        answer = await self._ask(lambda: self._number(keys=[numbers], args=args))
        return answer if isinstance(answer, int) and answer >= 0 else None

    async def ended(self, run: Run, key: str, number: int, delivered: bool) -> None:
        numbers, _, _ = self.keys_of(run.name, run.owner)
        args: list[str | int] = [f"{key[:32]}:{number}", int(delivered), LIFETIME]
        await self._ask(lambda: self._ended(keys=[numbers], args=args))

    async def share(
        self, run: Run, share: RunShare, before: Decimal = Decimal(0), limit: Decimal | None = None
    ) -> bool | None:
        _, shares, clients = self.keys_of(run.name, run.owner)
        spent = rounded_up(share.sums.cost + share.sums.assumed, _NANO)
        held = rounded_up(share.held, _NANO)
        value = f"{share.seq} {spent} {held} {share.until:.3f} ".encode() + msgspec.json.encode(share)
        limited = "" if limit is None else str(rounded_up(limit, _NANO))
        wall = self._wall()
        first: list[Any] = [run.id, value, share.seq, LIFETIME, run.owner, run.client]
        args = [*first, f"{wall:.3f}", rounded_up(before, _NANO), spent + held, limited, _MAX_SHARES, _MAX_CLIENTS]

        async def exchange() -> tuple[bool, dict[str, RunShare]]:
            fits, pairs = await self._share(keys=[shares, clients], args=args)
            return bool(fits), _shares(dict(zip(pairs[::2], pairs[1::2], strict=True)))

        answer: tuple[bool, dict[str, RunShare]] | None = await self._ask(exchange)
        if answer is None:
            return None
        fits, found = answer
        found.pop(run.id, None)
        run.apply_shared(list(found.values()), wall)
        return fits

    async def read(self, name: str) -> Mapping[str, RedisKnownRun] | None:
        redis = self._link.redis
        _, _, clients = self.keys_of(name, "")

        async def read_all() -> dict[str, RedisKnownRun]:
            known = {}
            named = await cast("Awaitable[dict[bytes, bytes]]", redis.hgetall(clients))
            for owner_bytes, client in named.items():
                owner = owner_bytes.decode()
                numbers, shares, _ = self.keys_of(name, owner)
                found = _shares(await cast("Awaitable[dict[bytes, bytes]]", redis.hgetall(shares)))
                keys = await cast("Awaitable[bytes | None]", redis.hget(numbers, "requests"))
                if found:
                    known[owner] = RedisKnownRun(client.decode("utf-8", "replace"), found, int(keys or 0))
            return known

        known: Mapping[str, RedisKnownRun] | None = await self._ask(read_all, _READ_TIMEOUT)
        return known

    async def _ask(self, command: Callable[[], Awaitable[Any]], timeout: float | None = None) -> Any:
        """Return the reply; None if there is none in time. timeout: seconds; None: the deadline."""
        if not self._link.up:
            return None
        try:
            return await self._link.run(command, self._deadline if timeout is None else timeout)
        except ResponseError as error:  # OOM, READONLY, NOPERM: runs are counted by each process alone
            self._link.complain(f"refuses to count a run: {error}")
        except (RedisError, OSError, TimeoutError):
            pass
        return None


def _shares(stored: Mapping[bytes, bytes]) -> dict[str, RunShare]:
    """Return the shares by process; what cannot be read is left out."""
    found = {}
    for process, value in stored.items():
        try:
            found[process.decode()] = msgspec.json.decode(value.split(b" ", 4)[4], type=RunShare)
        except (msgspec.DecodeError, UnicodeDecodeError, IndexError):
            continue
    return found
