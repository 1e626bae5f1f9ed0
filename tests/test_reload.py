"""When a running proxy takes new settings, and when it keeps the old ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.config.loader import LoadedSettings
from proxy.config.problems import Problem, SettingsError
from proxy.config.settings import CacheSettings, ServerSettings, Settings
from proxy.reload import MAX_CHANGES, SETTLE, Reloader
from proxy.system.clock import Clock
from tests.pipeline.clock import virtual_time

PUBLIC = Settings(server=ServerSettings(host="0.0.0.0", port=9000))


class Running:
    """A proxy that does nothing but reload. `file`: its settings file, whose whole text is the cache's `when`."""

    def __init__(self, file: Path) -> None:
        file.write_text("always")
        self.file = file
        self.in_force = LoadedSettings(PUBLIC, file)
        self.told: list[LoadedSettings] = []
        self.read: Callable[[], None] = lambda: None  # called while the file is being read
        self.use: Callable[[], None] = lambda: None  # called when settings are put in force
        self.reloader = Reloader(self.in_force, self._read, self._use, Clock())

    def _read(self, in_force: LoadedSettings) -> LoadedSettings:
        self.told.append(in_force)
        text = self.file.read_text()
        self.read()
        if text not in ("always", "never"):
            raise SettingsError((Problem(str(self.file), 1, "cache.when", f"found {text}"),))
        return LoadedSettings(Settings(cache=CacheSettings(when=text)), self.file)

    def _use(self, loaded: LoadedSettings) -> None:
        self.use()
        self.in_force = loaded


@pytest.fixture
def running(tmp_path: Path) -> Callable[[], Running]:
    return lambda: Running(tmp_path / "settings.yaml")


@virtual_time
async def test_new_settings_are_read_in_a_thread_with_the_fixed_ones(
    running: Callable[[], Running], caplog: pytest.LogCaptureFixture
) -> None:
    proxy = running()
    proxy.file.write_text("never")
    assert await proxy.reloader.reload("SIGHUP")
    assert proxy.in_force.settings == Settings(server=PUBLIC.server, cache=CacheSettings(when="never"))
    assert [name for name in ("server.host", "server.port", "cache.when") if f"{name} takes effect" in caplog.text] == [
        "server.host",
        "server.port",
    ]
    proxy.file.write_text("always")
    assert await proxy.reloader.reload("SIGHUP")
    assert [told.settings.server.host for told in proxy.told] == ["0.0.0.0"] * 2
    assert [told.settings.cache.when for told in proxy.told] == ["always", "never"]


@pytest.mark.parametrize("error", [OSError("no such file"), RuntimeError("nobody expected this")])
def test_invalid_settings_leave_the_old_ones_in_force(
    running: Callable[[], Running], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    @virtual_time
    async def told() -> None:
        proxy = running()
        before = proxy.in_force

        def fail() -> None:
            raise error

        proxy.file.write_text("never")
        proxy.use = fail
        assert not await proxy.reloader.reload("SIGHUP")
        assert proxy.in_force is before
        assert str(error) in caplog.text
        assert "stay" in caplog.text
        proxy.use = lambda: None
        assert await proxy.reloader.reload("SIGHUP")
        assert proxy.told[-1] is before

    told()


@virtual_time
async def test_a_file_is_read_when_its_writer_has_finished(running: Callable[[], Running]) -> None:
    proxy = running()
    reload = asyncio.create_task(proxy.reloader.reload("SIGHUP"))
    for text in ("", "n", "neve", "never"):
        proxy.file.write_text(text)
        await asyncio.sleep(SETTLE * 0.9)
        assert not proxy.told
    assert await reload
    assert proxy.in_force.settings.cache.when == "never"
    assert len(proxy.told) == 1


@pytest.mark.parametrize("half", ["ne", "always"])
def test_a_file_that_changed_while_being_read_is_read_again(running: Callable[[], Running], half: str) -> None:
    @virtual_time
    async def told() -> None:
        proxy = running()
        proxy.file.write_text(half)

        def write_on() -> None:
            proxy.read = lambda: None
            proxy.file.write_text("never")

        proxy.read = write_on
        assert await proxy.reloader.reload("SIGHUP")
        assert proxy.in_force.settings.cache.when == "never"
        assert len(proxy.told) == 2

    told()


@virtual_time
async def test_a_file_that_keeps_changing_is_given_up(
    running: Callable[[], Running], caplog: pytest.LogCaptureFixture
) -> None:
    proxy = running()
    lengths = iter(range(1, 10 * MAX_CHANGES))

    def write_on() -> None:
        proxy.file.write_text("x" * next(lengths))

    proxy.read = write_on
    proxy.file.write_text("never")
    assert not await proxy.reloader.reload("SIGHUP")
    assert "does not stop changing" in caplog.text
    assert proxy.in_force.settings is PUBLIC
