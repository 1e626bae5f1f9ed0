"""`Fetcher`: gets a response from upstream and makes a reply of it: an error, a plain one, a stream, embeddings."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from msgspec.structs import replace

from ..cache.completeness import plain_complete
from ..cache.embeddings import answer_body, in_order, vectors_of
from ..cache.lookup import ResponseCache
from ..cache.plan import CachePlan
from ..protocol.errors import ProxyError
from ..protocol.masking import SecretMasker
from ..protocol.request import ProxyRequest
from ..upstream.endpoint_sender import EndpointSender
from ..upstream.progress import AttemptLog
from ..upstream.reader import ResponseReader, WholeResponse
from ..upstream.response import ResponseInHand
from ..upstream.retry.fallback import with_model
from .coalescing.reply import Charge, Failure, Reply, SharedReply
from .coalescing.single_flight import Sharing
from .embeddings import MAX_EMBEDDINGS, EmbeddingsFetcher, answer_model, new_entry
from .recorder import Recorder, RequestContext
from .response_headers import Pairs, cost_headers
from .stream_replies import RETRYABLE, StreamReplies

SPILL: Final = 64 * 1024 * 1024
"""A plain response larger than this is not parsed: it is passed on as it comes (bytes)."""

_UNKNOWN_COST: Final[Pairs] = (("X-Proxy-Cost-Status", "unknown"),)


class Fetcher:
    """Gets responses from upstream."""

    def __init__(
        self,
        sender: EndpointSender,
        reader: ResponseReader,
        cache: ResponseCache,
        *,
        embeddings: EmbeddingsFetcher,
        streams: StreamReplies,
        recorder: Recorder,
        masker: SecretMasker,
    ) -> None:
        self._sender = sender
        self._reader = reader
        self._cache = cache
        self._embeddings = embeddings
        self._streams = streams
        self._recorder = recorder
        self._masker = masker

    async def fetch(self, request: ProxyRequest, plan: CachePlan, attempt_log: AttemptLog) -> SharedReply | Failure:
        """Return the reply that the upstream's response makes, or why there is none. Never raises ProxyError.

        If it is cancelled it finishes the receipt itself.
        """
        context = RequestContext(request, plan, attempt_log, Charge())
        try:
            if plan.batch is not None and plan.batch.changes_request:
                return await self._embeddings_reply(context)
            response = await self._sender.send(request, attempt_log)
            if attempt_log.model:  # a fallback answers: it is priced as such and never stored as the model asked for
                fallback = with_model(request, attempt_log.model)
                context = context._replace(request=fallback, plan=replace(plan, write=False))
            if response.body is not None:
                return self._error_reply(context, response)
            if response.is_stream or response.opaque:
                return self._streams.reply(context, response)
            return await self._plain_reply(context, response)
        except ProxyError as error:
            context.charge.error = error.code
            receipt = self._recorder.receipt(context, error.status)
            return Failure(error.copy(self._recorder.headers(context)), receipt)
        except asyncio.CancelledError:
            context.charge.error = "client_gone"
            self._recorder.finish(self._recorder.receipt(context, 499))
            raise

    def _error_reply(self, context: RequestContext, response: ResponseInHand) -> SharedReply:
        """Return the upstream's own error with its status and body; keys are masked."""
        assert response.body is not None
        attempt_log = context.attempt_log
        error = context.charge.error = "no_usable_key" if attempt_log.no_usable_key else f"upstream_{response.status}"
        replaced = b"x-should-retry" if attempt_log.spent or attempt_log.no_usable_key else b""
        common = attempt_log.retry_headers()
        reply = Reply(
            response.status,
            response.response.reason,
            self._reader.headers(response, without=replaced),
            self._recorder.headers(context, _UNKNOWN_COST) + common,
            self._masker.mask(response.body),
            receipt=self._recorder.receipt(context, response.status),
        )
        sharing = Sharing.RETRY if response.outcome in RETRYABLE else Sharing.SHARED
        return SharedReply(reply, sharing, Charge(error=error), common)

    async def _plain_reply(self, context: RequestContext, response: ResponseInHand) -> SharedReply:
        """Return a good response that is read whole. One that is too large is streamed."""
        request, plan, attempt_log, charge = context
        max_bytes = SPILL if plan.batch is None else MAX_EMBEDDINGS
        whole = await self._reader.read(request, response, attempt_log, max_bytes)
        if whole is None:
            return self._streams.reply(context, response)
        charge.usage, charge.cost = whole.usage, whole.cost  # to be paid, even if the client leaves while it is stored
        charge.answer_model = answer_model(whole.document)
        body, stored, why_not = whole.body, False, None
        if plan.write and not response.leaked and not request.stream:
            why_not = "not a JSON answer"
            if response.status == 200 and isinstance(whole.document, Mapping):
                why_not = plain_complete(request.endpoint, request.document, whole.document)
            if why_not is None:
                body, stored = await self._store(context, response, whole)
        proxy_headers = self._recorder.headers(context, cost_headers(whole.cost, whole.usage), stored, why_not)
        reply = Reply(response.status, response.response.reason, whole.headers, proxy_headers, body)
        return self._settled(context, reply, stored)

    async def _store(
        self, context: RequestContext, response: ResponseInHand, whole: WholeResponse
    ) -> tuple[bytes, bool]:
        """Store a complete response, of embeddings also each item. Returns the body, and whether it was stored."""
        request, plan, _, charge = context
        body, batch = whole.body, plan.batch
        vectors = vectors_of(whole.document) if batch is not None else None
        if vectors is not None and batch is not None and not in_order(whole.document):
            body = answer_body(dict(enumerate(vectors)), batch.order, charge.answer_model, whole.usage)
        new = new_entry(request, response, whole)
        stored = self._cache.store(request, plan, new, body)
        if vectors is not None:
            stored |= await self._cache.store_items(request, plan, new, range(len(vectors)), vectors)
        return body, stored

    async def _embeddings_reply(self, context: RequestContext) -> SharedReply:
        """Return the reply to a batch that goes upstream only in part, or in parts."""
        charge = context.charge
        joined = await self._embeddings.fetch(context)
        if isinstance(joined, ResponseInHand):
            return self._error_reply(context, joined)
        charge.answer_model, charge.savings = joined.model, joined.savings
        context = context._replace(plan=joined.plan)
        cost = cost_headers(charge.cost, charge.usage, joined.savings)
        proxy_headers = self._recorder.headers(context, cost, joined.stored)
        return self._settled(
            context, Reply(200, joined.reason, joined.headers, proxy_headers, joined.body), joined.stored
        )

    def _settled(self, context: RequestContext, reply: Reply, stored: bool) -> SharedReply:
        """Return the reply with its receipt. It is shared if it was stored."""
        if not stored:
            self._streams.mark_uncacheable(context.request, context.plan)
        reply = replace(reply, receipt=self._recorder.receipt(context, reply.status))
        return SharedReply(reply, Sharing.SHARED if stored else Sharing.PRIVATE, context.charge)
