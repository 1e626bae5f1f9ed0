"""Limits in Redis: one script call a decision, by the server's clock (`limits.lua`). Imported only where configured.

While Redis is lost each proxy holds its last known share by itself. Once it is back each tells what it has admitted
meanwhile, and keeps to its share until all of them have: so nobody comes back with a burst. Should Redis have lost its
memory, all of what is still in a window is told again. Requests at work are told as each proxy's own number, again and
again: a lost message heals, and a proxy that was killed is forgotten after 10 s with all it held.
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
from ...system.redis_keys import Amount, digest, literal, shape
from .rate_limiter import RateLimiter, Reservation
from .redis_key_states import RedisKeyStates
from .redis_limiter import Asked, RedisRateLimiter, RedisReservation
from .redis_loss import FORGET_AFTER, KEY_STATE_WAIT, OutageDetector, loop_time
from .redis_snapshot import read_usage
from .shared import ApplyRemoteState, RemoteState

log = logging.getLogger("proxy")

DEADLINE: Final = 1.0
"""Seconds a call waits for its answer; a late one is no loss (redis_silence)."""

HEARTBEAT: Final = 1.0
"""Seconds between two signs of life."""

GRACE: Final = 8.0
"""Seconds a proxy keeps to its share after Redis came back: longer than any other takes to notice (redis_link)."""

_PAUSE: Final = 0.02
_LIFE: Final = 2 * 86_400_000
_BATCH: Final = 64
_MOST_PENDING: Final = 20_000
_SCRIPT: Final = resources.files(__package__).joinpath("redis.lua").read_text(encoding="utf-8")

_LOST = (RedisError, OSError, TimeoutError)


class RedisLimits:
    """url: a secret; prefix: of every key; proxy: an id of this process; clock: monotonic seconds.

    offset: ms added to the server's clock, in tests only. Raises ValueError, without the URL's text.
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
        self._allowances: WeakValueDictionary[str, RedisRateLimiter] = WeakValueDictionary()
        self._phase = "alone"
        self._lost_at, self._back_at = -math.inf, math.inf
        self._silence = OutageDetector()
        self._skew = 0.0  # server's ms less ours
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
        made = RedisRateLimiter(name, limits, use, self._tell)
        if not self.sound:
            made.lose(self._proxies, self._rank, self._clock())
        self._allowances[name] = made
        return made

    async def open(self, adopt: ApplyRemoteState) -> None:
        self._states.adopt = adopt
        await self.link.open()
        if await self._beat() or not self.link.gone:  # late is not lost, and nobody knows yet of how many we are one
            self._phase = "shared"
            self._silence.began()
            for allowance in self._allowances.values():
                allowance.share()
        else:
            self._lost_at, self._forgotten = self._clock(), True
            log.warning("redis limits: not reached; this proxy holds the limits by itself until it is")
        self._beating = spawn(self._beats(), "redis limits")

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
        if reservation is None or reservation.allowance.most is None:
            return await self._confirm(reservation, key, model)
        async with reservation.allowance.turn:
            return await self._confirm(reservation, key, model)

    async def _confirm(self, reservation: RedisReservation | None, key: str, model: str) -> bool:
        until = loop_time() + DEADLINE
        while self.sound:
            if self.link.up:
                asked, patience = Asked(), self._deadline if reservation is not None else KEY_STATE_WAIT
                try:
                    await self.link.run(lambda asked=asked: self._ask(asked, reservation, key, model), patience)  # type: ignore[misc]
                except ResponseError as error:
                    self.link.complain(f"refuses a decision: {error}")
                    self._lose()
                    break
                except _LOST:
                    self._silence.failed()
                    self._abandon(asked, reservation)
                except asyncio.CancelledError:
                    self._abandon(asked, reservation)
                    raise
                else:
                    assert asked.reply is not None
                    return await self._decided(asked.reply, reservation, key, model)
            if reservation is None:
                return True  # what others know of the key can be learned the hard way
            if self._silence.is_loss(self.link.gone):
                self._lose()
            elif key and loop_time() >= until:  # it can wait in the gate, as long as it may
                reservation.allowance.refused(reservation, math.inf, self._clock())
                reservation.cancel()
                return False
            else:
                await asyncio.sleep(_PAUSE)
        if reservation is None:
            return True
        if not reservation.allowance.made_alone(reservation):
            reservation.cancel()  # it was reserved of the whole limit: now from our share
            return False
        self._count_alone(reservation)
        return True

    async def _ask(self, asked: Asked, reservation: RedisReservation | None, key: str, model: str) -> None:
        allowance = reservation.allowance if reservation is not None else None
        name = allowance.name if allowance is not None else "none"
        keys = [self._key("e"), self._key("a", name), self._key("r", name)]
        keys += self._states.keys(key, model) if key else []
        most = allowance.most if allowance is not None else None
        args: list[Any] = ["reserve", self._offset(), self._epoch, self._proxy, self._next()]
        args += [allowance.confirmed + 1 if allowance is not None else 0, -1 if most is None else most]
        if reservation is not None and allowance is not None:
            for window in allowance.windows:
                span, width = shape(window.span)
                args += [window.name, window.limit, span, width, reservation.tokens if window.counts_tokens else 1]
        reply: list[Any] = await self._script(keys=keys, args=args)
        self._silence.answered()
        asked.reply = reply
        if asked.abandoned:
            self._undo(reply, reservation)

    def _abandon(self, asked: Asked, reservation: RedisReservation | None) -> None:
        """Nobody waits for this answer any more: what it admits, or has admitted, is taken back."""
        asked.abandoned = True
        if asked.reply is not None:
            self._undo(asked.reply, reservation)

    def _undo(self, reply: Sequence[Any], reservation: RedisReservation | None) -> None:
        if reply[0] == 1 and reservation is not None:
            self._enqueue(reservation.allowance, int(reply[1]), -reservation.tokens, -1)

    async def _decided(self, reply: Sequence[Any], reservation: RedisReservation | None, key: str, model: str) -> bool:
        code, server, wait, running, states, totals = reply
        now = self._clock()
        news = self._states.news(key, model, states, server)
        if reservation is None:
            return not news
        allowance = reservation.allowance
        if code == 1:
            allowance.admitted(reservation, server, counted=True)
        if code != 2:
            known = dict(zip((window.name for window in allowance.windows), totals, strict=False))
            if allowance.most is not None:
                known["concurrency"] = int(running)
            allowance.seen(known, now)
        if code == 1 and not news:
            return True
        if code == 2:
            await self._beat()
        elif code == 0:
            allowance.refused(reservation, wait / 1000 if wait >= 0 else math.inf, now)
        reservation.cancel()
        return False

    # -- what others must know ----------------------------------------------------------------------------------------

    def _tell(self, reservation: RedisReservation, tokens: int, requests: int) -> None:
        assert reservation.stamp is not None
        self._enqueue(reservation.allowance, int(reservation.stamp), tokens, requests)

    def _enqueue(self, allowance: RedisRateLimiter, stamp: int, tokens: int, requests: int) -> None:
        amounts = tuple(
            (window.name, *shape(window.span), stamp, change)
            for window in allowance.windows
            if (change := tokens if window.counts_tokens else requests)
        )
        if amounts or allowance.most is not None:
            self._post(allowance, amounts)

    def _post(self, allowance: RedisRateLimiter, amounts: tuple[Amount, ...]) -> None:
        self._outbox.append((allowance, amounts))
        if len(self._outbox) > _MOST_PENDING:
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
                # It may have been done, only late: what is taken twice does no harm, what is given back twice does.
                self._outbox.extendleft((who, tuple(one for one in each if one[-1] > 0)) for who, each in batch[::-1])
                if isinstance(error, ResponseError):
                    self.link.complain(f"takes no settlement: {error}")
                return

    async def _send(self, batch: Sequence[tuple[RedisRateLimiter, tuple[Amount, ...]]]) -> None:
        async with self.link.redis.pipeline(transaction=False) as pipe:
            for allowance, amounts in batch:
                args: list[Any] = ["add", self._offset(), self._proxy, self._next()]
                args.append(allowance.confirmed if allowance.most is not None else -1)
                for amount in amounts:
                    args += amount
                pipe.evalsha(self._script.sha, 2, self._key("a", allowance.name), self._key("r", allowance.name), *args)
            await pipe.execute()

    def publish_key_state(self, key: str, model: str, states: Mapping[str, RemoteState]) -> None:
        self._states.publish(key, model, states, self._server(self._clock()))

    def reset(self) -> None:
        spawn(self._reset(), "redis limits reset")

    async def _reset(self) -> None:
        with contextlib.suppress(*_LOST):
            redis, cursor = self.link.redis, -1
            while cursor:
                cursor, keys = await redis.scan(max(cursor, 0), match=literal(self._key("a")) + ":*", count=1000)
                if keys:
                    await redis.unlink(*keys)
            await redis.incr(self._key("x"))
            await redis.pexpire(self._key("x"), _LIFE)

    # -- signs of life ------------------------------------------------------------------------------------------------

    async def _beats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT if self.sound else HEARTBEAT / 5)
            try:
                await self._beat()
            except Exception:
                log.exception("redis limits: a sign of life failed")

    async def _beat(self) -> bool:
        """Tells that we live, and learns who else does. Whether Redis answered."""
        if not self.link.up:
            self._silence.failed()
            self._back_at = self._clock()  # where it had been back for a moment, that counts anew
            if self.sound and self._silence.is_loss(self.link.gone):
                self._lose()
            return False
        counted = [allowance for allowance in self._allowances.values() if allowance.most is not None]
        keys = [self._key("p"), self._key("e"), self._key("x"), *(self._key("r", each.name) for each in counted)]
        args: list[Any] = ["hello", self._offset(), self._proxy, _LIFE]
        for allowance in counted:
            args += (self._next(), allowance.confirmed)
        try:
            reply = await self.link.run(lambda: self._script(keys=keys, args=args), self._deadline)
        except ResponseError as error:
            self.link.complain(f"takes no sign of life: {error}")
            if self.sound:
                self._lose()
            return False
        except _LOST:
            self._silence.failed()
            return False
        self._silence.answered()
        now = self._clock()
        server, self._proxies, self._rank, epoch, resets, heard = reply
        self._skew = server - now * 1000
        if self._epoch not in (b"", epoch):
            self._forgotten = True
            if self.sound:
                self._lose()
            self._phase = "alone"
        self._epoch = epoch
        if self._resets not in (b"", resets):
            for allowance in self._allowances.values():
                allowance.reset()
        self._resets = resets
        self._come_back(now, heard)
        if self.sound:
            hashes = [(self._key("a", each.name), each) for each in self._allowances.values()]
            with contextlib.suppress(*_LOST):
                await read_usage(self.link, self._script.sha, self._offset(), hashes, self._clock, self._deadline)
        return True

    def _lose(self) -> None:
        now = self._clock()
        self._phase, self._lost_at = "alone", now
        for allowance in self._allowances.values():
            allowance.lose(self._proxies, self._rank, now)
        text = "limits are no longer shared (%s): this proxy holds 1 of %d shares by itself"
        log.warning("redis limits: " + text, self.link.state, self._proxies)

    def _come_back(self, now: float, heard: float) -> None:
        """One step on the way back: tell what was admitted alone; later, when all have, share again.

        heard: when (server's ms) all proxies have been heard of.
        """
        if self._phase == "alone" and self._lost_at > -math.inf:
            self._phase, self._back_at = "back", now
            if self._forgotten:
                self._lost_at = now - FORGET_AFTER  # it does not even know who else is there: all are given time
                self._outbox.clear()
            since = -math.inf if self._forgotten else self._lost_at
            self._forgotten = False
            for allowance in self._allowances.values():
                for window, stamp, amount in allowance.held_since(since):
                    self._post(allowance, ((window.name, *shape(window.span), int(self._server(stamp)), amount),))
                allowance.pushed()
            self._post_counts()
        elif self._phase == "back":
            if self._outbox:
                self._post_counts()
            elif now >= self._back_at + GRACE or (
                self._back_at < self._lost_at + FORGET_AFTER and heard > self._server(self._lost_at)
            ):
                self._phase = "shared"
                for allowance in self._allowances.values():
                    allowance.share()
                log.warning("redis limits: shared again")

    def _post_counts(self) -> None:
        for allowance in self._allowances.values():
            if allowance.most is not None:
                self._post(allowance, ())
        if self._outbox and (self._flushing is None or self._flushing.done()):
            self._flushing = spawn(self._flush(), "redis limits settle")

    def _count_alone(self, reservation: RedisReservation) -> None:
        """Admitted by ourselves: told once Redis is back, at once where it is."""
        server = self._server(self._clock())
        reservation.allowance.admitted(reservation, server, counted=self._phase == "back")
        if self._phase == "back":
            self._enqueue(reservation.allowance, int(server), reservation.tokens, 1)

    def _server(self, moment: float) -> float:
        """Our clock's `moment` in the server's ms."""
        return moment * 1000 + self._skew

    # -- names --------------------------------------------------------------------------------------------------------

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _key(self, *parts: str) -> str:
        return self._start + ":".join(parts)
