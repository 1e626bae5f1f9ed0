"""The SDKs, sync and async, and the two places they are pointed at: the scripted upstream and the demo."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests import upstream_answers
from tests.launch import ProxyProcess, settings, write_config
from tests.ledger import Request
from tests.scripted_upstream import Answer, ScriptedUpstream
from tests.sdk.kit import KINDS, Job, Kind, Outcome, Sdk, start

# Node has no other flavour than async.
FLAVOURS = [(kind, name) for kind in KINDS for name in (["sync", "async"] if kind.language == "python" else ["async"])]
CITY = '{"name": "Köln", "people": 1}'


@dataclass(frozen=True, slots=True)
class Caller:
    """One SDK in front of one address."""

    sdk: Sdk
    asynchronous: bool
    address: str
    name: str
    """Unique to the test: prompts are made of it, and the names of models that get into trouble."""

    def call(
        self, method: str, /, raw: bool = False, azure: bool = False, max_retries: int | None = None, **fields: Any
    ) -> Outcome:
        job = Job(self.address, method, fields, raw, azure, self.asynchronous, max_retries)
        return self.sdk.ask(job)

    def chat(self, prompt: str = "", /, method: str = "create", **options: Any) -> Outcome:
        """`chat.completions.create` with a prompt that no other test uses."""
        messages = [{"role": "user", "content": f"{prompt} {self.name}".strip()}]
        return self.call(f"chat.completions.{method}", **({"model": "gpt-4o", "messages": messages} | options))


def obliging(request: Request) -> Answer:
    """`canned.behave`, and a tool call for a request with tools, JSON for one with a schema."""
    body = request.json() if request.body else {}
    if "tools" in body:
        call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}}
        if body.get("stream"):
            return upstream_answers.stream(_tool_events(call))
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": None}
        return upstream_answers.chat(choices=[choice])
    if "response_format" in body and not body.get("stream"):
        return upstream_answers.chat(CITY)
    if "response_format" in body:
        return upstream_answers.stream(
            upstream_answers.chat_events([CITY[:8], CITY[8:]], upstream_answers.include_usage(body))
        )
    return upstream_answers.behave(request)


def _tool_events(call: upstream_answers.Json) -> list[bytes]:
    arguments = call["function"]["arguments"]
    first = call | {"index": 0, "function": call["function"] | {"arguments": ""}}
    deltas = [[first], *([{"index": 0, "function": {"arguments": part}}] for part in (arguments[:5], arguments[5:]))]
    events = [upstream_answers.event(upstream_answers.chunk({"tool_calls": delta})) for delta in deltas]
    return [*events, *upstream_answers.chat_events([], finish="tool_calls")[1:]]


@pytest.fixture(scope="session")
def sdks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Kind], Sdk]]:
    """The drivers, each started when it is first asked for; installed once for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sdks"
    shared.mkdir(exist_ok=True)
    own = tmp_path_factory.mktemp("drivers")
    running: dict[Kind, Sdk] = {}

    def sdk(kind: Kind) -> Sdk:
        if kind not in running:
            running[kind] = start(kind, shared, own)
        return running[kind]

    yield sdk
    for driver in running.values():
        driver.stop()


def _run(process: ProxyProcess) -> Iterator[ProxyProcess]:
    process.start()
    yield process
    problems = process.finish()
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="session")
def sdk_proxy(upstream_server: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyProcess]:
    """In front of the scripted upstream. What spoils a key or a limit keeps to a model of its own.

    One retry a request, and a budget that always has that one left.
    """
    home = tmp_path_factory.mktemp("proxy")
    config = settings(
        upstream_server.port,
        retry={"max_retries": 1, "budget": 1.0},
        throttle={"limits": {"throttled-*": {"rpm": 1}}, "max_wait": "0s"},
    )
    yield from _run(ProxyProcess(["serve", "--port", "0", "--config", str(write_config(home, config))], home, {}))


@pytest.fixture(scope="session")
def demo_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyProcess]:
    home = tmp_path_factory.mktemp("demo")
    hurry = {"PROXY__RETRY__BASE_DELAY": "10ms", "PROXY__RETRY__JITTER": "10ms"}
    yield from _run(ProxyProcess(["demo", "--port", "0"], home, hurry))


@pytest.fixture(params=FLAVOURS, ids=lambda flavour: f"{flavour[0].name}-{flavour[1]}")
def caller(
    request: pytest.FixtureRequest,
    sdks: Callable[[Kind], Sdk],
    sdk_proxy: ProxyProcess,
    upstream: ScriptedUpstream,
) -> Caller:
    """Each SDK, sync and async, in front of the scripted upstream, which answers as `obliging` does."""
    kind, flavour = request.param
    upstream.script = obliging
    name = request.node.name.removeprefix("test_").translate(str.maketrans("[]_", "---"))
    return Caller(sdks(kind), flavour == "async", sdk_proxy.address, name)


@pytest.fixture(params=["scripted", "demo"])
def anywhere(request: pytest.FixtureRequest, caller: Caller) -> Caller:
    """`caller`, and the same in front of `openai-proxy demo`."""
    if request.param == "scripted":
        return caller
    demo: ProxyProcess = request.getfixturevalue("demo_proxy")
    return replace(caller, address=demo.address)
