"""Limits shared over Redis: one call of `redis.lua` for each decision, by the server's clock.

While Redis is lost each proxy keeps to its last known share. When Redis is back each proxy first publishes what it has
admitted meanwhile, and keeps to its share until all have done so; thus there is no burst. If Redis has lost its data,
everything that is still in a window is published again. Of requests in flight each proxy publishes its own number again
and again: so a lost message does no harm, and a proxy that was killed is forgotten after 10 s with all that it used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, Final
from weakref import WeakValueDictionary

from redis.exceptions import NoScriptError, RedisError, ResponseError

from ...config.limits import Limits
from ...system.clock import spawn
from ...system.redis import DEADLINE_MAX, RedisConnection
from ...system.redis_keys import Amount, digest, shape
from ...system.tasks import spawn_forever
from .rate_limiter import RateLimiter, Reservation
from .redis_key_states import RedisKeyStates
from .redis_limiter import Asked, RedisRateLimiter, RedisReservation, read_decision
from .redis_loss import FORGET_AFTER, KEY_STATE_WAIT, OutageDetector, log_state, loop_time
from .redis_snapshot import clear_usage, read_usage
from .shared import ApplyRemoteState, RemoteState

log = logging.getLogger("proxy")

DEADLINE: Final = 1.0
"""Seconds for which a call waits for its reply; a late reply alone is no outage (`redis_loss.py`)."""

HEARTBEAT: Final = 1.0
"""Seconds between two heartbeats."""

GRACE: Final = 8.0
"""Seconds for which a proxy keeps to its share after Redis is back: longer than any other takes to notice."""

_PAUSE: Final = 0.02
_LIFETIME: Final = 2 * 86_400_000
_BATCH: Final = 64
_MAX_PENDING: Final = 20_000
_SCRIPT: Final = resources.files(__package__).joinpath("redis.lua").read_text(encoding="utf-8")

_LOST = (RedisError, OSError, TimeoutError)


class RedisLimits:
    """Limits in one Redis.

    url: a secret.
    prefix: the start of every key.
    proxy: an id of this process.
    clock: returns monotonic seconds.
    deadline: seconds for which a call waits for its reply.
    offset: ms that are added to the server's clock, in tests only.
    Raises ValueError, without the URL's text.
    """

    def __init__(
        self,
        url: str,
        prefix: str,
        proxy: str,
        clock: Callable[[], float],
        deadline: float = DEADLINE,
        offset: Callable[[], int] = lambda: 0,
    ) -> None:
        self.link = RedisConnection(url, deadline, "redis limits", "each proxy holds its share of the limits")
        self._script = self.link.redis.register_script(_SCRIPT)
        self._start = f"{{{prefix}}}:l1:"
        self._states = RedisKeyStates(self.link, self._script, self._key("s"), offset)
        self._proxy = proxy
        self._clock = clock
        self._deadline = deadline
        self._offset = offset
        self._limiters: WeakValueDictionary[str, RedisRateLimiter] = WeakValueDictionary()
        self._phase = "alone"
        self._lost_at, self._back_at = -math.inf, math.inf
        self._outage = OutageDetector()
        self._skew = 0.0  # the server's clock less this proxy's, in ms
        self._proxies, self._rank = 1, 0
        self._epoch, self._resets, self._forgotten = b"", b"", False
        self._sequence = 0
        self._outbox: deque[tuple[RedisRateLimiter, tuple[Amount, ...]]] = deque()
        self._flushing: asyncio.Task[None] | None = None
        self._beating: asyncio.Task[None] | None = None

    @property
    def sound(self) -> bool:
        return self._phase == "shared"

    def rate_limiter(self, where: tuple[str, str], limits: Limits, use: float) -> RateLimiter:
        name = digest(*where)
        made = RedisRateLimiter(name, limits, use, self._publish)
        if not self.sound:
            made.use_share(self._proxies, self._rank, self._clock())
        self._limiters[name] = made
        return made

    async def open(self, adopt: ApplyRemoteState) -> None:
        self._states.adopt = adopt
        await self.link.open()
        if await self._beat() or not self.link.gone:  # late is not lost, and the number of proxies is unknown
            self._phase = "shared"
            self._outage.connected()
            for limiter in self._limiters.values():
                limiter.share()
        else:
            self._lost_at, self._forgotten = self._clock(), True
            log_state("alone", "not reached; until it is, this proxy keeps the limits by itself")
        self._beating = spawn_forever(self._beats, "redis limits")

    async def close(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
        with contextlib.suppress(*_LOST):
            await self._flush()
            if self.link.up:
                await self.link.run(lambda: self.link.redis.zrem(self._key("p"), self._proxy), self._deadline)
        await self.link.close()

    # -- decisions ----------------------------------------------------------------------------------------------------

    async def confirm(self, reservation: Reservation | None, key: str = "", model: str = "") -> bool:
        assert reservation is None or isinstance(reservation, RedisReservation)
        if reservation is None or reservation.limiter.max_concurrency is None:
            return await self._confirm(reservation, key, model)
        async with reservation.limiter.turn:
            return await self._confirm(reservation, key, model)

    async def _confirm(self, reservation: RedisReservation | None, key: str, model: str) -> bool:
        until = loop_time() + DEADLINE
        while self.sound:
            if self.link.up:
                asked, timeout = Asked(), self._deadline if reservation is not None else KEY_STATE_WAIT
                try:
                    await self.link.run(lambda asked=asked: self._ask(asked, reservation, key, model), timeout)  # type: ignore[misc]
                except ResponseError as error:
                    self.link.complain(f"refuses a decision: {error}")
                    self._lose()
                    break
                except _LOST:
                    self._outage.failed()
                    self._abandon(asked, reservation)
                except asyncio.CancelledError:
                    self._abandon(asked, reservation)
                    raise
                else:
                    assert asked.reply is not None
                    return await self._decided(asked.reply, reservation, key, model)
            if reservation is None:
                return True  # what others know of the key, the upstream will say
            if self._outage.is_loss(self.link.gone):
                self._lose()
            elif key and loop_time() >= until:  # it can wait in the queue
                reservation.limiter.refused(reservation, math.inf, self._clock())
                reservation.cancel()
                return False
            else:
                await asyncio.sleep(_PAUSE)
        if reservation is None:
            return True
        if not reservation.limiter.made_alone(reservation):
            reservation.cancel()  # it was made from the whole limit: make it from the share
            return False
        self._count_alone(reservation)
        return True

    async def _ask(self, asked: Asked, reservation: RedisReservation | None, key: str, model: str) -> None:
        limiter = reservation.limiter if reservation is not None else None
        name = limiter.name if limiter is not None else "none"
        keys = [self._key("e"), self._key("a", name), self._key("r", name)]
        keys += self._states.keys(key, model) if key else []
        limit = limiter.max_concurrency if limiter is not None else None
        args: list[Any] = ["reserve", self._offset(), self._epoch, self._proxy, self._next()]
        args += [limiter.confirmed + 1 if limiter is not None else 0, -1 if limit is None else limit]
        if reservation is not None and limiter is not None:
            for window in limiter.windows:
                span, width = shape(window.span)
                args += [window.name, window.limit, span, width, reservation.tokens if window.counts_tokens else 1]
        reply = read_decision(await self._script(keys=keys, args=args))
        self._outage.answered()
        asked.reply = reply
        if asked.abandoned:
            self._undo(reply, reservation)

    def _abandon(self, asked: Asked, reservation: RedisReservation | None) -> None:
        """Note that no caller waits for this reply any more: what it admits, or has admitted, is cancelled."""
        asked.abandoned = True
        if asked.reply is not None:
            self._undo(asked.reply, reservation)

    def _undo(self, reply: Sequence[Any], reservation: RedisReservation | None) -> None:
        if reply[0] == 1 and reservation is not None:
            self._enqueue(reservation.limiter, int(reply[1]), -reservation.tokens, -1)

    async def _decided(self, reply: Sequence[Any], reservation: RedisReservation | None, key: str, model: str) -> bool:
        code, server, wait, running, states, totals = reply
        now = self._clock()
        learned = self._states.apply(key, model, states, server)
        if reservation is None:
            return not learned
        limiter = reservation.limiter
        if code == 1:
            limiter.admitted(reservation, server, counted=True)
        if code != 2:
            known = dict(zip((window.name for window in limiter.windows), totals, strict=False))
            if limiter.max_concurrency is not None:
                known["concurrency"] = int(running)
            limiter.note_usage(known, now)
        if code == 1 and not learned:
            return True
        if code == 2:
            await self._beat()
        elif code == 0:
            limiter.refused(reservation, wait / 1000 if wait >= 0 else math.inf, now)
        reservation.cancel()
        return False

    # -- what others must know ----------------------------------------------------------------------------------------

    def _publish(self, reservation: RedisReservation, tokens: int, requests: int) -> None:
        assert reservation.stamp is not None
        self._enqueue(reservation.limiter, int(reservation.stamp), tokens, requests)

    def _enqueue(self, limiter: RedisRateLimiter, stamp: int, tokens: int, requests: int) -> None:
        amounts = tuple(
            (window.name, *shape(window.span), stamp, change)
            for window in limiter.windows
            if (change := tokens if window.counts_tokens else requests)
        )
        if amounts or limiter.max_concurrency is not None:
            self._post(limiter, amounts)

    def _post(self, limiter: RedisRateLimiter, amounts: tuple[Amount, ...]) -> None:
        self._outbox.append((limiter, amounts))
        if len(self._outbox) > _MAX_PENDING:
            self._outbox.popleft()
        if self._phase != "alone" and (self._flushing is None or self._flushing.done()):
            self._flushing = spawn(self._flush(), "redis limits settle")

    async def _flush(self) -> None:
        while self._outbox and self.link.up and self._phase != "alone":
            batch = [self._outbox.popleft() for _ in range(min(len(self._outbox), _BATCH))]
            try:
                await self.link.run(lambda batch=batch: self._send(batch), DEADLINE_MAX)  # type: ignore[misc]
            except _LOST as error:
                if isinstance(error, NoScriptError):
                    self._outbox.extendleft(reversed(batch))
                    await self.link.redis.script_load(_SCRIPT)
                    continue
                # It may have been done late. To count something twice does no harm, to free something twice does.
                for limiter, amounts in batch[::-1]:
                    self._outbox.appendleft((limiter, tuple(one for one in amounts if one[-1] > 0)))
                if isinstance(error, ResponseError):
                    self.link.complain(f"refuses a settlement: {error}")
                return

    async def _send(self, batch: Sequence[tuple[RedisRateLimiter, tuple[Amount, ...]]]) -> None:
        async with self.link.redis.pipeline(transaction=False) as pipe:
            for limiter, amounts in batch:
                args: list[Any] = ["add", self._offset(), self._proxy, self._next()]
                args.append(limiter.confirmed if limiter.max_concurrency is not None else -1)
                for amount in amounts:
                    args += amount
                pipe.evalsha(self._script.sha, 2, self._key("a", limiter.name), self._key("r", limiter.name), *args)
            await pipe.execute()

    def publish_key_state(self, key: str, model: str, states: Mapping[str, RemoteState]) -> None:
        self._states.publish(key, model, states, self._server(self._clock()))

    def reset(self) -> None:
        spawn(clear_usage(self.link.redis, self._key("a"), self._key("x"), _LIFETIME), "redis limits reset")

    # -- heartbeats ---------------------------------------------------------------------------------------------------

    async def _beats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT if self.sound else HEARTBEAT / 5)
            try:
                await self._beat()
            except Exception:
                log.exception("redis limits: a heartbeat failed")

    async def _beat(self) -> bool:
        """Send a heartbeat and read the others'. Returns whether Redis replied."""
        if not self.link.up:
            self._outage.failed()
            self._back_at = self._clock()  # if it had been back for a moment, that counts anew
            if self.sound and self._outage.is_loss(self.link.gone):
                self._lose()
            return False
        counted = [limiter for limiter in self._limiters.values() if limiter.max_concurrency is not None]
        keys = [self._key("p"), self._key("e"), self._key("x"), *(self._key("r", each.name) for each in counted)]
        args: list[Any] = ["hello", self._offset(), self._proxy, _LIFETIME]
        for limiter in counted:
            args += (self._next(), limiter.confirmed)

        async def exchange() -> tuple[float, int, int, bytes, bytes, float]:
            server, proxies, rank, epoch, resets, heard = await self._script(keys=keys, args=args)
            return float(server), int(proxies), int(rank), bytes(epoch), bytes(resets), float(heard)

        try:
            server, self._proxies, self._rank, epoch, resets, heard = await self.link.run(exchange, self._deadline)
        except ResponseError as error:
            self.link.complain(f"refuses a heartbeat: {error}")
            if self.sound:
                self._lose()
            return False
        except _LOST:
            self._outage.failed()
            return False
        self._outage.answered()
        now = self._clock()
        self._skew = server - now * 1000
        if self._epoch not in (b"", epoch):
            self._forgotten = True
            if self.sound:
                self._lose()
            self._phase = "alone"
        self._epoch = epoch
        if self._resets not in (b"", resets):
            for limiter in self._limiters.values():
                limiter.reset()
        self._resets = resets
        self._come_back(now, heard)
        if self.sound:
            hashes = [(self._key("a", each.name), each) for each in self._limiters.values()]
            with contextlib.suppress(*_LOST):
                await read_usage(self.link, self._script.sha, self._offset(), hashes, self._clock, self._deadline)
        return True

    def _lose(self) -> None:
        now = self._clock()
        self._phase, self._lost_at = "alone", now
        for limiter in self._limiters.values():
            limiter.use_share(self._proxies, self._rank, now)
        why, proxies = self.link.state, self._proxies
        log_state("alone", f"limits are no longer shared ({why}): this proxy holds 1 of {proxies} shares by itself")

    def _come_back(self, now: float, heard: float) -> None:
        """Take the next step on the way back: publish what was admitted alone; when all have done so, share again.

        heard: the server's ms since which all proxies have sent a heartbeat.
        """
        if self._phase == "alone" and self._lost_at > -math.inf:
            self._phase, self._back_at = "back", now
            if self._forgotten:
                self._lost_at = now - FORGET_AFTER  # Redis does not know the others either: give them time
                self._outbox.clear()
            since = -math.inf if self._forgotten else self._lost_at
            self._forgotten = False
            for limiter in self._limiters.values():
                for window, stamp, amount in limiter.used_since(since):
                    self._post(limiter, ((window.name, *shape(window.span), int(self._server(stamp)), amount),))
                limiter.published()
            self._post_counts()
        elif self._phase == "back":
            if self._outbox:
                self._post_counts()
            elif now >= self._back_at + GRACE or (
                self._back_at < self._lost_at + FORGET_AFTER and heard > self._server(self._lost_at)
            ):
                self._phase = "shared"
                for limiter in self._limiters.values():
                    limiter.share()
                log_state("shared", "shared again")

    def _post_counts(self) -> None:
        for limiter in self._limiters.values():
            if limiter.max_concurrency is not None:
                self._post(limiter, ())
        if self._outbox and (self._flushing is None or self._flushing.done()):
            self._flushing = spawn(self._flush(), "redis limits settle")

    def _count_alone(self, reservation: RedisReservation) -> None:
        """Count a request that was admitted alone: it is published when Redis is back, at once if it is."""
        server = self._server(self._clock())
        reservation.limiter.admitted(reservation, server, counted=self._phase == "back")
        if self._phase == "back":
            self._enqueue(reservation.limiter, int(server), reservation.tokens, 1)

    def _server(self, moment: float) -> float:
        """Return a moment of this proxy's clock (monotonic seconds) in the server's ms."""
        return moment * 1000 + self._skew

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _key(self, *parts: str) -> str:
        return self._start + ":".join(parts)
