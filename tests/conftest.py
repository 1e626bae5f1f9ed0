"""Fixtures for tests on real sockets (scripted upstream, real process, raw client); which tests are slow."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import hypothesis
import pytest

from tests.client import Client
from tests.guard import SLOW_FIXTURES, SLOW_FOLDERS, Guard
from tests.launch import Config, Launch, ProxyProcess, settings, write_config
from tests.scripted_upstream import ScriptedUpstream
from tests.upstream_answers import behave

# The machine may be busy with another worker: how long an example takes says nothing about what it proves.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

GUARD = Guard()


def pytest_configure() -> None:
    GUARD.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if item.nodeid.startswith(SLOW_FOLDERS) or not SLOW_FIXTURES.isdisjoint(fixtures):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Keep modules and collected tests out of the garbage collector's reach: many tests ask for a full collection."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    if item.get_closest_marker("slow") is None:
        GUARD.start()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    refused = GUARD.stop()
    yield
    assert not refused, f"no slow test, but it opened a socket or started a process: {refused}"


@pytest.fixture(scope="session")
def upstream_server() -> Iterator[ScriptedUpstream]:
    server = ScriptedUpstream(behave)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def upstream(upstream_server: ScriptedUpstream) -> Iterator[ScriptedUpstream]:
    """The scripted upstream with an empty ledger. Fails the test when something arrived that must not."""
    upstream_server.reset()
    yield upstream_server
    complaints = list(upstream_server.complaints)
    upstream_server.reset()
    assert not complaints, complaints


def _launcher(directory: Callable[[], Path]) -> Iterator[Launch]:
    running: list[ProxyProcess] = []

    def start(
        config: str | Config | None = None, env: Mapping[str, str] | None = None, args: Sequence[str] = ()
    ) -> ProxyProcess:
        home = directory()
        argv = ["serve", "--port", "0", *args]
        if config is not None:
            argv += ["--config", str(write_config(home, config))]
        process = ProxyProcess(argv, home, env or {})
        running.append(process)
        process.start()
        return process

    yield start
    problems = [problem for process in running for problem in process.finish()]
    assert not problems, "\n".join(problems)


@pytest.fixture
def launch(tmp_path: Path, upstream: ScriptedUpstream) -> Iterator[Launch]:
    """Starts real proxies; stops them afterwards and fails the test when a log shows a traceback or a key."""
    yield from _launcher(lambda: tmp_path)


@pytest.fixture(scope="session")
def _shared_proxy(
    upstream_server: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProxyProcess]:
    launcher = _launcher(lambda: tmp_path_factory.mktemp("shared"))
    start = next(launcher)
    yield start(settings(upstream_server.port))
    for _ in launcher:
        pass


@pytest.fixture
def proxy(_shared_proxy: ProxyProcess, upstream: ScriptedUpstream) -> Iterator[ProxyProcess]:
    """One proxy with the fast defaults, shared by many tests: leave no key cooling, use your own prompts."""
    assert _shared_proxy.alive(), _shared_proxy.stderr_so_far()
    yield _shared_proxy
    problems = _shared_proxy.problems()
    assert not problems, "\n".join(problems)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with Client() as session:
        yield session


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    names = (None, "proxy", "asyncio")
    levels = [logging.getLogger(name).level for name in names]
    kept = (logging._srcfile, logging.logThreads, logging.logProcesses, logging.logMultiprocessing)
    handlers = root.handlers[:]
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.flush()
    root.handlers[:] = handlers
    for name, level in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(level)
    logging._srcfile, logging.logThreads, logging.logProcesses, logging.logMultiprocessing = kept
