"""The stored answers of a running proxy, asked over its admin routes."""

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

_PATIENCE: Final = aiohttp.ClientTimeout(total=600, sock_connect=5, sock_read=120)
_SENT_AT_ONCE: Final = 1024 * 1024


@asynccontextmanager
async def asking(url: str, admin_key: Secret | None) -> AsyncIterator[RemoteCache]:
    """The proxy at `url`; `unix:PATH` is one on a socket. Raises UsageError."""
    connector: aiohttp.BaseConnector | None = None
    if url.startswith("unix:"):
        base, near = "http://localhost", True
        connector = aiohttp.UnixConnector(url.removeprefix("unix:"))
    else:
        try:
            parsed = parse_url(url)
        except Invalid as error:
            raise UsageError(f"--url: {error}") from None
        base = parsed.origin + parsed.path.removesuffix("/v1")
        near = parsed.scheme == "https" or is_loopback(parsed.host)
    headers = {}
    if admin_key is not None:
        if not near:
            raise UsageError("--url: the admin key would go over plain http to another machine: use https")
        headers["Authorization"] = f"Bearer {admin_key.reveal()}"
    async with aiohttp.ClientSession(
        headers=headers, connector=connector, timeout=_PATIENCE, trust_env=False
    ) as session:
        yield RemoteCache(session, base, url)


class RemoteCache:
    """`CacheClient` over HTTP."""

    def __init__(self, session: aiohttp.ClientSession, base: str, shown: str) -> None:
        self._session = session
        self._base = base
        self._shown = shown

    async def facts(self) -> dict[str, Any]:
        status = json.loads(await self._ask("GET", "status"))
        if status["cache"] is None:
            raise CommandError("nothing is stored: the cache of that proxy is off")
        facts: dict[str, Any] = status["cache"]
        return {"backend": status["settings"]["cache"]["backend"], "where": self._shown} | facts

    async def list(self, wanted: FilterArguments) -> AsyncIterator[Sequence[EntrySummary]]:
        asked = {name: str(value) for name, value in wanted.items()} | {"limit": str(PAGE)}
        while True:
            page = json.loads(await self._ask("GET", "cache", params=asked))
            yield page["entries"]
            if not page["next"]:
                return
            asked["after"] = page["next"]

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        found: list[Entry] = []
        for key in dict.fromkeys(key for key, _ in names):
            lines = await self._ask("GET", f"cache/{quote(key, safe='')}", params={"cassette": "1"}, absent=b"")
            try:
                found += [entry for entry in read(self._shown, lines.splitlines()) if name_of(entry) in names]
            except CassetteLineError as error:
                raise CommandError(str(error)) from None
        return found

    async def purge(self, wanted: FilterArguments, dry_run: bool) -> int:
        asked = {**wanted, "dry_run": dry_run} | ({} if wanted else {"all": True})
        count: int = json.loads(await self._ask("POST", "cache/purge", json=asked))["purged"]
        return count

    async def take(self, entries: Iterable[Entry], told: Callable[[], object]) -> ImportResult:
        total = ImportResult()
        lines: list[bytes] = []
        size = 0

        async def send() -> None:
            answer = json.loads(await self._ask("POST", "cache/import", data=b"".join(lines)))
            for name, count in answer.items():
                setattr(total, name, getattr(total, name) + count)
            for _ in lines:
                told()

        for entry in entries:
            lines.append(write_line(entry))
            size += len(lines[-1])
            if size >= _SENT_AT_ONCE:
                await send()
                lines, size = [], 0
        if lines:
            await send()
        return total

    async def explain(self, asked: dict[str, str], headers: dict[str, str], body: bytes) -> dict[str, Any]:
        """How the running proxy sees a request."""
        answer = await self._ask("POST", "cache/explain", params=asked, headers=headers, data=body)
        found: dict[str, Any] = json.loads(answer)
        return found

    async def _ask(self, method: str, path: str, *, absent: bytes | None = None, **request: Any) -> bytes:
        """The answer's body; `absent`: what stands for a 404. Raises CommandError."""
        try:
            async with self._session.request(
                method, f"{self._base}/_proxy/{path}", allow_redirects=False, **request
            ) as answer:
                body = await answer.read()
        except TimeoutError:
            raise CommandError(f"{self._shown} does not answer") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = getattr(getattr(error, "os_error", error), "strerror", None) or type(error).__name__
            raise CommandError(f"{self._shown} is not reached: {reason}") from None
        if answer.status == 404 and absent is not None:
            return absent
        if answer.status != 200:
            hint = " (server.admin_key, or PROXY__SERVER__ADMIN_KEY)" if answer.status == 401 else ""
            raise CommandError(f"{self._shown} answers {answer.status}: {_message(body)}{hint}")
        return body


def _message(body: bytes) -> str:
    try:
        text = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return "is it an openai-proxy?"
    return " ".join(str(text).split())[:300]
