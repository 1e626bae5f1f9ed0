"""When Redis counts as lost.

A proxy that goes on alone because of one late reply would use capacity that the others still share, so replies must be
late for some time. If connections are refused, Redis is lost for all proxies, and each may use its share at once.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final

from ...system.state_changes import Change, state_changed

REFUSED_FOR: Final = 0.5
"""Seconds after which Redis is lost if connections are refused or closed."""

SILENT_FOR: Final = 5.0
"""Seconds after which Redis is lost if replies are missing, from the first one that was missed.

It may be out of reach for this proxy only, or this machine may be busy.
"""

SETTLING: Final = 3.0
"""Seconds after the start until the other proxies are known: Redis does not count as lost before."""

KEY_STATE_WAIT: Final = 0.5
"""Seconds for which a request without limits waits for what others know of its key."""

FORGET_AFTER: Final = 5.0
"""Seconds without Redis within which no proxy has forgotten another: one heard of since then has told everything."""


def loop_time() -> float:
    """Return the running event loop's clock, in seconds."""
    return asyncio.get_running_loop().time()


def log_state(state: str, text: str) -> None:
    """Count and log that limits are shared, or kept by this proxy alone. text: says why."""
    state_changed(Change("limiter", "redis limits", state, f"redis limits: {text}"))


class OutageDetector:
    """Remembers since when Redis does not reply, by the running event loop's clock."""

    __slots__ = ("_since", "settled_at")

    def __init__(self) -> None:
        self._since = math.inf
        self.settled_at = -math.inf

    def connected(self) -> None:
        """Note that Redis was reached for the first time."""
        self.settled_at = loop_time() + SETTLING

    def failed(self) -> None:
        """Note that a reply was missing."""
        self._since = min(self._since, loop_time())

    def answered(self) -> None:
        """Note a reply."""
        self._since = math.inf

    def is_loss(self, gone: bool) -> bool:
        """Return whether Redis counts as lost. gone: connections are refused or closed."""
        return loop_time() >= max(self._since + (REFUSED_FOR if gone else SILENT_FOR), self.settled_at)
