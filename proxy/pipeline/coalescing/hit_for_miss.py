"""`HitForMiss`: remembers which responses could not be stored, so that requests do not wait in line for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

FlightKey = tuple[str, str]
"""Cache key and form: requests that have the same may share."""

HIT_FOR_MISS: Final = 60.0
"""Seconds for which requests for what could not be stored go upstream each on its own."""

HIT_FOR_MISS_KEPT: Final = 10_000
"""The number of keys that are remembered, at most."""


class HitForMiss:
    """Keys whose responses could not be stored not long ago. clock: returns monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: OrderedDict[FlightKey, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def clear(self) -> None:
        self._until.clear()

    def mark(self, keys: Sequence[FlightKey]) -> None:
        """For `HIT_FOR_MISS` seconds no request waits for another's response under these keys."""
        for key in keys:
            self._until[key] = self._clock() + HIT_FOR_MISS
            self._until.move_to_end(key)
        while len(self._until) > HIT_FOR_MISS_KEPT:
            self._until.popitem(last=False)

    def __contains__(self, key: FlightKey) -> bool:
        until = self._until.get(key)
        if until is None:
            return False
        if until > self._clock():
            return True
        del self._until[key]
        return False
