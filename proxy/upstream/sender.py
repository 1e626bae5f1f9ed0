"""Sends a request until there is a response to give: choose a key, send, understand, and again if the policy says so.

Every route uses this loop. What differs between routes is in the `UpstreamRequest`. The loop ends with a response in
hand or raises ProxyError; for a stream the first event has been read, so that until then everything can be retried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from msgspec import structs

from ..protocol.errors import ProxyError
from ..system.clock import Clock
from .attempt import AttemptRunner
from .counters import UpstreamCounters
from .key_lease import KeyLease, KeyLeases
from .keys.states import KeyOutcome
from .request import UpstreamRequest
from .response import ResponseInHand
from .result import AttemptResult, LastOutcome
from .retry.outcome import OutcomeKind
from .retry.policy import RetryAfter, RetryOnNewConnection, RetryState, ReturnToClient, Step, TryNextKey
from .target import Upstream

if TYPE_CHECKING:
    from ..config.settings import RetrySettings


class _Sending:
    """One request while it is sent.

    excluded: labels of the keys that have failed it; limited: those of them that are rate limited.
    visited: upstreams that it has been sent to. failing: by upstream, what counts against its health.
    last: the last result, the client's if no other attempt is possible. fresh: the next attempt needs a new connection.
    """

    __slots__ = ("excluded", "failing", "fresh", "key_request", "last", "limited", "request", "retries", "visited")

    def __init__(self, request: UpstreamRequest, retries: RetryState) -> None:
        self.request = request
        self.retries = retries
        self.key_request = structs.replace(
            request.key_request, route=request.key_route, deployment=request.route.deployment or ""
        )
        self.excluded: set[str] = set()
        self.limited: set[str] = set()
        self.visited: set[int] = set()
        self.failing: dict[int, int] = {}
        self.last: LastOutcome | None = None
        self.fresh = False

    def take_last(self, code: str) -> LastOutcome | None:
        """Return the last result if it is a better answer than the pool's error of this code."""
        self.request.attempt_log.exhausted = code != "queue_full"
        last = self.last
        if last is None or last.is_less_specific_than(code):
            return None
        self.last = None
        return last

    def keep(self, outcome: LastOutcome) -> None:
        """Another attempt follows: keep this result in place of the one before."""
        if self.last is not None:
            self.last.close()
        self.last = outcome


class RetryingSender:
    """Sends requests to the upstreams, with one key after another and as often as the retry policy allows."""

    def __init__(
        self,
        leases: KeyLeases,
        attempts: AttemptRunner,
        upstreams: Sequence[Upstream],
        retry: RetrySettings,
        counters: UpstreamCounters,
        clock: Clock,
    ) -> None:
        self.leases = leases
        self._pool = leases.pool
        self._attempts = attempts
        self._upstreams = upstreams
        self._retry = retry
        self._counters = counters
        self._clock = clock

    async def send(self, request: UpstreamRequest) -> ResponseInHand:
        """Return the response to give, which may be an error of the upstream's. Raises ProxyError if there is none.

        A good response carries its lease; every other lease is settled here. `request.attempt_log` is filled in.
        """
        sending = _Sending(request, RetryState(self._retry, self._clock.random, request.max_retries))
        try:
            while True:
                try:
                    lease = await self.leases.acquire(request, frozenset(sending.excluded), sending.key_request)
                except ProxyError as error:
                    last = sending.take_last(error.code)
                    if last is None:
                        raise
                    return last.unwrap(request.attempt_log, self.leases.pooled)
                upstream = self._upstreams[lease.key.upstream]
                if lease.key.upstream not in sending.visited:
                    sending.visited.add(lease.key.upstream)
                    upstream.budget.request(self._clock.monotonic())
                fresh = sending.fresh or request.upgrade or not request.repeatable
                sending.fresh = False
                result = await self._attempts.run(request, lease, upstream, fresh)
                if result.refuses_usage:
                    request.body.without_usage(upstream)
                    continue
                self._count(request, upstream, result)
                self._record_health(sending, lease, upstream, result)
                if result.response is not None and result.outcome is OutcomeKind.OK:
                    request.attempt_log.exhausted = False
                    worked = KeyOutcome(result.outcome, self._clock.monotonic(), route=request.key_route)
                    self.leases.record_outcome(request, lease.key, worked)
                    self.leases.admission.wake(request.queue)  # the key works, and its limits may be known better
                    return result.response
                asked_wait = self._record_failure(sending, lease, upstream, result)
                if not request.repeatable and result.outcome is not OutcomeKind.UNREACHED:
                    result = replace(result, outcome=OutcomeKind.FINAL)  # it may have been carried out
                step = self._next_step(sending, lease, upstream, result.outcome, asked_wait)
                outcome = _last_outcome(result, step)
                if isinstance(step, ReturnToClient) and not self._fails_over(sending, lease, result.outcome):
                    return outcome.unwrap(request.attempt_log, self.leases.pooled)
                self._counters.record_retry(upstream.address.name, result.outcome.value)
                request.attempt_log.note_cause(f"{lease.key.label}: {result.cause}")
                sending.keep(outcome)
                await self._follow(sending, lease, result, step)
        finally:
            if sending.last is not None:
                sending.last.close()
            for index, kind in sending.failing.items():  # once a request, and only if its retries did not help
                self._upstreams[index].breaker.record_failure(self._clock.monotonic(), kind)

    def _count(self, request: UpstreamRequest, upstream: Upstream, result: AttemptResult) -> None:
        """Count a response, and note the upstream's own code for the request's line."""
        response, log = result.response, request.attempt_log
        log.upstream_code = response.error.name if response is not None else ""
        if response is not None and result.outcome is OutcomeKind.OK:
            self._counters.last_success[upstream.address.name] = self._clock.wall()
        elif response is not None:
            self._counters.record_error(upstream.address.name, response.status, log.upstream_code)

    def _record_health(self, sending: _Sending, lease: KeyLease, upstream: Upstream, result: AttemptResult) -> None:
        """Note what the result says of the upstream's health."""
        failure = result.breaker_failure
        if failure is None:
            upstream.breaker.record_success()
            sending.failing.pop(lease.key.upstream, None)
        elif self._clock.monotonic() < sending.request.attempt_log.deadline.at:  # else the request's time was too short
            sending.failing[lease.key.upstream] = failure

    def _record_failure(
        self, sending: _Sending, lease: KeyLease, upstream: Upstream, result: AttemptResult
    ) -> float | None:
        """Record what a failed attempt says of its key. Return the seconds that the upstream asks to wait, if any."""
        request = sending.request
        asked_wait, reason, floor = result.rate_limit_info(request.tokens, self._clock.wall())
        cooling = asked_wait if asked_wait is not None else sending.retries.delay()
        outcome = KeyOutcome(
            result.outcome,
            self._clock.monotonic(),
            cooling,
            reason,
            floor,
            route=request.key_route,
            request=request.digest(upstream) if result.outcome is OutcomeKind.DOUBTFUL else 0,
        )
        self.leases.record_outcome(request, lease.key, outcome)
        return asked_wait

    def _next_step(
        self, sending: _Sending, lease: KeyLease, upstream: Upstream, outcome: OutcomeKind, asked_wait: float | None
    ) -> Step:
        """Return what follows a failed attempt."""
        request, pool, model = sending.request, self._pool, sending.request.model
        now = self._clock.monotonic()
        other_key = pool.other_ready(lease.key.label, model, sending.excluded, now, sending.key_request)
        if outcome is OutcomeKind.RATE_LIMITED and not other_key:
            soonest = pool.cooling_for(model, now, sending.key_request)
            asked_wait = asked_wait if soonest is None else soonest
        step = sending.retries.next(
            outcome,
            asked_wait=asked_wait,
            left=request.attempt_log.deadline.act_until - now,
            other_key=other_key,
            granted=partial(upstream.budget.take, now),
        )
        if isinstance(step, RetryAfter) and pool.all_breakers_open(model, lease.key.priority, now, sending.key_request):
            return ReturnToClient(spent=True)  # its breaker has opened, and no other upstream is left
        return step

    def _fails_over(self, sending: _Sending, lease: KeyLease, outcome: OutcomeKind) -> bool:
        """Whether keys of another priority are tried now that this one's retries are used up."""
        request, log = sending.request, sending.request.attempt_log
        log.exhausted = sending.retries.can_fail_over(outcome)
        higher = not request.key_request.pinned_to and self._pool.has_lower_group(
            request.model, lease.key.priority, sending.excluded, sending.key_request
        )
        if not (log.exhausted and higher and log.deadline.left_to_act() > 0):
            return False
        sending.key_request = structs.replace(sending.key_request, min_priority=lease.key.priority)
        return True

    async def _follow(self, sending: _Sending, lease: KeyLease, result: AttemptResult, step: Step) -> None:
        """Prepare the next attempt."""
        if isinstance(step, TryNextKey):
            sending.excluded.add(lease.key.label)
            if result.outcome is OutcomeKind.RATE_LIMITED:
                sending.limited.add(lease.key.label)
        elif isinstance(step, RetryOnNewConnection):
            sending.fresh = True
        elif isinstance(step, RetryAfter):
            assert sending.last is not None
            sending.last.close()  # no connection is held during the pause
            if result.response is not None and result.response.body is None:
                sending.last = None  # a stream that cannot be given to the client any more
            await self._clock.sleep(step.seconds)
            sending.request.attempt_log.paused_ms += step.seconds * 1000
            sending.excluded -= sending.limited  # one of them may be ready first: its state decides
            avoid = sending.key_request.avoid | {lease.key.upstream}
            sending.key_request = structs.replace(sending.key_request, avoid=avoid)


def _last_outcome(result: AttemptResult, step: Step) -> LastOutcome:
    final = isinstance(step, ReturnToClient)
    spent = isinstance(step, RetryAfter) or (isinstance(step, ReturnToClient) and step.spent)
    return LastOutcome(result, spent, waits=not final)
