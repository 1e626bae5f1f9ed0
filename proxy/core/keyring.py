"""The pool of keys: which one serves a request, and what each answer teaches about it (contract 7, Keys).

State is per (key, model); what is true of the whole key (401, `insufficient_quota`) stands under every model. All
methods are synchronous: one event loop needs no lock, and a key is chosen and its limits reserved in one step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

import msgspec

from .clients import Hold, Make
from .lenient import sayable
from .limits import Allowance, Limits, Never, Reservation, Wait, limits_for
from .outcome import Class

REST: Final = 600.0
"""Seconds after which a rejected or exhausted key is tried again."""

ANY_MODEL: Final = "*"
_MAX_STATES: Final = 10_000
_MAX_ALLOWANCES: Final = 10_000


class Status(Enum):
    READY = "ready"
    COOLING = "cooling"
    EXHAUSTED = "exhausted"
    REJECTED = "rejected"
    MISSING = "missing"  # this key cannot see the model; others may


@dataclass(frozen=True, slots=True)
class KeyState:
    """since, until: monotonic seconds."""

    status: Status
    since: float
    until: float
    reason: str


@dataclass(frozen=True, slots=True)
class PoolKey:
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
    own limits."""

    key: PoolKey
    reservation: Reservation | None
    hold: Hold | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """No key now. The gate waits `wait.seconds`; why decides the error when patience ends before."""

    wait: Wait
    why: Literal["throttled", "keys_cooling"]


@dataclass(frozen=True, slots=True)
class NoKey:
    """No key will do, however long one waits."""

    why: Literal["no_usable_key", "request_exceeds_limit"]
    detail: str


Strategy = Callable[[Sequence[PoolKey], "KeyRing", str, float], list[PoolKey]]
"""The order in which ready keys are tried: (keys, ring, model, now) -> keys."""


_States = OrderedDict[tuple[str, str], KeyState]


def _in_memory(where: tuple[str, str], limits: Limits, use: float) -> Allowance:
    return Allowance(limits, use)


class KeyRing:
    """The pool. `strategy` orders ready keys; `limits` are `throttle.limits`; `use` the share of each limit to use."""

    def __init__(
        self,
        keys: Sequence[PoolKey],
        strategy: Strategy,
        limits: Mapping[str, Limits],
        use: float = 1.0,
        make: Make | None = None,
    ) -> None:
        self._make = make or _in_memory
        self.keys = tuple(keys)
        self._strategy = strategy
        self._limits = limits
        self.limited = bool(limits) or any(key.limits for key in keys)
        self._use = use
        self._cooling: _States = OrderedDict()
        self._resting: _States = OrderedDict()  # apart: neither deadline is lost to the other
        self._allowances: OrderedDict[tuple[str, str], Allowance] = OrderedDict()
        self._serving: dict[str, tuple[tuple[PoolKey, ...], ...]] = {}
        self.last_used: dict[str, float] = {}
        self._uses = 0
        self._before: dict[tuple[str, str], Allowance] = {}
        self.turns: dict[str, int] = {}

    # -- which keys -------------------------------------------------------------------------------------------------

    def serving(self, model: str) -> tuple[tuple[PoolKey, ...], ...]:
        """The keys whose upstream serves `model`, in groups of rising priority number."""
        groups = self._serving.get(model)
        if groups is None:
            chosen = [key for key in self.keys if key.serves(model)]
            numbers = sorted({key.priority for key in chosen})
            groups = tuple(tuple(key for key in chosen if key.priority == number) for number in numbers)
            if len(self._serving) >= 4096:
                self._serving.clear()
            self._serving[model] = groups
        return groups

    def state(self, label: str, model: str, now: float) -> KeyState | None:
        """The state that keeps a key from use for `model` at `now`, None when it is ready; of two the longer one."""
        resting, cooling = self._both(label, model, now)
        if resting is None or cooling is None:
            return resting or cooling
        return max(resting, cooling, key=lambda state: state.until)

    def _both(self, label: str, model: str, now: float) -> tuple[KeyState | None, KeyState | None]:
        """What keeps a key from use: (exhausted, rejected or missing; cooling)."""
        resting = self._current(self._resting, (label, ANY_MODEL), now)
        if resting is None:
            resting = self._current(self._resting, (label, model), now)
        return resting, self._current(self._cooling, (label, model), now)

    @staticmethod
    def _current(states: _States, where: tuple[str, str], now: float) -> KeyState | None:
        state = states.get(where)
        if state is not None and state.until <= now:
            del states[where]
            return None
        return state

    def lease(
        self, model: str, tokens: int, excluded: frozenset[str], now: float, quota: str | None = None
    ) -> Lease | Held | NoKey:
        """A ready key with `tokens` reserved, or how long to wait, or that waiting is no use.

        excluded: labels this request has already failed with; quota: overrides the keys' own (pass-through: one a
        credential).
        """
        groups = self.serving(model)
        everyone = [key for group in groups for key in group]
        if not everyone:
            return NoKey("no_usable_key", "no configured upstream serves this model")
        cooling: list[float] = []
        throttled: list[float] = []
        too_large: str | None = None
        resting: list[str] = []
        missing: list[PoolKey] = []
        for group in groups:
            ready = []
            for key in group:
                if key.label in excluded:
                    continue
                rests, cools = self._both(key.label, model, now)
                if len(everyone) == 1:
                    rests = None  # without another key the upstream's own answer helps more than ours
                if rests is not None and rests.status is not Status.MISSING:
                    resting.append(f"{key.label} {rests.status.value}")
                elif cools is not None:
                    cooling.append(cools.until - now)
                elif rests is not None:
                    missing.append(key)
                else:
                    ready.append(key)
            got = self._reserve_first(ready, model, tokens, now, quota, throttled)
            if isinstance(got, Lease):
                return got
            too_large = got or too_large
        if missing and not cooling and not throttled and too_large is None:
            got = self._reserve_first(missing, model, tokens, now, quota, throttled)
            if isinstance(got, Lease):
                return got
            too_large = got
        if throttled or cooling:
            if cooling and (not throttled or min(cooling) < min(throttled)):
                return Held(Wait(min(cooling)), "keys_cooling")
            return Held(Wait(min(throttled)), "throttled")
        if too_large is not None:
            return NoKey("request_exceeds_limit", too_large)
        return NoKey("no_usable_key", "no usable key: " + (", ".join(resting) or "every key was refused"))

    def _reserve_first(
        self, ready: Sequence[PoolKey], model: str, tokens: int, now: float, quota: str | None, waits: list[float]
    ) -> Lease | str | None:
        """A lease on the first key with room; else adds each key's wait, and returns why a request can never fit."""
        too_large = None
        if len(ready) > 1:
            ready = self._strategy(ready, self, model, now)
        for key in ready:
            reservation: Reservation | None = None
            if self.limited:
                allowance = self.allowance(key, model, now, quota)
                if allowance is not None:
                    answer = allowance.reserve(tokens, now)
                    if isinstance(answer, Wait):
                        waits.append(answer.seconds)
                        continue
                    if isinstance(answer, Never):
                        too_large = answer.reason
                        continue
                    reservation = answer
            self.used(key)
            return Lease(key, reservation)
        return too_large

    def used(self, key: PoolKey) -> None:
        """Notes that a key is in use now: the least recently used one is the next."""
        self._uses += 1
        self.last_used[key.label] = self._uses

    def allowance(self, key: PoolKey, model: str, now: float, quota: str | None = None) -> Allowance | None:
        """The windows of (quota, model); None where no limit applies."""
        limits = limits_for({**self._limits, **key.limits}, model) if key.limits else limits_for(self._limits, model)
        if limits == Limits():
            return None
        where = (quota or key.quota or key.label, model)
        found = self._allowances.get(where)
        if found is None:
            if len(self._allowances) >= _MAX_ALLOWANCES:
                self._forget(now)
            found = self._allowances[where] = self._opened(where, limits)
        return found

    def _opened(self, where: tuple[str, str], limits: Limits) -> Allowance:
        """The windows as they were before a reload, with what the limits are now; else new ones."""
        before = self._before.pop(where, None)
        if before is None:
            return self._make(where, limits, self._use)
        before.change(limits, self._use)
        return before

    def _forget(self, now: float) -> None:
        for where in [where for where, allowance in self._allowances.items() if allowance.idle(now)]:
            del self._allowances[where]

    def reset(self) -> None:
        """Forgets what the limits hold; requests at work keep their permits."""
        for allowance in self._allowances.values():
            allowance.reset()

    def headroom(self, key: PoolKey, model: str, now: float) -> float:
        """Share of the tightest limit still free, 0..1; 1 without limits."""
        if not self.limited:
            return 1.0
        allowance = self.allowance(key, model, now)
        return 1.0 if allowance is None else allowance.headroom(now)

    # -- what an answer teaches ------------------------------------------------------------------------------------

    def learn(self, key: PoolKey, model: str, outcome: Class, now: float, wait: float, reason: str) -> None:
        """Takes note of an outcome. wait: seconds a rate-limited key cools."""
        match outcome:
            case Class.RATE_LIMITED:
                self._mark(key.label, model, Status.COOLING, now, now + wait, reason)
            case Class.QUOTA:
                self._mark(key.label, ANY_MODEL, Status.EXHAUSTED, now, now + REST, reason)
            case Class.UNAUTHORIZED:
                self._mark(key.label, ANY_MODEL, Status.REJECTED, now, now + REST, reason)
            case Class.FORBIDDEN:
                self._mark(key.label, model, Status.REJECTED, now, now + REST, reason)
            case Class.MODEL_MISSING:
                self._mark(key.label, model, Status.MISSING, now, now + REST, reason)
            case Class.OK | Class.FINAL:
                if self._resting:  # an answer proves the key works; a deadline set for cooling still stands
                    self._resting.pop((key.label, ANY_MODEL), None)
                    self._resting.pop((key.label, model), None)
            case _:
                pass

    def _mark(self, label: str, model: str, status: Status, now: float, until: float, reason: str) -> None:
        states = self._cooling if status is Status.COOLING else self._resting
        old = states.get((label, model))
        if old is not None and old.until > until:
            states[(label, model)] = replace(old, reason=reason)  # extended, never shortened
            return
        since = old.since if old is not None and old.status is status and old.until > now else now
        states[(label, model)] = KeyState(status, since, until, reason)
        states.move_to_end((label, model))
        while len(states) > _MAX_STATES:
            states.popitem(last=False)

    def states(self, label: str, model: str, now: float) -> dict[str, KeyState]:
        """What stands against a key's use for `model` now, by kind and the model it is about: `rests *`, `cools M` …"""
        found = {}
        for kind, states in (("rests", self._resting), ("cools", self._cooling)):
            for about in (model, ANY_MODEL):
                if (state := self._current(states, (label, about), now)) is not None:
                    found[f"{kind} {about}"] = state
        return found

    def adopt(self, label: str, model: str, status: str, now: float, wait: float, reason: str) -> None:
        """Takes over a state that another proxy has learned of."""
        self._mark(label, model, Status(status), now, now + wait, reason)

    # -- after a reload ------------------------------------------------------------------------------------------------

    def inherit(self, old: KeyRing, same: Set[str], now: float) -> None:
        """Takes over what still counts of the ring before: every window, and of the keys with a label in `same`
        that they cool or are exhausted. What was rejected gets another chance.
        """
        for where, state in old._cooling.items():
            if where[0] in same and state.until > now:
                self._cooling[where] = state
        for where, state in old._resting.items():
            if where[0] in same and state.until > now and state.status is Status.EXHAUSTED:
                self._resting[where] = state
        self.last_used.update(old.last_used)
        self._uses = old._uses
        self._before = {**old._before, **old._allowances}

    # -- what operators see ----------------------------------------------------------------------------------------

    def report(self, now: float) -> list[dict[str, Any]]:
        """For `GET /_proxy/keys`: labels, states with times relative to now (s), use of each limit. No secrets."""
        rows = []
        for key in self.keys:
            states = [
                {
                    "model": sayable(model),
                    "state": state.status.value,
                    "since_s": round(now - state.since, 3),
                    "until_s": round(state.until - now, 3),
                    "reason": state.reason,
                }
                for (label, model), state in (*self._resting.items(), *self._cooling.items())
                if label == key.label and state.until > now
            ]
            quota = key.quota or key.label
            usage = {sayable(model): a.usage(now) for (name, model), a in self._allowances.items() if name == quota}
            whole = next((s["state"] for s in states if s["model"] == ANY_MODEL), "ready")
            rows.append(
                {
                    "name": key.label,
                    "quota": quota,
                    "priority": key.priority,
                    "state": whole,
                    "states": states,
                    "limits": usage,
                }
            )
        return rows

    def counts(self, now: float) -> dict[str, int]:
        """Keys by state over all models (the worst one counts), for metrics."""
        worst = {key.label: Status.READY for key in self.keys}
        order = list(Status)
        for (label, _), state in (*self._resting.items(), *self._cooling.items()):
            if state.until > now and label in worst and order.index(state.status) > order.index(worst[label]):
                worst[label] = state.status
        return {status.value: sum(1 for value in worst.values() if value is status) for status in Status}
