"""Buying a batch of embeddings of which only a part goes upstream, or which goes there in parts.

What is cached of it was found by the `shelf`; what is left is bought by the `exchange` like any other call, each item
once, and is stored when its own call has ended well, whatever becomes of the next. The answer is made of all of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final

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
from ..upstream.response import ReadAnswer, ResponseInHand
from ..upstream.retry.outcome import TransportFailure

SPILL_OF_ITEMS: Final = 256 * 1024 * 1024
"""Embeddings whose items are to be stored are held up to here (bytes): 2,048 vectors as floats are 68 MB and more."""


class JoinedEmbeddings(msgspec.Struct, frozen=True):
    """An answer made of items. plan: what became of it; savings: of those that were cached, None where none was."""

    plan: CachePlan
    reason: str
    headers: Sequence[Raw]
    body: bytes
    model: str | None
    stored: bool
    savings: Savings | None


class EmbeddingsFetcher:
    """Fetches the items of batches that are not cached.

    read: reads a response whole and settles it. None if it is longer than that many bytes. Raises ProxyError.
    """

    def __init__(
        self,
        sender: EndpointSender,
        cache: ResponseCache,
        masker: SecretMasker,
        read: Callable[[ProxyRequest, ResponseInHand, AttemptLog, int], Awaitable[ReadAnswer | None]],
    ) -> None:
        self._sender = sender
        self._cache = cache
        self._masker = masker
        self._read = read

    async def fetch(
        self, request: ProxyRequest, plan: CachePlan, attempt_log: AttemptLog
    ) -> JoinedEmbeddings | ResponseInHand:
        """The answer; or the first error answer of an upstream, for the client. Raises ProxyError.

        `progress` holds, then and in any case, what the calls that ended well have cost.
        """
        batch, model = plan.batch, None
        assert batch is not None
        bought: dict[int, bytes] = {}
        usages: list[Usage | None] = []
        costs: list[Cost | None] = []
        stored = leaked = False
        while parts := batch.calls_to_make(bought):
            numbers = parts[0]
            part = request.with_input(batch.input(numbers))
            answered = await self._sender.send(part, attempt_log, whole=False)
            if answered.body is not None:
                return answered
            read = await self._whole(part, answered, attempt_log)
            usages.append(read.usage)
            costs.append(read.cost)
            attempt_log.usage, attempt_log.cost = total_usage(usages), total_cost(costs)
            vectors, named = _vectors(part, answered, read)
            if bought and named != model:
                raise _not_whole("several models answered")
            model = named
            leaked = leaked or answered.leaked
            if plan.write and not answered.leaked:
                goods = new_entry(answered, read.headers, read.usage, read.cost, model, part.model)
                stored |= await self._cache.store_items(request, plan, goods, numbers, vectors)
            bought.update(zip(numbers, vectors, strict=True))
            if any(found.entry.answer_model != model for found in batch.found.values()):
                batch = msgspec.structs.replace(batch, found={})  # vectors of two models cannot be compared
                plan = msgspec.structs.replace(plan, batch=batch, reason="model changed", fwd="request")
        everything = bought | {number: found.vector for number, found in batch.found.items()}
        size = sum(map(len, everything.values()))
        body = await in_thread_if_large(size, answer_body, everything, batch.order, model, attempt_log.usage)
        if leaked:
            body = self._masker.mask(body)
        savings = savings_of(batch.found.values()) if batch.found else None
        return JoinedEmbeddings(plan, answered.response.reason, read.headers, body, model, stored, savings)

    async def _whole(self, part: ProxyRequest, answered: ResponseInHand, attempt_log: AttemptLog) -> ReadAnswer:
        read = None
        if not (answered.is_stream or answered.opaque):
            read = await self._read(part, answered, attempt_log, SPILL_OF_ITEMS)
        if read is None:
            answered.lease.settle(None)
            answered.response.close()
            raise _not_whole("a stream, encoded, or too long")
        return read


def _vectors(part: ProxyRequest, answered: ResponseInHand, read: ReadAnswer) -> tuple[list[bytes], str | None]:
    """What was bought, and the model's name. Raises Refusal where it is not what was asked for: the client's request
    was another, so the answer cannot pass as it is.
    """
    why_not: str | None = "not a JSON answer"
    if answered.status == 200 and isinstance(read.document, Mapping):
        why_not = plain_complete(part.endpoint, part.document, read.document)
    vectors = vectors_of(read.document) if why_not is None else None
    if vectors is None:
        raise _not_whole(why_not or "not of the usual form")
    model = read.document.get("model")
    return vectors, model if isinstance(model, str) else None


def new_entry(
    answered: ResponseInHand,
    headers: Sequence[Raw],
    usage: Usage | None,
    cost: Cost | None,
    model: object,
    asked_model: str = "",
) -> NewEntry:
    upstream = answered.upstream
    price = partial(
        upstream.prices.cost, upstream.address.kind, (model if isinstance(model, str) else None, asked_model)
    )
    return NewEntry(answered.status, headers, usage, cost, model, answered.injected, price)


def _not_whole(why: str) -> ProxyError:
    return TransportFailure("invalid", f"the upstream's embeddings are not what was asked for: {why}").proxy_error()
