"""Stored objects on routes that are passed through: which key a request needs, and whose objects a response brings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from ..protocol.request import Client
from ..protocol.routes import Route
from ..services import Services
from ..upstream.keys.lease import UpstreamKey
from ..upstream.keys.object_owners import UNPINNED, Pinned
from ..upstream.keys.response_watch import ResponseWatch
from ..upstream.keys.stored_objects import BroughtObjects, names_in
from ..upstream.response import ResponseInHand

_MAKES: Final = frozenset({"POST", "PUT", "PATCH"})


class PassedObjects:
    """Finds the objects in requests and responses, and asks and tells `ObjectOwners` of them."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def matter(self, client: Client) -> bool:
        """Return whether anything depends on the objects that a request of this client names."""
        return len(self._services.pool.keys) > 1 or bool(client.name)

    async def pin(
        self,
        route: Route,
        document: object,
        client: Client,
        fixed: Callable[[], UpstreamKey | None],
    ) -> Pinned:
        """Return which key a request needs. Raises ProxyError(object_not_found).

        document: its body, if that is JSON and could be read. fixed: returns the key for unknown objects.
        """
        if not self.matter(client):
            return UNPINNED
        named = names_in(document, route.path, route.query)
        return await self._services.object_owners.pin(self._services.pool, named, client, fixed)

    def watch(
        self, method: str, route: Route, client: Client, pinned: Pinned, response: ResponseInHand
    ) -> ResponseWatch | None:
        """Return what reads a copy of a response; None if it brings no objects. Its `Location` may name one, too."""
        headers = response.response.headers
        if not route.stateful or response.status >= 300 or method in ("HEAD", "DELETE", "OPTIONS"):
            return None
        maker = client if method in _MAKES else None
        record = partial(self._services.object_owners.record_brought, response.lease.key, pinned, maker)
        if located := names_in(None, headers.get("Location", "").partition("?")[0]).certain:
            record(BroughtObjects(located))
        if not ResponseWatch.reads(headers.get("Content-Type", "")):
            return None
        encoding = "" if response.decoded else headers.get("Content-Encoding", "").strip().lower()
        length = headers.get("Content-Length", "")
        known = int(length) if length.isascii() and length.isdigit() else None
        return ResponseWatch(encoding, known, record)
