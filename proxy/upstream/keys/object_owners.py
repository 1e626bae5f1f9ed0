"""Which key made which stored object: in memory, and where a Redis is configured, in common with other proxies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from ...protocol.request import ProxyRequest
from ...protocol.sse import Splitter, data_of
from ...system.clock import spawn
from .lease import UpstreamKey
from .pool import KeyPool
from .stored_objects import OwnerTable, ids_made_by, ids_made_by_event, ids_named

_NAME_OBJECTS: Final = frozenset({"chat", "responses"})
"""Of the five endpoints, those whose requests can name stored objects."""


class SharedOwners(Protocol):
    """Where proxies tell each other. Neither method raises; both are quick about it when it is lost."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def put(self, ids: list[str], label: str) -> None: ...

    async def get(self, ids: list[str]) -> str | None: ...


class ObjectOwners:
    """Remembers who made what. `wall`: Unix seconds."""

    def __init__(self, wall: Callable[[], float], shared: SharedOwners | None = None) -> None:
        self._wall = wall
        self._makers = OwnerTable()
        self.shared = shared

    async def open(self) -> None:
        if self.shared is not None:
            await self.shared.open()

    async def close(self) -> None:
        if self.shared is not None:
            await self.shared.close()

    def record_owner(self, ids: list[str], label: str) -> None:
        """These objects are seen by that key."""
        wall = self._wall()
        news = [id_ for id_ in ids if self._makers.record(id_, label, wall)]
        if news and self.shared is not None:
            spawn(self.shared.put(news, label), "objects")

    async def owner_of(self, ids: list[str]) -> str | None:
        """The label of the key that made one of them; None where nobody knows."""
        label = self._makers.owner_of(ids, self._wall())
        if label is None and self.shared is not None and ids:
            label = await self.shared.get(ids)
            if label is not None:
                self._makers.record(ids[0], label, self._wall())
        return label

    async def pinned_key(self, pool: KeyPool, request: ProxyRequest) -> str:
        """The label of the one key that may see the stored objects a request names; '' where it names none."""
        if len(pool.keys) == 1 or request.endpoint not in _NAME_OBJECTS:
            return ""
        ids = ids_named(request.body, request.document)
        if not ids:
            return ""
        label = await self.owner_of(ids)
        key = pool.by_label(label) if label is not None else None
        if key is None:
            key = pool.first_serving(request.model)
        return key.label if key is not None else ""

    def record_answer(self, pool: KeyPool, request: ProxyRequest, key: UpstreamKey, document: object) -> None:
        """Remembers which key made what an answer brings, where it is stored upstream."""
        if len(pool.keys) > 1 and (
            request.endpoint == "responses" or (request.endpoint == "chat" and request.document.get("store") is True)
        ):
            self.record_owner(ids_made_by(document), key.label)

    def record_stream(self, pool: KeyPool, request: ProxyRequest, key: UpstreamKey, first: Sequence[bytes]) -> None:
        """The same for a stream, of which the first event tells. first: its bytes so far."""
        if len(pool.keys) > 1 and request.endpoint == "responses":
            for event in Splitter().feed(b"".join(first)):
                self.record_owner(ids_made_by_event(data_of(event) or b""), key.label)
