"""`Broadcast`: one stream for several clients. Each read is kept once, in a list in which each subscriber has a place.

Subscribers read at their own pace. The upstream is read as fast as the fastest of them, and `WINDOW` bytes ahead: so a
single subscriber exerts back-pressure, and a slow one does not slow the others. At most as many bytes are held as the
cache may store of a response (`max_entry`), for subscribers that may still come. A stream that grows beyond that gets
no new subscribers, and what all have read is dropped. A subscriber that lags further behind, or more than `LAG` if that
is more, is cut off: its client's connection is aborted.
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
"""How far the upstream is read ahead of the fastest subscriber (bytes)."""

LAG: Final = 8 * 1024 * 1024
"""Bytes held for slow subscribers, at most, if the cache would not store more."""

_CATCH_UP: Final = 16
"""A subscriber that is as many reads behind gets several of them as one, up to `_JOINED` bytes."""
_JOINED: Final = 64 * 1024


class Broadcast:
    """One stream and its subscribers.

    keep: bytes held for subscribers that may still come. full: is called once when the stream exceeds them, and no
    other subscriber may come. all_joined: whether all that may subscribe have done so, so that consumed reads may be
    dropped. unread: whether no subscriber will read, so that none is waited for.
    """

    def __init__(
        self,
        stream: StreamRelay,
        keep: int,
        full: Callable[[], None],
        all_joined: Callable[[], bool],
        unread: Callable[[], bool],
    ) -> None:
        self.stream = stream
        self._keep = keep
        self._full = full
        self._all_joined = all_joined
        self._unread = unread
        self._complete = True
        self._reads: list[bytes] = []
        self._dropped = 0  # the number of reads that were dropped
        self._size = 0  # bytes, dropped ones too
        self._held = 0
        self._front = 0  # bytes that the fastest subscriber has passed on
        self._subscribers: set[Subscriber] = set()
        self._waiting: dict[Subscriber, asyncio.Future[None]] = {}
        self._room: asyncio.Future[None] | None = None
        self._closed = False
        self._failure: TransportFailure | None = None

    @property
    def held(self) -> int:
        """Return the number of bytes that are held."""
        return self._held

    @property
    def end(self) -> int:
        """Return the number of the next read."""
        return self._dropped + len(self._reads)

    def subscribe(self) -> Subscriber:
        """Return one more subscriber, from the first byte on."""
        assert self._dropped == 0, "the beginning is gone"
        subscriber = Subscriber(self)
        self._subscribers.add(subscriber)
        return subscriber

    async def record(self) -> None:
        """Read the whole stream. If it fails, it fails for every subscriber."""
        failure: TransportFailure | None = TransportFailure("invalid", "the proxy failed on this stream")
        try:
            await self.stream.relay(self.publish)
            failure = None
        except StreamBroken as broken:
            failure = broken.failure.again()
        finally:
            self._failure = failure
            self._closed = True
            self._wake()

    async def publish(self, data: bytes) -> None:
        """Publish a read. Returns when the next may be made."""
        self._reads.append(data)
        self._size += len(data)
        self._held += len(data)
        if self._waiting:
            self._offer(data)
        if self._size > self._keep:
            if self._complete:
                self._complete = False
                self._full()
            if self._all_joined():
                self._drop_consumed()
        while self._size - self._front > WINDOW and not self._unread():
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_result(None)

    def _offer(self, data: bytes) -> None:
        """Give the newest read to all that wait for it; those that can take it at once go on waiting."""
        for subscriber, future in list(self._waiting.items()):
            if future.done():
                del self._waiting[subscriber]
            elif subscriber.take is None:
                del self._waiting[subscriber]
                future.set_result(None)
            else:
                try:
                    ready = subscriber.offer(data)
                except Exception as error:
                    ready = True
                    del self._waiting[subscriber]
                    future.set_exception(error)
                    del future  # it holds the error, which holds this frame
                if not ready:
                    del self._waiting[subscriber]
                    future.set_result(None)

    def _drop_consumed(self) -> None:
        """Drop what all have read, and cut off the slowest subscriber while too much is held."""
        while True:
            slowest = min((each.at for each in self._subscribers), default=self.end)
            gone = slowest - self._dropped
            self._held -= sum(map(len, self._reads[:gone]))
            del self._reads[:gone]
            self._dropped = slowest
            if self._held <= max(self._keep, LAG):
                return
            for subscriber in [each for each in self._subscribers if each.at == slowest]:
                subscriber.cut_off()

    # -- what subscribers do -------------------------------------------------------------------------------------------

    async def next_for(self, subscriber: Subscriber) -> tuple[bytes, int] | None:
        """Return a subscriber's next read, or several joined, and the number of the one after; None at the end.

        It is b"" if the subscriber must wait until its client has taken more. Raises TransportFailure.
        """
        while subscriber.at == self.end:
            if self._failure is not None:
                raise self._failure.again()
            if self._closed:
                return None
            self._waiting[subscriber] = asyncio.get_running_loop().create_future()
            await self._waiting[subscriber]  # from no variable: it may end with an error, which holds this frame
            if subscriber.behind:
                return b"", subscriber.at
        at = subscriber.at
        first = at - self._dropped
        if len(self._reads) - first < _CATCH_UP:
            return self._reads[first], at + 1
        end, size = first, 0
        while end < len(self._reads) and size < _JOINED:
            size += len(self._reads[end])
            end += 1
        return b"".join(self._reads[first:end]), self._dropped + end

    def passed(self, position: int) -> None:
        """A subscriber has passed on the first `position` bytes."""
        if position > self._front:
            self._front = position
        if self._room is not None and self._size - self._front <= WINDOW:
            self.go_on()

    def go_on(self) -> None:
        """Let the publisher check again whether it may go on."""
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        self._subscribers.discard(subscriber)


class Subscriber:
    """A place in a broadcast.

    at: the number of its next read. too_slow: is called when it is cut off.
    take: passes a read on without waiting; returns whether it can take more. behind: it could not, the last time.
    """

    __slots__ = ("_broadcast", "_is_cut_off", "_taken", "at", "behind", "take", "too_slow")

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self._taken = 0
        self._is_cut_off = False
        self.at = 0
        self.behind = False
        self.take: Callable[[bytes], bool] | None = None
        self.too_slow: Callable[[], None] | None = None

    def offer(self, data: bytes) -> bool:
        """Take the newest read at once. Returns whether the next can be taken so."""
        assert self.take is not None
        self.at += 1
        self._taken += len(data)
        if self.take(data):
            self._broadcast.passed(self._taken)
            return True
        self.behind = True
        return False

    async def next(self) -> bytes | None:
        """Return more of the stream, b"" if the client must take more first, None at the end. Raises TransportFailure.

        A subscriber that asks for more has passed on what it got.
        """
        self.behind = False
        self._broadcast.passed(self._taken)
        if self._is_cut_off:
            raise TransportFailure("timeout", "the client reads too slowly")
        found = await self._broadcast.next_for(self)
        if found is None:
            return None
        data, self.at = found
        self._taken += len(data)
        return data

    @property
    def caught_up(self) -> bool:
        """Whether it has everything that came so far."""
        return self.at == self._broadcast.end

    def cut_off(self) -> None:
        too_slow = self.too_slow
        self.close()
        self._is_cut_off = True
        if too_slow is not None:
            too_slow()

    def close(self) -> None:
        """Read no more."""
        self._broadcast.unsubscribe(self)
        self.take = self.too_slow = None


class SubscriberStream:
    """A broadcast as one client gets it: through its own filter, at its own pace.

    ended: is called exactly once, at the end. push: writes without waiting, and returns whether the client takes as
    much as is written; it saves a turn of the event loop for each read.
    """

    def __init__(self, broadcast: Broadcast, client_filter: ClientFilter, ended: Callable[[StreamEnd], None]) -> None:
        self.audit = broadcast.stream.audit
        self.interrupted = ""
        self.push: Callable[[bytes], bool] | None = None
        self._stream = broadcast.stream
        self._subscriber = broadcast.subscribe()
        self._subscriber.too_slow = self._cut_off
        self._filter = client_filter
        self._ended = ended
        self._started = False
        self._done = False
        self._too_slow = False
        self._task: asyncio.Task[object] | None = None

    @property
    def between_events(self) -> bool:
        """Whether a comment may follow what was passed on so far."""
        return self._subscriber.caught_up and self._stream.between_events and self._filter.at_boundary

    def client_left(self) -> None:
        """End a stream whose client left before the first byte. After `relay` has begun it does nothing."""
        if not self._started:
            self._end(StreamEnd(client_left=True))

    def _cut_off(self) -> None:
        """End the stream of a client that reads too slowly."""
        self._too_slow = True
        if self._task is not None:
            self._task.cancel()

    async def relay(self, write: Write) -> None:
        """Pass the whole stream to `write`. Raises StreamBroken after a failure, when it has written an error event."""
        self._started = True
        self._task = asyncio.current_task()
        feed, more = self._filter.feed, self._subscriber.next
        if self.push is not None:
            self._subscriber.take = self._take
        try:
            while (chunk := await more()) is not None:
                if not chunk:
                    await write(b"")  # which waits until the client has taken enough
                elif out := feed(chunk):
                    await write(out)
            if out := self._filter.finish():
                await write(out)
        except TransportFailure as failure:
            if self._stream.over:  # it broke off after its end: nothing is missing
                self._end(StreamEnd())
                return
            await self._break(write, failure.code, failure, self._stream.open_for_error and self._filter.at_boundary)
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
            may_write = self._filter.at_boundary
            if self._filter.raw:
                may_write = self._subscriber.caught_up and self._stream.open_for_error
            await self._break(write, self.interrupted, TransportFailure("invalid", SHUTTING_DOWN), may_write)
        except BaseException:
            self._leave()
            raise
        else:
            self._end(StreamEnd())

    def _take(self, data: bytes) -> bool:
        assert self.push is not None
        out = self._filter.feed(data)
        return not out or self.push(out)

    def _leave(self) -> None:
        """The client has left. Most SDKs hang up as soon as they have the last event: then nothing is missing."""
        self._end(StreamEnd(client_left=not (self._stream.over and self._subscriber.caught_up)))

    async def _break(self, write: Write, code: str, failure: TransportFailure, may_write: bool) -> None:
        reported = self.audit is not None and self.audit.error
        self._end(StreamEnd(failure=code))
        if may_write and not reported:
            await write(error_event(code, failure.detail))
        raise StreamBroken(failure)

    def _end(self, ending: StreamEnd) -> None:
        if not self._done:
            self._done = True
            self._task = None
            self._subscriber.close()
            self._ended(ending)
