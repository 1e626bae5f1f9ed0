"""`Reloader`: puts new settings in force in a running proxy, on SIGHUP or when a file that holds a key has changed.

The new services are built beside the old ones and take their place in one step; requests in flight end with the
services they began with. The settings that are validated are those that will be in force: the new ones, with what
cannot change while the proxy runs (the listener). If they cannot be read or used, nothing changes and the log says why.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from .config.loader import LoadedSettings
from .config.problems import SettingsError
from .config.schema import with_fixed
from .observability.event_counters import ACTIONS
from .system.clock import Clock

log = logging.getLogger("proxy.reload")

CHECK_INTERVAL: Final = 2.0
"""Seconds between two checks of the files that are watched."""

SETTLE: Final = 0.1
"""Seconds for which the settings file must not change before it is read, because it may be written in several steps."""

MAX_CHANGES: Final = 50
"""The number of changes in a row after which a reload is given up."""

Read = Callable[[LoadedSettings], LoadedSettings]
"""Reads the settings again, for those in force. Raises SettingsError."""

Stamp = tuple[int, ...] | None


def stamp(path: Path) -> Stamp:
    """Return what differs if a file has changed. Symbolic links are followed, because secret mounts swap them."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class Reloader:
    """loaded: the settings in force. use: puts others in force; raises OSError if it cannot."""

    def __init__(self, loaded: LoadedSettings, read: Read, use: Callable[[LoadedSettings], None], clock: Clock) -> None:
        self._in_force = loaded
        self._read = read
        self._use = use
        self._clock = clock
        self._stamps = self._stamps_of(loaded)
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Reload soon: SIGHUP came."""
        self._asked.set()

    async def run(self) -> None:
        """Wait for reasons to reload, for as long as the proxy runs."""
        while True:
            waiting = asyncio.ensure_future(self._asked.wait())
            pausing = asyncio.ensure_future(self._clock.sleep(CHECK_INTERVAL))
            try:
                await asyncio.wait({waiting, pausing}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
                pausing.cancel()
            if self._asked.is_set():
                self._asked.clear()
                await self.reload("SIGHUP")
            elif changed := [path for path, before in self._stamps.items() if stamp(path) not in (before, None)]:
                await self.reload(f"{changed[0]} changed")

    async def reload(self, why: str) -> bool:
        """Reload. why: for the log. Returns whether new settings are in force."""
        self._stamps = {path: stamp(path) for path in self._stamps}  # a bad file is logged once
        try:
            loaded = await self._settled()
            settings, fixed = with_fixed(self._in_force.settings, loaded.settings)
            loaded = replace(loaded, settings=settings)
            self._use(loaded)
        except (SettingsError, OSError) as error:
            for problem in error.problems if isinstance(error, SettingsError) else [error]:
                log.error("%s", problem)
            log.error("reload (%s): these settings cannot be used; the old ones stay", why)
            return False
        except Exception:
            log.exception("reload (%s): failed inside the proxy; the old settings stay", why)
            return False
        self._in_force = loaded
        self._stamps = self._stamps_of(loaded)
        for name in fixed:
            log.warning("reload (%s): %s takes effect at the next start", why, name)
        for warning in loaded.warnings:
            log.warning("%s", warning)
        ACTIONS["reload"] += 1
        log.info("reload (%s): new settings in force", why)
        return True

    async def _settled(self) -> LoadedSettings:
        """Return the settings once their file does not change any more. Raises SettingsError, OSError.

        They are read in a thread, because commands for keys may run.
        """
        for _ in range(MAX_CHANGES):
            before = self._written()
            await self._clock.sleep(SETTLE)
            if self._written() != before:
                continue
            try:
                loaded = await asyncio.to_thread(self._read, self._in_force)
            except SettingsError:
                if self._written() == before:
                    raise
            else:
                if self._written() == before:
                    return loaded
        raise OSError(f"{self._in_force.file} does not stop changing")

    def _written(self) -> Stamp:
        return stamp(self._in_force.file) if self._in_force.file is not None else None

    @staticmethod
    def _stamps_of(loaded: LoadedSettings) -> dict[Path, Stamp]:
        return {path: stamp(path) for path in loaded.watched}
