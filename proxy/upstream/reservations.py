"""What is reserved for a request before it is sent: of its client's limits and of the budgets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ..accounting.budgets.account import BudgetReservation
from ..accounting.budgets.budgets import Budgets
from ..protocol.request import Client, ProxyRequest
from ..system.clock import Clock
from .estimates import Estimates
from .limits.clients import ClientLimits, ClientReservation
from .limits.estimate import RequestSize
from .limits.shared import SharedLimits
from .progress import AttemptLog
from .response import ResponseInHand
from .retry.outcome import OutcomeKind


class Reservations:
    """Reserves for requests. limiter: counts limits for several processes; None: they are counted here."""

    def __init__(
        self, clients: ClientLimits, budgets: Budgets, estimates: Estimates, limiter: SharedLimits | None, clock: Clock
    ) -> None:
        self._clients = clients
        self._budgets = budgets
        self.estimates = estimates
        self._limiter = limiter
        self._clock = clock

    async def send(
        self,
        client: Client,
        tokens: int,
        budget: BudgetReservation | None,
        log: AttemptLog,
        send: Callable[[], Awaitable[ResponseInHand]],
    ) -> ResponseInHand:
        """Reserve `tokens` of the client's limits, then call `send`. Raises ProxyError.

        The lease of a good response takes over what is reserved, `budget` included; otherwise it is settled here.
        """
        log.budget_reservation = budget
        reserved: ClientReservation | None = None
        used: int | None = None
        try:
            reserved = await self.client(client, tokens)
            response = await send()
            if response.outcome is OutcomeKind.OK:
                response.lease.client_reservation, response.lease.budget_reservation = reserved, budget
                reserved = budget = None
            used = 0
            return response
        finally:
            if reserved is not None:
                reserved.settle(used) if log.sent else reserved.cancel()
            if budget is not None:
                budget.cancel()

    async def budget(self, request: ProxyRequest, size: RequestSize | None) -> BudgetReservation | None:
        """Reserve the estimated cost in the budgets that count the request. Raises ProxyError(budget_exceeded)."""
        if size is None or not self._budgets.active:
            return None
        return await self._budgets.reserve(request.client, self.estimates.max_cost(request, size))

    async def client(self, client: Client, tokens: int) -> ClientReservation | None:
        """Reserve a request of `tokens` in the client's limits. Raises ProxyError(client_limit, …)."""
        reserved = self._clients.reserve(client, tokens, self._clock.monotonic())
        if self._limiter is None:
            return reserved
        while reserved is not None and reserved.reservation is not None:
            try:
                if await self._limiter.confirm(reserved.reservation):
                    break
            except BaseException:
                reserved.cancel()
                raise
            reserved.cancel()
            reserved = self._clients.reserve(client, tokens, self._clock.monotonic())
        return reserved
