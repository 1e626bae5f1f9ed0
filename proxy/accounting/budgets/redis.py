"""Budgets in Redis: one script call a request and account (`budgets.lua`). Imported only where limits are shared.

Each proxy tells all it has spent in a period and what it holds, whenever that changes and once a second; so a lost
message heals, and what a killed proxy held is forgotten after `HELD_FOR`. Should Redis have lost its memory, all is
told again, and what the ledger knew at the start with it.
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
"""Seconds a request waits for an answer, at most."""

HELD_FOR: Final = 15.0
"""Seconds after which a proxy that says nothing holds nothing any more: it died."""

_PICO: Final = 12
_LIVES: Final[Mapping[Kind, int]] = {"day": 3 * 86400, "month": 33 * 86400}
_SCRIPT: Final = resources.files(__package__).joinpath("redis.lua").read_text(encoding="utf-8")


class RedisBudgets:
    """url: a secret; prefix: of every key, at most 64 bytes; process: an id of this one. Raises ValueError, without the
    URL's text.
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
        """Of one account all keys are in one slot of a cluster: the first part is its hash tag. At most 120 bytes."""
        return ":".join([f"{self._prefix}:b1:{{{digest(account.name)}}}", *map(str, parts)])

    async def publish(self, account: Account, wall: float, ask: Decimal | None = None) -> bool | None:
        if not self._link.up:
            return None
        pots = account.at(wall)
        keys = [self.key(account, "held"), *(self.key(account, pot.kind, int(pot.start)) for pot in pots)]
        self._seq += 1
        args: list[Any] = [self._process, self._seq, round(HELD_FOR * 1000), rounded_up(account.held, _PICO)]
        args.append("" if ask is None else rounded_up(ask, _PICO))
        for pot in pots:
            args += [rounded_up(pot.own, _PICO), rounded_down(pot.limit), _LIVES[pot.kind], _least(pot)]
        try:
            answer = await self._link.run(lambda: self._script(keys=keys, args=args), self._deadline)
        except ResponseError as error:  # OOM, READONLY, NOPERM, more than 9 million USD
            self._link.complain(f"refuses to count a budget: {error}")
            return None
        except (RedisError, OSError, TimeoutError):
            return None
        room, held, proxies, *totals = answer
        spent: dict[tuple[Kind, float], Decimal] = {}
        for pot, total, mine in zip(pots, totals[::2], totals[1::2], strict=True):
            spent[pot.kind, float(keys[1 + pots.index(pot)].rpartition(":")[2])] = _usd(int(total) - int(mine))
        account.apply_shared(spent, _usd(int(held)), int(proxies), wall)
        return bool(room)


def _least(pot: BudgetPeriod) -> int:
    """What the total cannot be less than: what was spent before this process was started, and what it has spent."""
    return rounded_up(EXACT.add(pot.before, pot.own), _PICO)


def rounded_down(amount: Decimal) -> int:
    return int(EXACT.scaleb(amount, _PICO))


def _usd(pico: int) -> Decimal:
    return EXACT.scaleb(Decimal(pico), -_PICO)
