"""New settings for a running proxy: on SIGHUP, or when a file that holds a key changed.

The new world is compiled beside the old one and takes its place in one step; requests in flight end in the world they
began in. A reload is no first start: what is validated is what will be in force, the new settings with what cannot
change (the listener). What cannot be read or used changes nothing, and the log says why.
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
from .system.clock import Clock

log = logging.getLogger("proxy")

LOOK: Final = 2.0
"""Seconds between two looks at the files that are watched."""

SETTLE: Final = 0.1
"""Seconds for which the settings file must not have changed when it is read: it may be written in several steps."""

UNSETTLED: Final = 50
"""So many times in a row it may have changed before the reload is given up."""

Read = Callable[[LoadedSettings], LoadedSettings]
"""Reads the settings again, to be put in force instead of those given. Raises SettingsError."""

Stamp = tuple[int, ...] | None


def stamp(path: Path) -> Stamp:
    """What tells that a file is another than before: symbolic links are followed, as secret mounts swap those."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class Reloader:
    """loaded: what is in force; use: puts other settings in force, raises OSError if it cannot."""

    def __init__(self, loaded: LoadedSettings, read: Read, use: Callable[[LoadedSettings], None], clock: Clock) -> None:
        self._in_force = loaded
        self._read = read
        self._use = use
        self._clock = clock
        self._stamps = self._look(loaded)
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """SIGHUP came."""
        self._asked.set()

    async def run(self) -> None:
        """For as long as the proxy runs."""
        while True:
            waiting = asyncio.ensure_future(self._asked.wait())
            napping = asyncio.ensure_future(self._clock.sleep(LOOK))
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
        """Whether new settings are in force."""
        self._stamps = {path: stamp(path) for path in self._stamps}  # a bad file is complained about once
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
        self._stamps = self._look(loaded)
        for name in fixed:
            log.warning("reload (%s): %s takes effect at the next start", why, name)
        for warning in loaded.warnings:
            log.warning("%s", warning)
        log.info("reload (%s): new settings in force", why)
        return True

    async def _settled(self) -> LoadedSettings:
        """The settings of a file that nobody is writing. Raises SettingsError, OSError.

        They are read beside the loop, as reading may run commands for keys.
        """
        for _ in range(UNSETTLED):
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
    def _look(loaded: LoadedSettings) -> dict[Path, Stamp]:
        return {path: stamp(path) for path in loaded.watched}
