"""What operators see of the real process: metrics, JSON log lines, spans sent to a collector on the loopback."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import Launch, settings
from tests.scripted_upstream import ScriptedUpstream, hold

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP and keeps the spans."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def spans(self) -> list[Any]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        found = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [span for one in found for rs in one.resource_spans for ss in rs.scope_spans for span in ss.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


async def test_spans_reach_a_collector_before_the_process_ends(
    launch: Launch, upstream: ScriptedUpstream, client: Client, collector: Collector
) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    proxy = launch(settings(upstream.port), {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
    body = ask("traced")
    assert (await client.send(proxy, body, headers={"traceparent": TRACE})).headers["X-Proxy-Cache"] == "miss"
    assert (await client.send(proxy, body)).headers["X-Proxy-Cache"] == "hit"
    proxy.terminate()
    assert proxy.wait() == 0
    spans = collector.spans()
    assert sorted(span.name for span in spans) == ["POST", "chat gpt-4o", "chat gpt-4o"]
    [call] = [span for span in spans if span.name == "POST"]
    [miss] = [span for span in spans if span.span_id == call.parent_span_id]
    assert f"00-{miss.trace_id.hex()}-{miss.parent_span_id.hex()}-01" == TRACE
    assert upstream.last.header("traceparent") == f"00-{call.trace_id.hex()}-{call.span_id.hex()}-01"
    assert b"traced" not in b"".join(collector.bodies)


async def test_an_unreachable_collector_does_not_affect_requests(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    proxy = launch(settings(upstream.port), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
    assert (await client.send(proxy, ask("unheard"))).status == 200
    began = time.monotonic()
    proxy.terminate()
    assert proxy.wait() == 0
    assert time.monotonic() - began < 8


async def test_metrics_count_requests_tokens_and_cost(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, ("k1", "k2"), throttle={"limits": {"gpt-4o": {"rpm": 10}}}))
    events, gate = upstream_answers.chat_events(), upstream.gate()
    begun, rest = upstream_answers.stream(events[:1], end=False), upstream_answers.stream(events[1:])[1:]
    upstream.queue(
        "/v1/chat/completions", [upstream_answers.server_error()], upstream_answers.chat(), [*begun, hold(gate), *rest]
    )
    await client.send(proxy, ask("retried"))
    async with client.open(proxy, ask("streamed", stream=True)) as answer:
        await answer.content.readexactly(len(events[0]))
        gate.open()  # only now, or all of it may be read at once
        await answer.content.read()
    await client.send(proxy, ask("retried"))
    text = (await client.send(proxy, method="GET", path="/metrics")).body.decode()
    seen = {name: float(value) for name, value in re.findall(r"^openai_proxy_(\S+) (\S+)$", text, re.MULTILINE)}
    assert seen['retries_total{reason="retry",upstream="openai"}'] == 1
    assert seen['requests_total{cache="hit",endpoint="chat",model="gpt-4o",status="2xx"}'] == 1
    assert seen['time_to_first_byte_seconds_count{endpoint="chat"}'] == 2
    assert seen["overhead_seconds_count"] == 2
    assert seen['breaker_state{state="closed",upstream="openai"}'] == 1
    heads = [seen[f'key_headroom_ratio{{key="{key}"}}'] for key in ("k1", "k2")]
    assert sum(heads) == pytest.approx(1.7)  # three calls of ten each
    assert seen["stream_chunk_gap_seconds_count"] >= 1
    assert "_created" not in text


async def test_json_lines(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, log={"format": "json", "level": "info"}))
    answer = await client.send(proxy, ask("a line"), headers={"traceparent": TRACE})
    hits = [await client.send(proxy, ask("a line")) for _ in range(20)]
    refused = await client.send(proxy, b"{")
    assert upstream.last.header("traceparent") == TRACE
    proxy.terminate()
    assert proxy.wait() == 0
    lines = [json.loads(line) for line in proxy.stderr_so_far().splitlines() if line.startswith('{"time"')]
    by_id = {line["id"]: line for line in lines if "id" in line}
    miss = by_id[answer.headers["X-Proxy-Request-Id"]]
    assert (miss["cache"], miss["model"], miss["status"], miss["traceparent"]) == ("miss", "gpt-4o", 200, TRACE)
    assert by_id[refused.headers["X-Proxy-Request-Id"]]["error"] == "invalid_json"
    result = [line for line in lines if line.get("cache") == "hit"]
    assert result[0]["id"] == hits[0].headers["X-Proxy-Request-Id"]
    assert 1 <= len(result) <= 3
    assert sum(line["hits"] for line in result) <= 20
