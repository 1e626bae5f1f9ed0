"""New settings for a running proxy: on SIGHUP, or when a file that holds a key changed.

The new world is compiled beside the old one and takes its place in one step; requests in flight end in the world they
began in. What cannot be read or used changes nothing, and the log says why.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from .config import Loaded, Settings, SettingsError
from .seams import Seams

log = logging.getLogger("proxy")

LOOK: Final = 2.0
"""Seconds between two looks at the files that are watched."""

FIXED: Final = (
    "server.host",
    "server.port",
    "server.workers",
    "server.socket",
    "server.ops",
    "cache.backend",
    "cache.path",
    "cache.memory_size",
    "cache.max_size",
    "cache.max_entry",
    "cache.mode",
    "cache.cassette",
    "cache.stale_while_revalidate",
    "cache.stale_if_error",
    "throttle.backend",
    "redis.url",
    "redis.prefix",
    "ledger.path",
    "ledger.enabled",
)
"""Settings that hold until the next start: what they describe is open, bound or allocated."""


def with_fixed(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """`new` with what is fixed taken from `old`; and the names of those that would have been other."""
    changed = [path for path in FIXED if attrgetter(path)(old) != attrgetter(path)(new)]
    for path in changed:
        section, name = path.split(".")
        value: Any = attrgetter(path)(old)
        new = replace(new, **{section: replace(getattr(new, section), **{name: value})})
    return new, changed


Stamp = tuple[int, ...] | None


def stamp(path: Path) -> Stamp:
    """What tells that a file is another than before: symbolic links are followed, as secret mounts swap those."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class Reloader:
    """read: the settings anew, raises SettingsError; use: takes them, and returns what it has to say about them."""

    def __init__(
        self, loaded: Loaded, read: Callable[[], Loaded], use: Callable[[Loaded], Sequence[str]], seams: Seams
    ) -> None:
        self._read = read
        self._use = use
        self._seams = seams
        self._stamps = self._look(loaded)
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """SIGHUP came."""
        self._asked.set()

    async def run(self) -> None:
        """For as long as the proxy runs."""
        while True:
            waiting = asyncio.ensure_future(self._asked.wait())
            napping = asyncio.ensure_future(self._seams.sleep(LOOK))
            try:
                await asyncio.wait({waiting, napping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
                napping.cancel()
            if self._asked.is_set():
                self._asked.clear()
                await self.reload("SIGHUP")
            elif changed := [path for path, before in self._stamps.items() if stamp(path) not in (before, None)]:
                await self.reload(f"{changed[0]} changed")

    async def reload(self, why: str) -> bool:
        """Whether new settings are in force. Reading may run commands for keys, so it is done beside the loop."""
        self._stamps = {path: stamp(path) for path in self._stamps}  # a bad file is complained about once
        try:
            loaded = await asyncio.to_thread(self._read)
        except SettingsError as error:
            for problem in error.problems:
                log.error("%s", problem)
            log.error("reload (%s): these settings cannot be used; the old ones stay", why)
            return False
        said = self._use(loaded)
        self._stamps = self._look(loaded)
        for line in said:
            log.warning("reload (%s): %s", why, line)
        for warning in loaded.warnings:
            log.warning("%s", warning)
        log.info("reload (%s): new settings in force", why)
        return True

    @staticmethod
    def _look(loaded: Loaded) -> dict[Path, Stamp]:
        return {path: stamp(path) for path in loaded.watched}
