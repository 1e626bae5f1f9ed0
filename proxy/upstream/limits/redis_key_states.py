"""What proxies let each other know of keys: cooling, exhausted, rejected. A key in Redis for each state, which expires
with it, so that its end needs nobody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import orjson
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError

from ...system.clock import spawn
from ...system.redis import DEADLINE_MAX, RedisConnection
from ...system.redis_keys import digest
from .shared import ApplyRemoteState, RemoteState

MOST_TOLD: Final = 10_000


class RedisKeyStates:
    """adopt: takes what another proxy has learned; start: of every key in Redis; offset: as `RedisLimits` has it."""

    def __init__(self, link: RedisConnection, script: AsyncScript, start: str, offset: Callable[[], int]) -> None:
        self.adopt: ApplyRemoteState = lambda *_: None
        self._link = link
        self._script = script
        self._start = start
        self._offset = offset
        self._told: dict[tuple[str, str], float] = {}
        """(key, slot) -> until when (server's ms), as far as we know that the others know."""

    def keys(self, key: str, model: str) -> list[str]:
        return [self._key(key, slot) for slot in slots(model)]

    def news(self, key: str, model: str, states: Sequence[bytes], server: float) -> bool:
        """Whether others know what we do not. Then it is adopted. states: what stands under `keys`; server: ms now."""
        found = False
        for slot, text in zip(slots(model), states, strict=False):
            state = orjson.loads(text) if text else None
            if state is not None and self._told.get((key, slot)) != state["until"]:
                found = True
                self._note(key, slot, state["until"])
                seconds = max((state["until"] - server) / 1000, 0.001)
                self.adopt(key, slot.partition(" ")[2], state["status"], seconds, state["reason"])
        return found

    def publish(self, key: str, model: str, states: Mapping[str, RemoteState], server: float) -> None:
        """Tells what is new to the others: states that have come or grown, and rests that are over before their time
        because the key works; a time to cool stands whatever works.
        """
        for slot in slots(model):
            state, told = states.get(slot), self._told.get((key, slot))
            if state is None:
                if told is not None:
                    del self._told[key, slot]
                    if told > server and slot.startswith("rests"):
                        spawn(self._learn(key, slot, 0, b""), "redis limits learn")
                continue
            status, seconds, reason = state
            until = server + seconds * 1000
            if told is None or abs(told - until) > 50:
                self._note(key, slot, until)
                text = orjson.dumps({"status": status, "until": until, "reason": reason})
                spawn(self._learn(key, slot, max(1, round(seconds * 1000)), text), "redis limits learn")

    def _note(self, key: str, slot: str, until: float) -> None:
        if len(self._told) >= MOST_TOLD:
            self._told.clear()
        self._told[key, slot] = until

    async def _learn(self, key: str, slot: str, lasts: int, text: bytes) -> None:
        if self._link.up:
            args: list[Any] = ["learn", self._offset(), lasts, text]
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                await self._link.run(lambda: self._script(keys=[self._key(key, slot)], args=args), DEADLINE_MAX)

    def _key(self, key: str, slot: str) -> str:
        return f"{self._start}:{digest(key, slot)}"


def slots(model: str) -> tuple[str, str, str, str]:
    """The states that may stand against a key's use for `model`, each with the model it is about."""
    return (f"rests {model}", "rests *", f"cools {model}", "cools *")
