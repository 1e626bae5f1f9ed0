"""`python -m tests.rooms`: through how many rooms of the package one request of each kind walks.

A room is a folder of `proxy/`, or a file that lies loose in it. A change of room is a call of a function of the package
(or a coroutine that goes on) in another room than the call before it. One whole proxy serves in this process, in front
of the scripted upstream; a profile hook (`sys.setprofile`) notes the calls in order. Each kind is asked once unmeasured
before, so that imports and first connections do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, Final

import proxy
from proxy.app import App
from proxy.config.secret import Secret
from proxy.config.settings import KeySettings, RetrySettings, Settings, UpstreamSettings
from tests import upstream_answers
from tests.scripted_upstream import Connection, ScriptedUpstream, Step
from tests.server.kit import Answer, raw_connection, request, served

PACKAGE: Final = str(Path(proxy.__file__).parent) + "/"


@dataclass(slots=True)
class Walk:
    """The files whose functions were called, in order, such as `cache/key.py`."""

    files: list[str] = field(default_factory=list)

    @property
    def rooms(self) -> list[str]:
        """The room of every call."""
        return [file.partition("/")[0] for file in self.files]

    @property
    def entered(self) -> int:
        """The number of distinct rooms."""
        return len(set(self.rooms))

    @property
    def changes(self) -> int:
        """How often the next call was in another room."""
        return sum(one != other for one, other in pairwise(self.rooms))


@contextmanager
def watched() -> Iterator[Walk]:
    """Note what this thread calls in the package."""
    walk = Walk()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name != "<module>":
            walk.files.append(code.co_filename.removeprefix(PACKAGE))

    sys.setprofile(note)
    try:
        yield walk
    finally:
        sys.setprofile(None)


@dataclass(frozen=True, slots=True)
class Station:
    """A proxy that serves, and its upstream."""

    port: int
    upstream: ScriptedUpstream

    async def send(self, body: Any, target: str = "/v1/chat/completions", method: str = "POST") -> Answer:
        """One request on a connection of its own. Raises AssertionError if the response is not a 200."""
        async with raw_connection(self.port) as line:
            line.send(request(method, target, body))
            answer = await line.answer()
        assert answer.status == 200, answer
        return answer


def settings(port: int) -> Settings:
    """One key without limits in front of the scripted upstream; retries wait for nothing."""
    key = KeySettings("k1", Secret("sk-k1"), quota="k1")
    upstream = UpstreamSettings(base_url=f"http://127.0.0.1:{port}/v1", keys=(key,))
    return Settings(upstreams=(upstream,), retry=RetrySettings(base_delay=0.0, jitter=0.0))


@asynccontextmanager
async def station() -> AsyncIterator[Station]:
    upstream = ScriptedUpstream(upstream_answers.behave)
    upstream.start()
    app = App(settings(upstream.port))
    try:
        async with served(app.handle) as port:
            yield Station(port, upstream)
    finally:
        await app.transport.close()
        upstream.stop()


def question(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": text}]} | fields


async def memory_hit(at: Station, name: str) -> Walk:
    await at.send(question(name))
    await at.send(question(name))
    with watched() as walk:
        answer = await at.send(question(name))
    assert answer.get("X-Proxy-Cache") == "hit"
    return walk


async def respelled_hit(at: Station, name: str) -> Walk:
    await at.send(question(name))
    with watched() as walk:
        answer = await at.send(dict(reversed(question(name).items())))
    assert answer.get("X-Proxy-Cache") == "hit"
    return walk


async def plain_miss(at: Station, name: str) -> Walk:
    with watched() as walk:
        answer = await at.send(question(name))
    assert answer.get("X-Proxy-Cache") == "miss"
    return walk


async def _pause(_: Connection) -> None:
    await asyncio.sleep(0.002)


def paced_stream() -> list[Step]:
    """Seventeen events, the next one a little later, so that each is a read of its own."""
    return upstream_answers.stream(upstream_answers.chat_events([str(number) for number in range(13)], True), _pause)


async def streamed_miss(at: Station, name: str) -> Walk:
    at.upstream.queue("/v1/chat/completions", paced_stream())
    with watched() as walk:
        answer = await at.send(question(name, stream=True))
    assert answer.whole
    return walk


async def two_streams(at: Station, name: str) -> Walk:
    """The second one comes when the upstream has the first one's request."""
    gate = at.upstream.gate()

    async def wait(_: Connection) -> None:
        await gate.wait()

    at.upstream.queue("/v1/chat/completions", [wait, *paced_stream()])
    before = len(at.upstream.requests)
    with watched() as walk:
        asked = [asyncio.create_task(at.send(question(name, stream=True)))]
        while len(at.upstream.requests) == before:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        asked.append(asyncio.create_task(at.send(question(name, stream=True))))
        await asyncio.sleep(0.05)
        gate.open()
        answers = await asyncio.gather(*asked)
    assert sorted(str(answer.get("X-Proxy-Cache")) for answer in answers) == ["coalesced", "miss"]
    return walk


async def embeddings(at: Station, name: str) -> Walk:
    """Three of four texts are stored."""
    body = {"model": "text-embedding-3-small", "input": [f"{name} {number}" for number in range(3)]}
    await at.send(body, "/v1/embeddings")
    with watched() as walk:
        answer = await at.send(body | {"input": [*body["input"], f"{name} new"]}, "/v1/embeddings")
    assert answer.get("X-Proxy-Cache") == "partial"
    return walk


async def retried_500(at: Station, name: str) -> Walk:
    at.upstream.queue("/v1/chat/completions", upstream_answers.server_error())
    with watched() as walk:
        answer = await at.send(question(name))
    assert answer.get("X-Proxy-Attempts") == "2"
    return walk


async def pass_through(at: Station, name: str) -> Walk:
    with watched() as walk:
        await at.send(None, f"/v1/models?{name}", "GET")
    return walk


KINDS: Final[dict[str, Callable[[Station, str], Awaitable[Walk]]]] = {
    "memory hit, same bytes": memory_hit,
    "hit, other spelling": respelled_hit,
    "plain miss": plain_miss,
    "streamed miss": streamed_miss,
    "two equal streams at once": two_streams,
    "embeddings, 1 of 4 new": embeddings,
    "a 500 and its retry": retried_500,
    "pass-through": pass_through,
}


async def walks(names: Sequence[str] = tuple(KINDS)) -> dict[str, Walk]:
    """The walk of one request of each of these kinds."""
    found: dict[str, Walk] = {}
    async with station() as at:
        for name in names:
            for turn in ("unmeasured", "measured"):
                found[name] = await KINDS[name](at, f"{turn}-{len(found)}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.rooms", description=__doc__)
    parser.add_argument("kind", nargs="*", choices=[[], *KINDS], help="what to ask (default: one of each)")
    parser.add_argument("--files", action="store_true", help="also print the files, each where it is entered first")
    args = parser.parse_args(argv)
    found = asyncio.run(walks(args.kind or tuple(KINDS)))
    print(f"{'request':28}{'rooms':>7}{'changes':>9}")
    for name, walk in found.items():
        print(f"{name:28}{walk.entered:7}{walk.changes:9}")
        if args.files:
            print(*(f"    {file}" for file in dict.fromkeys(walk.files)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
