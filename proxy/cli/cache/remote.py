"""The cache of a running proxy, reached over its admin routes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

import aiohttp

from ...cache.cassette import CassetteLineError, name_of, read, write_line
from ...cache.entry import Entry
from ...cache.stores.intake import ImportResult
from ...cache.stores.interface import EntryName
from ...config.problems import Invalid
from ...config.secret import Secret
from ...config.urls import parse_url
from ...config.values import is_loopback
from .interface import PAGE, CommandError, EntrySummary, FilterArguments, UsageError

_TIMEOUT: Final = aiohttp.ClientTimeout(total=600, sock_connect=5, sock_read=120)
_BATCH_BYTES: Final = 1024 * 1024


@asynccontextmanager
async def connect(url: str, admin_key: Secret | None) -> AsyncIterator[RemoteCache]:
    """Yield the cache of the proxy at `url`, or `unix:PATH`. Raises UsageError."""
    connector: aiohttp.BaseConnector | None = None
    if url.startswith("unix:"):
        base, safe = "http://localhost", True
        connector = aiohttp.UnixConnector(url.removeprefix("unix:"))
    else:
        try:
            parsed = parse_url(url)
        except Invalid as error:
            raise UsageError(f"--url: {error}") from None
        base = parsed.origin + parsed.path.removesuffix("/v1")
        safe = parsed.scheme == "https" or is_loopback(parsed.host)
    headers = {}
    if admin_key is not None:
        if not safe:
            raise UsageError("--url: the admin key would go unencrypted to another machine; use https")
        headers["Authorization"] = f"Bearer {admin_key.reveal()}"
    async with aiohttp.ClientSession(
        headers=headers, connector=connector, timeout=_TIMEOUT, trust_env=False
    ) as session:
        yield RemoteCache(session, base, url)


class RemoteCache:
    """`CacheClient` over HTTP."""

    def __init__(self, session: aiohttp.ClientSession, base: str, url: str) -> None:
        """base: of the admin routes; url: as the user wrote it, for messages."""
        self._session = session
        self._base = base
        self._url = url

    async def facts(self) -> dict[str, Any]:
        status = json.loads(await self._ask("GET", "status"))
        if status["cache"] is None:
            raise CommandError("nothing is stored: cache.backend of that proxy is off")
        facts: dict[str, Any] = status["cache"]
        return {"backend": status["settings"]["cache"]["backend"], "where": self._url} | facts

    async def list(self, filters: FilterArguments) -> AsyncIterator[Sequence[EntrySummary]]:
        query = {name: str(value) for name, value in filters.items()} | {"limit": str(PAGE)}
        while True:
            page = json.loads(await self._ask("GET", "cache", params=query))
            yield page["entries"]
            if not page["next"]:
                return
            query["after"] = page["next"]

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        entries: list[Entry] = []
        for key in dict.fromkeys(key for key, _ in names):
            lines = await self._ask("GET", f"cache/{quote(key, safe='')}", params={"cassette": "1"}, absent=b"")
            try:
                entries += [entry for entry in read(self._url, lines.splitlines()) if name_of(entry) in names]
            except CassetteLineError as error:
                raise CommandError(str(error)) from None
        return entries

    async def purge(self, filters: FilterArguments, dry_run: bool) -> int:
        body = {**filters, "dry_run": dry_run} | ({} if filters else {"all": True})
        count: int = json.loads(await self._ask("POST", "cache/purge", json=body))["purged"]
        return count

    async def add(self, entries: Iterable[Entry], on_progress: Callable[[], object]) -> ImportResult:
        total = ImportResult()
        lines: list[bytes] = []
        size = 0

        async def send() -> None:
            answer = json.loads(await self._ask("POST", "cache/import", data=b"".join(lines)))
            for name, count in answer.items():
                setattr(total, name, getattr(total, name) + count)
            for _ in lines:
                on_progress()

        for entry in entries:
            lines.append(write_line(entry))
            size += len(lines[-1])
            if size >= _BATCH_BYTES:
                await send()
                lines, size = [], 0
        if lines:
            await send()
        return total

    async def explain(self, query: dict[str, str], headers: dict[str, str], body: bytes) -> dict[str, Any]:
        """Have the running proxy explain a request."""
        answer = await self._ask("POST", "cache/explain", params=query, headers=headers, data=body)
        explanation: dict[str, Any] = json.loads(answer)
        return explanation

    async def _ask(self, method: str, path: str, *, absent: bytes | None = None, **request: Any) -> bytes:
        """Send a request to an admin route; return the body. absent: returned for a 404. Raises CommandError."""
        try:
            async with self._session.request(
                method, f"{self._base}/_proxy/{path}", allow_redirects=False, **request
            ) as answer:
                body = await answer.read()
        except TimeoutError:
            raise CommandError(f"{self._url} does not answer; is it an openai-proxy?") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = getattr(getattr(error, "os_error", error), "strerror", None) or type(error).__name__
            raise CommandError(f"{self._url} is not reached: {reason}; is the proxy running there?") from None
        if answer.status == 404 and absent is not None:
            return absent
        if answer.status != 200:
            hint = "; set server.admin_key or PROXY__SERVER__ADMIN_KEY" if answer.status == 401 else ""
            raise CommandError(f"{self._url} answers {answer.status}: {_message(body)}{hint}")
        return body


def _message(body: bytes) -> str:
    try:
        text = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return "is it an openai-proxy?"
    return " ".join(str(text).split())[:300]
