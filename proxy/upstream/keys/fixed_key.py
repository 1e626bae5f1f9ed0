"""The key for requests to stateful routes that name no object whose key is known (`docs/keys-and-limits.md`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .lease import UpstreamKey
from .pool import KeyPool
from .states import UNUSABLE_FOR


def first_usable(pool: KeyPool, keys: Sequence[UpstreamKey], model: str, now: float) -> UpstreamKey | None:
    """Return the first of `keys` that is usable, else the first; None if there is none."""
    return next((key for key in keys if pool.is_usable(key, model, now)), keys[0] if keys else None)


LACKING = frozenset({404, 405, 501})
"""Statuses of an upstream that does not have a route, if the path names no object."""


class FixedKeys:
    """Chooses the first configured key that is usable and whose upstream has the route.

    keys: in the order of the settings. has_account: whether a key stands for an account; a server without one, which
    keeps nothing, comes after all others.
    """

    def __init__(self, pool: KeyPool, keys: Sequence[UpstreamKey], has_account: Callable[[UpstreamKey], bool]) -> None:
        self._pool = pool
        self._keys = sorted(keys, key=lambda key: not has_account(key))
        self._lacking: dict[tuple[int, str], float] = {}
        self._having: set[tuple[int, str]] = set()

    def choose(self, segment: str, model: str, now: float, without: frozenset[str] = frozenset()) -> UpstreamKey:
        """Return the key. segment: the route's; model: that runs, if it is known; without: labels of failed keys."""
        keys = [key for key in self._keys if key.serves(model)] or self._keys
        left = [key for key in keys if key.label not in without] or keys
        having = [key for key in left if not self._lacks(key, segment, now)] or left
        return first_usable(self._pool, having, model, now) or having[0]

    def prefers(self, other: UpstreamKey, key: UpstreamKey, segment: str, model: str, now: float) -> bool:
        """Return whether `other` may serve a request that `key` cannot."""
        return self._lacks(key, segment, now) or first_usable(self._pool, (key, other), model, now) is other

    def record(self, key: UpstreamKey, segment: str, status: int, now: float) -> None:
        """Take note of the response to a request that names no object."""
        where = key.upstream, segment
        if status in LACKING:
            self._having.discard(where)
            self._lacking[where] = now + UNUSABLE_FOR
        elif status < 400:
            self._having.add(where)
            self._lacking.pop(where, None)

    def _lacks(self, key: UpstreamKey, segment: str, now: float) -> bool:
        """Whether an upstream does not have a route; one that lacks one of them is expected to lack the others."""
        if (key.upstream, segment) in self._having:
            return False
        return any(upstream == key.upstream and until > now for (upstream, _), until in self._lacking.items())
