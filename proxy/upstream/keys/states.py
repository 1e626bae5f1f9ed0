"""What each answer does to the state of a key: one table, and the memory it is applied to (contract 7, Keys).

State is per (key, model); what is true of the whole key (401, `insufficient_quota`) stands under every model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Literal

from ..retry.outcome import OutcomeKind

UNUSABLE_FOR: Final = 600.0
"""Seconds after which a rejected or exhausted key is tried again."""

PROBE_REST: Final = 30.0
"""Seconds for which the one request that tries a rested key has it for itself, unless its answer comes before."""

PROBE_COOL: Final = 0.1
"""A key that has cooled is taken by one request, by the next after so many seconds, then at 1/2, 1/3 … of them: if it
is still limited few have gone up in vain when its 429 is back, and waiters do not stampede. An answer ends it."""

STALE: Final = 60.0
"""A cooling that ended so many seconds ago no longer matters."""

ANY_MODEL: Final = "*"
_MAX_STATES: Final = 10_000


class Status(Enum):
    READY = "ready"
    COOLING = "cooling"
    EXHAUSTED = "exhausted"
    REJECTED = "rejected"
    MISSING = "missing"  # this key cannot see the model; others may


@dataclass(frozen=True, slots=True)
class Transition:
    """The outcome takes the key out of use. whole: for every model; asked: as long as upstream asks, else `REST`."""

    status: Status
    whole: bool
    asked: bool = False


Effect = Transition | Literal["proves", "nothing"]
"""`proves`: the key works, so that a rest or a probe is over; a deadline set for cooling still stands."""

TRANSITIONS: Final[Mapping[OutcomeKind, Effect]] = {
    OutcomeKind.OK: "proves",
    OutcomeKind.FINAL: "proves",
    OutcomeKind.RATE_LIMITED: Transition(Status.COOLING, whole=False, asked=True),
    OutcomeKind.QUOTA: Transition(Status.EXHAUSTED, whole=True),
    OutcomeKind.UNAUTHORIZED: Transition(Status.REJECTED, whole=True),
    OutcomeKind.FORBIDDEN: Transition(Status.REJECTED, whole=False),
    OutcomeKind.MODEL_MISSING: Transition(Status.MISSING, whole=False),
    OutcomeKind.ORGANIZATION: "nothing",  # the headers are wrong, not the key
    OutcomeKind.TOO_LARGE: "nothing",  # smaller requests pass
    OutcomeKind.RETRY: "nothing",  # one odd 5xx is the upstream's affair
    OutcomeKind.UNREACHED: "nothing",
    OutcomeKind.STALE: "nothing",
    OutcomeKind.AMBIGUOUS: "nothing",
    OutcomeKind.TIMEOUT: "nothing",
    OutcomeKind.INVALID: "nothing",
}
"""From whatever state, by outcome."""


@dataclass(frozen=True, slots=True)
class KeyState:
    """since, until: monotonic seconds; floor: only requests of at least so many estimated tokens are held back (a
    token limit leaves room for small ones); probes: requests that tried the key since its time was over.
    """

    status: Status
    since: float
    until: float
    reason: str
    floor: int = 0
    probes: int = 0


_Where = tuple[str, str]
_States = OrderedDict[_Where, KeyState]


class KeyStates:
    """The states of all keys. Cooling stands apart from the rest: neither deadline is lost to the other."""

    def __init__(self) -> None:
        self._cooling: _States = OrderedDict()
        self._resting: _States = OrderedDict()

    def of(self, label: str, model: str, now: float) -> tuple[KeyState | None, KeyState | None]:
        """What keeps a key from use at `now`: (exhausted, rejected or missing; cooling)."""
        if not (self._resting or self._cooling):
            return None, None
        resting = self._held(self._resting, (label, ANY_MODEL), now)
        if resting is None:
            resting = self._held(self._resting, (label, model), now)
        return resting, self._held(self._cooling, (label, model), now)

    @staticmethod
    def _held(states: _States, where: _Where, now: float) -> KeyState | None:
        state = states.get(where)
        return state if state is not None and state.until > now else None

    def active(self, label: str, model: str, now: float) -> dict[str, KeyState]:
        """The same, each by its kind and the model it is about: `rests *`, `rests M`, `cools M`."""
        found = {
            f"rests {ANY_MODEL}": self._held(self._resting, (label, ANY_MODEL), now),
            f"rests {model}": self._held(self._resting, (label, model), now),
            f"cools {model}": self._held(self._cooling, (label, model), now),
        }
        return {kind: state for kind, state in found.items() if state is not None}

    def leased(self, label: str, model: str, now: float) -> None:
        """A request takes the key: where its time had run out, this one tries it for the others."""
        if not (self._resting or self._cooling):
            return
        for where in ((label, ANY_MODEL), (label, model)):
            state = self._resting.get(where)
            if state is not None and state.until <= now:
                self._resting[where] = replace(state, until=now + PROBE_REST, probes=state.probes + 1)
        state = self._cooling.get((label, model))
        if state is not None and state.until <= now:
            if now - state.until > STALE:
                del self._cooling[label, model]
            else:
                probes = state.probes + 1
                self._cooling[label, model] = replace(state, until=now + PROBE_COOL / probes, probes=probes)

    def record(
        self, label: str, model: str, outcome: OutcomeKind, now: float, wait: float, reason: str, floor: int = 0
    ) -> None:
        """Applies the table. wait: seconds a rate-limited key cools; floor: see KeyState."""
        effect = TRANSITIONS[outcome]
        if isinstance(effect, Transition):
            until = now + (wait if effect.asked else UNUSABLE_FOR)
            self.mark(label, ANY_MODEL if effect.whole else model, effect.status, now, until, reason, floor)
        elif effect == "proves":
            if self._resting:
                self._resting.pop((label, ANY_MODEL), None)
                self._resting.pop((label, model), None)
            if self._cooling:
                state = self._cooling.get((label, model))
                if state is not None and state.probes:
                    del self._cooling[label, model]

    def mark(
        self, label: str, model: str, status: Status, now: float, until: float, reason: str, floor: int = 0
    ) -> None:
        """Takes a key out of use until `until`; a deadline is extended, never shortened."""
        states = self._cooling if status is Status.COOLING else self._resting
        where = label, model
        old = states.get(where)
        current = old is not None and (old.until > now or old.probes > 0)
        if old is not None and old.until > now:
            floor = min(floor, old.floor)
            if old.until > until:
                states[where] = replace(old, reason=reason, floor=floor)
                return
        since = old.since if old is not None and current and old.status is status else now
        states[where] = KeyState(status, since, until, reason, floor)
        states.move_to_end(where)
        while len(states) > _MAX_STATES:
            states.popitem(last=False)

    def inherit(self, old: KeyStates, same: Set[str], now: float) -> None:
        """Takes over what still counts of keys with a label in `same`; what was rejected gets another chance."""
        for where, state in old._cooling.items():
            if where[0] in same and state.until > now:
                self._cooling[where] = state
        for where, state in old._resting.items():
            if where[0] in same and state.until > now and state.status is Status.EXHAUSTED:
                self._resting[where] = state

    def current(self, now: float) -> Iterator[tuple[str, str, KeyState]]:
        """(label, model, state) of all that is not ready."""
        for states in (self._resting, self._cooling):
            for (label, model), state in states.items():
                if state.until > now:
                    yield label, model, state
