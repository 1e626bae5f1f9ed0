"""OpenTelemetry spans in the SDK's in-memory exporter, and the OTEL_* variables."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

import proxy.server.tracing
from proxy.app import App
from proxy.config.settings import LedgerSettings, RetrySettings
from proxy.server.tracing import Tracing, tracing_from
from proxy.upstream.retry.outcome import TransportFailure
from tests.pipeline.fixture import ask, pool, settings
from tests.pipeline.script import Fails, Move, ScriptedTransport, completion, error, events, rate_limited, says, streams
from tests.server.kit import CHAT, TEST_TIMEOUT, Answer, raw_connection, request, served

pytestmark = pytest.mark.slow

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
INCOMING = [("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=a1,other=b2")]
CONFIG = settings(
    pool("k1", "k2"),
    retry=RetrySettings(base_delay=0, jitter=0),
    ledger=LedgerSettings(enabled=False),
    selection="round_robin",
)


class Stage:
    """A listening app with a scripted transport, and its spans."""

    def __init__(self, app: App, transport: ScriptedTransport, memory: Any, port: int) -> None:
        self.app = app
        self.transport = transport
        self._memory = memory
        self.port = port

    async def ask(
        self, method: str = "POST", target: str = CHAT, body: object = None, headers: Iterable[tuple[str, str]] = ()
    ) -> Answer:
        async with raw_connection(self.port) as line:
            line.send(request(method, target, body, headers))
            return await line.answer()

    async def spans(self, count: int) -> tuple[Any, list[Any]]:
        """Return the span of the request and those of its attempts, once there are this many."""
        async with asyncio.timeout(TEST_TIMEOUT):
            while len(found := self._memory.get_finished_spans()) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert len(found) == count
        *calls, own = found
        self._memory.clear()
        assert own.kind.name == "SERVER"
        for call in calls:
            assert (call.kind.name, call.parent.span_id) == ("CLIENT", own.context.span_id)
            assert call.context.trace_id == own.context.trace_id
        return own, calls


@asynccontextmanager
async def stage(*moves: Move) -> AsyncIterator[Stage]:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    memory, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracing, transport = Tracing(provider), ScriptedTransport(*moves)
    app = App(CONFIG, tracing=tracing)
    app._traced_transport = tracing.transport(transport)
    app._build(app.services)
    try:
        async with served(app.handle) as port:
            yield Stage(app, transport, memory, port)
    finally:
        await app.transport.close()
        await tracing.close()


async def test_a_miss_has_a_span_and_a_child_for_its_attempt() -> None:
    async with stage(says()) as pipeline:
        answer = await pipeline.ask(body=ask(), headers=INCOMING)
        own, [call] = await pipeline.spans(2)
    assert own.name == "chat gpt-4o"
    assert f"{own.context.trace_id:032x}" == TRACE
    assert f"{own.parent.span_id:016x}" == PARENT
    result = dict(own.attributes)
    assert result.pop("openai_proxy.queue_ms") >= 0
    assert result == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o",
        "gen_ai.response.model": "gpt-4o-2024-08-06",
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 200,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "openai_proxy.request_id": answer.get("X-Proxy-Request-Id"),
        "openai_proxy.cache": "miss",
        "openai_proxy.cache_reason": "new",
        "openai_proxy.upstream": "openai",
        "openai_proxy.key": answer.get("X-Proxy-Key"),
        "openai_proxy.attempts": 1,
        "openai_proxy.cost_usd": "0.002250",
        "openai_proxy.saved_usd": "0.000000",
    }
    assert own.status.status_code.name == call.status.status_code.name == "UNSET"
    assert dict(call.attributes) == {
        "http.request.method": "POST",
        "server.address": "up.test",
        "http.response.status_code": 200,
    }
    [sent] = pipeline.transport.sent
    assert sent.headers.getall("traceparent") == [f"00-{TRACE}-{call.context.span_id:016x}-01"]
    assert sent.headers.getall("tracestate") == ["vendor=a1,other=b2"]


@pytest.mark.parametrize("sent", [[], [("traceparent", "00-nonsense"), ("tracestate", "a=b")]])
async def test_without_traceparent_a_new_trace_begins(sent: list[tuple[str, str]]) -> None:
    async with stage(says()) as pipeline:
        await pipeline.ask(body=ask(), headers=sent)
        own, [call] = await pipeline.spans(2)
        assert own.parent is None
        [up] = pipeline.transport.sent[0].headers.getall("traceparent")
        assert up.startswith(f"00-{own.context.trace_id:032x}-{call.context.span_id:016x}-")
        assert "tracestate" not in pipeline.transport.sent[0].headers


async def test_a_hit_has_a_span_without_children() -> None:
    async with stage(says()) as pipeline:
        await pipeline.ask(body=ask())
        await pipeline.spans(2)
        hit = await pipeline.ask(body=ask(), headers=INCOMING)
        own, _ = await pipeline.spans(1)
    assert own.name == "chat gpt-4o"
    result = {name: own.attributes[f"openai_proxy.{name}"] for name in ("request_id", "cache", "cost_usd", "saved_usd")}
    assert result == {
        "request_id": hit.get("X-Proxy-Request-Id"),
        "cache": "hit",
        "cost_usd": "0.000000",
        "saved_usd": "0.002250",
    }
    assert own.attributes["gen_ai.usage.output_tokens"] == 200


async def test_the_span_of_a_stream_ends_with_the_stream() -> None:
    first, *more = events(usage=True)
    async with stage(streams([first, 0.05, *more])) as pipeline:
        await pipeline.ask(body=ask(stream=True))
        own, _ = await pipeline.spans(2)
    assert own.end_time - own.start_time >= 45_000_000
    assert own.attributes["gen_ai.usage.output_tokens"] == 200


async def test_every_attempt_has_a_span() -> None:
    async with stage(rate_limited(), error(500), Fails("unreached"), says()) as pipeline:
        await pipeline.ask(body=ask())
        own, calls = await pipeline.spans(5)
    result = [
        [call.attributes.get(name) for name in ("http.response.status_code", "error.type", "http.request.resend_count")]
        for call in calls
    ]
    assert result == [[429, "429", None], [500, "500", 1], [None, "upstream_unreachable", 2], [200, None, 3]]
    assert [call.status.status_code.name for call in calls] == ["ERROR", "ERROR", "ERROR", "UNSET"]
    assert own.attributes["openai_proxy.attempts"] == 4
    ups = [sent.headers["traceparent"][36:52] for sent in pipeline.transport.sent]
    assert ups == [f"{call.context.span_id:016x}" for call in calls]


async def test_errors_set_the_span_status() -> None:
    cut = streams([events()[0], TransportFailure("invalid", "cut")])
    async with stage(*[error(500)] * 4, cut) as pipeline:
        await pipeline.ask(body=ask())
        own, _ = await pipeline.spans(5)
        assert (own.attributes["error.type"], own.status.status_code.name) == ("upstream_500", "ERROR")
        await pipeline.ask(body=b"{")
        own, _ = await pipeline.spans(1)
        assert (own.name, own.attributes["http.response.status_code"]) == ("POST", 400)
        assert own.status.status_code.name == "UNSET"
        await pipeline.ask(body=ask(stream=True))
        own, _ = await pipeline.spans(2)
        assert (own.attributes["error.type"], own.status.status_code.name) == ("upstream_invalid_response", "ERROR")


async def test_a_coalesced_request_has_its_own_span() -> None:
    async with stage(says(wait=0.1)) as pipeline:
        await asyncio.gather(pipeline.ask(body=ask()), pipeline.ask(body=ask()))
        async with asyncio.timeout(TEST_TIMEOUT):
            while len(found := pipeline._memory.get_finished_spans()) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    own = sorted(span.attributes["openai_proxy.cache"] for span in found if span.kind.name == "SERVER")
    assert own == ["coalesced", "miss"]
    [call] = [span for span in found if span.kind.name == "CLIENT"]
    [miss] = [span for span in found if span.attributes.get("openai_proxy.cache") == "miss"]
    assert call.parent.span_id == miss.context.span_id


async def test_pass_through_routes_have_spans_and_own_pages_have_none() -> None:
    async with stage(says()) as pipeline:
        for path in ("/healthz", "/readyz", "/metrics", "/_proxy/status"):
            await pipeline.ask("GET", path)
        await pipeline.ask("GET", "/v1/models")
        own, [call] = await pipeline.spans(2)
    assert (own.name, own.attributes["openai_proxy.cache"]) == ("models", "bypass")
    assert call.attributes["http.request.method"] == "GET"


async def test_no_text_of_a_request_or_response_is_in_a_span() -> None:
    async with stage(says()) as pipeline:
        await pipeline.ask(body=ask("a secret prompt"), headers=[("Authorization", "Bearer sk-of-a-client")])
        own, calls = await pipeline.spans(2)
    text = " ".join(span.to_json() for span in (own, *calls))
    assert not [word for word in ("secret prompt", "Hello!", "sk-k1", "sk-k2", "sk-of-a-client") if word in text]


async def test_unusual_model_names_become_valid_attributes() -> None:
    async with stage(says(completion(model="x" * 20_000)), says()) as pipeline:
        for name in ("m\n\u2028" + "x" * 20_000, "\ud800"):
            body = json.dumps(ask(model=name)).encode()
            await pipeline.ask(body=body)
            own, _ = await pipeline.spans(2)
            assert own.name.isascii()
            assert len(own.name) < 200
            assert len(str(dict(own.attributes))) < 2000


# --- the environment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_SERVICE_NAME": "x"},
    ],
)
def test_off_unless_asked_for(environ: Mapping[str, str], caplog: pytest.LogCaptureFixture) -> None:
    assert tracing_from(environ) is None
    assert caplog.records == []


@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_TRACES_EXPORTER": "zipkin"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"},
    ],
)
def test_unsupported_otel_settings_are_reported(environ: Mapping[str, str], caplog: pytest.LogCaptureFixture) -> None:
    assert tracing_from(environ) is None
    assert "only OTEL_TRACES_EXPORTER=otlp over http/protobuf" in caplog.text


def test_without_the_extra_the_error_names_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk.trace"):
        monkeypatch.setitem(sys.modules, name, None)
    caplog.set_level(logging.INFO)
    assert tracing_from({"OTEL_TRACES_EXPORTER": "otlp"}) is None
    assert "pip install 'openai-caching-proxy[tracing]'" in caplog.text


def test_opentelemetry_is_not_imported_unless_asked_for() -> None:
    code = "import sys, proxy.app; print([m for m in sys.modules if m.startswith('opentelemetry.sdk')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


async def test_closing_does_not_wait_for_an_unreachable_collector(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider

    provider, go_on = TracerProvider(shutdown_on_exit=False), threading.Event()
    monkeypatch.setattr(provider, "shutdown", lambda: go_on.wait(5))
    monkeypatch.setattr(proxy.server.tracing, "CLOSE_TIMEOUT", 0.01)
    await Tracing(provider).close()
    assert "the last spans were not sent within" in caplog.text
    go_on.set()
    await asyncio.sleep(0)
