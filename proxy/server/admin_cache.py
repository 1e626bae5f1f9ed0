"""The admin routes of the cache: list, show, purge, export, import and explain (docs/caching.md)."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec

from ..cache.cassette import CassetteLineError, read, write
from ..cache.entry import Entry
from ..cache.listing import listing
from ..cache.stores.intake import import_entries
from ..cache.stores.interface import Filter, StoreError
from ..cache.stores.tiered import TieredStore
from ..observability.aggregate import pages_joined
from ..observability.event_counters import operator_action
from ..pipeline.explain import explain, request_of
from ..protocol.durations import parse_duration
from ..protocol.errors import ProxyError
from ..protocol.headers import Raw
from ..protocol.request import parse_body
from ..protocol.routes import printable
from ..services import Services
from .access import client_named
from .peers import LocalAnswer, PeerWorkers

_FILTERS: Final = ("model", "endpoint", "namespace", "tag", "key", "prefix")
_MAX_PAGE: Final = 1000


class CacheAdmin:
    """The routes below `/_proxy/cache`. Every method raises ProxyError."""

    def __init__(self, services: Services, peers: PeerWorkers | None = None) -> None:
        self._services = services
        self._peers = peers or PeerWorkers(None)

    def for_peers(self) -> dict[str, LocalAnswer]:
        """Return the handlers of other workers' requests, about this worker's memory."""
        return {
            "list": lambda query: self._own_list(query.decode("utf-8", "surrogateescape")),
            "entries": lambda key: self._read(key.decode("utf-8", "surrogateescape")),
            "forget": self._forget,
            "import": self._own_import,
        }

    @property
    def _memory_only(self) -> bool:
        """True if the workers have no common store, so that each has entries that the others lack."""
        return self._peers.any and self._store().slower is None

    async def list(self, query: str) -> dict[str, Any]:
        """Return a page of entries. query: filters of a purge, `limit`, and `after`: the `next` of the last page."""
        page = await self._own_list(query)
        if not self._memory_only:
            return page
        return pages_joined([page, *await self._peers.ask("list", query.encode("utf-8", "surrogateescape"))])

    async def _own_list(self, query: str) -> dict[str, Any]:
        fields = _query(query, (*_FILTERS, "older_than", "after", "limit"))
        after = fields.pop("after", "")
        limit = fields.pop("limit", "100")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= _MAX_PAGE):
            raise _invalid("limit", f"a number from 1 to {_MAX_PAGE}")
        filters = self._filter(fields)
        try:
            page = await self._store().list(filters, after, int(limit))
        except StoreError as error:
            raise _store_failed(error) from None
        except ValueError:
            raise _invalid("after", "the `next` of the page before") from None
        wall = self._services.clock.wall()
        return {"entries": [listing(entry, size, wall) for entry, size in page.entries], "next": page.next}

    async def show(self, key: str, query: str) -> dict[str, Any] | bytes:
        """Return the entries of a key; with `?cassette=1`, as lines of a cassette."""
        flags = _query(query, ("body", "cassette"))
        for name, value in flags.items():
            if value not in ("0", "1"):
                raise _invalid(name, "0 or 1")
        entries = await self._read(key)
        if self._memory_only and len(entries) < 2:
            by_form = {entry.form: entry for entry in [*await self._peers.entries(key), *entries]}
            entries = [by_form[form] for form in sorted(by_form)]
        if not entries:
            raise ProxyError("unknown_route", f"no stored response has the key {printable(key)!r}")
        if flags.get("cassette") == "1":
            return b"".join(write(entries))
        wall = self._services.clock.wall()
        with_body = flags.get("body") == "1"
        forms = [listing(entry, entry.size, wall) | (_body(entry) if with_body else {}) for entry in entries]
        return {"key": key, "forms": forms}

    async def _read(self, key: str) -> Sequence[Entry]:
        try:
            return sorted(await self._store().read([(key, "json"), (key, "sse")]), key=lambda entry: entry.form)
        except StoreError as error:
            raise _store_failed(error) from None

    async def purge(self, body: bytes, who: str) -> dict[str, Any]:
        """Delete entries, in every worker's memory too. Without a common store, the workers' numbers are added.

        who: asks for it, for the log. What matches nothing says so in `message`.
        """
        filters, dry_run = self._purge_request(body)
        try:
            count = await self._store().purge(filters, dry_run)
        except StoreError as error:
            raise _store_failed(error) from None
        peer_counts = await self._peers.ask("forget", body)
        count += sum(peer_counts) if self._memory_only else 0
        which = _shown(filters)
        if not dry_run:
            operator_action("purge", who, f"{count} stored {'response' if count == 1 else 'responses'} ({which})")
        message = {} if count else {"message": f"nothing matches: {which}"}
        return {"purged": count, "dry_run": dry_run} | message

    async def _forget(self, body: bytes) -> int:
        return await self._store().forget(*self._purge_request(body))

    def _purge_request(self, body: bytes) -> tuple[Filter, bool]:
        """Return the filters of a purge, and whether it is a dry run."""
        fields = parse_body(body)
        names = set(fields)
        flags = {name: fields.pop(name, False) for name in ("all", "dry_run")}
        for name, value in flags.items():
            if type(value) is not bool:
                raise _invalid(name, "true or false")
        filters = self._filter(fields)
        is_filtered = bool(names - set(flags))
        if not is_filtered and not flags["all"]:
            raise ProxyError("invalid_option", 'a purge needs a filter, or "all": true', param="all")
        if is_filtered and flags["all"]:
            raise ProxyError("invalid_option", '"all" goes without filters', param="all")
        return filters, flags["dry_run"]

    async def import_lines(self, body: bytes, who: str) -> dict[str, Any]:
        """Store the entries of a cassette's lines; if one line is bad, none is stored."""
        result = await self._own_import(body)
        operator_action("import", who, ", ".join(f"{count} {name}" for name, count in result.items()))
        if self._memory_only:
            await self._peers.ask("import", body)
        return result

    async def _own_import(self, body: bytes) -> dict[str, Any]:
        try:
            entries = list(read("line", body.split(b"\n")))
        except CassetteLineError as error:
            raise ProxyError("bad_request", str(error)) from None
        try:
            result = await import_entries(self._store(), entries, self._services.clock.wall())
        except StoreError as error:
            raise _store_failed(error) from None
        return msgspec.structs.asdict(result)

    async def explain(self, query: str, headers: Sequence[Raw], body: bytes) -> dict[str, Any]:
        """Explain the request `body`: its cache key, and how it differs from stored requests. headers: its options."""
        parameters = _query(query, ("target", "client"))
        services = self._services
        client = client_named(services.settings, parameters.get("client"))
        target = parameters.get("target", "/v1/chat/completions")
        request = request_of(services.addresses, target, headers, body, client)
        try:
            pages = self._summaries(Filter(endpoint=request.endpoint))
            explanation = await explain(services.planner, services.settings.cache, request, pages)
        except StoreError as error:
            raise _store_failed(error) from None
        return {"client": client.name or None} | explanation

    async def _summaries(self, filters: Filter) -> AsyncIterator[Sequence[dict[str, Any]]]:
        store, after, wall = self._services.store, "", self._services.clock.wall()
        while store.enabled:
            page = await store.list(filters, after, _MAX_PAGE)
            yield [listing(entry, size, wall) for entry, size in page.entries]
            after = page.next
            if not after:
                return

    def _store(self) -> TieredStore:
        if not self._services.store.enabled:
            raise ProxyError("bad_request", "nothing is stored: cache.backend is off")
        return self._services.store

    def _filter(self, fields: Mapping[str, object]) -> Filter:
        filters: dict[str, Any] = {}
        for name, value in fields.items():
            if name == "older_than":
                filters["stored_before"] = self._services.clock.wall() - _seconds(name, value)
            elif name not in _FILTERS:
                known = f"known are {', '.join(_FILTERS)} and older_than"
                raise ProxyError("invalid_option", f"{printable(name)}: no such field; {known}", param=printable(name))
            elif not isinstance(value, str):
                raise _invalid(name, "a string")
            else:
                filters[name] = value
        return Filter(**filters)


def _shown(filters: Filter) -> str:
    """Return the filters of a purge as an operator reads them."""
    given = {name: value for name, value in asdict(filters).items() if value is not None}
    return ", ".join(f"{name} {printable(str(value))}" for name, value in given.items()) or "all"


def _seconds(name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12:
        return float(value)
    try:
        return parse_duration(value if isinstance(value, str) else "")
    except ValueError as error:
        raise _invalid(name, str(error)) from None


def _query(query: str, known: tuple[str, ...]) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True, max_num_fields=50):
        if name not in known:
            message = f"{printable(name)}: no such parameter; known are {', '.join(known)}"
            raise ProxyError("invalid_option", message, param=printable(name))
        parameters[name] = value
    return parameters


def _body(entry: Entry) -> dict[str, str]:
    try:
        return {"body": entry.body.decode()}
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(entry.body).decode()}


def _invalid(name: str, expected: str) -> ProxyError:
    return ProxyError("invalid_option", f"{name}: expected {expected}", param=name)


def _store_failed(error: StoreError) -> ProxyError:
    return ProxyError("internal_error", f"the store failed: {error}")
