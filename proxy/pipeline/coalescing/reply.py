"""What a fetch ends with: a reply for one client, or a failure; and what coalesced requests may take from it."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import msgspec

from ...accounting.receipt import Receipt
from ...cache.embeddings import Savings
from ...cost.pricing import Cost, usd
from ...cost.usage import Usage
from ...protocol.errors import ProxyError
from ...protocol.headers import Raw
from ..relay import ClientFilter, StreamRelay
from ..response_headers import ZERO_COST, Pairs
from .broadcast import Broadcast, SubscriberStream
from .single_flight import Sharing


class Charge(msgspec.Struct):
    """What a request has cost, as far as it is known: of a stream only at its end.

    error: the code in its receipt. savings: of cached items of a batch; for a request that shares the reply, all of it.
    """

    usage: Usage | None = None
    cost: Cost | None = None
    answer_model: str | None = None
    error: str = ""
    savings: Savings | None = None

    def saved_by_sharing(self) -> Savings:
        """Return what a request saves that shares the reply: the cost of cached items and of fetched ones."""
        cached = self.savings or Savings(None, ZERO_COST, estimated=False)
        if self.cost is None or cached.cost is None:
            return msgspec.structs.replace(cached, cost=None)
        return msgspec.structs.replace(cached, cost=usd(self.cost.usd + Decimal(cached.cost)))


class Reply(msgspec.Struct, frozen=True):
    """A response for one client.

    headers: the upstream's. proxy_headers: the proxy's own. body: None if `stream` brings it.
    receipt: that of the request, still to be finished; None if a stream's end does that.
    charge: of a stream, for its trailers.
    """

    status: int
    reason: str
    headers: Sequence[Raw]
    proxy_headers: Pairs
    body: bytes | None = None
    stream: StreamRelay | SubscriberStream | None = None
    receipt: Receipt | None = None
    charge: Charge | None = None


class Failure(msgspec.Struct, frozen=True):
    """No response could be had. receipt: as in `Reply`; None if the fetch goes on for others and its end makes it."""

    error: ProxyError
    receipt: Receipt | None = None

    @property
    def status(self) -> int:
        return self.error.status


class SharedReply(msgspec.Struct, frozen=True):
    """The reply to the request that was sent upstream, and what of it coalesced requests may have.

    common_headers: those of the proxy's headers that are the same for all of them.
    usage_asked: the usage chunk is in the stream, if the upstream sends one.
    broadcast: lets several clients read its stream. client_filter: what the client that sent the request gets of that.
    """

    reply: Reply
    sharing: Sharing
    charge: Charge
    common_headers: Pairs = ()
    usage_asked: bool = True
    broadcast: Broadcast | None = None
    client_filter: ClientFilter | None = None
