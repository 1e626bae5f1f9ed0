"""When Redis is lost. A proxy that goes alone for a late answer takes of what the others still share, so lateness must
last; where nobody listens Redis is lost for all, and each may take its share.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final

REFUSED_FOR: Final = 0.5
"""Seconds after which it is lost where connections are refused or closed."""

SILENT_FOR: Final = 5.0
"""Seconds after which it is lost where answers do not come, since it was seen that one did not: perhaps it is for us
alone, and perhaps only because this machine is busy."""

SETTLING: Final = 3.0
"""Seconds after the start until who else is there can be taken for known: before, it is not lost."""

KEY_STATE_WAIT: Final = 0.5
"""Seconds a request of no limit waits for what others know of its key."""

FORGET_AFTER: Final = 5.0
"""Seconds without Redis after which nobody has forgotten anybody: who has been heard of since, has told everything."""


def loop_time() -> float:
    """The running loop's seconds."""
    return asyncio.get_running_loop().time()


class OutageDetector:
    """Since when calls are not answered, by the running loop's clock."""

    __slots__ = ("_since", "settled_at")

    def __init__(self) -> None:
        self._since = math.inf
        self.settled_at = -math.inf

    def began(self) -> None:
        """Redis was reached for the first time."""
        self.settled_at = loop_time() + SETTLING

    def failed(self) -> None:
        """A call was not answered."""
        self._since = min(self._since, loop_time())

    def answered(self) -> None:
        self._since = math.inf

    def is_loss(self, gone: bool) -> bool:
        """Whether it is time to part. gone: nobody listens."""
        return loop_time() >= max(self._since + (REFUSED_FOR if gone else SILENT_FOR), self.settled_at)
