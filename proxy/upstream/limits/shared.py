"""Where limits are counted. In memory they are plain `core.limits` allowances, decided synchronously, and nothing of
this package is imported. `redis` counts them for every proxy that names the same Redis.

With a limiter each proxy still decides by its own allowances first: what its own requests alone exceed need not be
asked for. What they would admit is then confirmed by the limiter, in one call, or taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from ...config.limits import Limits
from .rate_limiter import RateLimiter, Reservation

RECHECK: Final = 0.25
"""Seconds after which the others are asked again: they give back unheard."""

ApplyRemoteState = Callable[[str, str, str, float, str], None]
"""Takes over what another proxy learned of a key: (label, model, status, seconds it lasts, reason)."""

RemoteState = tuple[str, float, str]
"""What keeps a key from use: (status, seconds it lasts, reason)."""


class SharedLimits(Protocol):
    """Limits that hold across proxies. Owned by one event loop."""

    @property
    def sound(self) -> bool:
        """Whether they hold across proxies now: False while each holds only its share."""

    def rate_limiter(self, where: tuple[str, str], limits: Limits, use: float) -> RateLimiter:
        """The windows of one name, to be reserved from and then confirmed."""

    async def open(self, adopt: ApplyRemoteState) -> None:
        """Returns within about a second, whether the others can be reached or not."""

    async def close(self) -> None: ...

    async def confirm(self, reservation: Reservation | None, key: str = "", model: str = "") -> bool:
        """Whether a reservation holds everywhere, and nobody knows better of the key. If not, it was taken back, and
        the allowance or the key ring now says how long to wait.
        """

    def publish_key_state(self, key: str, model: str, states: Mapping[str, RemoteState]) -> None:
        """Lets others know of a key's states, by kind and model: `rests *`, `cools M`. What is not there is over."""

    def reset(self) -> None:
        """Everybody's windows start afresh."""
