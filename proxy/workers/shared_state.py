"""The state that the supervisor holds for all workers, in place of a Redis: limits, runs, owners, metrics.

Every method is synchronous and runs in the supervisor's event loop, so there are no locks. The rules are those of
`upstream.limits`, `accounting.runs` and `upstream.keys.owner_table`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final
from weakref import WeakKeyDictionary

import msgspec

from ..accounting.runs.run import Run, Runs, RunShare
from ..config.limits import Limits
from ..observability.aggregate import Family, summed
from ..upstream.keys.owner_table import OwnerTable
from ..upstream.limits.rate_limiter import RateLimiter, Reservation, Wait
from ..upstream.limits.shared import RECHECK
from .ipc import Answer

MAX_SHARES: Final = 1000
_MAX_LIMITS: Final = 10_000

_WAITS: Final = 2 * RECHECK
"""Seconds for which a refused worker counts as waiting; one that still waits asks again earlier."""

_TURN: Final = 0.1
"""Seconds for which released capacity is kept for the worker that has waited longest."""

_pack = msgspec.msgpack.Encoder().encode


def pack(*values: Any) -> bytes:
    """Return the body of a message."""
    return _pack(values)


def unpack(body: bytes, *kinds: Any) -> Any:
    """Return the values of a message. kinds: their types. Raises msgspec.DecodeError."""
    return msgspec.msgpack.decode(body, type=tuple[kinds])  # type: ignore[valid-type]


class WorkersKnownRun(msgspec.Struct, frozen=True):
    """One client's run. shares: by process; keys: number of distinct requests."""

    client: str
    shares: dict[str, RunShare]
    keys: int


@dataclass(slots=True)
class _SharedLimit:
    """A limit of all workers.

    waiting: workers that were refused a concurrent request, and when; without turns, the worker that releases one
    would always get the next. turn: (worker, until) for which released capacity is kept.
    """

    rate_limiter: RateLimiter
    limits: Limits
    use: float
    waiting: OrderedDict[int, float] = field(default_factory=OrderedDict)
    turn: tuple[int, float] | None = None


class SharedState:
    """Shared state of all workers. Clocks: monotonic in seconds, wall in Unix seconds."""

    def __init__(self, monotonic: Callable[[], float], wall: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._limits: dict[tuple[str, str], _SharedLimit] = {}
        self._reservations: dict[int, dict[int, tuple[Reservation, _SharedLimit]]] = {}
        self._notify: dict[int, Callable[[str, bytes], None]] = {}
        self._runs = Runs()
        self._shares: WeakKeyDictionary[Run, dict[str, RunShare]] = WeakKeyDictionary()
        self._owners = OwnerTable()
        self._metrics_of: dict[int, list[Family]] = {}
        self._ended_metrics: list[Family] = []

    def handlers(self, worker: int, notify: Callable[[str, bytes], None]) -> Mapping[str, Callable[[bytes], Answer]]:
        """Return the handlers of a worker's messages.

        worker: its id, which no other worker ever has. notify: sends it a notification.
        """
        self._notify[worker] = notify
        return {
            "reserve": lambda body: self._reserve(worker, body),
            "release": lambda body: self._release(worker, body),
            "reset": lambda _: self._reset(),
            "run.number": self._number,
            "run.ended": self._ended,
            "run.share": self._share,
            "run.read": self._read,
            "owner.put": self._record_owner,
            "owner.get": self._owners_of,
        }

    def worker_ended(self, worker: int) -> None:
        """Settle what an ended worker had reserved, and keep its counters."""
        self._notify.pop(worker, None)
        for reservation, limit in self._reservations.pop(worker, {}).values():
            reservation.settle(None)
            self._offer_capacity(limit, worker)
        counters = [family for family in self._metrics_of.pop(worker, []) if family.adds_up]
        self._ended_metrics = summed([self._ended_metrics, counters])

    # -- limits -------------------------------------------------------------------------------------------------------

    def _reserve(self, worker: int, body: bytes) -> Answer:
        number, limit_id, limits, use, tokens = unpack(body, int, tuple[str, str], Limits, float, int)
        now = self._monotonic()
        limit = self._limit(limit_id, limits, use, now)
        rate_limiter, wait = limit.rate_limiter, 0.0
        answer = rate_limiter.reserve(tokens, now) if self._may_reserve(limit, worker, now) else Wait(_TURN)
        if isinstance(answer, Reservation):
            self._reservations.setdefault(worker, {})[number] = answer, limit
            limit.waiting.pop(worker, None)
        else:
            wait = answer.seconds if isinstance(answer, Wait) else math.inf
            if wait in (math.inf, _TURN):
                limit.waiting[worker] = now
        used = {name: level["used"] for name, level in rate_limiter.usage(now).items()}
        return pack(isinstance(answer, Reservation), wait, used)

    def _may_reserve(self, limit: _SharedLimit, worker: int, now: float) -> bool:
        """Return False while capacity is kept for another worker."""
        if limit.turn is not None and (limit.turn[0] == worker or now >= limit.turn[1]):
            limit.turn = None
        return limit.turn is None

    def _offer_capacity(self, limit: _SharedLimit, worker: int) -> None:
        """Give the turn to the worker that has waited longest, now that `worker` has released capacity."""
        now = self._monotonic()
        for waiting, since in list(limit.waiting.items()):
            if waiting in self._notify and now - since < _WAITS:
                if waiting != worker:
                    limit.turn = waiting, now + _TURN
                    self._notify[waiting]("capacity", b"")
                return
            del limit.waiting[waiting]

    def _limit(self, limit_id: tuple[str, str], limits: Limits, use: float, now: float) -> _SharedLimit:
        limit = self._limits.get(limit_id)
        if limit is None:
            if len(self._limits) >= _MAX_LIMITS:
                for idle in [name for name, known in self._limits.items() if known.rate_limiter.idle(now)]:
                    del self._limits[idle]
            limit = self._limits[limit_id] = _SharedLimit(RateLimiter(limits, use), limits, use)
        elif (limit.limits, limit.use) != (limits, use):  # after a reload
            limit.limits, limit.use = limits, use
            limit.rate_limiter.change(limits, use)
        return limit

    def _release(self, worker: int, body: bytes) -> Answer:
        number, sent, tokens = unpack(body, int, bool, int | None)
        reserved = self._reservations.get(worker, {}).pop(number, None)
        if reserved is not None:
            reservation, limit = reserved
            if sent:
                reservation.settle(tokens)
            else:
                reservation.cancel()
            self._offer_capacity(limit, worker)
        return None

    def _reset(self) -> Answer:
        for limit in self._limits.values():
            limit.rate_limiter.reset()
        return None

    # -- runs ---------------------------------------------------------------------------------------------------------

    def _run(self, owner: str, client: str, name: str) -> Run:
        run = self._runs.get(owner, name)
        if run is None:
            run = Run("", owner, client, name, self._wall())
            self._runs.begin(owner, run)
            self._shares[run] = {}
        return run

    def _number(self, body: bytes) -> Answer:
        owner, client, name, key, retry = unpack(body, str, str, str, str, bool)
        number = self._run(owner, client, name).number(key, retry)
        self._runs.numbered()
        return pack(number)

    def _ended(self, body: bytes) -> Answer:
        owner, client, name, key, number, delivered = unpack(body, str, str, str, str, int, bool)
        self._run(owner, client, name).ended(key, number, delivered)
        return None

    def _share(self, body: bytes) -> Answer:
        owner, client, name, id_, share, before, limit = unpack(
            body, str, str, str, str, RunShare, Decimal, Decimal | None
        )
        shares = self._shares[self._run(owner, client, name)]
        others = [other for process, other in shares.items() if process != id_]
        fits = True
        if limit is not None:  # the same rule as `Run.room_for`
            wall = self._wall()
            taken = sum((other.sums.cost + other.sums.assumed + other.held_at(wall) for other in others), Decimal(0))
            after = taken + share.sums.cost + share.sums.assumed + share.held
            before += taken
            fits = before < limit and (not before or after <= limit)
        old = shares.get(id_)
        if fits and (old.seq < share.seq if old is not None else len(shares) < MAX_SHARES):
            shares[id_] = share
        return pack(fits, others)

    def _read(self, body: bytes) -> Answer:
        (name,) = unpack(body, str)
        runs = self._runs.named(name)
        return pack({run.owner: WorkersKnownRun(run.client, self._shares[run], run.keys) for run in runs})

    # -- stored objects -----------------------------------------------------------------------------------------------

    def _record_owner(self, body: bytes) -> Answer:
        digests, owner, only_new = unpack(body, list[str], str, bool)
        for digest in digests:
            self._owners.record(digest, owner, self._wall(), only_new)
        return None

    def _owners_of(self, body: bytes) -> Answer:
        (digests,) = unpack(body, list[str])
        found = ((digest, self._owners.get(digest, self._wall())) for digest in digests)
        return pack({digest: owner for digest, owner in found if owner is not None})

    # -- metrics ------------------------------------------------------------------------------------------------------

    def record_metrics(self, worker: int, families: list[Family]) -> None:
        """Replace a worker's metrics."""
        self._metrics_of[worker] = families

    def metrics(self) -> list[list[Family]]:
        """Return each worker's last metrics, and the counters of ended workers."""
        return [*self._metrics_of.values(), self._ended_metrics]
