"""`EmbeddingsFetcher`: fetches the items of a batch that are not cached, in upstream requests of allowed size.

Each item is stored when the upstream request that brought it has ended well, whatever becomes of the next. The response
is made of all items, cached and new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from ..cache.completeness import plain_complete
from ..cache.embeddings import Savings, answer_body, savings_of, total_usage, vectors_of
from ..cache.lookup import NewEntry, ResponseCache
from ..cache.plan import CachePlan
from ..cost.pricing import Cost, total_cost
from ..cost.usage import Usage
from ..protocol.errors import ProxyError
from ..protocol.headers import Raw
from ..protocol.masking import SecretMasker
from ..protocol.request import ProxyRequest
from ..system.threads import in_thread_if_large
from ..upstream.endpoint_sender import EndpointSender
from ..upstream.progress import AttemptLog
from ..upstream.reader import ResponseReader, WholeResponse
from ..upstream.response import ResponseInHand
from ..upstream.retry.outcome import TransportFailure
from .recorder import RequestContext

MAX_EMBEDDINGS: Final = 256 * 1024 * 1024
"""The largest response whose items are stored (bytes): 2,048 vectors as floats are 68 MB and more."""


class JoinedEmbeddings(msgspec.Struct, frozen=True):
    """A response made of items. plan: what became of it. savings: of the cached items, None if there are none."""

    plan: CachePlan
    reason: str
    headers: Sequence[Raw]
    body: bytes
    model: str | None
    stored: bool
    savings: Savings | None


class EmbeddingsFetcher:
    """Fetches the items of batches that are not cached."""

    def __init__(
        self, sender: EndpointSender, reader: ResponseReader, cache: ResponseCache, masker: SecretMasker
    ) -> None:
        self._sender = sender
        self._reader = reader
        self._cache = cache
        self._masker = masker

    async def fetch(self, context: RequestContext) -> JoinedEmbeddings | ResponseInHand:
        """Return the response; or the first error response of an upstream, for the client. Raises ProxyError.

        The charge of `context` holds, however it ends, what the upstream requests that ended well have cost.
        """
        request, plan, attempt_log, charge = context
        batch, model = plan.batch, None
        assert batch is not None
        fetched: dict[int, bytes] = {}
        usages: list[Usage | None] = []
        costs: list[Cost | None] = []
        stored = leaked = False
        while parts := batch.calls_to_make(fetched):
            numbers = parts[0]
            part = request.with_input(batch.input(numbers))
            response = await self._sender.send(part, attempt_log, whole=False)
            if response.body is not None:
                return response
            whole = await self._read(part, response, attempt_log)
            usages.append(whole.usage)
            costs.append(whole.cost)
            charge.usage, charge.cost = total_usage(usages), total_cost(costs)
            vectors = _vectors(part, response, whole)
            named = answer_model(whole.document)
            if fetched and named != model:
                raise _unusable("several models answered")
            model = named
            leaked = leaked or response.leaked
            if plan.write and not response.leaked:
                new = new_entry(part, response, whole)
                stored |= await self._cache.store_items(request, plan, new, numbers, vectors)
            fetched.update(zip(numbers, vectors, strict=True))
            if any(found.entry.answer_model != model for found in batch.found.values()):
                batch = msgspec.structs.replace(batch, found={})  # vectors of two models cannot be compared
                plan = msgspec.structs.replace(plan, batch=batch, reason="model changed", fwd="request")
        everything = fetched | {number: found.vector for number, found in batch.found.items()}
        size = sum(map(len, everything.values()))
        body = await in_thread_if_large(size, answer_body, everything, batch.order, model, charge.usage)
        if leaked:
            body = self._masker.mask(body)
        savings = savings_of(batch.found.values()) if batch.found else None
        return JoinedEmbeddings(plan, response.response.reason, whole.headers, body, model, stored, savings)

    async def _read(self, part: ProxyRequest, response: ResponseInHand, attempt_log: AttemptLog) -> WholeResponse:
        whole = None
        if not (response.is_stream or response.opaque):
            whole = await self._reader.read(part, response, attempt_log, MAX_EMBEDDINGS)
        if whole is None:
            response.lease.settle(None)
            response.response.close()
            raise _unusable("a stream, encoded, or too long")
        return whole


def new_entry(request: ProxyRequest, response: ResponseInHand, whole: WholeResponse) -> NewEntry:
    """Return what of a plain response is to be stored beside its body."""
    model = answer_model(whole.document)
    price = partial(response.upstream.cost, request, model, service_tier=None)
    return NewEntry(response.status, whole.headers, whole.usage, whole.cost, model, response.injected, price)


def answer_model(document: Any) -> str | None:
    """Return the model that a response names."""
    model = document.get("model") if isinstance(document, Mapping) else None
    return model if isinstance(model, str) else None


def _vectors(part: ProxyRequest, response: ResponseInHand, whole: WholeResponse) -> list[bytes]:
    """Return the fetched vectors. Raises ProxyError if they are not what was asked for.

    Such a response cannot be passed on as it is, because the client's request was another.
    """
    why_not: str | None = "not a JSON answer"
    if response.status == 200 and isinstance(whole.document, Mapping):
        why_not = plain_complete(part.endpoint, part.document, whole.document)
    vectors = vectors_of(whole.document) if why_not is None else None
    if vectors is None:
        raise _unusable(why_not or "not of the usual form")
    return vectors


def _unusable(why: str) -> ProxyError:
    return TransportFailure("invalid", f"the upstream's embeddings are not what was asked for: {why}").proxy_error()
