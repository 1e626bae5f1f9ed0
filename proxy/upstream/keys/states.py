"""What each outcome does to the state of a key: one table, and the states it is applied to (`docs/keys-and-limits.md`).

State is per (key, model). What concerns the whole key (401, `insufficient_quota`) is kept under every model.
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

PROBE_TIMEOUT: Final = 30.0
"""Seconds for which one request alone tries an unusable key again, unless its response comes sooner."""

PROBE_SPACING: Final = 0.1
"""After a cooldown, probes are spaced by this many seconds, then by 1/2, 1/3 … of it, until a response comes: few
requests fail if the key is still limited, and the waiters do not all start at once."""

FORGET_COOLING_AFTER: Final = 60.0
"""Seconds after its end at which a cooldown is forgotten."""

ANY_MODEL: Final = "*"
_MAX_STATES: Final = 10_000


class Status(Enum):
    READY = "ready"
    COOLING = "cooling"
    EXHAUSTED = "exhausted"
    REJECTED = "rejected"
    MISSING = "missing"  # this key has no access to the model or route; others may


@dataclass(frozen=True, slots=True)
class Transition:
    """The outcome makes the key unusable.

    all_models: for every model, not only the one asked for. until_upstream_says: for as long as the upstream asks,
    not for `UNUSABLE_FOR`. for_route: for the route alone, whatever the model. repeated: only if another request had
    the same outcome before, with no success between.
    """

    status: Status
    all_models: bool
    until_upstream_says: bool = False
    for_route: bool = False
    repeated: bool = False


Effect = Transition | Literal["healthy", "nothing"]
"""`healthy`: the key works, which ends an unusable state or a probe; the deadline of a cooldown still stands."""

TRANSITIONS: Final[Mapping[OutcomeKind, Effect]] = {
    OutcomeKind.OK: "healthy",
    OutcomeKind.FINAL: "healthy",
    OutcomeKind.RATE_LIMITED: Transition(Status.COOLING, all_models=False, until_upstream_says=True),
    OutcomeKind.QUOTA: Transition(Status.EXHAUSTED, all_models=True),
    OutcomeKind.UNAUTHORIZED: Transition(Status.REJECTED, all_models=True),
    OutcomeKind.FORBIDDEN: Transition(Status.REJECTED, all_models=False),
    OutcomeKind.DOUBTFUL: Transition(Status.REJECTED, all_models=False, repeated=True),
    OutcomeKind.MODEL_MISSING: Transition(Status.MISSING, all_models=False),
    OutcomeKind.SCOPE: Transition(Status.MISSING, all_models=False, for_route=True),
    OutcomeKind.REFUSED: "nothing",  # it is about this request
    OutcomeKind.ORGANIZATION: "nothing",  # the headers are wrong, not the key
    OutcomeKind.TOO_LARGE: "nothing",  # smaller requests pass
    OutcomeKind.RETRY: "nothing",  # a single 5xx is about the upstream, not the key
    OutcomeKind.UNREACHED: "nothing",
    OutcomeKind.STALE: "nothing",
    OutcomeKind.AMBIGUOUS: "nothing",
    OutcomeKind.TIMEOUT: "nothing",
    OutcomeKind.INVALID: "nothing",
}
"""What each outcome does, whatever the state was."""


@dataclass(frozen=True, slots=True)
class KeyOutcome:
    """What became of a request on a key.

    at: monotonic seconds. wait: seconds a rate-limited key cools. floor: as in `KeyState`. route: as in `KeyRequest`.
    request: digest of the request, which tells it from others.
    """

    kind: OutcomeKind
    at: float
    wait: float = 0.0
    reason: str = ""
    floor: int = 0
    route: str = ""
    request: int = 0


@dataclass(frozen=True, slots=True)
class KeyState:
    """Why a key is not ready.

    since, until: monotonic seconds. floor: only requests of at least this many estimated tokens are held back, since
    a token limit leaves room for smaller ones. probes: requests that tried the key since `until` passed.
    """

    status: Status
    since: float
    until: float
    reason: str
    floor: int = 0
    probes: int = 0


@dataclass(frozen=True, slots=True)
class StateChange:
    """A key has come into another state, for one model or all of them. until: monotonic seconds."""

    model: str
    status: Status
    until: float = 0.0
    reason: str = ""


_KeyAndModel = tuple[str, str]
_States = OrderedDict[_KeyAndModel, KeyState]


class KeyStates:
    """The states of all keys. Cooldowns are kept apart from unusable states, so that neither deadline is lost."""

    def __init__(self) -> None:
        self._cooling: _States = OrderedDict()
        self._unusable: _States = OrderedDict()
        self._doubtful: OrderedDict[_KeyAndModel, int] = OrderedDict()
        """The request that got a refusal of which it is not known whether it is about the key."""

    def blocking(self, label: str, model: str, now: float, route: str = "") -> tuple[KeyState | None, KeyState | None]:
        """Return what keeps a key from use at `now`: (exhausted, rejected or missing; cooling)."""
        if not (self._unusable or self._cooling):
            return None, None
        unusable = self._active(self._unusable, (label, ANY_MODEL), now)
        if unusable is None:
            unusable = self._active(self._unusable, (label, model), now)
        if unusable is None and route:
            unusable = self._active(self._unusable, (label, route), now)
        return unusable, self._active(self._cooling, (label, model), now)

    @staticmethod
    def _active(states: _States, where: _KeyAndModel, now: float) -> KeyState | None:
        state = states.get(where)
        return state if state is not None and state.until > now else None

    def active(self, label: str, model: str, now: float) -> dict[str, KeyState]:
        """Return the same by kind and model, as other proxies are told: `rests *`, `rests M`, `cools M`."""
        found = {
            f"rests {ANY_MODEL}": self._active(self._unusable, (label, ANY_MODEL), now),
            f"rests {model}": self._active(self._unusable, (label, model), now),
            f"cools {model}": self._active(self._cooling, (label, model), now),
        }
        return {kind: state for kind, state in found.items() if state is not None}

    def record_lease(self, label: str, model: str, now: float) -> None:
        """Note that a request takes the key. If the key's time was over, this request is the probe for the others."""
        if not (self._unusable or self._cooling):
            return
        for where in ((label, ANY_MODEL), (label, model)):
            state = self._unusable.get(where)
            if state is not None and state.until <= now:
                self._unusable[where] = replace(state, until=now + PROBE_TIMEOUT, probes=state.probes + 1)
        state = self._cooling.get((label, model))
        if state is not None and state.until <= now:
            if now - state.until > FORGET_COOLING_AFTER:
                del self._cooling[label, model]
            else:
                probes = state.probes + 1
                self._cooling[label, model] = replace(state, until=now + PROBE_SPACING / probes, probes=probes)

    def record(self, label: str, model: str, outcome: KeyOutcome) -> StateChange | None:
        """Apply the table to an outcome. Return what has changed; None if the state goes on."""
        effect = TRANSITIONS[outcome.kind]
        if isinstance(effect, Transition):
            if effect.repeated and not self._is_repeated((label, model), outcome.request):
                return None
            until = outcome.at + (outcome.wait if effect.until_upstream_says else UNUSABLE_FOR)
            state = KeyState(effect.status, outcome.at, until, outcome.reason, outcome.floor)
            where = outcome.route if effect.for_route else ANY_MODEL if effect.all_models else model
            return self.mark(label, where, state)
        return self._recover(label, model, outcome.route) if effect == "healthy" else None

    def _recover(self, label: str, model: str, route: str) -> StateChange | None:
        """The key works: end its unusable states and the probing after a cooldown."""
        ended = None
        if self._unusable:
            for where in (route, model, ANY_MODEL):
                if self._unusable.pop((label, where), None) is not None:
                    ended = StateChange(where, Status.READY)
        if self._doubtful:
            self._doubtful.pop((label, model), None)
        if self._cooling:
            old = self._cooling.get((label, model))
            if old is not None and old.probes:
                del self._cooling[label, model]
                ended = ended or StateChange(model, Status.READY)
        return ended

    def _is_repeated(self, where: _KeyAndModel, request: int) -> bool:
        """Note a doubtful refusal. Return whether another request had one before, with no success since then."""
        before = self._doubtful.setdefault(where, request)
        while len(self._doubtful) > _MAX_STATES:
            self._doubtful.popitem(last=False)
        return before != request

    def mark(self, label: str, model: str, state: KeyState) -> StateChange | None:
        """Put a key into `state`, which begins at `state.since`. A deadline is extended, never shortened.

        Return the change; None if the key was in this state already, or stays in a longer one.
        """
        change: StateChange | None = StateChange(model, state.status, state.until, state.reason)
        states = self._cooling if state.status is Status.COOLING else self._unusable
        where = label, model
        old = states.get(where)
        if old is not None:
            running = old.until > state.since
            if running:
                state = replace(state, floor=min(state.floor, old.floor))
                if old.until > state.until:
                    states[where] = replace(old, reason=state.reason, floor=state.floor)
                    return None
            if (running or old.probes) and old.status is state.status:
                state, change = replace(state, since=old.since), None
        states[where] = state
        states.move_to_end(where)
        while len(states) > _MAX_STATES:
            states.popitem(last=False)
        return change

    def inherit(self, old: KeyStates, same: Set[str], now: float) -> None:
        """Take over the active states of the keys with a label in `same`, except rejections, which get another try."""
        for where, state in old._cooling.items():
            if where[0] in same and state.until > now:
                self._cooling[where] = state
        for where, state in old._unusable.items():
            if where[0] in same and state.until > now and state.status is Status.EXHAUSTED:
                self._unusable[where] = state

    def current(self, now: float) -> Iterator[tuple[str, str, KeyState]]:
        """Yield (label, model, state) of whatever is not ready."""
        for states in (self._unusable, self._cooling):
            for (label, model), state in states.items():
                if state.until > now:
                    yield label, model, state
