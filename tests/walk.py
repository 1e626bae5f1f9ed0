"""The way of one request through the files of `proxy/`: `python -m tests.walk` counts rooms and changes of room.

A room is a folder in `proxy/`, or a file that lies loose there. Every call of a function of `proxy/` counts, in order,
and so does every time a coroutine goes on. A call in another room than the one before is a change of room.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, Final

from aiohttp import ClientSession
from aiohttp.web import ServerRunner, SockSite

from proxy.app import App
from proxy.config.loader import load
from proxy.server.connections import ListeningServer
from proxy.server.listeners import bind
from tests.launch import settings, write_config
from tests.scripted_upstream import ScriptedUpstream
from tests.upstream_answers import behave

PACKAGE: Final = str(Path(__file__).resolve().parent.parent / "proxy") + "/"


@contextmanager
def calls() -> Iterator[list[str]]:
    """Gather the file of every call of a function of `proxy/` in this thread, as `cache/key.py`."""
    files: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name != "<module>":
            files.append(code.co_filename.removeprefix(PACKAGE))

    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)


def rooms(files: list[str]) -> list[str]:
    """Return the room of every call."""
    return [name.split("/")[0] for name in files]


def changes(files: list[str]) -> int:
    """Return how often the next call is in another room."""
    passed = rooms(files)
    return sum(one != other for one, other in pairwise(passed))


async def walk(directory: Path, *bodies: dict[str, Any]) -> list[list[str]]:
    """Send requests to a proxy in this process, in front of a scripted upstream; return the files of each."""
    upstream = ScriptedUpstream(behave)
    upstream.start()
    app = App(load(write_config(directory, settings(upstream.port)), {}, {}, directory).settings)
    runner = ServerRunner(ListeningServer(app.handle), handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    listener = bind("127.0.0.1", 0)
    await SockSite(runner, listener).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
    found = []
    try:
        async with ClientSession() as client:
            for body in bodies:
                with calls() as files:
                    async with client.post(url, json=body) as response:
                        assert response.status == 200, await response.text()
                        await response.read()
                found.append(files)
    finally:
        await runner.cleanup()
        await app.transport.close()
        upstream.stop()
    return found


if __name__ == "__main__":
    question = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Which way?"}]}
    other = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Which way, in pieces?"}], "stream": True}
    # Caches that are filled once are filled by this one.
    warm = {"model": "gpt-4o", "messages": [{"role": "user", "content": "First"}]}
    names = ("plain miss", "memory hit, same bytes", "streamed miss")
    with tempfile.TemporaryDirectory() as place:
        ways = asyncio.run(walk(Path(place), warm, question, question, other))[1:]
    for name, way in zip(names, ways, strict=True):
        print(f"{name}: {len(set(rooms(way)))} rooms, {changes(way)} changes of room, {len(set(way))} files")
    if "--files" in sys.argv:
        print("\n".join(dict.fromkeys(ways[0])))
