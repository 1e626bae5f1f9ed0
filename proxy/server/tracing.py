"""OpenTelemetry spans for each request and each request upstream, by the GenAI semantic conventions.

They need the extra `tracing` and the OTEL_* variables (docs/metrics-and-logs.md). They contain no prompt, no response
and no key. `app` wraps the handler and the transport; no other module imports this one.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from aiohttp.web import BaseRequest

from .. import __version__
from ..accounting.receipt import Receipt
from ..protocol.headers import Raw
from ..protocol.routes import printable
from ..protocol.traceparent import traceparent
from ..services import Services
from ..upstream.interfaces import ConnectionInfo, UpstreamResponse, UpstreamTransport
from ..upstream.retry.outcome import TransportFailure
from .responses import FullResponse

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

log = logging.getLogger("proxy")

CLOSE_TIMEOUT: Final = 3.0
"""Seconds for sending the last spans when the proxy stops."""

_OPERATIONS: Final = {"chat": "chat", "responses": "chat", "completions": "text_completion", "embeddings": "embeddings"}
"""`gen_ai.operation.name` by endpoint; for other routes it is their first path segment."""

_PROVIDERS: Final = {"openai": "openai", "azure": "azure.ai.openai"}
_OWN: Final = ("/_proxy", "/healthz", "/readyz", "/metrics")
_CONTEXT: Final = ("traceparent", "tracestate")
_ID: Final = re.compile(rb"\r\nX-Proxy-Request-Id: ([^\r]+)\r\n")


@dataclass(slots=True)
class _Request:
    """The request of the current task. context: of its span; attempts: sent upstream; exported: it has attributes."""

    span: Span
    context: Context
    attempts: int = 0
    exported: bool = False


_current: ContextVar[_Request | None] = ContextVar("request", default=None)


class Tracing:
    """Creates spans. provider: creates and exports them."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("openai-caching-proxy", __version__)
        self._context_of = set_span_in_context
        self._propagator = TraceContextTextMapPropagator()
        self._server, self._client = SpanKind.SERVER, SpanKind.CLIENT
        self._failed = Status(StatusCode.ERROR)

    # -- requests ------------------------------------------------------------------------------------------------------

    async def handle(
        self, request: BaseRequest, services: Services, handler: Callable[[BaseRequest], Awaitable[Any]]
    ) -> Any:
        """Serve a request within a span, unless it is for one of the proxy's own routes."""
        if request.raw_path.startswith(_OWN):
            return await handler(request)
        method = printable(request.method, 20)
        span = self._tracer.start_span(
            method, self._parent(request.raw_headers), self._server, {"http.request.method": method}
        )
        current = _Request(span, self._context_of(span))
        token = _current.set(current)
        try:
            response = await handler(request)
            if span.is_recording():
                self._record_response(current, services, response)
            return response
        finally:
            _current.reset(token)
            span.end()

    def _parent(self, raw: Sequence[Raw]) -> Context | None:
        parent = traceparent(raw)
        if not parent:
            return None
        states = [value.decode("latin-1") for name, value in raw if name.lower() == b"tracestate"]
        return self._propagator.extract({"traceparent": parent, **({"tracestate": ",".join(states)} if states else {})})

    def _record_response(self, current: _Request, services: Services, response: Any) -> None:
        current.span.set_attribute("http.response.status_code", response.status)
        if not current.exported and isinstance(response, FullResponse):  # a hit, whose receipt is not observed
            match = _ID.search(response.head)
            receipt = services.receipts.get(match[1].decode("latin-1")) if match is not None else None
            if receipt is not None:
                self._export(current, receipt, services)
        if response.status >= 500:
            current.span.set_status(self._failed)

    def observe(self, receipt: Receipt, services: Services) -> None:
        """Add a receipt to the span of the current request; only the first one is that request's."""
        current = _current.get()
        if current is not None and not current.exported and current.span.is_recording():
            self._export(current, receipt, services)

    def _export(self, current: _Request, receipt: Receipt, services: Services) -> None:
        current.exported = True
        operation = _OPERATIONS.get(receipt.endpoint, printable(receipt.endpoint, 40))
        upstream = services.upstream_named(receipt.upstream or services.upstreams[0].address.name)
        usage = receipt.usage
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": _PROVIDERS[upstream.address.kind] if upstream is not None else None,
            "gen_ai.request.model": printable(receipt.model, 120),
            "gen_ai.response.model": printable(receipt.answer_model or "", 120),
            "gen_ai.usage.input_tokens": usage.prompt_tokens if usage is not None else None,
            "gen_ai.usage.output_tokens": usage.completion_tokens if usage is not None else None,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens if usage is not None else None,
            "error.type": receipt.error,
            "openai_proxy.request_id": receipt.id,
            "openai_proxy.client": receipt.client,
            "openai_proxy.cache": receipt.cache,
            "openai_proxy.cache_reason": receipt.reason,
            "openai_proxy.upstream": receipt.upstream,
            "openai_proxy.key": receipt.key,
            "openai_proxy.attempts": receipt.attempts,
            "openai_proxy.queue_ms": receipt.queue_ms,
            "openai_proxy.cost_usd": receipt.cost_usd,
            "openai_proxy.saved_usd": receipt.saved_usd,
        }
        current.span.set_attributes({name: value for name, value in attributes.items() if value not in (None, "")})
        current.span.update_name(f"{operation} {printable(receipt.model, 120)}".rstrip())
        if receipt.status >= 500 or (receipt.error and receipt.status < 400):  # a stream that broke
            current.span.set_status(self._failed)

    # -- requests upstream ---------------------------------------------------------------------------------------------

    def transport(self, transport: UpstreamTransport) -> UpstreamTransport:
        """Return a transport with a span for each request, whose context goes upstream."""
        return _TracedTransport(self, transport)

    async def send(
        self, transport: UpstreamTransport, method: str, url: str, headers: Sequence[tuple[str, str]], **rest: Any
    ) -> UpstreamResponse:
        current = _current.get()
        if current is None:  # a request that no client has sent, such as a background revalidation
            return await transport.send(method, url, headers, **rest)
        target = urlsplit(url)
        attributes: dict[str, str | int] = {"http.request.method": method, "server.address": target.hostname or ""}
        if target.port is not None:
            attributes["server.port"] = target.port
        if current.attempts:
            attributes["http.request.resend_count"] = current.attempts
        current.attempts += 1
        span = self._tracer.start_span(method, current.context, self._client, attributes)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._context_of(span))
        headers = [pair for pair in headers if pair[0].lower() not in _CONTEXT] + list(carrier.items())
        failure = "cancelled"
        try:
            response = await transport.send(method, url, headers, **rest)
            span.set_attribute("http.response.status_code", response.status)
            failure = str(response.status) if response.status >= 400 else ""
            return response
        except TransportFailure as error:
            failure = error.code
            raise
        finally:
            if failure:
                span.set_attribute("error.type", failure)
                span.set_status(self._failed)
            span.end()

    # -- the end -------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Send the last spans, for at most `CLOSE_TIMEOUT`."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the event loop may be closed by now
                loop.call_soon_threadsafe(done.set)

        Thread(target=shut_down, name="tracing", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await done.wait()
        except TimeoutError:
            log.warning("tracing: the last spans were not sent within %gs; is the OTLP endpoint up?", CLOSE_TIMEOUT)


class _TracedTransport:
    """An `UpstreamTransport` with a span for each request."""

    def __init__(self, tracing: Tracing, transport: UpstreamTransport) -> None:
        self._tracing = tracing
        self._transport = transport

    async def send(
        self,
        method: str,
        url: str,
        headers: Sequence[tuple[str, str]],
        body: bytes | AsyncIterator[bytes] | None,
        *,
        first_byte: float,
        connection: ConnectionInfo,
    ) -> UpstreamResponse:
        send = self._tracing.send
        return await send(
            self._transport, method, url, headers, body=body, first_byte=first_byte, connection=connection
        )


def tracing_from(environ: Mapping[str, str]) -> Tracing | None:
    """Return the tracing that the OTEL_* variables ask for, None if they do not. If it is impossible, log why."""
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none"
    if off or not (exporter or endpoint):
        return None
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if exporter not in ("", "otlp") or protocol not in (None, "", "http/protobuf"):
        log.warning("tracing is off: only OTEL_TRACES_EXPORTER=otlp over http/protobuf is built in")
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("tracing is off: OTEL_* asks for it, but it needs pip install 'openai-caching-proxy[tracing]'")
        return None
    named = environ.get("OTEL_SERVICE_NAME") or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {SERVICE_NAME: "openai-caching-proxy"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)
