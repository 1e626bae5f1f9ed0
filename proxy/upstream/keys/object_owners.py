"""Which key and which client made each stored object: in memory, in a file, and in common with other processes.

A request that names stored objects goes to the key that made them, and only for the client that they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import msgspec
import orjson

from ...protocol.errors import ProxyError
from ...protocol.json_edit import is_ambiguous
from ...protocol.request import Client, ProxyRequest
from ...protocol.routes import printable
from ...protocol.sse import data_of
from ...system.clock import spawn
from .fixed_key import first_usable
from .lease import UpstreamKey
from .owner_table import Owner, OwnerTable, digest_of
from .pool import KeyPool
from .stored_objects import NOTHING, BroughtObjects, NamedObjects, brought_by, names_in

_NAME_OBJECTS: Final = frozenset({"chat", "responses"})
"""Those of the five endpoints whose requests can name stored objects."""

_PREVIOUS: Final = b"previous_response_id"

_MAX_ASKED: Final = 16
"""Objects of one request for which other places are asked."""


class SharedOwners(Protocol):
    """Owners kept outside this process's memory. No method raises, and all are quick if the place does not work.

    Objects are named by `digest_of` their ids; owners are `Owner.text`.
    """

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def put(self, digests: list[str], owner: str, only_new: bool) -> None:
        """Store the owner of these objects. only_new: of those whose owner is not known there."""

    async def get(self, digests: list[str]) -> dict[str, str]:
        """Return the owners of those objects that are known there."""


class Pinned(msgspec.Struct, frozen=True):
    """What follows from the objects that a request names.

    key: label of the only key that will do, "" for any. owner: of the first known object; None if none is known.
    """

    key: str = ""
    owner: Owner | None = None
    named: NamedObjects = NOTHING


UNPINNED: Final = Pinned()


class ObjectOwners:
    """Remembers who made which object. wall: returns Unix seconds. places: where owners are kept beside memory."""

    def __init__(self, wall: Callable[[], float], places: Sequence[SharedOwners] = ()) -> None:
        self._wall = wall
        self._owners = OwnerTable()
        self._places = tuple(places)

    async def open(self) -> None:
        for place in self._places:
            await place.open()

    async def close(self) -> None:
        for place in self._places:
            await place.close()

    # -- what is known -------------------------------------------------------------------------------------------------

    def record(self, ids: Sequence[str], owner: Owner, only_new: bool = False) -> None:
        """Remember the owner of these objects. only_new: of those whose owner is not known yet.

        What one client has made and another one gets as made for itself, too, belongs to neither: the upstream gives
        out the same id again.
        """
        wall, text = self._wall(), owner.text()
        news: dict[str, list[str]] = {}
        unknown = []
        for digest in map(digest_of, ids):
            known = self._owners.get(digest, wall)
            if known is None and only_new and self._places:
                unknown.append(digest)
                continue
            put = text
            if known is not None and (only_new or not may_use(Owner.from_text(known), owner)):
                put = known if only_new else Owner(owner.maker).text()
            if self._owners.record(digest, put, wall):
                news.setdefault(put, []).append(digest)
        for put, digests in news.items():
            for place in self._places:
                spawn(place.put(digests, put, only_new), "objects")
        if unknown:
            spawn(self._record_unless_known(unknown, text), "objects")

    async def _record_unless_known(self, digests: list[str], text: str) -> None:
        """Remember the owner of those objects that no other place knows."""
        missing = dict.fromkeys(digests)
        for place in self._places:
            for digest, known in (await place.get(list(missing))).items() if missing else ():
                self._owners.record(digest, known, self._wall())
                missing.pop(digest, None)
        new = [digest for digest in missing if self._owners.record(digest, text, self._wall(), only_new=True)]
        for place in self._places:
            if new:
                await place.put(new, text, True)

    async def find(self, ids: Sequence[str]) -> dict[str, Owner]:
        """Return the owners of those objects that are known, by id."""
        wall = self._wall()
        found: dict[str, str] = {}
        missing: dict[str, str] = {}
        for id_ in ids:
            digest = digest_of(id_)
            known = self._owners.get(digest, wall)
            if known is not None:
                found[id_] = known
            elif len(missing) < _MAX_ASKED:
                missing[digest] = id_
        for place in self._places:
            if not missing:
                break
            for digest, text in (await place.get(list(missing))).items():
                if digest in missing:
                    found[missing.pop(digest)] = text
                    self._owners.record(digest, text, wall)
        owners = {id_: Owner.from_text(text) for id_, text in found.items()}
        for id_, owner in owners.items():
            self.record([id_], owner, only_new=True)  # what is used is remembered for longer
        return owners

    # -- requests ------------------------------------------------------------------------------------------------------

    async def pin(
        self, pool: KeyPool, named: NamedObjects, client: Client, fixed: Callable[[], UpstreamKey | None]
    ) -> Pinned:
        """Return the only key that can see the objects a request names: the one that made the first known one.

        fixed: returns the key for objects that nobody knows. Raises ProxyError(object_not_found) if one of the objects
        belongs to another client.
        """
        if not named:
            return UNPINNED
        owners = await self.find([*named.certain, *named.possible])
        for id_, owner in owners.items():
            if not may_use(owner, Owner("", client.name, client.cache_partition)):
                raise ProxyError("object_not_found", f"No object with id {printable(id_, 80)!r} found.", param="id")
        first = next((owners[id_] for id_ in (*named.certain, *named.possible) if id_ in owners), None)
        key = key_made_by(pool, first.maker) if first is not None else None
        if key is None and (named.certain or first is not None):
            key = fixed()
        return Pinned(key.label if key is not None else "", first, named)

    async def pinned_key(self, pool: KeyPool, request: ProxyRequest, now: float) -> str:
        """Return the label of the only key that may serve a request to one of the five endpoints; "" for any."""
        named = self._named(pool, request)
        if not named:
            return ""
        if request.client.name and request.body.count(_PREVIOUS) > 1 and is_ambiguous(request.body, _PREVIOUS.decode()):
            raise ProxyError("bad_request", "the body names two previous responses", param=_PREVIOUS.decode())
        pinned = await self.pin(pool, named, request.client, lambda: _fixed_key(pool, request.model, now))
        return pinned.key if len(pool.keys) > 1 else ""

    def _named(self, pool: KeyPool, request: ProxyRequest) -> NamedObjects:
        if request.endpoint not in _NAME_OBJECTS or (len(pool.keys) == 1 and not request.client.name):
            return NOTHING  # nothing depends on it
        return names_in(request.document, query=request.route.query)

    # -- responses -----------------------------------------------------------------------------------------------------

    def record_brought(self, key: UpstreamKey, pinned: Pinned, client: Client | None, brought: BroughtObjects) -> None:
        """Remember who made the objects in a response, and whose they are.

        What the response has made belongs to whom the object belongs that the request named, else to `client`. What the
        request named itself, and what the response only mentions, has no owner unless it is known already.
        client: None if the request made nothing.
        """
        owner: Owner | None = None
        if pinned.owner is not None and pinned.owner.client:
            owner = pinned.owner._replace(maker=key.maker)
        elif client is not None:
            owner = Owner(key.maker, client.name, client.cache_partition)
        named = {*pinned.named.certain, *pinned.named.possible}
        made = [id_ for id_ in brought.made if id_ not in named] if owner is not None else []
        if owner is not None and made:
            self.record(made, owner)
        seen = [id_ for id_ in (*brought.made, *brought.seen) if id_ in named or id_ not in made]
        if seen:
            self.record(seen, Owner(key.maker), only_new=True)
        if brought.sealed:
            self.record(brought.sealed, Owner(key.maker))  # who has it was given it

    def record_answer(self, pool: KeyPool, request: ProxyRequest, key: UpstreamKey, document: object) -> None:
        """Remember who made the objects in a response of one of the five endpoints, or in an event of it."""
        if request.endpoint == "chat" and request.document.get("store") is not True and isinstance(document, Mapping):
            document = document.get("choices")  # it is not kept, but audio in it is
        elif request.endpoint not in _NAME_OBJECTS:
            return
        brought = brought_by(document)
        if brought:
            self.record_brought(key, Pinned(named=self._named(pool, request)), request.client, brought)

    def watch_stream(self, pool: KeyPool, request: ProxyRequest, key: UpstreamKey) -> Callable[[bytes], None] | None:
        """Return what remembers the objects in each event of a stream; None if the stream brings none."""
        if request.endpoint == "responses":
            marks: tuple[bytes, ...] = (b'"item"', b'"response"')
        elif request.endpoint == "chat":
            marks = (b'"audio"',)
        else:
            return None
        stored = request.endpoint == "chat" and request.document.get("store") is True

        def watch(event: bytes) -> None:
            nonlocal stored
            if not (stored or any(mark in event for mark in marks)):
                return
            try:
                document = orjson.loads(data_of(event) or b"")
            except orjson.JSONDecodeError:
                return
            stored = False  # the id of a stored chat is the same in every chunk
            self.record_answer(pool, request, key, document)

        return watch


def key_made_by(pool: KeyPool, maker: str) -> UpstreamKey | None:
    """Return the key that this stands for, else one of its upstream; None if the upstream is gone."""
    upstream = maker.partition("-")[0] + "-"
    same = [key for key in pool.keys if key.maker.startswith(upstream)]
    return next((key for key in same if key.maker == maker), same[0] if same else None)


def _fixed_key(pool: KeyPool, model: str, now: float) -> UpstreamKey | None:
    return first_usable(pool, [key for key in pool.keys if key.serves(model)], model, now)


def may_use(owner: Owner, client: Owner) -> bool:
    """Whether a client may use an object: it is its own, it has none, or both share a cache."""
    return (
        not (owner.client or owner.partition)
        or not client.partition
        or client.client == owner.client
        or client.partition == owner.partition
    )
