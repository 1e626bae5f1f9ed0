"""States of upstream keys (cooling, exhausted, rejected) shared over Redis.

Each state is a Redis key that expires when the state ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec
import orjson
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError

from ...system.clock import spawn
from ...system.redis import DEADLINE_MAX, RedisConnection
from ...system.redis_keys import digest
from .shared import ApplyRemoteState, RemoteState

MAX_KNOWN: Final = 10_000
"""How many states are remembered as known to the others; beyond that all are forgotten and published again."""


class RedisKeyStates:
    """Key states in one Redis.

    script: `redis.lua`.
    start: the start of every Redis key.
    offset: ms that are added to the server's clock.
    adopt: takes over what another proxy has learned.
    """

    def __init__(self, link: RedisConnection, script: AsyncScript, start: str, offset: Callable[[], int]) -> None:
        self.adopt: ApplyRemoteState = lambda *_: None
        self._link = link
        self._script = script
        self._start = start
        self._offset = offset
        self._known: dict[tuple[str, str], float] = {}
        """Until when (server's ms) the others know a state to last, by key and slot."""

    def keys(self, key: str, model: str) -> list[str]:
        """Return the Redis keys of the states that can keep `key` from serving `model`."""
        return [self._key(key, slot) for slot in slots(model)]

    def apply(self, key: str, model: str, states: Sequence[bytes], server: float) -> bool:
        """Take over what others have learned. Returns whether there was anything new.

        states: the values of `keys`.
        server: the server's time in ms.
        """
        found = False
        for slot, text in zip(slots(model), states, strict=False):
            state = _parse(text) if text else None
            if state is not None and self._known.get((key, slot)) != state.until:
                found = True
                self._note(key, slot, state.until)
                seconds = max((state.until - server) / 1000, 0.001)
                self.adopt(key, slot.partition(" ")[2], state.status, seconds, state.reason)
        return found

    def publish(self, key: str, model: str, states: Mapping[str, RemoteState], server: float) -> None:
        """Publish states that are new or last longer than published before.

        If an exhausted or rejected key works again early, that is published too; a cooldown always runs to its end.

        server: the server's time in ms.
        """
        for slot in slots(model):
            state, known = states.get(slot), self._known.get((key, slot))
            if state is None:
                if known is not None:
                    del self._known[key, slot]
                    if known > server and slot.startswith("rests"):
                        spawn(self._learn(key, slot, 0, b""), "redis limits learn")
                continue
            status, seconds, reason = state
            until = server + seconds * 1000
            if known is None or abs(known - until) > 50:
                self._note(key, slot, until)
                text = orjson.dumps({"status": status, "until": until, "reason": reason})
                spawn(self._learn(key, slot, max(1, round(seconds * 1000)), text), "redis limits learn")

    def _note(self, key: str, slot: str, until: float) -> None:
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[key, slot] = until

    async def _learn(self, key: str, slot: str, lasts: int, text: bytes) -> None:
        """Write a state that lasts `lasts` ms; 0: it has ended."""
        if self._link.up:
            args: list[Any] = ["learn", self._offset(), lasts, text]
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                await self._link.run(lambda: self._script(keys=[self._key(key, slot)], args=args), DEADLINE_MAX)

    def _key(self, key: str, slot: str) -> str:
        return f"{self._start}:{digest(key, slot)}"


class _Stored(msgspec.Struct):
    """A key state as it lies in Redis. until: the server's ms."""

    status: Literal["cooling", "exhausted", "rejected", "missing"]
    until: float
    reason: str


def _parse(text: object) -> _Stored | None:
    """Return the stored state; None if the value is not one of ours: it is as if nothing were known."""
    try:
        return msgspec.json.decode(text, type=_Stored) if isinstance(text, bytes) else None
    except (msgspec.DecodeError, ValueError):
        return None


def slots(model: str) -> tuple[str, str, str, str]:
    """Return the names of the states that can keep a key from serving `model`, each with the model it concerns."""
    return (f"rests {model}", "rests *", f"cools {model}", "cools *")
