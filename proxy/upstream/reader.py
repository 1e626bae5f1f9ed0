"""`ResponseReader`: reads plain responses whole, parses and prices them, and settles what was reserved for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from ..cache.embeddings import read_answer
from ..config.settings import Settings
from ..cost.pricing import Cost
from ..cost.usage import NO_TOKENS, Usage, usage_of
from ..protocol.headers import Raw, downstream_headers
from ..protocol.json_parse import parse_leniently
from ..protocol.masking import SecretMasker
from ..protocol.request import ProxyRequest
from ..system.clock import Clock
from ..system.threads import in_thread_if_large
from .estimates import Estimates
from .keys.object_owners import ObjectOwners
from .keys.pool import KeyPool
from .progress import AttemptLog
from .response import ResponseInHand
from .retry.outcome import TransportFailure


class WholeResponse(msgspec.Struct, frozen=True):
    """A plain response that was read whole and settled. headers, body: for the client; document: the body, parsed."""

    headers: Sequence[Raw]
    body: bytes
    document: Any
    usage: Usage | None
    cost: Cost | None


class ResponseReader:
    """Reads responses of the five endpoints. estimates: learn from the usage; owners: learn of stored objects."""

    def __init__(
        self,
        estimates: Estimates,
        owners: ObjectOwners,
        pool: KeyPool,
        masker: SecretMasker,
        clock: Clock,
        settings: Settings,
    ) -> None:
        self._estimates = estimates
        self._owners = owners
        self._pool = pool
        self._masker = masker
        self._clock = clock
        self._pooled = not settings.passthrough
        self._max_entry = settings.cache.max_entry

    async def read(
        self, request: ProxyRequest, response: ResponseInHand, attempt_log: AttemptLog, max_bytes: int
    ) -> WholeResponse | None:
        """Read a response whole and settle its lease. Raises ProxyError if it is broken.

        None, and nothing is settled, if it is longer than `max_bytes`: then `response.first` holds what was read.
        """
        began = self._clock.monotonic()
        settled = False
        try:
            body = await self._body(response, attempt_log, max_bytes)
            if body is None:
                settled = True
                return None
            document = await _parse(request, response, body)
            attempt_log.upstream_ms += (self._clock.monotonic() - began) * 1000
            usage, cost = price(request, response, document)
            response.lease.settle(usage.total_tokens if usage else None, cost)
            self._estimates.record(request, attempt_log.size, usage)
            settled = True
            if request.endpoint == "responses" or b'"audio"' in body or request.document.get("store") is True:
                self._owners.record_answer(self._pool, request, response.lease.key, document)
        except TransportFailure as failure:
            raise failure.proxy_error() from None
        finally:
            if not settled:
                response.lease.settle(None)
                response.response.close()
        response.response.close()
        headers = self.headers(response)
        if self._masker.found_in(body):
            response.leaked = True
            body = self._masker.mask(body)
        return WholeResponse(headers, body, document, usage, cost)

    def headers(self, response: ResponseInHand, without: bytes = b"") -> list[Raw]:
        """Return the upstream's headers for the client, with pool keys masked. without: one that the proxy sets."""
        headers = downstream_headers(response.response.raw_headers, pooled=self._pooled, decoded=response.decoded)
        if self._masker.found_in(b"\n".join([value for _, value in headers])):
            response.leaked = True
            headers = [(name, self._masker.mask(value)) for name, value in headers]
        if without:
            headers = [(name, value) for name, value in headers if name.lower() != without]
        return headers

    def watch(self, request: ProxyRequest, response: ResponseInHand) -> Callable[[bytes], None] | None:
        """Return what learns of stored objects from each event of a stream; None if it brings none."""
        return self._owners.watch_stream(self._pool, request, response.lease.key)

    def leaks(self, body: bytes) -> bool:
        """Whether a body repeats a pool key."""
        return self._masker.found_in(body)

    async def _body(self, response: ResponseInHand, attempt_log: AttemptLog, max_bytes: int) -> bytes | None:
        """Return the body; None if it grows beyond `max_bytes`."""
        if not (response.decoded or response.first) and (whole := response.response.ready()) is not None:
            return whole
        parts, response.first = response.first, []
        size = sum(map(len, parts))
        try:
            async with attempt_log.deadline.limit():
                async for chunk in response.more:
                    parts.append(chunk)
                    size += len(chunk)
                    if size > max_bytes:
                        response.first = parts
                        return None
                    if attempt_log.for_cache_only and size > self._max_entry:
                        raise TransportFailure("invalid", "too large for the cache, and nobody else wants it")
        except TimeoutError:
            raise TransportFailure("timeout", "the upstream did not finish its answer in time") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)


async def _parse(request: ProxyRequest, response: ResponseInHand, body: bytes) -> Any:
    """Return the parsed body of a JSON response, None of any other. Raises TransportFailure(invalid) if broken."""
    content_type = response.response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    body = body.removeprefix(b"\xef\xbb\xbf")  # a parser may ignore it (RFC 8259 section 8.1)
    if content_type != "application/json" and not content_type.endswith("+json"):
        if content_type in ("", "text/html") and response.status < 400 and body.lstrip()[:1] == b"<":
            raise TransportFailure("invalid", "the upstream answered with a web page in place of JSON")
        return None
    if response.status == 204:
        return None
    try:
        return await in_thread_if_large(
            len(body), read_answer if request.endpoint == "embeddings" else parse_leniently, body
        )
    except ValueError:
        raise TransportFailure("invalid", "the upstream's JSON answer is cut short or broken") from None


def price(request: ProxyRequest, response: ResponseInHand, document: Any) -> tuple[Usage | None, Cost | None]:
    """Return usage and cost of a plain response; None if it does not say, or no price is known."""
    usage = usage_of(request.endpoint, document)
    if usage is None and request.endpoint == "moderations" and isinstance(document, Mapping) and response.status == 200:
        usage = NO_TOKENS
    if usage is None:
        return None, None
    said = document if isinstance(document, Mapping) else {}
    return usage, response.upstream.cost(request, said.get("model"), usage, said.get("service_tier"))
