"""One stream for several readers: every read is kept once, in a growing list, and each reader has a place in it.

Readers go at their own pace. The upstream is read as fast as the fastest of them takes it, with `WINDOW` bytes to
spare; so one reader alone exerts back-pressure as ever, and a slow one holds up nobody else. What is held at most is
what the cache may keep of an answer (`max_entry`), for readers yet to come; a stream that grows beyond gets no new
readers, what all have read of it is let go, and who lags more than that, or `LAG` where it is more, is dropped: his
connection is aborted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from ...protocol.errors import error_event
from ...upstream.interfaces import Write
from ...upstream.retry.outcome import TransportFailure
from ..relay import SHUTTING_DOWN, ClientFilter, StreamBroken, StreamEnd, StreamRelay

WINDOW: Final = 256 * 1024
"""So far (bytes) the upstream is read ahead of the fastest reader."""

LAG: Final = 8 * 1024 * 1024
"""Bytes held for slow readers at most, where the cache would not keep more."""

_CATCH_UP: Final = 16
"""Who is so many reads behind gets several of them as one, up to `_JOINED` bytes."""
_JOINED: Final = 64 * 1024


class Broadcast:
    """flow: where it comes from; keep: bytes held for readers yet to come; full: told once when they are exceeded and
    nobody new may come; all_here: whether those who may come then have their readers, so that what all have read can be
    let go; unread: whether nobody will read, so that nobody is waited for."""

    def __init__(
        self,
        flow: StreamRelay,
        keep: int,
        full: Callable[[], None],
        all_here: Callable[[], bool],
        unread: Callable[[], bool],
    ) -> None:
        self.flow = flow
        self._keep = keep
        self._full = full
        self._all_here = all_here
        self._unread = unread
        self._complete = True
        self._reads: list[bytes] = []
        self._cut = 0  # how many reads were let go
        self._size = 0  # bytes, with what was let go
        self._held = 0
        self._front = 0  # bytes that the fastest reader ever has passed on
        self._readers: set[Subscriber] = set()
        self._asleep: dict[Subscriber, asyncio.Future[None]] = {}
        self._room: asyncio.Future[None] | None = None
        self._closed = False
        self._failure: TransportFailure | None = None

    @property
    def held(self) -> int:
        """Bytes."""
        return self._held

    @property
    def end(self) -> int:
        """The number of the next read."""
        return self._cut + len(self._reads)

    def reader(self) -> Subscriber:
        """One more reader, from the first byte on."""
        assert self._cut == 0, "the beginning is gone"
        reader = Subscriber(self)
        self._readers.add(reader)
        return reader

    async def record(self) -> None:
        """Lets the whole stream flow in. A failure of it is every reader's."""
        failure: TransportFailure | None = TransportFailure("invalid", "the proxy failed on this stream")
        try:
            await self.flow.relay(self.publish)
            failure = None
        except StreamBroken as broken:
            failure = broken.failure.again()
        finally:
            self._failure = failure
            self._closed = True
            self._wake()

    async def publish(self, data: bytes) -> None:
        """One more read; returns when the next may be made."""
        self._reads.append(data)
        self._size += len(data)
        self._held += len(data)
        if self._asleep:
            self._offer(data)
        if self._size > self._keep:
            if self._complete:
                self._complete = False
                self._full()
            if self._all_here():
                self._drop_consumed()
        while self._size - self._front > WINDOW and not self._unread():
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def _wake(self) -> None:
        asleep, self._asleep = self._asleep, {}
        for future in asleep.values():
            if not future.done():
                future.set_result(None)

    def _offer(self, data: bytes) -> None:
        """The newest read goes to all who wait for it: at once to those who take it so, and they sleep on."""
        for reader, future in list(self._asleep.items()):
            if future.done():
                del self._asleep[reader]
            elif reader.take is None:
                del self._asleep[reader]
                future.set_result(None)
            else:
                try:
                    ready = reader.given(data)
                except Exception as error:
                    ready = True
                    del self._asleep[reader]
                    future.set_exception(error)
                    del future  # it holds the error, which holds this frame
                if not ready:
                    del self._asleep[reader]
                    future.set_result(None)

    def _drop_consumed(self) -> None:
        """Lets go of what all have read, and drops the slowest while too much is held."""
        while True:
            slowest = min((reader.at for reader in self._readers), default=self.end)
            gone = slowest - self._cut
            self._held -= sum(map(len, self._reads[:gone]))
            del self._reads[:gone]
            self._cut = slowest
            if self._held <= max(self._keep, LAG):
                return
            for reader in [reader for reader in self._readers if reader.at == slowest]:
                reader.drop()

    # -- what readers do ----------------------------------------------------------------------------------------------

    async def subscribe(self, reader: Subscriber) -> tuple[bytes, int] | None:
        """The reader's next read, or several from there on, and the number of the next; nothing where it is behind with
        what it took; None at the end. Raises TransportFailure."""
        while reader.at == self.end:
            if self._failure is not None:
                raise self._failure.again()
            if self._closed:
                return None
            self._asleep[reader] = asyncio.get_running_loop().create_future()
            await self._asleep[reader]  # from no variable: it may end with an error, which holds this frame
            if reader.behind:
                return b"", reader.at
        at = reader.at
        first = at - self._cut
        if len(self._reads) - first < _CATCH_UP:
            return self._reads[first], at + 1
        end, size = first, 0
        while end < len(self._reads) and size < _JOINED:
            size += len(self._reads[end])
            end += 1
        return b"".join(self._reads[first:end]), self._cut + end

    def passed(self, position: int) -> None:
        """A reader has passed on the first `position` bytes."""
        if position > self._front:
            self._front = position
        if self._room is not None and self._size - self._front <= WINDOW:
            self.go_on()

    def go_on(self) -> None:
        """Who waits for room looks again."""
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def unsubscribe(self, reader: Subscriber) -> None:
        self._readers.discard(reader)


class Subscriber:
    """A place in a reel. at: the number of its next read; too_slow: told when it is dropped; take: passes a read on
    without waiting, and says whether more can be taken so; behind: the last time it said no."""

    __slots__ = ("_dropped", "_reel", "_taken", "at", "behind", "take", "too_slow")

    def __init__(self, reel: Broadcast) -> None:
        self._reel = reel
        self._taken = 0
        self._dropped = False
        self.at = 0
        self.behind = False
        self.take: Callable[[bytes], bool] | None = None
        self.too_slow: Callable[[], None] | None = None

    def given(self, data: bytes) -> bool:
        """The newest read, taken at once; whether the next may be."""
        assert self.take is not None
        self.at += 1
        self._taken += len(data)
        if self.take(data):
            self._reel.passed(self._taken)
            return True
        self.behind = True
        return False

    async def next(self) -> bytes | None:
        """More of it, b"" where what was taken is to be waited for, None at the end. Who asks for more has passed on
        what he got. Raises TransportFailure."""
        self.behind = False
        self._reel.passed(self._taken)
        if self._dropped:
            raise TransportFailure("timeout", "the client reads too slowly")
        found = await self._reel.subscribe(self)
        if found is None:
            return None
        data, self.at = found
        self._taken += len(data)
        return data

    @property
    def caught_up(self) -> bool:
        """It has everything that came so far."""
        return self.at == self._reel.end

    def drop(self) -> None:
        told = self.too_slow
        self.close()
        self._dropped = True
        if told is not None:
            told()

    def close(self) -> None:
        """Reads no more."""
        self._reel.unsubscribe(self)
        self.take = self.too_slow = None


class SubscriberStream:
    """A reel as one client gets it: in its own dress, at its own pace. ended: called exactly once; push: a `write` that
    does not wait, and says whether the client takes as much as is written: it spares a turn of the loop for each read.
    """

    def __init__(self, reel: Broadcast, dress: ClientFilter, ended: Callable[[StreamEnd], None]) -> None:
        self.audit = reel.flow.audit
        self.interrupted = ""
        self.push: Callable[[bytes], bool] | None = None
        self._flow = reel.flow
        self._reader = reel.reader()
        self._reader.too_slow = self._cut
        self._dress = dress
        self._ended = ended
        self._pumped = False
        self._done = False
        self._too_slow = False
        self._task: asyncio.Task[object] | None = None

    def client_left(self) -> None:
        """The client left before the first byte. After `pump` it does nothing."""
        if not self._pumped:
            self._end(StreamEnd(client_left=True))

    def _cut(self) -> None:
        """The client takes its stream so slowly that it gets no more of it."""
        self._too_slow = True
        if self._task is not None:
            self._task.cancel()

    async def relay(self, write: Write) -> None:
        """Passes the whole stream to `write`. Raises StreamBroken after a failure has been told, or could not be."""
        self._pumped = True
        self._task = asyncio.current_task()
        feed, more = self._dress.feed, self._reader.next
        if self.push is not None:
            self._reader.take = self._take
        try:
            while (chunk := await more()) is not None:
                if not chunk:
                    await write(b"")  # which waits until the client has taken enough
                elif out := feed(chunk):
                    await write(out)
            if out := self._dress.finish():
                await write(out)
        except TransportFailure as failure:
            if self._flow.over:  # it broke off after its end: nothing is missing
                self._end(StreamEnd())
                return
            await self._break(write, failure.code, failure, self._flow.open_for_error and self._dress.at_boundary)
        except asyncio.CancelledError:
            if not self.interrupted and not self._too_slow:
                self._leave()
                raise
            if self._task is not None:
                self._task.uncancel()
            if self._too_slow:
                self._end(StreamEnd(failure="client_too_slow"))
                slow = TransportFailure("timeout", "the client reads too slowly")
                raise StreamBroken(slow, at_once=True) from None
            open_ = self._dress.at_boundary
            if self._dress.raw:
                open_ = self._reader.caught_up and self._flow.open_for_error
            await self._break(write, self.interrupted, TransportFailure("invalid", SHUTTING_DOWN), open_)
        except BaseException:
            self._leave()
            raise
        else:
            self._end(StreamEnd())

    def _take(self, data: bytes) -> bool:
        assert self.push is not None
        out = self._dress.feed(data)
        return not out or self.push(out)

    def _leave(self) -> None:
        """The client has gone; most SDKs hang up as soon as they have the last event, and then nothing is missing."""
        self._end(StreamEnd(client_left=not (self._flow.over and self._reader.caught_up)))

    async def _break(self, write: Write, code: str, failure: TransportFailure, open_: bool) -> None:
        told = self.audit is not None and self.audit.error
        self._end(StreamEnd(failure=code))
        if open_ and not told:
            await write(error_event(code, failure.detail))
        raise StreamBroken(failure)

    def _end(self, ending: StreamEnd) -> None:
        if not self._done:
            self._done = True
            self._task = None
            self._reader.close()
            self._ended(ending)
