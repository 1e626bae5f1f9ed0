"""One request's dealings with the upstreams: choose a key, send, understand, and again where the policy says so.

It ends with an answer in hand (for streams: its first event too, so that until here everything may be retried), or with
a Refusal. Whatever happens in between, each lease is settled exactly once.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

import orjson
from msgspec import structs

from ..accounting.budgets.account import BudgetReservation
from ..cost.pricing import Cost
from ..cost.usage import Usage
from ..protocol.errors import ProxyError
from ..protocol.headers import upstream_headers
from ..protocol.json_edit import set_field, want_usage
from ..protocol.request import ProxyRequest
from ..services import Services
from .cost_estimate import max_cost_estimate
from .deadline import SharedDeadline
from .interfaces import ConnectionInfo, UpstreamTransport
from .keys.lease import KeyRequest, Lease, NoKey, NotReady
from .keys.prompt_affinity import HEAD, prefix_of
from .limits.clients import ClientReservation
from .limits.estimate import RequestSize, request_size
from .limits.queue import QueueFull, TimedOut
from .limits.rate_limiter import Wait
from .progress import AttemptLog
from .response import ResponseInHand, classify_response, refuses_stream_options, response_in_hand
from .result import LastOutcome, rate_limit_info, unwrap, waited_too_long
from .retry.fallback import fallbacks_for, with_model
from .retry.outcome import OutcomeKind, TransportFailure, breaker_failure
from .retry.policy import RetryAfter, RetryOnNewConnection, RetryState, ReturnToClient, TryNextKey
from .target import Upstream

__all__ = ["AttemptLog", "RetryingSender"]

_ACCEPT_ENCODING: Final = frozenset({b"accept-encoding"})
"""Answers are asked for as they are: they are read, and a stream's compression would hold its events back."""


class RetryingSender:
    """Runs calls against the upstreams of a world."""

    def __init__(self, services: Services, transport: UpstreamTransport) -> None:
        self._services = services
        self._way_up = transport
        self._no_stream_options: set[tuple[str, str]] = set()

    async def send(self, request: ProxyRequest, attempt_log: AttemptLog, *, whole: bool = True) -> ResponseInHand:
        """The answer to give. Raises ProxyError where there is none. `progress` is filled in as it goes, for receipts.

        whole: the answer is all the client gets; to a part of one no other model may answer.
        """
        tokens = self._estimate(request, attempt_log)
        stake = attempt_log.budget_reservation = await self._reserve_budget(request, attempt_log.size)
        hold: ClientReservation | None = None
        used: int | None = None
        try:
            hold = await self._services.reserve_client(request.client, tokens)
            answered = await self._with_fallbacks(request, tokens, attempt_log, whole)
            if answered.outcome is OutcomeKind.OK and (hold is not None or stake is not None):
                answered.lease = structs.replace(answered.lease, client_reservation=hold, budget_reservation=stake)
                hold = stake = None
            used = 0
            return answered
        finally:
            if hold is not None:
                hold.settle(used) if attempt_log.sent else hold.cancel()
            if stake is not None:
                stake.cancel()

    async def _with_fallbacks(
        self, request: ProxyRequest, tokens: int, attempt_log: AttemptLog, whole: bool
    ) -> ResponseInHand:
        """What the call's own model answers, or one of those that stand in for it."""
        tied = await self._services.object_owners.pinned_key(self._services.pool, request)
        first = await self._send_with_model(request, tokens, attempt_log, tied)
        others = fallbacks_for(self._services.settings.retry.fallbacks, request.model) if whole else ()
        if not others or tied or not attempt_log.exhausted:
            return unwrap(first)
        told = attempt_log.spent, attempt_log.no_usable_key
        kept = False
        try:
            for model in others:
                if attempt_log.deadline.left() <= 0:
                    break
                attempt_log.spent = attempt_log.no_usable_key = False
                then = await self._send_with_model(with_model(request, model), tokens, attempt_log, "")
                if isinstance(then, ResponseInHand):
                    if then.outcome is OutcomeKind.OK:
                        attempt_log.model = model
                        return then
                    then.response.close()
            kept = True
            attempt_log.spent, attempt_log.no_usable_key = told
            return unwrap(first)
        finally:
            if not kept and isinstance(first, ResponseInHand):
                first.response.close()

    async def _send_with_model(
        self, request: ProxyRequest, tokens: int, attempt_log: AttemptLog, tied: str
    ) -> ResponseInHand | ProxyError:
        """What comes of the call with its own model. `progress.exhausted`: no key or upstream is left to try."""
        attempt_log.exhausted = False
        try:
            return await self._attempts(request, tokens, attempt_log, tied)
        except ProxyError as refusal:
            return refusal.copy(refusal.lines)

    async def _attempts(self, request: ProxyRequest, tokens: int, attempt_log: AttemptLog, tied: str) -> ResponseInHand:
        clock, pool, passthrough = self._services.clock, self._services.pool, self._services.passthrough
        policy = self._services.retry_policy.with_max_retries(request.options.max_retries)
        attempts = RetryState(policy, clock.random)
        excluded: set[str] = set()
        limited: set[str] = set()
        visited: set[int] = set()
        failing: dict[int, int] = {}
        wish = KeyRequest(self._prefix(request), pinned_to=tied)
        last: LastOutcome | None = None
        fresh = False
        try:
            while True:
                try:
                    lease = await self._lease(request, tokens, frozenset(excluded), attempt_log, wish)
                except ProxyError as refusal:
                    attempt_log.exhausted = refusal.code != "queue_full"
                    if last is None or last.is_less_specific_than(refusal.code):
                        raise
                    final, last = last, None
                    return final.unwrap(attempt_log, passthrough)
                upstream = self._services.upstreams[lease.key.upstream]
                if lease.key.upstream not in visited:
                    visited.add(lease.key.upstream)
                    upstream.budget.request(clock.monotonic())
                failure: TransportFailure | None = None
                answered: ResponseInHand | None = None
                try:
                    answered = await self._attempt(request, lease, upstream, ConnectionInfo(fresh), attempt_log)
                    outcome = answered.outcome
                except TransportFailure as error:
                    failure, outcome = error.again(), error.outcome
                fresh = False
                if answered is not None and answered.injected and refuses_stream_options(answered):
                    self._remember_refusal(upstream, request.model)
                    continue
                now = clock.monotonic()
                sick = breaker_failure(
                    outcome, (answered.status, answered.response.headers) if answered is not None else None
                )
                if sick is None:
                    upstream.breaker.record_success()
                    failing.pop(lease.key.upstream, None)
                elif now < attempt_log.deadline.at:  # else it may be this request's impatience
                    failing[lease.key.upstream] = sick
                if answered is not None and outcome is OutcomeKind.OK:
                    attempt_log.exhausted = False
                    self._services.record_outcome(lease.key, request.model, outcome, 0.0, "")
                    self._services.admission.wake(self._queue_name(request))  # the key works, and said what room it has
                    if answered.is_event_stream:
                        self._services.object_owners.record_stream(pool, request, lease.key, answered.first)
                    return answered
                asked, reason, floor = rate_limit_info(answered, failure, tokens, clock.wall())
                if not passthrough:
                    cooling = asked if asked is not None else policy.delay(attempts.retries, clock.random)
                    self._services.record_outcome(lease.key, request.model, outcome, cooling, reason, floor)
                other_key = pool.other_ready(lease.key.label, request.model, excluded, now, wish)
                if outcome is OutcomeKind.RATE_LIMITED and not other_key:
                    soonest = pool.soonest(request.model, now, wish)
                    asked = asked if soonest is None else soonest
                step = attempts.next(
                    outcome,
                    asked_wait=asked,
                    left=attempt_log.deadline.at - now,
                    other_key=other_key,
                    granted=partial(upstream.budget.take, now),
                )
                if isinstance(step, RetryAfter) and pool.all_closed(request.model, lease.key.priority, now, tied):
                    step = ReturnToClient(spent=True)  # the breaker has opened: nobody here will take it for a while
                spent = isinstance(step, ReturnToClient) and step.spent
                mine = LastOutcome(
                    answered,
                    failure,
                    outcome,
                    spent or isinstance(step, RetryAfter),
                    not isinstance(step, ReturnToClient),
                )
                if isinstance(step, ReturnToClient):
                    attempt_log.exhausted = attempts.can_fail_over(outcome)
                    higher = not tied and pool.higher(request.model, lease.key.priority, excluded)
                    if not (attempt_log.exhausted and higher and now < attempt_log.deadline.at):
                        return mine.unwrap(attempt_log, passthrough)
                    wish = structs.replace(wish, min_priority=lease.key.priority)
                self._services.counters.record_retry(upstream.address.name, outcome.value)
                if last is not None:
                    last.close()
                last = mine
                if isinstance(step, TryNextKey):
                    excluded.add(lease.key.label)
                    if outcome is OutcomeKind.RATE_LIMITED:
                        limited.add(lease.key.label)
                elif isinstance(step, RetryOnNewConnection):
                    fresh = True
                elif isinstance(step, RetryAfter):
                    mine.close()  # no connection waits with us
                    if answered is not None and answered.body is None:
                        last = None  # a stream, which cannot be given any more
                    await clock.sleep(step.seconds)
                    attempt_log.paused_ms += step.seconds * 1000
                    excluded -= limited  # one of them may be ready first: its state decides
                    wish = structs.replace(wish, avoid=wish.avoid | {lease.key.upstream})
        finally:
            if last is not None:
                last.close()
            for (
                index,
                sick,
            ) in failing.items():  # once a request, and only where its retries did not help
                self._services.upstreams[index].breaker.record_failure(clock.monotonic(), sick)

    # -- keys ---------------------------------------------------------------------------------------------------------

    def _estimate(self, request: ProxyRequest, attempt_log: AttemptLog) -> int:
        services = self._services
        if not (services.pool.counts_tokens or services.clients.counts_tokens or services.budgets.active):
            return 0
        attempt_log.size = request_size(request.endpoint, request.document)
        return self._services.calibration.estimate(request.model, attempt_log.size)

    async def _reserve_budget(self, request: ProxyRequest, size: RequestSize | None) -> BudgetReservation | None:
        """Reserve the estimated cost in the budgets that count the request. Raises ProxyError(budget_exceeded)."""
        services, model = self._services, request.model
        if size is None or not services.budgets.active:
            return None
        ratio, output = services.calibration.ratio(model), services.calibration.output(model)
        estimate = max_cost_estimate(request, size, services.serving(model), ratio, output)
        return await services.budgets.reserve(request.client, estimate)

    def used(self, request: ProxyRequest, attempt_log: AttemptLog, said: int) -> Usage:
        """What an answer has used by estimate that said so many bytes of text."""
        return self._services.calibration.used(
            request.model, attempt_log.size or request_size(request.endpoint, request.document), said
        )

    def learn(self, request: ProxyRequest, attempt_log: AttemptLog, usage: Usage | None) -> None:
        """What an answer used makes the next estimate for its model better."""
        if usage is not None and attempt_log.size is not None:
            self._services.calibration.record(request.model, attempt_log.size, usage)

    def _quota(self, request: ProxyRequest) -> str | None:
        return request.client.cache_partition or None if self._services.passthrough else None

    def _queue_name(self, request: ProxyRequest) -> str:
        quota = self._quota(request)
        return f"{request.model} {quota}" if quota else request.model

    def _prefix(self, request: ProxyRequest) -> bytes:
        if len(self._services.pool.keys) == 1 or len(request.body) < HEAD:
            return b""
        return prefix_of(request.endpoint, request.document, request.model)

    async def _lease(
        self, request: ProxyRequest, tokens: int, excluded: frozenset[str], attempt_log: AttemptLog, wish: KeyRequest
    ) -> Lease:
        """A key with its limits reserved, after waiting for it if need be. Raises ProxyError."""
        pool, clock = self._services.pool, self._services.clock
        quota, lane = self._quota(request), self._queue_name(request)
        why = "throttled"

        def ask(now: float) -> Lease | NoKey | Wait:
            nonlocal why
            answer = pool.lease(request.model, tokens, excluded, now, quota, wish)
            if isinstance(answer, NotReady):
                why = answer.why
                return answer.wait
            return answer

        async def ask_everybody(now: float) -> Lease | NoKey | Wait:
            while True:
                answer = ask(now)
                if not isinstance(answer, Lease):
                    return answer
                if await self._confirmed(answer, request.model):
                    return answer
                now = clock.monotonic()

        began = clock.monotonic()
        patience = min(request.max_wait - attempt_log.queue_ms / 1000, attempt_log.deadline.at - began)
        try:
            got: Lease | NoKey = await self._services.admission.acquire(
                lane, ask if self._services.limiter is None else ask_everybody, patience, request.client.name
            )
        except TimedOut as error:
            raise waited_too_long(why, request.model, error.retry_after) from None
        except QueueFull:
            message = f"{self._services.settings.throttle.max_queue} requests are waiting already"
            raise ProxyError("queue_full", message, retry_after=1.0) from None
        finally:
            attempt_log.queue_ms += (clock.monotonic() - began) * 1000
        if isinstance(got, NoKey):
            raise ProxyError(got.why, got.detail, retry_after=got.retry_after)
        return got

    async def _confirmed(self, lease: Lease, model: str) -> bool:
        """Whether a lease holds for the other proxies, too. If not, it is over."""
        assert self._services.limiter is not None
        try:
            return await self._services.limiter.confirm(lease.reservation, lease.key.label, model)
        except BaseException:
            if lease.reservation is not None:
                lease.reservation.cancel()
            raise

    # -- one call -----------------------------------------------------------------------------------------------------

    async def _attempt(
        self, request: ProxyRequest, lease: Lease, upstream: Upstream, trip: ConnectionInfo, attempt_log: AttemptLog
    ) -> ResponseInHand:
        """Sends once. The lease is settled here unless a good answer is returned with it. Raises TransportFailure."""
        clock = self._services.clock
        began = clock.monotonic()
        kept = charged = False
        tokens: int | None = None
        try:
            if attempt_log.deadline.at <= began:
                raise TransportFailure("timeout", "the time for this request is over")
            attempt_log.attempts += 1
            attempt_log.upstream, attempt_log.key = upstream.address.name, lease.key.label
            answered = await self._send(request, lease, upstream, trip, began, attempt_log.deadline)
            if answered.outcome is OutcomeKind.OK:
                kept = True
            else:
                tokens = 0
            return answered
        except (TransportFailure, asyncio.CancelledError) as error:
            charged = not isinstance(error, TransportFailure) or error.kind == "timeout"
            raise
        finally:
            attempt_log.upstream_ms += (clock.monotonic() - began) * 1000
            attempt_log.sent |= trip.connected
            if not kept:
                self.settle(request, lease, tokens, went_up=trip.connected)
                if charged and trip.connected and attempt_log.budget_reservation is not None:
                    attempt_log.budget_reservation.assume(clock.wall())

    def settle(
        self, request: ProxyRequest, lease: Lease, tokens: int | None, went_up: bool = True, cost: Cost | None = None
    ) -> None:
        """Ends a lease: with tokens used and cost (None: unknown), or as if it had never been (contract 7)."""
        if lease.budget_reservation is not None:
            lease.budget_reservation.settle(cost.usd if cost is not None else None, self._services.clock.wall())
        if lease.client_reservation is not None:
            lease.client_reservation.settle(tokens) if went_up else lease.client_reservation.cancel()
        if lease.reservation is not None:
            if went_up:
                lease.reservation.settle(tokens)
            else:
                lease.reservation.cancel()
            self._services.admission.wake(self._queue_name(request))

    async def _send(
        self,
        request: ProxyRequest,
        lease: Lease,
        upstream: Upstream,
        trip: ConnectionInfo,
        began: float,
        deadline: SharedDeadline,
    ) -> ResponseInHand:
        services = self._services
        site, dialect = upstream.address, upstream.provider
        body, injected = self._body(request, upstream)
        headers = upstream_headers(request.headers, pooled=not services.passthrough, dropped=_ACCEPT_ENCODING)
        headers.append(("Accept-Encoding", "identity"))
        headers.extend(self.credential(lease, upstream, request.client.auth))
        first_byte = services.settings.timeouts.first_byte
        deadline.sending(trip, began + first_byte)
        reply = await self._way_up.send(
            "POST",
            dialect.url(site, request.route, request.model),
            headers,
            body,
            first_byte=min(first_byte, deadline.at - began),
            trip=trip,
        )
        try:
            services.pool.observe_headers(
                lease.key, request.model, reply.headers, services.clock.monotonic(), self._quota(request)
            )
            answered = response_in_hand(reply, upstream, lease, injected, began)
            if answered.status >= 400 or answered.is_event_stream:
                async with deadline.limit():
                    await classify_response(answered)
            return answered
        except TimeoutError:
            reply.close()
            raise TransportFailure("timeout", "the upstream did not answer in time") from None
        except BaseException:
            reply.close()
            raise

    def credential(self, lease: Lease, upstream: Upstream, auth: tuple[str, str] | None) -> tuple[tuple[str, str], ...]:
        """The credential headers that go up: the pool key's, or in pass-through the client's own. Raises
        TransportFailure.
        """
        if self._services.passthrough:
            return upstream.provider.client_auth(*auth) if auth else ()
        return self._services.credential(lease.key.label)

    def _body(self, request: ProxyRequest, upstream: Upstream) -> tuple[bytes, bool]:
        """The client's bytes, with only those fields changed that must be; whether we asked for usage in its place."""
        body = request.body
        model = upstream.provider.body_model(upstream.address, request.route, request.model, request.body_model)
        if model is not None:
            body = set_field(body, "model", orjson.dumps(model))
        if (
            request.stream
            and request.endpoint in ("chat", "completions")
            and self._services.settings.cost.stream_usage == "inject"
            and (upstream.address.name, request.model) not in self._no_stream_options
        ):
            asking = want_usage(body, request.document)
            if asking is not None:
                return asking, True
        return body, False

    def _remember_refusal(self, upstream: Upstream, model: str) -> None:
        if len(self._no_stream_options) >= 1000:
            self._no_stream_options.clear()  # not: stop learning, for then a request would go round in circles
        self._no_stream_options.add((upstream.address.name, model))
