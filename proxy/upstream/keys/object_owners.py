"""Which upstream key created which stored object: in memory, and shared with other processes."""

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
"""Those of the five endpoints whose requests can name stored objects."""


class SharedOwners(Protocol):
    """Owners shared by several processes. No method raises, and all are quick while the others are out of reach."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def put(self, ids: list[str], label: str) -> None:
        """Publish that these objects belong to the key of this label."""

    async def get(self, ids: list[str]) -> str | None:
        """Return the label of the key that one of the objects belongs to; None if it is unknown."""


class ObjectOwners:
    """Remembers which key created which object. wall: returns Unix seconds."""

    def __init__(self, wall: Callable[[], float], shared: SharedOwners | None = None) -> None:
        self._wall = wall
        self._owners = OwnerTable()
        self.shared = shared

    async def open(self) -> None:
        if self.shared is not None:
            await self.shared.open()

    async def close(self) -> None:
        if self.shared is not None:
            await self.shared.close()

    def record_owner(self, ids: list[str], label: str) -> None:
        """Remember that these objects belong to the key of this label."""
        wall = self._wall()
        new = [id_ for id_ in ids if self._owners.record(id_, label, wall)]
        if new and self.shared is not None:
            spawn(self.shared.put(new, label), "objects")

    async def owner_of(self, ids: list[str]) -> str | None:
        """Return the label of the key that created one of the objects; None if it is unknown."""
        label = self._owners.owner_of(ids, self._wall())
        if label is None and self.shared is not None and ids:
            label = await self.shared.get(ids)
            if label is not None:
                self._owners.record(ids[0], label, self._wall())
        return label

    async def pinned_key(self, pool: KeyPool, request: ProxyRequest) -> str:
        """Return the label of the only key that can see the stored objects a request names; '' if it names none."""
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
        """Remember the key that created the objects in a response, if the upstream stores them."""
        if len(pool.keys) > 1 and (
            request.endpoint == "responses" or (request.endpoint == "chat" and request.document.get("store") is True)
        ):
            self.record_owner(ids_made_by(document), key.label)

    def record_stream(self, pool: KeyPool, request: ProxyRequest, key: UpstreamKey, first: Sequence[bytes]) -> None:
        """Remember the key that created the object named in a stream's first event. first: the bytes so far."""
        if len(pool.keys) > 1 and request.endpoint == "responses":
            for event in Splitter().feed(b"".join(first)):
                self.record_owner(ids_made_by_event(data_of(event) or b""), key.label)
