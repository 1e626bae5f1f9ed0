"""The requests and streams in flight. This state outlives a reload."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol


class Interruptible(Protocol):
    """What flows to a client. interrupted: the code of the reason why the proxy ends it, '' while it does not."""

    interrupted: str


@dataclass(slots=True)
class InFlight:
    """What one process serves.

    started: Unix seconds. requests: number in flight. closing: new requests are refused. draining: the first signal
    to stop has come. address: of the main listener. streams: by the task that relays them.
    """

    started: float = 0.0
    requests: int = 0
    closing: bool = False
    draining: bool = False
    address: str = ""
    streams: dict[asyncio.Task[object], Interruptible] = field(default_factory=dict)
