from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress

import pytest

from proxy.workers.ipc import Channel, ConnectionLost
from tests.garbage import uncollected
from tests.workers.kit import wire


async def test_a_call_is_answered_at_once_or_later() -> None:
    async with wire() as (one, other):

        async def later(body: bytes) -> bytes:
            await asyncio.sleep(0.01)
            return body + b"!"

        other.handlers = {"now": lambda body: body[::-1], "later": later}
        one.handlers = {"now": lambda body: b"here, too"}
        answers = await asyncio.gather(one.request("later", b"a"), one.request("now", b"abc"), other.request("now"))
        assert list(answers) == [b"a!", b"cba", b"here, too"]
        large = bytes(20_000_000)
        assert len(await one.request("now", large, 20.0)) == len(large)


async def test_notes_come_in_order_and_before_a_later_call() -> None:
    async with wire() as (one, other):
        came: list[bytes] = []
        other.handlers = {"note": came.append, "all": lambda _: b"".join(came)}
        for part in (b"a", b"b", b"c"):
            one.notify("note", part)
        assert await one.request("all") == b"abc"


async def test_what_fails_or_is_late_is_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    async with wire() as (one, other):

        async def never(_: bytes) -> bytes:
            await asyncio.sleep(3600)
            return b""

        async def broken(_: bytes) -> bytes:
            raise ValueError

        def wrong(_: bytes) -> bytes:
            raise ValueError

        other.handlers = {"never": never, "broken": broken, "wrong": wrong, "fine": lambda _: b"fine"}
        for kind in ("broken", "wrong", "unknown"):
            with pytest.raises(ConnectionLost):
                await one.request(kind)
        with pytest.raises(ConnectionLost):
            await one.request("never", patience=0.01)
        assert await one.request("fine") == b"fine"
        assert "wrong failed" in caplog.text
        assert not one._waiting


async def test_who_is_gone_answers_nobody() -> None:
    async with wire() as (one, other):
        other.handlers = {"never": lambda _: asyncio.sleep(3600)}
        asking = asyncio.ensure_future(one.request("never", patience=60.0))
        await asyncio.sleep(0.01)
        other.close()
        with pytest.raises(ConnectionLost):
            await asking
        with pytest.raises(ConnectionLost):
            await one.request("never")
        one.notify("nobody hears")
        await one.flush()
        assert isinstance(one, Channel)


async def test_a_failed_call_leaves_no_reference_cycle() -> None:
    found: Counter[str] = Counter()

    async def never(_: bytes) -> bytes:
        await asyncio.sleep(3600)
        return b""

    async with wire() as (one, other):
        other.handlers = {"never": never}
        with uncollected(found, ours=True):
            for kind in ("unknown", "never"):
                with suppress(ConnectionLost):
                    await one.request(kind, b"", 0.01 if kind == "never" else 2.0)
    assert not found
