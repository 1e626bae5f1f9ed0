"""The link between supervisor and worker: requests, notifications, and ends that go away."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress

import pytest

from proxy.workers.ipc import Channel, ConnectionLost
from tests.garbage import uncollected
from tests.workers.kit import channel_pair


async def test_request_is_answered_at_once_or_later() -> None:
    async with channel_pair() as (one, other):

        async def later(body: bytes) -> bytes:
            await asyncio.sleep(0.01)
            return body + b"!"

        other.handlers = {"now": lambda body: body[::-1], "later": later}
        one.handlers = {"now": lambda body: b"here, too"}
        answers = await asyncio.gather(one.request("later", b"a"), one.request("now", b"abc"), other.request("now"))
        assert list(answers) == [b"a!", b"cba", b"here, too"]
        large = bytes(20_000_000)
        assert len(await one.request("now", large, 20.0)) == len(large)


async def test_notifications_arrive_in_order_and_before_a_later_request() -> None:
    async with channel_pair() as (one, other):
        received: list[bytes] = []
        other.handlers = {"note": received.append, "all": lambda _: b"".join(received)}
        for part in (b"a", b"b", b"c"):
            one.notify("note", part)
        assert await one.request("all") == b"abc"


async def test_failed_or_late_answer_raises(caplog: pytest.LogCaptureFixture) -> None:
    async with channel_pair() as (one, other):

        async def never_answer(_: bytes) -> bytes:
            await asyncio.sleep(3600)
            return b""

        async def fail_later(_: bytes) -> bytes:
            raise ValueError

        def fail(_: bytes) -> bytes:
            raise ValueError

        other.handlers = {
            "never_answer": never_answer,
            "fail_later": fail_later,
            "fail": fail,
            "fine": lambda _: b"fine",
        }
        for kind in ("fail_later", "fail", "unknown"):
            with pytest.raises(ConnectionLost):
                await one.request(kind)
        with pytest.raises(ConnectionLost):
            await one.request("never_answer", timeout=0.01)
        assert await one.request("fine") == b"fine"
        assert "fail failed" in caplog.text
        assert not one._waiting


async def test_closed_end_answers_no_request() -> None:
    async with channel_pair() as (one, other):
        other.handlers = {"never_answer": lambda _: asyncio.sleep(3600)}
        asking = asyncio.ensure_future(one.request("never_answer", timeout=60.0))
        await asyncio.sleep(0.01)
        other.close()
        with pytest.raises(ConnectionLost):
            await asking
        with pytest.raises(ConnectionLost):
            await one.request("never_answer")
        one.notify("nobody hears")
        await one.flush()
        assert isinstance(one, Channel)


async def test_failed_request_leaves_no_reference_cycle() -> None:
    leaked: Counter[str] = Counter()

    async def never_answer(_: bytes) -> bytes:
        await asyncio.sleep(3600)
        return b""

    async with channel_pair() as (one, other):
        other.handlers = {"never_answer": never_answer}
        with uncollected(leaked, ours=True):
            for kind in ("unknown", "never_answer"):
                with suppress(ConnectionLost):
                    await one.request(kind, b"", 0.01 if kind == "never_answer" else 2.0)
    assert not leaked
