"""The stored answers for operators: list, look, purge, and lines of a cassette out and in (contract 4)."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec
import orjson

from ..cache.cassette import CassetteLineError, read, write
from ..cache.entry import Entry
from ..cache.listing import listing
from ..cache.stores.intake import import_entries
from ..cache.stores.interface import Filter, StoreError
from ..cache.stores.tiered import TieredStore
from ..observability.aggregate import pages_joined
from ..pipeline.explain import explain, request_of
from ..protocol.durations import parse_duration
from ..protocol.errors import ProxyError
from ..protocol.headers import Raw
from ..protocol.routes import printable
from ..services import Services
from .access import client_named
from .peers import LocalAnswer, PeerWorkers

_TEXTS: Final = ("model", "endpoint", "namespace", "tag", "key", "prefix")
_MOST_LISTED: Final = 1000


class CacheAdmin:
    """What the routes below `/_proxy/cache` do. Every method raises Refusal."""

    def __init__(self, services: Services, siblings: PeerWorkers | None = None) -> None:
        self._services = services
        self._siblings = siblings or PeerWorkers(None)

    def for_peers(self) -> dict[str, LocalAnswer]:
        """What other workers may ask: of our memory."""
        return {
            "list": lambda query: self._own_list(query.decode("utf-8", "surrogateescape")),
            "entries": lambda key: self._read(key.decode("utf-8", "surrogateescape")),
            "forget": self._forget,
            "import": self._own_take,
        }

    @property
    def _scattered(self) -> bool:
        """Each worker has entries of its own, and only there."""
        return self._siblings.any and self._store().slower is None

    async def list(self, query: str) -> dict[str, Any]:
        """A page: `after` is the `next` of the page before, "" at the end; the filters are those of a purge."""
        page = await self._own_list(query)
        if not self._scattered:
            return page
        return pages_joined([page, *await self._siblings.ask("list", query.encode("utf-8", "surrogateescape"))])

    async def _own_list(self, query: str) -> dict[str, Any]:
        asked = _query(query, (*_TEXTS, "older_than", "after", "limit"))
        after = asked.pop("after", "")
        limit = asked.pop("limit", "100")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= _MOST_LISTED):
            raise _wrong("limit", f"a number from 1 to {_MOST_LISTED}")
        which = self._filter(asked)
        try:
            page = await self._store().list(which, after, int(limit))
        except StoreError as error:
            raise _broken(error) from None
        except ValueError:
            raise _wrong("after", "the `next` of the page before") from None
        wall = self._services.clock.wall()
        return {"entries": [listing(entry, size, wall) for entry, size in page.entries], "next": page.next}

    async def show(self, key: str, query: str) -> dict[str, Any] | bytes:
        """The stored forms of a key; bytes: the lines of a cassette, for `?cassette=1`."""
        asked = _query(query, ("body", "cassette"))
        for name, value in asked.items():
            if value not in ("0", "1"):
                raise _wrong(name, "0 or 1")
        found = await self._read(key)
        if self._scattered and len(found) < 2:
            there = {entry.form: entry for entry in [*await self._siblings.entries(key), *found]}
            found = [there[form] for form in sorted(there)]
        if not found:
            raise ProxyError("unknown_route", f"no stored answer has the key {printable(key)!r}")
        if asked.get("cassette") == "1":
            return b"".join(write(found))
        wall = self._services.clock.wall()
        with_body = asked.get("body") == "1"
        forms = [listing(entry, entry.size, wall) | (_body(entry) if with_body else {}) for entry in found]
        return {"key": key, "forms": forms}

    async def _read(self, key: str) -> Sequence[Entry]:
        try:
            return sorted(await self._store().read([(key, "json"), (key, "sse")]), key=lambda entry: entry.form)
        except StoreError as error:
            raise _broken(error) from None

    async def purge(self, body: bytes) -> dict[str, Any]:
        """Every worker's memory follows at once; what is only there is counted where it is."""
        which, dry_run = self._purged(body)
        try:
            count = await self._store().purge(which, dry_run)
        except StoreError as error:
            raise _broken(error) from None
        elsewhere = await self._siblings.ask("forget", body)
        return {"purged": count + (sum(elsewhere) if self._scattered else 0), "dry_run": dry_run}

    async def _forget(self, body: bytes) -> int:
        return await self._store().forget(*self._purged(body))

    def _purged(self, body: bytes) -> tuple[Filter, bool]:
        """What shall be dropped, and whether only counted."""
        asked = _object(body)
        given = set(asked)
        flags = {name: asked.pop(name, False) for name in ("all", "dry_run")}
        for name, value in flags.items():
            if type(value) is not bool:
                raise _wrong(name, "true or false")
        which = self._filter(asked)
        filters = given - set(flags)
        if not filters and not flags["all"]:
            raise ProxyError("invalid_option", 'a purge needs a filter, or "all": true', param="all")
        if filters and flags["all"]:
            raise ProxyError("invalid_option", '"all" goes without filters', param="all")
        return which, flags["dry_run"]

    async def take(self, body: bytes) -> dict[str, Any]:
        """Entries as lines of a cassette; a bad line changes nothing."""
        taken = await self._own_take(body)
        if self._scattered:
            await self._siblings.ask("import", body)
        return taken

    async def _own_take(self, body: bytes) -> dict[str, Any]:
        try:
            entries = list(read("line", body.split(b"\n")))
        except CassetteLineError as error:
            raise ProxyError("bad_request", str(error)) from None
        try:
            taken = await import_entries(self._store(), entries, self._services.clock.wall())
        except StoreError as error:
            raise _broken(error) from None
        return msgspec.structs.asdict(taken)

    async def explain(self, query: str, headers: Sequence[Raw], body: bytes) -> dict[str, Any]:
        """The key of the request `body`, and how it differs from what is stored. Options by header, as in a request."""
        asked = _query(query, ("target", "client"))
        services = self._services
        client = client_named(services.settings, asked.get("client"))
        call = request_of(services.addresses, asked.get("target", "/v1/chat/completions"), headers, body, client)
        try:
            pages = self._summaries(Filter(endpoint=call.endpoint))
            found = await explain(services.planner, services.settings.cache, call, pages)
        except StoreError as error:
            raise _broken(error) from None
        return {"client": client.name or None} | found

    async def _summaries(self, which: Filter) -> AsyncIterator[Sequence[dict[str, Any]]]:
        store, after, wall = self._services.store, "", self._services.clock.wall()
        while store.enabled:
            page = await store.list(which, after, _MOST_LISTED)
            yield [listing(entry, size, wall) for entry, size in page.entries]
            after = page.next
            if not after:
                return

    def _store(self) -> TieredStore:
        if not self._services.store.enabled:
            raise ProxyError("bad_request", "nothing is stored: the cache is off")
        return self._services.store

    def _filter(self, asked: Mapping[str, object]) -> Filter:
        found: dict[str, Any] = {}
        for name, value in asked.items():
            if name == "older_than":
                found["stored_before"] = self._services.clock.wall() - _seconds(name, value)
            elif name not in _TEXTS:
                raise ProxyError("invalid_option", f"{printable(name)}: no such field", param=printable(name))
            elif not isinstance(value, str):
                raise _wrong(name, "a text")
            else:
                found[name] = value
        return Filter(**found)


def _seconds(name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12:
        return float(value)
    try:
        return parse_duration(value if isinstance(value, str) else "")
    except ValueError as error:
        raise _wrong(name, str(error)) from None


def _object(body: bytes) -> dict[str, Any]:
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ProxyError("invalid_json", "the body is not JSON") from None
    if not isinstance(asked, dict):
        raise ProxyError("invalid_json", "the body must be a JSON object")
    return asked


def _query(query: str, known: tuple[str, ...]) -> dict[str, str]:
    asked: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True, max_num_fields=50):
        if name not in known:
            raise ProxyError("invalid_option", f"{printable(name)}: no such parameter", param=printable(name))
        asked[name] = value
    return asked


def _body(entry: Entry) -> dict[str, str]:
    try:
        return {"body": entry.body.decode()}
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(entry.body).decode()}


def _wrong(name: str, expected: str) -> ProxyError:
    return ProxyError("invalid_option", f"{name}: expected {expected}", param=name)


def _broken(error: StoreError) -> ProxyError:
    return ProxyError("internal_error", f"the store cannot be asked: {error}")
