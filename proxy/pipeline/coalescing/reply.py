"""What an answer from upstream is to the one who bought it, and what of it concerns those who share it."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import msgspec

from ...cache.embeddings import Savings
from ...cost.pricing import Cost, usd
from ...cost.usage import Usage
from ...protocol.headers import Raw
from ..relay import ClientFilter, StreamRelay
from ..response_headers import ZERO_COST
from .broadcast import Broadcast, SubscriberStream
from .single_flight import Sharing


class Charge(msgspec.Struct):
    """What an answer cost, as far as known: a stream's only at its end. error: as its receipt has it; savings: of the
    items of a batch that were cached, or all of it to one who shares it."""

    usage: Usage | None = None
    cost: Cost | None = None
    answer_model: str | None = None
    error: str = ""
    savings: Savings | None = None

    def saved_by_sharing(self) -> Savings:
        """What it spares whoever gets it, too: all of it, cached items and bought ones."""
        cached = self.savings or Savings(None, ZERO_COST, estimated=False)
        if self.cost is None or cached.cost is None:
            return msgspec.structs.replace(cached, cost=None)
        return msgspec.structs.replace(cached, cost=usd(self.cost.usd + Decimal(cached.cost)))


class Reply(msgspec.Struct, frozen=True):
    """An answer from upstream. lines: our headers, as text, and with them `extra`: those that hold for everybody who
    gets it; body: whole, or None where `flow` streams it.

    share: whose it may be; reel, dress: where several read its stream, and what the one who bought it gets of that;
    usage_asked: the usage chunk is in the stream, if the upstream sends one.
    """

    status: int
    reason: str
    headers: Sequence[Raw]
    lines: str
    body: bytes | None
    stream: StreamRelay | SubscriberStream | None = None
    share: Sharing = Sharing.PRIVATE
    charge: Charge | None = None
    extra: str = ""
    broadcast: Broadcast | None = None
    client_filter: ClientFilter | None = None
    usage_asked: bool = True
