"""Budgets shared over Redis: one call of `redis.lua` for each request and account.

Each proxy publishes all that it has spent in a period and what it has reserved, whenever that changes and once a
second. So a lost message does no harm, and what a killed proxy had reserved is forgotten after `HELD_FOR`. If Redis
loses its data, everything is published again, together with what the ledger knew at the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from importlib import resources
from typing import Any, Final

from redis.exceptions import RedisError, ResponseError

from ...system.redis import RedisConnection
from ...system.redis_keys import digest
from ..runs.run import rounded_up
from .account import EXACT, Account, BudgetPeriod, Kind

DEADLINE: Final = 0.09
"""Seconds a request waits for Redis, at most."""

HELD_FOR: Final = 15.0
"""Seconds after which a silent proxy is taken for dead and its reservations no longer count."""

_PICO: Final = 12
_LIVES: Final[Mapping[Kind, int]] = {"day": 3 * 86400, "month": 33 * 86400}
_SCRIPT: Final = resources.files(__package__).joinpath("redis.lua").read_text(encoding="utf-8")


class RedisBudgets:
    """Budgets in one Redis.

    url: a secret.
    prefix: the start of every key, at most 64 bytes.
    process: an id of this process.
    deadline: seconds a call may take.
    Raises ValueError, without the URL's text.
    """

    def __init__(self, url: str, prefix: str, process: str, deadline: float = DEADLINE) -> None:
        self._link = RedisConnection(
            url, deadline, "redis budgets", "each proxy holds its share of what was left of the budgets"
        )
        self._script = self._link.redis.register_script(_SCRIPT)
        self._prefix = prefix
        self._process = process
        self._deadline = deadline
        self._seq = 0
        self._opened = False

    async def open(self) -> None:
        if not self._opened:
            self._opened = True
            await self._link.open()

    async def close(self) -> None:
        await self._link.close()

    def key(self, account: Account, *parts: object) -> str:
        """Return the Redis key of one of an account's values, of at most 120 bytes.

        The account's digest is the hash tag, so that all keys of an account are in one slot of a cluster.
        """
        return ":".join([f"{self._prefix}:b1:{{{digest(account.name)}}}", *map(str, parts)])

    async def publish(self, account: Account, wall: float, ask: Decimal | None = None) -> bool | None:
        if not self._link.up:
            return None
        periods = account.at(wall)
        names = [(period.kind, int(period.start)) for period in periods]  # another may have begun at the answer
        keys = [self.key(account, "held"), *(self.key(account, *name) for name in names)]
        self._seq += 1
        args: list[Any] = [self._process, self._seq, round(HELD_FOR * 1000), rounded_up(account.held, _PICO)]
        args.append("" if ask is None else rounded_up(ask, _PICO))
        for period in periods:
            args += [rounded_up(period.own, _PICO), _rounded_down(period.limit), _LIVES[period.kind], _least(period)]

        async def count() -> tuple[bool, Decimal, int, dict[tuple[Kind, float], Decimal]]:
            room, held, proxies, *totals = await self._script(keys=keys, args=args)
            spent = {
                (kind, float(start)): _usd(int(total) - int(mine))
                for (kind, start), total, mine in zip(names, totals[::2], totals[1::2], strict=True)
            }
            return bool(room), _usd(int(held)), int(proxies), spent

        try:
            room, held, proxies, spent = await self._link.run(count, self._deadline)
        except ResponseError as error:  # OOM, READONLY, NOPERM, more than 9 million USD
            self._link.complain(f"refuses to count a budget: {error}")
            return None
        except (RedisError, OSError, TimeoutError):
            return None
        account.apply_shared(spent, held, proxies, wall)
        return room


def _least(period: BudgetPeriod) -> int:
    """Return what the total is at least: what was spent before this process was started, and by it since."""
    return rounded_up(EXACT.add(period.before, period.own), _PICO)


def _rounded_down(amount: Decimal) -> int:
    return int(EXACT.scaleb(amount, _PICO))


def _usd(pico: int) -> Decimal:
    return EXACT.scaleb(Decimal(pico), -_PICO)
