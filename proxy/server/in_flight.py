"""What is going on right now in one proxy, whatever its settings: it outlives a reload."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..pipeline.coalescing.broadcast import SubscriberStream
from ..pipeline.relay import StreamRelay


@dataclass(slots=True)
class InFlight:
    """in_flight: requests being served; flows: running streams by their task; closing: no new work is taken up;
    draining: SIGTERM came; address: what the proxy listens on; started: Unix seconds.
    """

    started: float = 0.0
    requests: int = 0
    closing: bool = False
    draining: bool = False
    address: str = ""
    streams: dict[asyncio.Task[object], StreamRelay | SubscriberStream] = field(default_factory=dict)
