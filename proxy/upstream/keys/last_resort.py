"""The last resort: while every key of a model is rejected, one request in a second is still tried."""

from __future__ import annotations

from typing import Final

INTERVAL: Final = 1.0
"""Seconds between two requests that are tried on rejected keys of one model."""

_MAX_MODELS: Final = 10_000


class LastResort:
    """Which requests may use rejected keys. A request that may is tried on all of them, one after another."""

    def __init__(self) -> None:
        self._given: dict[str, tuple[float, frozenset[str]]] = {}

    def allows(self, model: str, excluded: frozenset[str], now: float) -> bool:
        """Whether a request may use a rejected key. excluded: labels of keys that it has failed with."""
        given = self._given.get(model)
        return given is None or now - given[0] >= INTERVAL or given[1] <= excluded

    def record(self, model: str, tried: frozenset[str], now: float) -> None:
        """Note that a request uses a rejected key. tried: labels of its keys, this one among them."""
        if len(self._given) >= _MAX_MODELS:
            self._given.clear()
        self._given[model] = now, tried
