"""The retry policy: what follows each outcome of a request. It never sleeps, sends or reads a clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .outcome import KEY_TROUBLE, OutcomeKind

if TYPE_CHECKING:
    from ...config.settings import RetrySettings


def retry_delay(policy: RetrySettings, attempt: int, random: Callable[[], float]) -> float:
    """Return the seconds to wait before the `attempt`-th retry, counted from 0.

    That is `min(base_delay * 2^attempt + random(0, jitter), max_delay)`.
    """
    return min(policy.base_delay * 2.0 ** min(attempt, 30) + random() * policy.jitter, policy.max_delay)


@dataclass(frozen=True, slots=True)
class ReturnToClient:
    """The outcome goes to the client. spent: the proxy's retries are used up, so that an SDK should add none."""

    spent: bool = False


@dataclass(frozen=True, slots=True)
class TryNextKey:
    """Ask for another key at once; the last one is not used for this request again."""


@dataclass(frozen=True, slots=True)
class RetryOnNewConnection:
    """Send again at once, with the same key, on a new connection."""


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Wait `seconds`, then ask for a key again."""

    seconds: float


Step = ReturnToClient | TryNextKey | RetryOnNewConnection | RetryAfter


_ELSEWHERE: Final = frozenset({*KEY_TROUBLE, OutcomeKind.RETRY, OutcomeKind.RATE_LIMITED, OutcomeKind.UNREACHED})


class RetryState:
    """One request's use of the policy. max_retries: the request's own number; None: the policy's."""

    __slots__ = ("_max_retries", "_policy", "_random", "retries", "stale_used")

    def __init__(self, policy: RetrySettings, random: Callable[[], float], max_retries: int | None = None) -> None:
        self._policy = policy
        self._random = random
        self._max_retries = policy.max_retries if max_retries is None else max_retries
        self.stale_used = False
        self.retries = 0

    def delay(self) -> float:
        """Return the seconds to wait before the next retry, if the upstream does not ask for a time."""
        return retry_delay(self._policy, self.retries, self._random)

    def can_fail_over(self, outcome: OutcomeKind) -> bool:
        """Whether another upstream or another model may be tried after this one's retries are used up."""
        return outcome in _ELSEWHERE or (
            outcome in (OutcomeKind.AMBIGUOUS, OutcomeKind.STALE, OutcomeKind.TIMEOUT) and self._policy.ambiguous
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
        """Return what follows an outcome.

        asked_wait: seconds the upstream asks to wait; None: it does not. left: seconds to the deadline.
        other_key: another key could be used now.
        granted: takes one retry out of the upstream's budget, and returns False if it is empty.
        """
        if outcome in (OutcomeKind.OK, OutcomeKind.FINAL, OutcomeKind.INVALID):
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
        if outcome in (OutcomeKind.AMBIGUOUS, OutcomeKind.TIMEOUT) and not self._policy.ambiguous:
            return ReturnToClient()
        if self.retries >= self._max_retries:
            return ReturnToClient(spent=self._max_retries > 0)
        pause = max(self.delay(), asked_wait or 0.0)
        if pause >= left:
            return ReturnToClient(spent=self.retries > 0)
        if not granted():
            return ReturnToClient(spent=True)
        self.retries += 1
        return RetryAfter(pause)


class RetryBudget:
    """Limits the retries of 10 s to a share of the upstream's requests in that time (`retry.budget`), plus 10.

    It bounds the load that retries add to an upstream that fails altogether (Google, *Site Reliability Engineering*,
    chapter 21).
    """

    WINDOW: Final = 10.0
    FLOOR: Final = 10

    def __init__(self, share: float) -> None:
        self._share = share
        self._requests: deque[tuple[float, int]] = deque()
        self._retries: deque[float] = deque()
        self._total = 0

    def request(self, now: float) -> None:
        """Count a request (not a retry) sent at `now` (monotonic seconds), by tenths of a second to bound memory."""
        self._expire(now)
        if self._requests and now - self._requests[-1][0] < 0.1:
            stamp, count = self._requests[-1]
            self._requests[-1] = (stamp, count + 1)
        else:
            self._requests.append((now, 1))
        self._total += 1

    def take(self, now: float) -> bool:
        """Take one retry at `now` (monotonic seconds). Return False if the budget has none left."""
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
