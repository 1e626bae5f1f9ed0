"""Named runs: number each request, reserve its estimated cost, and add up what it came to.

The rules are in `run.py`. If a Redis is configured, numbers and totals are shared over it; while it is out of reach,
each process goes on with what it knows.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Protocol

from ...cache.entry import Entry
from ...cost.pricing import usd
from ...protocol.errors import ProxyError
from ...protocol.request import ProxyRequest
from ...system.clock import Clock, spawn
from ..receipt import Receipt
from .run import NOTHING, Run, Runs, RunShare, RunTotals, as_json, joined

log = logging.getLogger("proxy")

HELD_FOR: Final = 3600.0
"""Seconds after which another process's reservations no longer count: if it were alive, it would have renewed them."""

_ZERO: Final = Decimal(0)
_PAID_FOR: Final = frozenset({"client_gone", "upstream_timeout", "upstream_invalid_response", "draining"})
"""Errors after which the upstream may well charge for a request although no usage came."""


class KnownRun(Protocol):
    """One client's run as it is shared."""

    @property
    def client(self) -> str: ...

    @property
    def shares(self) -> Mapping[str, RunShare]:
        """What each process has done in the run, by process."""

    @property
    def keys(self) -> int:
        """How many distinct requests there were."""


class SharedRuns(Protocol):
    """Runs shared by several processes. No method raises; None: it is out of reach, and the caller goes on alone."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def number(self, run: Run, key: str, retry: bool) -> int | None:
        """Return the number of a request that has just arrived. retry: an SDK says that it asks again."""

    async def ended(self, run: Run, key: str, number: int, delivered: bool) -> None:
        """Take note that the request with this number has ended."""

    async def share(
        self, run: Run, share: RunShare, before: Decimal = _ZERO, limit: Decimal | None = None
    ) -> bool | None:
        """Publish this process's share and take over the others'.

        limit: USD; the share is published only if there is room for all of it, otherwise False is returned.
        before: USD of the share that this request does not add.
        """

    async def read(self, name: str) -> Mapping[str, KnownRun] | None:
        """Return all clients' runs of this name, by owner."""


@dataclass(slots=True, eq=False)
class RunTicket:
    """One request in a run.

    number: None if it is not numbered.
    held: USD reserved.
    sent: it may have been sent upstream, so that a receipt will say what it cost.
    """

    run: Run
    key: str = ""
    number: int | None = None
    held: Decimal = _ZERO
    sent: bool = False


class RunRegistry:
    """All runs; they survive a reload."""

    def __init__(self, clock: Clock, shared: SharedRuns | None = None) -> None:
        self._clock = clock
        self._shared = shared
        self._runs = Runs()
        self._tickets: dict[str, RunTicket] = {}
        self._publishing: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        if self._shared is not None:
            await self._shared.open()

    async def close(self) -> None:
        """Wait up to a second until the others know everything."""
        if self._publishing:
            await asyncio.wait(set(self._publishing), timeout=1.0)
        if self._shared is not None:
            await self._shared.close()

    # -- one request, from its arrival to its end ----------------------------------------------------------------------

    def enter(self, request: ProxyRequest) -> Run | None:
        """Return the run of a request that arrives; None: it is in none. Raises ProxyError(invalid_option)."""
        name, max_cost = request.options.run, request.options.max_cost
        if not name:
            if max_cost is not None:
                raise ProxyError("invalid_option", "max-cost is a run's: name it with X-Proxy-Run", param="max-cost")
            return None
        owner = f"{request.client.name}\n{request.client.cache_partition}"
        run = self._runs.get(owner, name)
        if run is None:
            run = Run(self._clock.new_id()[:16], _digest(owner), request.client.name, name, self._clock.wall())
            self._runs.begin(owner, run)
        if max_cost is not None:
            run.max_cost = max_cost
        self._tickets[request.id] = RunTicket(run)
        return run

    async def sample(self, request: ProxyRequest, key: str) -> str:
        """Return the sample for the cache key of a request. key: its cache key without a sample."""
        ticket = self._tickets.get(request.id)
        if ticket is None or request.options.sample:
            return request.options.sample
        run, retry = ticket.run, _is_retry(request)
        number = None
        if self._shared is not None:
            number, _ = await asyncio.gather(
                self._shared.number(run, key, retry), self._shared.share(run, run.share(self._until()))
            )
        forgotten = run.forgotten
        number = run.number(key, retry) if number is None else run.took(key, number)
        if run.forgotten and not forgotten:
            log.warning("a run has too many different requests: the oldest are forgotten and start at 0 again")
        self._runs.numbered()
        ticket.key, ticket.number = key, number
        return str(number)

    def expected_output(self, request: ProxyRequest) -> int:
        """Return how many tokens an answer in the request's run has taken on average; 0 if there was none."""
        ticket = self._tickets.get(request.id)
        return ticket.run.completion_mean if ticket is not None else 0

    async def admit(self, request: ProxyRequest, amount: Decimal) -> None:
        """Reserve the estimated cost, in USD, before the request is sent. Raises ProxyError(budget_exceeded)."""
        ticket, limit = self._tickets.get(request.id), request.options.max_cost
        if ticket is None:
            return
        run = ticket.run
        before, fits = run.committed, limit is None or run.room_for(amount, limit)
        run.reserve(amount)
        ticket.held = amount
        if self._shared is not None and limit is not None:
            answer = await self._shared.share(run, run.share(self._until()), before, limit)
            fits = fits if answer is None else answer
        if not fits and limit is not None:
            run.release(amount)
            ticket.held = _ZERO
            message = (
                f"the run {run.name!r} has cost {usd(run.cost)} USD and this request might cost {usd(amount)}, with "
                f"requests in flight more than its max-cost of {usd(limit)}; stored answers are still given"
            )
            raise ProxyError("budget_exceeded", message, param="max-cost")
        ticket.sent = True

    def hit(self, request: ProxyRequest, entry: Entry) -> None:
        """End a request that was answered from the cache."""
        ticket = self._tickets.pop(request.id, None)
        if ticket is not None:
            saved = Decimal(entry.cost) if entry.cost is not None else _ZERO
            self._end(ticket, RunTotals(requests=1, hits=1, saved=saved), request.model, delivered=True)

    def finished(self, receipt: Receipt) -> None:
        """End a request as its receipt says."""
        ticket = self._tickets.pop(receipt.id, None)
        if ticket is None:
            return
        good = receipt.status < 400 and not receipt.error
        from_cache = receipt.cache in ("hit", "stale", "coalesced")
        miss = good and not from_cache
        cost = Decimal(receipt.cost_usd) if receipt.cost_usd is not None else None
        charged = miss or receipt.error in _PAID_FOR
        usage = receipt.usage if not from_cache else None
        sums = RunTotals(
            requests=1,
            hits=good and from_cache,
            misses=miss,
            errors=not good,
            unpriced=miss and cost is None,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            cost=cost or _ZERO,
            saved=Decimal(receipt.saved_usd) if good and receipt.saved_usd is not None else _ZERO,
            assumed=ticket.held if cost is None and charged and receipt.attempts else _ZERO,
        )
        self._end(ticket, sums, receipt.model, delivered=good)

    def abandoned(self, request: ProxyRequest, gone: bool) -> None:
        """End a request that got no response.

        gone: its client disconnected. Its upstream request may go on for other clients, and its receipt comes after it.
        """
        ticket = self._tickets.get(request.id)
        if ticket is None:
            return
        if gone and ticket.sent:
            if ticket.number is not None:
                ticket.run.ended(ticket.key, ticket.number, False)
            return
        del self._tickets[request.id]
        self._end(ticket, RunTotals(requests=1, errors=1), request.model, delivered=False)

    def _end(self, ticket: RunTicket, sums: RunTotals, model: str, *, delivered: bool) -> None:
        run = ticket.run
        run.release(ticket.held)
        run.add(sums, self._clock.wall(), model[:128])
        if ticket.number is not None:
            run.ended(ticket.key, ticket.number, delivered)
        if self._shared is not None:
            task = spawn(self._publish(self._shared, ticket, delivered), "run sums")
            self._publishing.add(task)
            task.add_done_callback(self._publishing.discard)

    async def _publish(self, shared: SharedRuns, ticket: RunTicket, delivered: bool) -> None:
        run = ticket.run
        if ticket.number is not None:
            await asyncio.gather(
                shared.ended(run, ticket.key, ticket.number, delivered), shared.share(run, run.share(self._until()))
            )
        else:
            await shared.share(run, run.share(self._until()))

    def _until(self) -> float:
        return self._clock.wall() + HELD_FOR

    # -- reports -------------------------------------------------------------------------------------------------------

    async def report(self, name: str) -> dict[str, Any] | None:
        """Return all clients' runs of this name together, and each, for `GET /_proxy/runs/{run}`; None: there is none.

        If the other processes are out of reach, what they did is what was last heard of them.
        """
        known = await self._shared.read(name) if self._shared is not None else None
        clients: dict[str, tuple[str, list[RunShare], int]] = {}
        for owner, one in (known or {}).items():
            clients[owner] = one.client, list(one.shares.values()), one.keys
        for run in self._runs.named(name):
            mine = run.share(self._until())
            if known is None or run.owner not in known:
                others = [] if run.others_sums is NOTHING else [RunShare(0, run.others_sums, first=mine.first)]
                clients[run.owner] = run.client, [mine, *others], run.keys
            else:
                shares = {**known[run.owner].shares, run.id: mine}
                clients[run.owner] = run.client, list(shares.values()), max(run.keys, known[run.owner].keys)
        if not clients:
            return None
        each = [(client, joined(shares), keys) for client, shares, keys in clients.values()]
        total = joined([share for _, share, _ in each])
        return {
            "run": name,
            **as_json(total, sum(keys for _, _, keys in each)),
            "clients": [{"client": client or None, **as_json(share, keys)} for client, share, keys in each],
        }


def run_headers(run: Run) -> tuple[tuple[str, str], ...]:
    """Return the headers of responses in a run: `docs/runs.md`."""
    return ("X-Proxy-Run-Cost-USD", usd(run.cost)), ("X-Proxy-Run-Saved-USD", usd(run.saved))


def _is_retry(request: ProxyRequest) -> bool:
    """Return whether an official SDK says that this request is a retry."""
    for name, value in request.headers:
        if len(name) == 23 and name.lower() == b"x-stainless-retry-count":
            return value.strip().isdigit() and int(value[:9]) > 0
    return False


def _digest(owner: str) -> str:
    """Return an owner's name for Redis: the owner may contain the digest of a credential."""
    return hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:32]
