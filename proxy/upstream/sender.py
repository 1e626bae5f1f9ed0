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

from ..accounting.budgets.budgets import stake_for
from ..cost.pricing import Cost
from ..cost.usage import Usage
from ..protocol.errors import Refusal
from ..protocol.headers import upstream_headers
from ..protocol.json_edit import set_field, want_usage
from ..protocol.request import Call
from ..services import World
from .deadline import Horizon
from .interfaces import Trip, WayUp
from .keys.lease import Held, Lease, NoKey, Wish
from .keys.prompt_affinity import HEAD, prefix_of
from .limits.clients import Hold
from .limits.estimate import measure
from .limits.queue import QueueFull, TimedOut
from .limits.rate_limiter import Wait
from .progress import Progress
from .response import Answered, dislikes_stream_options, seen, understand
from .result import Last, given, reading, waited_too_long
from .retry.fallback import asking, fallbacks_for
from .retry.outcome import Class, TransportFailure, ailment
from .retry.policy import Attempts, ChangeKey, Deliver, Fresh, Pause
from .target import Upstream

__all__ = ["Exchange", "Progress"]

_ACCEPT_ENCODING: Final = frozenset({b"accept-encoding"})
"""Answers are asked for as they are: they are read, and a stream's compression would hold its events back."""


class Exchange:
    """Runs calls against the upstreams of a world."""

    def __init__(self, world: World, way_up: WayUp) -> None:
        self._world = world
        self._way_up = way_up
        self._no_stream_options: set[tuple[str, str]] = set()

    async def run(self, call: Call, progress: Progress, *, whole: bool = True) -> Answered:
        """The answer to give. Raises Refusal where there is none. `progress` is filled in as it goes, for receipts.

        whole: the answer is all the client gets; to a part of one no other model may answer.
        """
        tokens = self._estimate(call, progress)
        stake = progress.stake = await stake_for(self._world, call, progress.measure)
        hold: Hold | None = None
        used: int | None = None
        try:
            hold = await self._world.hold(call.client, tokens)
            answered = await self._with_fallbacks(call, tokens, progress, whole)
            if answered.outcome is Class.OK and (hold is not None or stake is not None):
                answered.lease = structs.replace(answered.lease, hold=hold, stake=stake)
                hold = stake = None
            used = 0
            return answered
        finally:
            if hold is not None:
                hold.settle(used) if progress.went_up else hold.cancel()
            if stake is not None:
                stake.cancel()

    async def _with_fallbacks(self, call: Call, tokens: int, progress: Progress, whole: bool) -> Answered:
        """What the call's own model answers, or one of those that stand in for it."""
        tied = await self._world.objects.tied_to(self._world.ring, call)
        first = await self._tried(call, tokens, progress, tied)
        others = fallbacks_for(self._world.settings.retry.fallbacks, call.model) if whole else ()
        if not others or tied or not progress.exhausted:
            return given(first)
        told = progress.spent, progress.no_usable_key
        kept = False
        try:
            for model in others:
                if progress.horizon.left() <= 0:
                    break
                progress.spent = progress.no_usable_key = False
                then = await self._tried(asking(call, model), tokens, progress, "")
                if isinstance(then, Answered):
                    if then.outcome is Class.OK:
                        progress.model = model
                        return then
                    then.reply.close()
            kept = True
            progress.spent, progress.no_usable_key = told
            return given(first)
        finally:
            if not kept and isinstance(first, Answered):
                first.reply.close()

    async def _tried(self, call: Call, tokens: int, progress: Progress, tied: str) -> Answered | Refusal:
        """What comes of the call with its own model. `progress.exhausted`: no key or upstream is left to try."""
        progress.exhausted = False
        try:
            return await self._attempts(call, tokens, progress, tied)
        except Refusal as refusal:
            return refusal.again(refusal.lines)

    async def _attempts(self, call: Call, tokens: int, progress: Progress, tied: str) -> Answered:
        seams, ring, passthrough = self._world.seams, self._world.ring, self._world.passthrough
        policy = self._world.policy.asked(call.options.max_retries)
        attempts = Attempts(policy, seams.random)
        excluded: set[str] = set()
        limited: set[str] = set()
        visited: set[int] = set()
        failing: dict[int, int] = {}
        wish = Wish(self._prefix(call), only=tied)
        last: Last | None = None
        fresh = False
        try:
            while True:
                try:
                    lease = await self._lease(call, tokens, frozenset(excluded), progress, wish)
                except Refusal as refusal:
                    progress.exhausted = refusal.code != "queue_full"
                    if last is None or last.says_less_than(refusal.code):
                        raise
                    final, last = last, None
                    return final.given(progress, passthrough)
                upstream = self._world.upstreams[lease.key.upstream]
                if lease.key.upstream not in visited:
                    visited.add(lease.key.upstream)
                    upstream.budget.request(seams.monotonic())
                failure: TransportFailure | None = None
                answered: Answered | None = None
                try:
                    answered = await self._attempt(call, lease, upstream, Trip(fresh), progress)
                    outcome = answered.outcome
                except TransportFailure as error:
                    failure, outcome = error.again(), error.outcome
                fresh = False
                if answered is not None and answered.injected and dislikes_stream_options(answered):
                    self._remember_dislike(upstream, call.model)
                    continue
                now = seams.monotonic()
                sick = ailment(outcome, (answered.status, answered.reply.headers) if answered is not None else None)
                if sick is None:
                    upstream.breaker.succeeded()
                    failing.pop(lease.key.upstream, None)
                elif now < progress.horizon.until:  # else it may be this request's impatience
                    failing[lease.key.upstream] = sick
                if answered is not None and outcome is Class.OK:
                    progress.exhausted = False
                    self._world.learn(lease.key, call.model, outcome, 0.0, "")
                    self._world.gate.notify(self._lane(call))  # the key works, and said what room it has
                    if answered.is_event_stream:
                        self._world.objects.note_stream(ring, call, lease.key, answered.first)
                    return answered
                asked, reason, floor = reading(answered, failure, tokens, seams.wall())
                if not passthrough:
                    cooling = asked if asked is not None else policy.delay(attempts.retries, seams.random)
                    self._world.learn(lease.key, call.model, outcome, cooling, reason, floor)
                other_key = ring.other_ready(lease.key.label, call.model, excluded, now, wish)
                if outcome is Class.RATE_LIMITED and not other_key:
                    soonest = ring.soonest(call.model, now, wish)
                    asked = asked if soonest is None else soonest
                step = attempts.after(
                    outcome,
                    asked_wait=asked,
                    left=progress.horizon.until - now,
                    other_key=other_key,
                    granted=partial(upstream.budget.take, now),
                )
                if isinstance(step, Pause) and ring.all_closed(call.model, lease.key.priority, now, tied):
                    step = Deliver(spent=True)  # the breaker has opened: nobody here will take it for a while
                spent = isinstance(step, Deliver) and step.spent
                mine = Last(answered, failure, outcome, spent or isinstance(step, Pause), not isinstance(step, Deliver))
                if isinstance(step, Deliver):
                    progress.exhausted = attempts.elsewhere(outcome)
                    higher = not tied and ring.higher(call.model, lease.key.priority, excluded)
                    if not (progress.exhausted and higher and now < progress.horizon.until):
                        return mine.given(progress, passthrough)
                    wish = structs.replace(wish, above=lease.key.priority)
                self._world.tallies.retried(upstream.site.name, outcome.value)
                if last is not None:
                    last.close()
                last = mine
                if isinstance(step, ChangeKey):
                    excluded.add(lease.key.label)
                    if outcome is Class.RATE_LIMITED:
                        limited.add(lease.key.label)
                elif isinstance(step, Fresh):
                    fresh = True
                elif isinstance(step, Pause):
                    mine.close()  # no connection waits with us
                    if answered is not None and answered.body is None:
                        last = None  # a stream, which cannot be given any more
                    await seams.sleep(step.seconds)
                    progress.paused_ms += step.seconds * 1000
                    excluded -= limited  # one of them may be ready first: its state decides
                    wish = structs.replace(wish, avoid=wish.avoid | {lease.key.upstream})
        finally:
            if last is not None:
                last.close()
            for (
                index,
                sick,
            ) in failing.items():  # once a request, and only where its retries did not help
                self._world.upstreams[index].breaker.failed(seams.monotonic(), sick)

    # -- keys ---------------------------------------------------------------------------------------------------------

    def _estimate(self, call: Call, progress: Progress) -> int:
        world = self._world
        if not (world.ring.counts_tokens or world.clients.counts_tokens or world.budgets.active):
            return 0
        progress.measure = measure(call.endpoint, call.document)
        return self._world.habits.estimate(call.model, progress.measure)

    def used(self, call: Call, progress: Progress, said: int) -> Usage:
        """What an answer has used by estimate that said so many bytes of text."""
        return self._world.habits.used(call.model, progress.measure or measure(call.endpoint, call.document), said)

    def learn(self, call: Call, progress: Progress, usage: Usage | None) -> None:
        """What an answer used makes the next estimate for its model better."""
        if usage is not None and progress.measure is not None:
            self._world.habits.learn(call.model, progress.measure, usage)

    def _quota(self, call: Call) -> str | None:
        return call.client.scope or None if self._world.passthrough else None

    def _lane(self, call: Call) -> str:
        quota = self._quota(call)
        return f"{call.model} {quota}" if quota else call.model

    def _prefix(self, call: Call) -> bytes:
        if len(self._world.ring.keys) == 1 or len(call.body) < HEAD:
            return b""
        return prefix_of(call.endpoint, call.document, call.model)

    async def _lease(self, call: Call, tokens: int, excluded: frozenset[str], progress: Progress, wish: Wish) -> Lease:
        """A key with its limits reserved, after waiting for it if need be. Raises Refusal."""
        ring, seams = self._world.ring, self._world.seams
        quota, lane = self._quota(call), self._lane(call)
        why = "throttled"

        def ask(now: float) -> Lease | NoKey | Wait:
            nonlocal why
            answer = ring.lease(call.model, tokens, excluded, now, quota, wish)
            if isinstance(answer, Held):
                why = answer.why
                return answer.wait
            return answer

        async def ask_everybody(now: float) -> Lease | NoKey | Wait:
            while True:
                answer = ask(now)
                if not isinstance(answer, Lease):
                    return answer
                if await self._confirmed(answer, call.model):
                    return answer
                now = seams.monotonic()

        began = seams.monotonic()
        patience = min(call.patience - progress.queue_ms / 1000, progress.horizon.until - began)
        try:
            got: Lease | NoKey = await self._world.gate.admit(
                lane, ask if self._world.limiter is None else ask_everybody, patience, call.client.name
            )
        except TimedOut as error:
            raise waited_too_long(why, call.model, error.retry_after) from None
        except QueueFull:
            message = f"{self._world.settings.throttle.max_queue} requests are waiting already"
            raise Refusal("queue_full", message, retry_after=1.0) from None
        finally:
            progress.queue_ms += (seams.monotonic() - began) * 1000
        if isinstance(got, NoKey):
            raise Refusal(got.why, got.detail, retry_after=got.retry_after)
        return got

    async def _confirmed(self, lease: Lease, model: str) -> bool:
        """Whether a lease holds for the other proxies, too. If not, it is over."""
        assert self._world.limiter is not None
        try:
            return await self._world.limiter.confirm(lease.reservation, lease.key.label, model)
        except BaseException:
            if lease.reservation is not None:
                lease.reservation.cancel()
            raise

    # -- one call -----------------------------------------------------------------------------------------------------

    async def _attempt(self, call: Call, lease: Lease, upstream: Upstream, trip: Trip, progress: Progress) -> Answered:
        """Sends once. The lease is settled here unless a good answer is returned with it. Raises TransportFailure."""
        seams = self._world.seams
        began = seams.monotonic()
        kept = charged = False
        tokens: int | None = None
        try:
            if progress.horizon.until <= began:
                raise TransportFailure("timeout", "the time for this request is over")
            progress.attempts += 1
            progress.upstream, progress.key = upstream.site.name, lease.key.label
            answered = await self._send(call, lease, upstream, trip, began, progress.horizon)
            if answered.outcome is Class.OK:
                kept = True
            else:
                tokens = 0
            return answered
        except (TransportFailure, asyncio.CancelledError) as error:
            charged = not isinstance(error, TransportFailure) or error.kind == "timeout"
            raise
        finally:
            progress.upstream_ms += (seams.monotonic() - began) * 1000
            progress.went_up |= trip.connected
            if not kept:
                self.settle(call, lease, tokens, went_up=trip.connected)
                if charged and trip.connected and progress.stake is not None:
                    progress.stake.assume(seams.wall())

    def settle(
        self, call: Call, lease: Lease, tokens: int | None, went_up: bool = True, cost: Cost | None = None
    ) -> None:
        """Ends a lease: with tokens used and cost (None: unknown), or as if it had never been (contract 7)."""
        if lease.stake is not None:
            lease.stake.settle(cost.usd if cost is not None else None, self._world.seams.wall())
        if lease.hold is not None:
            lease.hold.settle(tokens) if went_up else lease.hold.cancel()
        if lease.reservation is not None:
            if went_up:
                lease.reservation.settle(tokens)
            else:
                lease.reservation.cancel()
            self._world.gate.notify(self._lane(call))

    async def _send(
        self, call: Call, lease: Lease, upstream: Upstream, trip: Trip, began: float, horizon: Horizon
    ) -> Answered:
        world = self._world
        site, dialect = upstream.site, upstream.dialect
        body, injected = self._body(call, upstream)
        headers = upstream_headers(call.headers, pooled=not world.passthrough, dropped=_ACCEPT_ENCODING)
        headers.append(("Accept-Encoding", "identity"))
        headers.extend(self.credential(lease, upstream, call.client.auth))
        first_byte = world.settings.timeouts.first_byte
        horizon.going_up(trip, began + first_byte)
        reply = await self._way_up.send(
            "POST",
            dialect.url(site, call.route, call.model),
            headers,
            body,
            first_byte=min(first_byte, horizon.until - began),
            trip=trip,
        )
        try:
            world.ring.told(lease.key, call.model, reply.headers, world.seams.monotonic(), self._quota(call))
            answered = seen(reply, upstream, lease, injected, began)
            if answered.status >= 400 or answered.is_event_stream:
                async with horizon.limit():
                    await understand(answered)
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
        if self._world.passthrough:
            return upstream.dialect.client_auth(*auth) if auth else ()
        return self._world.credential(lease.key.label)

    def _body(self, call: Call, upstream: Upstream) -> tuple[bytes, bool]:
        """The client's bytes, with only those fields changed that must be; whether we asked for usage in its place."""
        body = call.body
        model = upstream.dialect.body_model(upstream.site, call.route, call.model, call.body_model)
        if model is not None:
            body = set_field(body, "model", orjson.dumps(model))
        if (
            call.stream
            and call.endpoint in ("chat", "completions")
            and self._world.settings.cost.stream_usage == "inject"
            and (upstream.site.name, call.model) not in self._no_stream_options
        ):
            asking = want_usage(body, call.document)
            if asking is not None:
                return asking, True
        return body, False

    def _remember_dislike(self, upstream: Upstream, model: str) -> None:
        if len(self._no_stream_options) >= 1000:
            self._no_stream_options.clear()  # not: stop learning, for then a request would go round in circles
        self._no_stream_options.add((upstream.site.name, model))
