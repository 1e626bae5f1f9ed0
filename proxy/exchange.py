"""One request's dealings with the upstreams: choose a key, send, understand, and again where the policy says so.

It ends with an answer in hand (for streams: its first event too, so that until here everything may be retried), or with
a Refusal. Whatever happens in between, each lease is settled exactly once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import orjson

from .core.attempts import Attempts, ChangeKey, Deliver, Fresh, Pause
from .core.call import Call
from .core.edit import set_field, want_usage
from .core.errors import Refusal
from .core.estimate import estimate_tokens
from .core.headers import upstream_headers
from .core.inflate import Inflater
from .core.keyring import Held, Lease, NoKey
from .core.limits import Wait
from .core.outcome import (
    Class,
    ErrorInfo,
    TransportFailure,
    classify,
    error_info,
    retry_after,
    stream_error,
)
from .core.ports import Trip, UpstreamReply, WayUp
from .core.sse import Splitter, data_of
from .gate import QueueFull, TimedOut
from .world import Upstream, World

MAX_ERROR_BODY: Final = 8 * 1024 * 1024
FIRST_EVENT_HELD: Final = 64 * 1024
"""A stream's first bytes are held back at most so far for its first event to be complete."""


@dataclass(slots=True)
class Answered:
    """An upstream's answer in hand. body: bytes of what was read whole (errors), else None; first: what was read of a
    stream so far, decoded; leaked: it repeats a pool key; more: the rest of the body, decoded; injected: its usage
    chunk was only our wish."""

    status: int
    reply: UpstreamReply
    upstream: Upstream
    lease: Lease
    injected: bool
    is_stream: bool
    opaque: bool
    decoded: bool
    more: AsyncIterator[bytes]
    outcome: Class = Class.OK
    body: bytes | None = None
    first: list[bytes] = field(default_factory=list)
    sent_at: float = 0.0
    leaked: bool = False


@dataclass(slots=True)
class Progress:
    """What the exchange has cost so far: calls made, milliseconds waited and spent upstream, where it went last."""

    attempts: int = 0
    queue_ms: float = 0.0
    paused_ms: float = 0.0
    upstream_ms: float = 0.0
    upstream: str = ""
    key: str = ""
    spent: bool = False
    no_usable_key: bool = False


class Exchange:
    """Runs calls against the upstreams of a world."""

    def __init__(self, world: World, way_up: WayUp) -> None:
        self._world = world
        self._way_up = way_up
        self._no_stream_options: set[tuple[str, str]] = set()

    async def run(self, call: Call, progress: Progress) -> Answered:
        """The answer to give. Raises Refusal where there is none. `progress` is filled in as it goes, for receipts."""
        seams, ring = self._world.seams, self._world.ring
        policy = self._world.policy
        if call.options.max_retries is not None:
            policy = replace(policy, max_retries=call.options.max_retries)
        attempts = Attempts(policy, seams.random)
        tokens = self._estimate(call)
        excluded: set[str] = set()
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
                step = attempts.after(
                    outcome,
                    asked_wait=asked,
                    left=call.deadline - now,
                    other_key=self._other_key(call, lease, excluded, now),
                    granted=partial(upstream.budget.take, now),
                )
                if isinstance(step, Deliver):
                    progress.spent = step.spent
                    if answered is None:
                        assert failure is not None
                        raise _refusal(failure, step.spent)
                    return answered
                if isinstance(step, ChangeKey):
                    excluded.add(lease.key.label)
                    refused, answered = answered, refused
                if answered is not None:
                    answered.reply.close()
                if isinstance(step, Fresh):
                    fresh = True
                elif isinstance(step, Pause):
                    await seams.sleep(step.seconds)
                    progress.paused_ms += step.seconds * 1000
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

    def _lane(self, call: Call) -> str:
        quota = self._quota(call)
        return f"{call.model} {quota}" if quota else call.model

    async def _lease(
        self, call: Call, tokens: int, excluded: frozenset[str], progress: Progress, *, last: bool
    ) -> Lease | None:
        """A key with its limits reserved, after waiting for it if need be. None: no key is left and, unless this was
        the
        `last` word (then: Refusal), the answer of one that refused can be delivered."""
        ring, seams = self._world.ring, self._world.seams
        quota = self._quota(call)
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
            got: Lease | NoKey = await self._world.gate.admit(self._lane(call), ask, patience)
        except TimedOut as error:
            raise _waited_too_long(why, error.retry_after) from None
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
        progress.attempts += 1
        progress.upstream, progress.key = upstream.site.name, lease.key.label
        began = seams.monotonic()
        kept = False
        tokens: int | None = None
        try:
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
        headers = upstream_headers(call.headers, pooled=not world.passthrough)
        headers = [(name, value) for name, value in headers if name.lower() != "accept-encoding"]
        headers.append(("Accept-Encoding", "identity"))
        headers.extend(self.credential(lease, upstream, call.client.auth))
        left = call.deadline - world.seams.monotonic()
        if left <= 0:
            raise TransportFailure("timeout", "the time for this request is over")
        reply = await self._way_up.send(
            "POST",
            dialect.url(site, call.route, call.model),
            headers,
            body,
            first_byte=min(world.settings.timeouts.first_byte, left),
            trip=trip,
        )
        try:
            async with asyncio.timeout(max(0.0, call.deadline - world.seams.monotonic())):
                return await self._understand(call, lease, upstream, reply, injected, began)
        except TimeoutError:
            reply.close()
            raise TransportFailure("timeout", "the upstream did not answer in time") from None
        except BaseException:
            reply.close()
            raise

    def credential(self, lease: Lease, upstream: Upstream, auth: tuple[str, str] | None) -> tuple[tuple[str, str], ...]:
        """The credential headers that go up: the pool key's, or in pass-through the client's own."""
        if self._world.passthrough:
            return upstream.dialect.client_auth(*auth) if auth else ()
        return self._world.credentials[lease.key.label]

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
        if len(self._no_stream_options) < 1000:
            self._no_stream_options.add((upstream.site.name, model))

    async def _understand(
        self,
        call: Call,
        lease: Lease,
        upstream: Upstream,
        reply: UpstreamReply,
        injected: bool,
        began: float,
    ) -> Answered:
        """Reads as much as is needed to know what the answer is. Raises TransportFailure."""
        encoding = reply.headers.get("Content-Encoding", "identity").strip().lower()
        decoded = Inflater.knows(encoding)
        answered = Answered(
            status=reply.status,
            reply=reply,
            upstream=upstream,
            lease=lease,
            injected=injected,
            is_stream=reply.headers.get("Content-Type", "").lower().startswith("text/event-stream"),
            opaque=not decoded and encoding not in ("", "identity"),
            decoded=decoded,
            more=_decoded(reply.chunks(), encoding) if decoded else reply.chunks(),
            sent_at=began,
        )
        if 300 <= reply.status < 400:
            raise TransportFailure("invalid", f"the upstream answered with a redirect ({reply.status})")
        if reply.status >= 400:
            answered.body = await _read(answered.more, MAX_ERROR_BODY)
            should_retry = reply.headers.get("x-should-retry")
            answered.outcome = classify(reply.status, error_info(answered.body), should_retry)
        elif answered.is_stream and not answered.opaque:
            error = await _first_event(answered)
            if error is not None:
                answered.outcome = classify(*error, reply.headers.get("x-should-retry"))
                if answered.outcome is Class.FINAL:
                    answered.outcome = Class.OK
        return answered

    def _reading(
        self, answered: Answered | None, failure: TransportFailure | None, wall: float
    ) -> tuple[float | None, str]:
        """(seconds the upstream asks to wait, the reason in a few words)."""
        if answered is None:
            return None, failure.detail if failure else ""
        info = error_info(answered.body) if answered.body is not None else ErrorInfo()
        return retry_after(answered.reply.headers, wall), f"{answered.status} {info.code or info.type}".strip()


def _waited_too_long(why: str, seconds: float) -> Refusal:
    if why == "keys_cooling":
        return Refusal("keys_cooling", "all keys that could serve this are cooling down", retry_after=seconds)
    message = "the configured rate limits leave no room within the time this request may wait"
    return Refusal("throttled", message, retry_after=seconds)


def _dislikes_stream_options(answered: Answered) -> bool:
    return answered.status == 400 and answered.body is not None and b"stream_options" in answered.body


async def _decoded(chunks: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    inflater = Inflater(encoding)
    async for chunk in chunks:
        out = inflater.feed(chunk)
        if out:
            yield out
    inflater.finish()


async def _read(chunks: AsyncIterator[bytes], limit: int) -> bytes:
    parts, size = [], 0
    async for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > limit:
            raise TransportFailure("invalid", "the upstream's error answer is too large")
    return b"".join(parts)


async def _first_event(answered: Answered) -> tuple[int, ErrorInfo] | None:
    """Reads up to the first event that carries data, into `answered.first`; the error it is, if it is one."""
    splitter = Splitter()
    held = 0
    async for chunk in answered.more:
        answered.first.append(chunk)
        held += len(chunk)
        for event in splitter.feed(chunk):
            data = data_of(event)
            if data is not None:
                return stream_error(data)
        if held > FIRST_EVENT_HELD:
            return None
    if not held:
        raise TransportFailure("invalid", "the upstream ended its stream before the first event")
    return None


def _refusal(failure: TransportFailure, spent: bool) -> Refusal:
    code = {"timeout": "upstream_timeout", "invalid": "upstream_invalid_response"}.get(
        failure.kind, "upstream_unreachable"
    )
    return Refusal(code, failure.detail, should_retry=False if spent else None)
