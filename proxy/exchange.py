"""One request's dealings with the upstreams: choose a key, send, understand, and again where the policy says so.

It ends with an answer in hand (for streams: its first event too, so that until here everything may be retried), or with
a Refusal. Whatever happens in between, each lease is settled exactly once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Final

import orjson

from .answered import Answered, seen, understand
from .core.attempts import Attempts, ChangeKey, Deliver, Fresh, Pause
from .core.call import Call
from .core.edit import set_field, want_usage
from .core.errors import Refusal
from .core.estimate import estimate_tokens
from .core.headers import upstream_headers
from .core.keyring import Held, Lease, NoKey, Status
from .core.limits import Wait
from .core.outcome import (
    Class,
    ErrorInfo,
    TransportFailure,
    error_info,
    retry_after,
)
from .core.ports import Trip, WayUp
from .core.pricing import Cost
from .core.routes import printable
from .core.usage import Usage
from .gate import QueueFull, TimedOut
from .world import Upstream, World

_ACCEPT_ENCODING: Final = frozenset({b"accept-encoding"})
"""Answers are asked for as they are: they are read, and a stream's compression would hold its events back."""


@dataclass(slots=True)
class Progress:
    """What the exchange has cost so far: calls made, milliseconds waited, spent upstream and, for a stream, until its
    first event; where it went last; usage, cost: of the calls that ended well, where several are needed for one
    answer."""

    attempts: int = 0
    queue_ms: float = 0.0
    paused_ms: float = 0.0
    upstream_ms: float = 0.0
    first_byte_ms: float | None = None
    upstream: str = ""
    key: str = ""
    spent: bool = False
    no_usable_key: bool = False
    usage: Usage | None = None
    cost: Cost | None = None


class Exchange:
    """Runs calls against the upstreams of a world."""

    def __init__(self, world: World, way_up: WayUp) -> None:
        self._world = world
        self._way_up = way_up
        self._no_stream_options: set[tuple[str, str]] = set()

    async def run(self, call: Call, progress: Progress) -> Answered:
        """The answer to give. Raises Refusal where there is none. `progress` is filled in as it goes, for receipts."""
        seams, ring = self._world.seams, self._world.ring
        policy = self._world.policy.asked(call.options.max_retries)
        attempts = Attempts(policy, seams.random)
        tokens = self._estimate(call)
        excluded: set[str] = set()
        limited: set[str] = set()
        refused: Answered | None = None
        fresh = False
        try:
            while True:
                lease = await self._lease(call, tokens, frozenset(excluded), progress, last=refused is None)
                if lease is None:
                    assert refused is not None
                    progress.no_usable_key = not self._world.passthrough
                    final, refused = refused, None
                    return final
                upstream = self._world.upstreams[lease.key.upstream]
                if not attempts.retries:
                    upstream.budget.request(seams.monotonic())
                failure: TransportFailure | None = None
                answered: Answered | None = None
                try:
                    answered = await self._attempt(call, lease, upstream, Trip(fresh), progress)
                    outcome = answered.outcome
                except TransportFailure as error:
                    failure, outcome = error, error.outcome
                fresh = False
                if answered is not None and answered.injected and _dislikes_stream_options(answered):
                    self._remember_dislike(upstream, call.model)
                    continue
                now = seams.monotonic()
                if answered is not None and outcome is Class.OK:
                    ring.learn(lease.key, call.model, outcome, now, 0.0, "")
                    return answered
                asked, reason = self._reading(answered, failure, seams.wall())
                if not self._world.passthrough and not reason.endswith("mismatched_organization"):
                    cooling = asked if asked is not None else policy.delay(attempts.retries, seams.random)
                    ring.learn(lease.key, call.model, outcome, now, cooling, reason)
                other_key = self._other_key(call, lease, excluded, now)
                if outcome is Class.RATE_LIMITED and not other_key:
                    asked = self._soonest(call, now, asked)
                step = attempts.after(
                    outcome,
                    asked_wait=asked,
                    left=call.deadline - now,
                    other_key=other_key,
                    granted=partial(upstream.budget.take, now),
                )
                if isinstance(step, Deliver):
                    progress.spent = step.spent
                    if answered is None:
                        assert failure is not None
                        raise failure.refusal(step.spent)
                    return answered
                if isinstance(step, ChangeKey):
                    excluded.add(lease.key.label)
                    if outcome is Class.RATE_LIMITED:
                        limited.add(lease.key.label)
                    refused, answered = answered, refused
                if answered is not None:
                    answered.reply.close()
                if isinstance(step, Fresh):
                    fresh = True
                elif isinstance(step, Pause):
                    await seams.sleep(step.seconds)
                    progress.paused_ms += step.seconds * 1000
                    excluded -= limited  # one of them may be ready first: its state decides
        finally:
            if refused is not None:
                refused.reply.close()

    # -- keys ---------------------------------------------------------------------------------------------------------

    def _estimate(self, call: Call) -> int:
        if not self._world.ring.limited:
            return 0
        return estimate_tokens(call.endpoint, call.document)

    def _quota(self, call: Call) -> str | None:
        return call.client.scope or None if self._world.passthrough else None

    def _other_key(self, call: Call, lease: Lease, excluded: set[str], now: float) -> bool:
        ring = self._world.ring
        return any(
            key.label != lease.key.label
            and key.label not in excluded
            and ring.state(key.label, call.model, now) is None
            for group in ring.serving(call.model)
            for key in group
        )

    def _soonest(self, call: Call, now: float, asked: float | None) -> float | None:
        """Seconds until the first of the cooling keys is ready again; what the last one `asked` where none has a
        state.
        """
        ring = self._world.ring
        states = [ring.state(key.label, call.model, now) for group in ring.serving(call.model) for key in group]
        waits = [state.until - now for state in states if state is not None and state.status is Status.COOLING]
        return min(waits, default=asked)

    def _lane(self, call: Call) -> str:
        quota = self._quota(call)
        return f"{call.model} {quota}" if quota else call.model

    async def _lease(
        self, call: Call, tokens: int, excluded: frozenset[str], progress: Progress, *, last: bool
    ) -> Lease | None:
        """A key with its limits reserved, after waiting for it if need be.

        None: no key is left, but the answer of one that refused can be delivered; Refusal where that was the `last`.
        """
        ring, seams = self._world.ring, self._world.seams
        quota, lane = self._quota(call), self._lane(call)
        why = "throttled"

        def ask(now: float) -> Lease | NoKey | Wait:
            nonlocal why
            answer = ring.lease(call.model, tokens, excluded, now, quota)
            if isinstance(answer, Held):
                why = answer.why
                return answer.wait
            return answer

        began = seams.monotonic()
        patience = min(call.patience - progress.queue_ms / 1000, call.deadline - began)
        try:
            got: Lease | NoKey = await self._world.gate.admit(lane, ask, patience)
        except TimedOut as error:
            raise _waited_too_long(why, call.model, error.retry_after) from None
        except QueueFull:
            message = f"{self._world.settings.throttle.max_queue} requests are waiting already"
            raise Refusal("queue_full", message, retry_after=1.0) from None
        finally:
            progress.queue_ms += (seams.monotonic() - began) * 1000
        if isinstance(got, NoKey):
            if not last:
                return None
            raise Refusal(got.why, got.detail)
        return got

    # -- one call -----------------------------------------------------------------------------------------------------

    async def _attempt(self, call: Call, lease: Lease, upstream: Upstream, trip: Trip, progress: Progress) -> Answered:
        """Sends once. The lease is settled here unless a good answer is returned with it. Raises TransportFailure."""
        seams = self._world.seams
        began = seams.monotonic()
        kept = False
        tokens: int | None = None
        try:
            if call.deadline <= began:
                raise TransportFailure("timeout", "the time for this request is over")
            progress.attempts += 1
            progress.upstream, progress.key = upstream.site.name, lease.key.label
            answered = await self._send(call, lease, upstream, trip, began)
            if answered.outcome is Class.OK:
                kept = True
            else:
                tokens = 0
            return answered
        finally:
            progress.upstream_ms += (seams.monotonic() - began) * 1000
            if not kept:
                self.settle(call, lease, tokens, went_up=trip.connected)

    def settle(self, call: Call, lease: Lease, tokens: int | None, went_up: bool = True) -> None:
        """Ends a lease: with the tokens used, None where that is unknown; or as if it had never been (contract 7,
        Client gone).
        """
        if lease.reservation is not None:
            if went_up:
                lease.reservation.settle(tokens)
            else:
                lease.reservation.cancel()
            self._world.gate.notify(self._lane(call))

    async def _send(self, call: Call, lease: Lease, upstream: Upstream, trip: Trip, began: float) -> Answered:
        world = self._world
        site, dialect = upstream.site, upstream.dialect
        body, injected = self._body(call, upstream)
        headers = upstream_headers(call.headers, pooled=not world.passthrough, dropped=_ACCEPT_ENCODING)
        headers.append(("Accept-Encoding", "identity"))
        headers.extend(self.credential(lease, upstream, call.client.auth))
        reply = await self._way_up.send(
            "POST",
            dialect.url(site, call.route, call.model),
            headers,
            body,
            first_byte=min(world.settings.timeouts.first_byte, call.deadline - began),
            trip=trip,
        )
        try:
            answered = seen(reply, upstream, lease, injected, began)
            if answered.status >= 400 or answered.is_event_stream:
                async with asyncio.timeout(max(0.0, call.deadline - world.seams.monotonic())):
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

    def _reading(
        self, answered: Answered | None, failure: TransportFailure | None, wall: float
    ) -> tuple[float | None, str]:
        """(seconds the upstream asks to wait, the reason in a few words)."""
        if answered is None:
            return None, failure.detail if failure else ""
        info = error_info(answered.body) if answered.body is not None else ErrorInfo()
        return retry_after(answered.reply.headers, wall), f"{answered.status} {info.code or info.type}".strip()


def _waited_too_long(why: str, model: str, seconds: float) -> Refusal:
    shown = f"{printable(model, 60)!r}, {seconds:.1f} s to go"
    if why == "keys_cooling":
        message = f"all keys that could serve this are cooling down ({shown})"
        return Refusal("keys_cooling", message, retry_after=seconds)
    message = (
        f"throttle.limits leave no room within the time this request may wait ({shown}); "
        "throttle.max_wait or X-Proxy-Max-Wait let it wait longer"
    )
    return Refusal("throttled", message, retry_after=seconds)


def _dislikes_stream_options(answered: Answered) -> bool:
    return answered.status == 400 and answered.body is not None and b"stream_options" in answered.body
