"""Which key made which stored object: in memory, and where a Redis is configured, in common with other proxies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from ...protocol.request import Call
from ...protocol.sse import Splitter, data_of
from ...system.clock import spawn
from .lease import PoolKey
from .pool import KeyRing
from .stored_objects import Makers, ids_named, made_by, made_by_event

_NAME_OBJECTS: Final = frozenset({"chat", "responses"})
"""Of the five endpoints, those whose requests can name stored objects."""


class Shared(Protocol):
    """Where proxies tell each other. Neither method raises; both are quick about it when it is lost."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def put(self, ids: list[str], label: str) -> None: ...

    async def get(self, ids: list[str]) -> str | None: ...


class Objects:
    """Remembers who made what. `wall`: Unix seconds."""

    def __init__(self, wall: Callable[[], float], shared: Shared | None = None) -> None:
        self._wall = wall
        self._makers = Makers()
        self.shared = shared

    async def open(self) -> None:
        if self.shared is not None:
            await self.shared.open()

    async def close(self) -> None:
        if self.shared is not None:
            await self.shared.close()

    def made(self, ids: list[str], label: str) -> None:
        """These objects are seen by that key."""
        wall = self._wall()
        news = [id_ for id_ in ids if self._makers.made(id_, label, wall)]
        if news and self.shared is not None:
            spawn(self.shared.put(news, label), "objects")

    async def maker(self, ids: list[str]) -> str | None:
        """The label of the key that made one of them; None where nobody knows."""
        label = self._makers.maker(ids, self._wall())
        if label is None and self.shared is not None and ids:
            label = await self.shared.get(ids)
            if label is not None:
                self._makers.made(ids[0], label, self._wall())
        return label

    async def tied_to(self, ring: KeyRing, call: Call) -> str:
        """The label of the one key that may see the stored objects a request names; '' where it names none."""
        if len(ring.keys) == 1 or call.endpoint not in _NAME_OBJECTS:
            return ""
        ids = ids_named(call.body, call.document)
        if not ids:
            return ""
        label = await self.maker(ids)
        key = ring.named(label) if label is not None else None
        if key is None:
            key = ring.fixed(call.model)
        return key.label if key is not None else ""

    def note(self, ring: KeyRing, call: Call, key: PoolKey, document: object) -> None:
        """Remembers which key made what an answer brings, where it is stored upstream."""
        if len(ring.keys) > 1 and (
            call.endpoint == "responses" or (call.endpoint == "chat" and call.document.get("store") is True)
        ):
            self.made(made_by(document), key.label)

    def note_stream(self, ring: KeyRing, call: Call, key: PoolKey, first: Sequence[bytes]) -> None:
        """The same for a stream, of which the first event tells. first: its bytes so far."""
        if len(ring.keys) > 1 and call.endpoint == "responses":
            for event in Splitter().feed(b"".join(first)):
                self.made(made_by_event(data_of(event) or b""), key.label)
