"""The retry policy as one small machine: what follows each outcome of a request (contract 7, Retry).

It holds what one request has used up; it never sleeps, sends or reads a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from .outcome import KEY_TROUBLE, OutcomeKind


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`retry.*` of the settings; times in seconds."""

    max_retries: int = 3
    base_delay: float = 1.0
    max_delay: float = 10.0
    jitter: float = 1.0
    ambiguous: bool = True

    def with_max_retries(self, max_retries: int | None) -> RetryPolicy:
        """The policy of a request that may ask for a number of retries of its own; None: it does not."""
        return self if max_retries is None else replace(self, max_retries=max_retries)

    def delay(self, attempt: int, random: Callable[[], float]) -> float:
        """`min(base · 2^attempt + random(0, jitter), max)` for the `attempt`-th retry, counted from 0."""
        return min(self.base_delay * 2.0 ** min(attempt, 30) + random() * self.jitter, self.max_delay)


@dataclass(frozen=True, slots=True)
class ReturnToClient:
    """The outcome is the client's. spent: our retries are used up, so an SDK should add none."""

    spent: bool = False


@dataclass(frozen=True, slots=True)
class TryNextKey:
    """Ask for a key again at once; the last one is not to be used for this request."""


@dataclass(frozen=True, slots=True)
class RetryOnNewConnection:
    """Send again at once, with the same key, on a connection that nobody used before."""


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Wait that long, then ask for a key again."""

    seconds: float


Step = ReturnToClient | TryNextKey | RetryOnNewConnection | RetryAfter


_ELSEWHERE: Final = frozenset({*KEY_TROUBLE, OutcomeKind.RETRY, OutcomeKind.RATE_LIMITED, OutcomeKind.UNREACHED})


class RetryState:
    """One request's use of the policy."""

    __slots__ = ("_random", "policy", "retries", "stale_used")

    def __init__(self, policy: RetryPolicy, random: Callable[[], float]) -> None:
        self.policy = policy
        self._random = random
        self.retries = 0
        self.stale_used = False

    def can_fail_over(self, outcome: OutcomeKind) -> bool:
        """Whether another upstream, or another model, may be tried once this one's retries are used up."""
        return outcome in _ELSEWHERE or (
            outcome in (OutcomeKind.AMBIGUOUS, OutcomeKind.STALE) and self.policy.ambiguous
        )

    def next(
        self,
        outcome: OutcomeKind,
        *,
        asked_wait: float | None,
        left: float,
        other_key: bool,
        granted: Callable[[], bool],
    ) -> Step:
        """The next step.

        asked_wait: seconds the upstream asked for, None if it did not; left: seconds to the deadline;
        other_key: another key could be used now; granted: takes one retry out of the upstream's budget, False where it
        is empty.
        """
        if outcome in (OutcomeKind.OK, OutcomeKind.FINAL, OutcomeKind.INVALID, OutcomeKind.TIMEOUT):
            return ReturnToClient()
        if outcome in KEY_TROUBLE:
            return TryNextKey()
        if outcome is OutcomeKind.STALE:
            if not self.stale_used:
                self.stale_used = True
                return RetryOnNewConnection()
            outcome = OutcomeKind.AMBIGUOUS
        if outcome is OutcomeKind.RATE_LIMITED and other_key:
            return TryNextKey()
        if outcome is OutcomeKind.AMBIGUOUS and not self.policy.ambiguous:
            return ReturnToClient()
        if self.retries >= self.policy.max_retries:
            return ReturnToClient(spent=self.policy.max_retries > 0)
        pause = max(self.policy.delay(self.retries, self._random), asked_wait or 0.0)
        if pause >= left:
            return ReturnToClient(spent=self.retries > 0)
        if not granted():
            return ReturnToClient(spent=True)
        self.retries += 1
        return RetryAfter(pause)


class RetryBudget:
    """Retries of one upstream as a share of its requests over the last 10 s, beyond a floor of 10 (`retry.budget`).

    After Google SRE, chapter 21: what bounds the load added to an upstream that fails altogether.
    """

    WINDOW: Final = 10.0
    FLOOR: Final = 10

    def __init__(self, share: float) -> None:
        self._share = share
        self._requests: deque[tuple[float, int]] = deque()
        self._retries: deque[float] = deque()
        self._total = 0

    def request(self, now: float) -> None:
        """Counts a request (not a retry) sent up at `now` (monotonic s); in tenths of a second, to bound memory."""
        self._expire(now)
        if self._requests and now - self._requests[-1][0] < 0.1:
            stamp, count = self._requests[-1]
            self._requests[-1] = (stamp, count + 1)
        else:
            self._requests.append((now, 1))
        self._total += 1

    def take(self, now: float) -> bool:
        """One retry, if the budget has one left."""
        self._expire(now)
        if len(self._retries) >= self.FLOOR + self._share * self._total:
            return False
        self._retries.append(now)
        return True

    def _expire(self, now: float) -> None:
        while self._requests and now - self._requests[0][0] >= self.WINDOW:
            self._total -= self._requests.popleft()[1]
        while self._retries and now - self._retries[0] >= self.WINDOW:
            self._retries.popleft()
