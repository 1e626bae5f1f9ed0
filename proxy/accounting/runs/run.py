"""Named runs (`X-Proxy-Run`, `docs/runs.md`): the number of a request, what a run has cost, and what it may still cost.

Identical requests in a run are numbered 0, 1, 2 … in order of arrival, and each number is a sample of its own in the
cache. An SDK's retry takes the lowest number that was not delivered. Numbers whose request has ended come first, since
one in flight belongs to another caller. If there is none, the retry takes a number in flight: its client gave up, and
the proxy has not noticed yet.

Bounds: `MAX_RUNS` runs and `MAX_KEYS` distinct requests in a run, of which the least recently used are forgotten first
(a forgotten request begins at number 0 again); `MAX_KEYS_IN_ALL` requests in all runs, above which whole runs are
forgotten; `MAX_OPEN` undelivered numbers in a run; `MAX_MODELS` model names.
"""

from __future__ import annotations

from collections import OrderedDict
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any, Final

import msgspec

from ...cost.pricing import usd

MAX_RUNS: Final = 1000
MAX_KEYS: Final = 100_000
MAX_KEYS_IN_ALL: Final = 200_000
MAX_OPEN: Final = 10_000
MAX_MODELS: Final = 32

_TRIM_EVERY: Final = 256
_ZERO: Final = Decimal(0)
_EXACT: Final = Context(prec=60)  # as in `cost/pricing.py`: nothing is ever rounded


class RunTotals(msgspec.Struct, frozen=True):
    """What requests have come to. Amounts are in USD.

    unpriced: responses without a known cost.
    assumed: estimates of requests that were sent and whose cost is unknown; they count against `max_cost` only.
    """

    requests: int = 0
    hits: int = 0
    misses: int = 0
    errors: int = 0
    unpriced: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: Decimal = _ZERO
    saved: Decimal = _ZERO
    assumed: Decimal = _ZERO

    def plus(self, other: RunTotals) -> RunTotals:
        return RunTotals(*[_add(getattr(self, name), getattr(other, name)) for name in RunTotals.__struct_fields__])


def _add(one: Any, other: Any) -> Any:
    return _EXACT.add(one, other) if isinstance(one, Decimal) else one + other


NOTHING: Final = RunTotals()


class RunShare(msgspec.Struct, frozen=True):
    """Everything that one process has done in a run. Of two such states the one with the larger `seq` is newer.

    held: USD reserved for requests in flight; it counts until `until` (Unix seconds), since a process may die.
    first, last: Unix seconds of the first and the last request.
    """

    seq: int
    sums: RunTotals
    held: Decimal = _ZERO
    until: float = 0.0
    first: float = 0.0
    last: float = 0.0
    max_cost: Decimal | None = None
    models: tuple[str, ...] = ()

    def held_at(self, wall: float) -> Decimal:
        return self.held if wall < self.until else _ZERO


def joined(shares: list[RunShare]) -> RunShare:
    """Return the shares of several processes, or clients, as one. `max_cost` is the latest."""
    if len(shares) == 1:
        return shares[0]
    sums = NOTHING
    for share in shares:
        sums = sums.plus(share.sums)
    latest = max(shares, key=lambda share: share.last)
    models = dict.fromkeys(model for share in shares for model in share.models)
    return RunShare(
        seq=0,
        sums=sums,
        held=sum((share.held for share in shares), _ZERO),
        first=min(share.first for share in shares),
        last=latest.last,
        max_cost=latest.max_cost,
        models=tuple(models)[:MAX_MODELS],
    )


def as_json(share: RunShare, keys: int) -> dict[str, Any]:
    """Return what `GET /_proxy/runs/{run}` says of a share. keys: the number of distinct requests."""
    sums = share.sums
    return {
        "requests": sums.requests,
        "hits": sums.hits,
        "misses": sums.misses,
        "errors": sums.errors,
        "unpriced": sums.unpriced,
        "distinct_keys": keys,
        "cost_usd": usd(sums.cost),
        "saved_usd": usd(sums.saved),
        "max_cost": usd(share.max_cost) if share.max_cost is not None else None,
        "prompt_tokens": sums.prompt_tokens,
        "completion_tokens": sums.completion_tokens,
        "total_tokens": sums.prompt_tokens + sums.completion_tokens,
        "first_at": round(share.first, 3),
        "last_at": round(share.last, 3),
        "models": sorted(share.models),
    }


class Run:
    """One client's run of one name, as this process knows it. id: unique to this object among all processes."""

    def __init__(self, id_: str, owner: str, client: str, name: str, wall: float) -> None:
        self.id = id_
        self.owner = owner
        self.client = client
        self.name = name
        self.sums = NOTHING
        self.held = _ZERO
        self.max_cost: Decimal | None = None
        self.others = _ZERO
        """USD that other processes have spent in this run or reserved, when they were last asked."""
        self.others_sums = NOTHING
        self._first = self._last = wall
        self._seq = 0
        self._models: dict[str, None] = {}
        self._counts: OrderedDict[bytes, int] = OrderedDict()
        self._open: OrderedDict[tuple[bytes, int], bool] = OrderedDict()
        """Undelivered numbers, each with whether its request has ended."""
        self.forgotten = 0
        """How many distinct requests were forgotten because there were more than `MAX_KEYS`."""

    # -- numbers ------------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> int:
        """Return how many distinct requests are numbered and remembered."""
        return len(self._counts)

    def count(self, key: str) -> int:
        """Return how many numbers this request has been given, as far as known here."""
        return self._counts.get(_short(key), 0)

    def number(self, key: str, retry: bool) -> int:
        """Return the number of a request that has just arrived."""
        short = _short(key)
        if retry:
            mine = [(not ended, number) for (one, number), ended in self._open.items() if one == short]
            if mine:
                number = min(mine)[1]
                self._open[short, number] = False
                self._counts.move_to_end(short)
                return number
        return self._give(short, self._counts.get(short, 0))

    def took(self, key: str, number: int) -> int:
        """Take note of a number that was given by another process, and return it."""
        return self._give(_short(key), number)

    def _give(self, short: bytes, number: int) -> int:
        self._counts[short] = max(number + 1, self._counts.get(short, 0))
        self._counts.move_to_end(short)
        if len(self._counts) > MAX_KEYS:
            self._counts.popitem(last=False)
            self.forgotten += 1
        self._open[short, number] = False
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        return number

    def ended(self, key: str, number: int, delivered: bool) -> None:
        """Take note that the request with this number has ended."""
        name = _short(key), number
        if delivered:
            self._open.pop(name, None)
        elif name in self._open:
            self._open[name] = True

    # -- money --------------------------------------------------------------------------------------------------------

    @property
    def cost(self) -> Decimal:
        """Return the USD that all processes have spent."""
        return _EXACT.add(self.sums.cost, self.others_sums.cost)

    @property
    def saved(self) -> Decimal:
        return _EXACT.add(self.sums.saved, self.others_sums.saved)

    @property
    def committed(self) -> Decimal:
        """Return the USD that this process has spent or reserved."""
        return _EXACT.add(_EXACT.add(self.sums.cost, self.sums.assumed), self.held)

    def room_for(self, amount: Decimal, limit: Decimal) -> bool:
        """Return whether another `amount` stays within `limit`. Once the limit is reached, not even 0 does.

        While nothing is spent or reserved, any request is admitted: an estimate from `max_tokens` must not keep a run
        from beginning.
        """
        taken = _EXACT.add(self.committed, self.others)
        return taken < limit and (not taken or _EXACT.add(taken, amount) <= limit)

    def reserve(self, amount: Decimal) -> None:
        self.held = _EXACT.add(self.held, amount)

    def release(self, amount: Decimal) -> None:
        self.held = _EXACT.subtract(self.held, amount)

    def add(self, sums: RunTotals, wall: float, model: str = "") -> None:
        """Add the totals of a request. wall: Unix seconds."""
        self.sums = self.sums.plus(sums)
        self._last = max(self._last, wall)
        if model and len(self._models) < MAX_MODELS:
            self._models[model] = None

    @property
    def completion_mean(self) -> int:
        """Return the mean of the completion tokens of this process's misses: what to expect without a limit."""
        misses = self.sums.misses
        return -(-self.sums.completion_tokens // misses) if misses else 0

    def share(self, until: float) -> RunShare:
        """Return this process's share, newer than all before. until: Unix seconds for which reservations hold."""
        self._seq += 1
        return RunShare(
            self._seq, self.sums, self.held, until, self._first, self._last, self.max_cost, tuple(self._models)
        )

    def apply_shared(self, shares: list[RunShare], wall: float) -> None:
        """Take over what the other processes have done."""
        sums, taken = NOTHING, _ZERO
        for share in shares:
            sums = sums.plus(share.sums)
            taken = _EXACT.add(taken, share.held_at(wall))
        self.others_sums = sums
        self.others = _EXACT.add(taken, _EXACT.add(sums.cost, sums.assumed))


class Runs:
    """The runs of all clients that this process remembers."""

    def __init__(self) -> None:
        self._runs: OrderedDict[tuple[str, str], Run] = OrderedDict()
        self._given = 0

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, owner: str, name: str) -> Run | None:
        """Return a run and note that it was used."""
        run = self._runs.get((owner, name))
        if run is not None:
            self._runs.move_to_end((owner, name))
        return run

    def begin(self, owner: str, run: Run) -> None:
        """Remember a new run, and forget others if there are too many."""
        self._runs[owner, run.name] = run
        self._trim()

    def numbered(self) -> None:
        """Note that a number was given. Every few times the bounds are enforced."""
        self._given += 1
        if self._given % _TRIM_EVERY == 0:
            self._trim()

    def _trim(self) -> None:
        """Enforce the bounds; the run used last always stays."""
        keys = sum(run.keys for run in self._runs.values()) if len(self._runs) > 1 else 0
        while len(self._runs) > MAX_RUNS or (keys > MAX_KEYS_IN_ALL and len(self._runs) > 1):
            _, forgotten = self._runs.popitem(last=False)
            keys -= forgotten.keys

    def named(self, name: str) -> list[Run]:
        """Return all clients' runs of this name."""
        return [run for (_, one), run in self._runs.items() if one == name]


def rounded_up(amount: Decimal, places: int) -> int:
    """Return `amount` in units of 10^-places, rounded up, for sums that another program compares."""
    return int(_EXACT.scaleb(amount, places).to_integral_value(ROUND_CEILING))


def _short(key: str) -> bytes:
    """Return half of a key's digest: it is as good as the whole, and many are kept."""
    return bytes.fromhex(key[:32])
