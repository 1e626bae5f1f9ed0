"""What the parent keeps in common for its workers. Every method is synchronous: one event loop, one owner, no locks.

It stands where a Redis would stand for processes that have none but each other: the rules are the same, those of
`core.limits`, `core.runs` and `core.objects`.
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
from ..upstream.keys.stored_objects import OwnerTable
from ..upstream.limits.rate_limiter import RateLimiter, Reservation, Wait
from ..upstream.limits.shared import RECHECK
from .ipc import Answer

MOST_SHARES: Final = 1000
_MOST_ALLOWANCES: Final = 10_000

_WAITS: Final = 2 * RECHECK
"""Seconds for which a worker that was refused a place is taken to wait for one: if it does, it asks again sooner."""

_TURN: Final = 0.1
"""Seconds for which a place that came back is kept for the worker whose turn it is."""

_pack = msgspec.msgpack.Encoder().encode


def pack(*values: Any) -> bytes:
    """A message's body."""
    return _pack(values)


def unpack(body: bytes, *kinds: Any) -> Any:
    """The values of a message, of these types. Raises msgspec.DecodeError."""
    return msgspec.msgpack.decode(body, type=tuple[kinds])  # type: ignore[valid-type]


class WorkersKnownRun(msgspec.Struct, frozen=True):
    """What is known of one client's run (`runs.Known`). keys: distinct requests."""

    client: str
    shares: dict[str, RunShare]
    keys: int


@dataclass(slots=True)
class _CountedLimit:
    """The windows of one name, and what they were made for."""

    allowance: RateLimiter
    limits: Limits
    use: float
    waiting: OrderedDict[int, float] = field(default_factory=OrderedDict)
    """Workers that were refused one of the requests at once, and when: else the one that gives a place back would
    take it again, for ever."""
    turn: tuple[int, float] | None = None


class SharedState:
    """monotonic: seconds; wall: Unix seconds."""

    def __init__(self, monotonic: Callable[[], float], wall: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._allowances: dict[tuple[str, str], _CountedLimit] = {}
        self._held: dict[int, dict[int, tuple[Reservation, _CountedLimit]]] = {}
        self._tell: dict[int, Callable[[str, bytes], None]] = {}
        self._runs = Runs()
        self._shares: WeakKeyDictionary[Run, dict[str, RunShare]] = WeakKeyDictionary()
        self._makers = OwnerTable()
        self._last: dict[int, list[Family]] = {}
        self._gone: list[Family] = []

    def handlers(self, worker: int, tell: Callable[[str, bytes], None]) -> Mapping[str, Callable[[bytes], Answer]]:
        """What a worker may ask; `worker`: its own number, of no other before or after it; tell: sends it a note."""
        self._tell[worker] = tell
        return {
            "reserve": lambda body: self._reserve(worker, body),
            "settle": lambda body: self._settle(worker, body),
            "reset": lambda _: self._reset(),
            "run.number": self._number,
            "run.ended": self._ended,
            "run.share": self._share,
            "run.read": self._read,
            "made": self._record_owner,
            "maker": self._owner_of,
        }

    def left(self, worker: int) -> None:
        """A worker is gone. What it had sent upstream stays counted, its places come back, and no count goes down."""
        self._tell.pop(worker, None)
        for reservation, counted in self._held.pop(worker, {}).values():
            reservation.settle(None)
            self._returned(counted, worker)
        self._gone = summed([self._gone, [each for each in self._last.pop(worker, []) if each.adds_up]])

    # -- limits -------------------------------------------------------------------------------------------------------

    def _reserve(self, worker: int, body: bytes) -> Answer:
        number, where, limits, use, tokens = unpack(body, int, tuple[str, str], Limits, float, int)
        now = self._monotonic()
        counted = self._counted(where, limits, use, now)
        allowance, wait = counted.allowance, 0.0
        answer = allowance.reserve(tokens, now) if self._may_ask(counted, worker, now) else Wait(_TURN)
        if isinstance(answer, Reservation):
            self._held.setdefault(worker, {})[number] = answer, counted
            counted.waiting.pop(worker, None)
        else:
            wait = answer.seconds if isinstance(answer, Wait) else math.inf
            if wait in (math.inf, _TURN):
                counted.waiting[worker] = now
        used = {name: level["used"] for name, level in allowance.usage(now).items()}
        return pack(isinstance(answer, Reservation), wait, used)

    def _may_ask(self, counted: _CountedLimit, worker: int, now: float) -> bool:
        """Whether no place is being kept for another."""
        if counted.turn is not None and (counted.turn[0] == worker or now >= counted.turn[1]):
            counted.turn = None
        return counted.turn is None

    def _returned(self, counted: _CountedLimit, worker: int) -> None:
        """A place has come back from a worker: it is the turn of who has waited longest."""
        now = self._monotonic()
        for waiting, since in list(counted.waiting.items()):
            if waiting in self._tell and now - since < _WAITS:
                if waiting != worker:
                    counted.turn = waiting, now + _TURN
                    self._tell[waiting]("room", b"")
                return
            del counted.waiting[waiting]

    def _counted(self, where: tuple[str, str], limits: Limits, use: float, now: float) -> _CountedLimit:
        found = self._allowances.get(where)
        if found is None:
            if len(self._allowances) >= _MOST_ALLOWANCES:
                for idle in [name for name, one in self._allowances.items() if one.allowance.idle(now)]:
                    del self._allowances[idle]
            found = self._allowances[where] = _CountedLimit(RateLimiter(limits, use), limits, use)
        elif (found.limits, found.use) != (limits, use):  # settings are other now
            found.limits, found.use = limits, use
            found.allowance.change(limits, use)
        return found

    def _settle(self, worker: int, body: bytes) -> Answer:
        number, went, tokens = unpack(body, int, bool, int | None)
        held = self._held.get(worker, {}).pop(number, None)
        if held is not None:
            reservation, counted = held
            if went:
                reservation.settle(tokens)
            else:
                reservation.cancel()
            self._returned(counted, worker)
        return None

    def _reset(self) -> Answer:
        for counted in self._allowances.values():
            counted.allowance.reset()
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
        others = [one for other, one in shares.items() if other != id_]
        fits = True
        if limit is not None:  # the rule is Run.room_for's
            wall = self._wall()
            taken = sum((o.sums.cost + o.sums.assumed + o.held_at(wall) for o in others), Decimal(0))
            after = taken + share.sums.cost + share.sums.assumed + share.held
            before += taken
            fits = before < limit and (not before or after <= limit)
        old = shares.get(id_)
        if fits and (old.seq < share.seq if old is not None else len(shares) < MOST_SHARES):
            shares[id_] = share
        return pack(fits, others)

    def _read(self, body: bytes) -> Answer:
        (name,) = unpack(body, str)
        runs = self._runs.named(name)
        return pack({run.owner: WorkersKnownRun(run.client, self._shares[run], run.keys) for run in runs})

    # -- stored objects -----------------------------------------------------------------------------------------------

    def _record_owner(self, body: bytes) -> Answer:
        ids, label = unpack(body, list[str], str)
        for id_ in ids:
            self._makers.record(id_, label, self._wall())
        return None

    def _owner_of(self, body: bytes) -> Answer:
        (ids,) = unpack(body, list[str])
        return pack(self._makers.owner_of(ids, self._wall()))

    # -- metrics ------------------------------------------------------------------------------------------------------

    def counted(self, worker: int, families: list[Family]) -> None:
        """A worker's metrics as they are now."""
        self._last[worker] = families

    def metrics(self) -> list[list[Family]]:
        """Every worker's, as last heard, and what those that are gone have counted."""
        return [*self._last.values(), self._gone]
