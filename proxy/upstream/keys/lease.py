"""The values of choosing a key: what there is, what is wanted, what one gets, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, Literal

import msgspec

from ...accounting.budgets.account import BudgetReservation
from ...config.limits import Limits
from ..limits.clients import ClientReservation
from ..limits.rate_limiter import Reservation, Wait


@dataclass(frozen=True, slots=True)
class UpstreamKey:
    """A key as the ring sees it: no secret. upstream: index of its upstream; models: globs that upstream serves."""

    label: str
    upstream: int
    models: tuple[str, ...]
    priority: int = 0
    quota: str = ""
    limits: Mapping[str, Limits] = field(default_factory=dict)
    weight: float = 1.0

    def serves(self, model: str) -> bool:
        return any(glob == "*" or fnmatchcase(model, glob) for glob in self.models)


class Lease(msgspec.Struct, frozen=True):
    """A key with its share of the limits reserved; `reservation` is None where no limit applies; hold: of its client's
    own limits; stake: of the budgets."""

    key: UpstreamKey
    reservation: Reservation | None
    tokens: int = 0
    client_reservation: ClientReservation | None = None
    budget_reservation: BudgetReservation | None = None


class KeyRequest(msgspec.Struct, frozen=True):
    """What a request asks of the key it gets. prefix: digest of its prompt's beginning, b"" for none; only: the label
    of the one key that will do (''): any); above: only priorities of a higher number than this; avoid: upstreams that
    failed it, to be taken last.
    """

    prefix: bytes = b""
    pinned_to: str = ""
    min_priority: int | None = None
    avoid: frozenset[int] = frozenset()


ANY_KEY: Final = KeyRequest()


@dataclass(frozen=True, slots=True)
class NotReady:
    """No key now. The gate waits `wait.seconds`; why decides the error when patience ends before."""

    wait: Wait
    why: Literal["throttled", "keys_cooling"]


@dataclass(frozen=True, slots=True)
class NoKey:
    """No key will do, however long one waits. retry_after: seconds until another request may find one, None:
    unknown.
    """

    why: Literal["no_usable_key", "request_exceeds_limit", "circuit_open"]
    detail: str
    retry_after: float | None = None


class Candidates(msgspec.Struct):
    """What stood in the way of each key."""

    cooling: list[float] = msgspec.field(default_factory=list)
    throttled: list[float] = msgspec.field(default_factory=list)
    open: list[float] = msgspec.field(default_factory=list)
    unusable: list[str] = msgspec.field(default_factory=list)
    missing: list[UpstreamKey] = msgspec.field(default_factory=list)
    too_large: str | None = None

    def answer(self) -> NotReady | NoKey:
        if self.throttled or self.cooling:
            if self.cooling and (not self.throttled or min(self.cooling) < min(self.throttled)):
                return NotReady(Wait(min(self.cooling)), "keys_cooling")
            return NotReady(Wait(min(self.throttled)), "throttled")
        if self.too_large is not None:
            return NoKey("request_exceeds_limit", self.too_large)
        if self.open:
            detail = "every upstream that serves this has failed too often of late and is left alone for a while"
            return NoKey("circuit_open", detail, min(self.open))
        return NoKey("no_usable_key", "no usable key: " + (", ".join(self.unusable) or "every key was refused"))
