"""Limits that are shared by several processes: by the workers of one proxy, or by proxies that use one Redis.

Each process still decides by its own `RateLimiter` first: what its own requests exceed need not be asked for. What it
would admit is then confirmed by `SharedLimits`, in one call, or taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from ...config.limits import Limits
from .rate_limiter import RateLimiter, Reservation

RECHECK: Final = 0.25
"""Seconds between two questions about the same limit: other processes free capacity without notifying this one."""

ApplyRemoteState = Callable[[str, str, str, float, str], None]
"""Takes over what another proxy has learned of a key: (label, model, status, seconds that it lasts, reason)."""

RemoteState = tuple[str, float, str]
"""What keeps a key from use: (status, seconds that it lasts, reason)."""


class SharedLimits(Protocol):
    """Limits that hold across processes, owned by one event loop."""

    @property
    def sound(self) -> bool:
        """Return whether limits are shared now; while they are not, each process keeps to its share."""

    def rate_limiter(self, where: tuple[str, str], limits: Limits, use: float) -> RateLimiter:
        """Return the limiter of one name, whose reservations must be confirmed."""

    async def open(self, adopt: ApplyRemoteState) -> None:
        """Connect. Returns within about a second, whether the others can be reached or not."""

    async def close(self) -> None: ...

    async def confirm(self, reservation: Reservation | None, key: str = "", model: str = "") -> bool:
        """Return whether a reservation is admitted by all, and no process knows that the key is not usable.

        If it is not, it was cancelled, and the limiter or the key pool now says how long to wait.
        """

    def publish_key_state(self, key: str, model: str, states: Mapping[str, RemoteState]) -> None:
        """Publish a key's states, by kind and model (`rests *`, `cools M`). What is missing has ended."""

    def reset(self) -> None:
        """Empty the windows of all processes."""
