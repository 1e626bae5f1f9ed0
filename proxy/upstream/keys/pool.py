"""The pool of keys: which one serves a request, and what each answer teaches about it (contract 7, Keys).

All methods are synchronous: one event loop needs no lock, and a key is chosen and its limits reserved in one step.
What an answer does to a key's state is the table of `keystates`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Final

from ...config.limits import Limits, limits_for
from ...protocol.json_parse import printable_name
from ..limits.clients import Make
from ..limits.learned import UpstreamLimits, Where
from ..limits.rate_limiter import ExceedsLimit, RateLimiter, Reservation, Wait
from ..retry.circuit_breaker import CircuitBreaker
from ..retry.outcome import OutcomeKind
from .lease import ANY_KEY, Candidates, KeyRequest, Lease, NoKey, NotReady, UpstreamKey
from .prompt_affinity import PromptAffinity
from .states import ANY_MODEL, PROBE_COOL, UNUSABLE_FOR, KeyState, KeyStates, Status

__all__ = [
    "ANY_MODEL",
    "UNUSABLE_FOR",
    "KeyPool",
    "KeyRequest",
    "KeyState",
    "Lease",
    "NoKey",
    "NotReady",
    "Status",
    "Strategy",
    "UpstreamKey",
]

_MAX_RATE_LIMITERS: Final = 10_000


Strategy = Callable[[Sequence[UpstreamKey], "KeyPool", str, float, bytes], list[UpstreamKey]]
"""The order in which ready keys are tried: (keys, ring, model, now, prefix as in Wish) -> keys."""


def _in_memory(where: tuple[str, str], limits: Limits, use: float) -> RateLimiter:
    return RateLimiter(limits, use)


class KeyPool:
    """The pool. `strategy` orders ready keys; `limits` are `throttle.limits`; `use` the share of each limit to use;
    `breakers` stand in the order of the upstreams; `learned` is None where answers teach no limits.
    """

    def __init__(
        self,
        keys: Sequence[UpstreamKey],
        strategy: Strategy,
        limits: Mapping[str, Limits],
        use: float = 1.0,
        make: Make | None = None,
        *,
        breakers: Sequence[CircuitBreaker] = (),
        learned: UpstreamLimits | None = None,
    ) -> None:
        self._make = make or _in_memory
        self.keys = tuple(keys)
        self._strategy = strategy
        self._limits = limits
        self.limited = bool(limits) or any(key.limits for key in keys)
        self._use = use
        self._breakers = tuple(breakers)
        self._learned = learned
        self._states = KeyStates()
        self._allowances: OrderedDict[tuple[str, str], RateLimiter] = OrderedDict()
        self._serving: dict[str, tuple[tuple[UpstreamKey, ...], ...]] = {}
        self._by_label = {key.label: key for key in self.keys}
        self.affinity = PromptAffinity()
        self.last_used: dict[str, float] = {}
        self._uses = 0
        self._before: dict[tuple[str, str], RateLimiter] = {}
        self.turns: dict[str, int] = {}
        self.credit: dict[str, dict[str, float]] = {}

    @property
    def counts_tokens(self) -> bool:
        """Whether a request's estimate decides anything."""
        return self.limited or (self._learned is not None and self._learned.tokens)

    # -- which keys -------------------------------------------------------------------------------------------------

    def serving(self, model: str) -> tuple[tuple[UpstreamKey, ...], ...]:
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

    def fixed(self, model: str) -> UpstreamKey | None:
        """The key of requests that name a stored object nobody remembers: the first configured that serves `model`."""
        return next((key for key in self.keys if key.serves(model)), None)

    def named(self, label: str) -> UpstreamKey | None:
        return self._by_label.get(label)

    def state(self, label: str, model: str, now: float) -> KeyState | None:
        """The state that keeps a key from use for `model` at `now`, None when it is ready; of two the longer one."""
        resting, cooling = self._states.of(label, model, now)
        if resting is None or cooling is None:
            return resting or cooling
        return max(resting, cooling, key=lambda state: state.until)

    def _groups(self, model: str, wish: KeyRequest) -> tuple[tuple[UpstreamKey, ...], ...]:
        groups = self.serving(model)
        if wish.pinned_to:
            key = self._by_label.get(wish.pinned_to)
            return ((key,),) if key is not None else ()
        if wish.min_priority is not None:
            return tuple(group for group in groups if group[0].priority > wish.min_priority)
        return groups

    def other_ready(self, but: str, model: str, excluded: set[str], now: float, wish: KeyRequest = ANY_KEY) -> bool:
        """Whether another key than `but` could be used now, or as good as now."""
        return any(
            key.label != but
            and key.label not in excluded
            and not self._closed_for(key, now)
            and (
                (state := self.state(key.label, model, now)) is None
                or (state.probes and state.until - now <= PROBE_COOL)
            )
            for group in self._groups(model, wish)
            for key in group
        )

    def higher(self, model: str, priority: int, excluded: set[str]) -> bool:
        """Whether there are keys of higher priority numbers."""
        groups = self._groups(model, KeyRequest(min_priority=priority))
        return any(key.label not in excluded for group in groups for key in group)

    def all_closed(self, model: str, priority: int, now: float, only: str = "") -> bool:
        """Whether no upstream of that priority is to be asked now."""
        groups = self._groups(model, KeyRequest(pinned_to=only))
        return all(self._closed_for(key, now) for group in groups for key in group if key.priority == priority)

    def soonest(self, model: str, now: float, wish: KeyRequest = ANY_KEY) -> float | None:
        """Seconds until the first of the cooling keys is ready again; None where none cools."""
        states = [self.state(key.label, model, now) for group in self._groups(model, wish) for key in group]
        return min((s.until - now for s in states if s is not None and s.status is Status.COOLING), default=None)

    def _closed_for(self, key: UpstreamKey, now: float) -> float:
        """Seconds for which the key's upstream is left alone."""
        return self._breakers[key.upstream].wait(now) if key.upstream < len(self._breakers) else 0.0

    def lease(
        self,
        model: str,
        tokens: int,
        excluded: frozenset[str],
        now: float,
        quota: str | None = None,
        wish: KeyRequest = ANY_KEY,
    ) -> Lease | NotReady | NoKey:
        """A ready key with `tokens` reserved, or how long to wait, or that waiting is no use.

        excluded: labels this request has already failed with; quota: overrides the keys' own (pass-through: one a
        credential).
        """
        groups = self._groups(model, wish)
        if not groups:
            return NoKey("no_usable_key", "no configured upstream serves this model")
        alone = wish.min_priority is None and sum(map(len, groups)) == 1
        search = Candidates()
        for group in groups:
            ready = [
                key
                for key in group
                if key.label not in excluded and self._open_to(key, model, tokens, now, alone, search)
            ]
            lease = self._reserve_first(ready, model, tokens, now, quota, wish, search)
            if lease is not None:
                return lease
        if search.missing and not search.cooling and not search.throttled and search.too_large is None:
            lease = self._reserve_first(search.missing, model, tokens, now, quota, wish, search)
            if lease is not None:
                return lease
        return search.answer()

    def _open_to(self, key: UpstreamKey, model: str, tokens: int, now: float, alone: bool, search: Candidates) -> bool:
        """Whether the key is ready; else `search` knows why not."""
        closed = self._closed_for(key, now)
        if closed:
            search.open.append(closed)
            return False
        rests, cools = self._states.of(key.label, model, now)
        if alone:
            rests = None  # without another key the upstream's own answer helps more than ours
        if rests is not None and rests.status is not Status.MISSING:
            search.unusable.append(f"{key.label} {rests.status.value}")
        elif cools is not None and tokens >= cools.floor:
            search.cooling.append(cools.until - now)
        elif rests is not None:
            search.missing.append(key)
        else:
            return True
        return False

    def _reserve_first(
        self,
        ready: Sequence[UpstreamKey],
        model: str,
        tokens: int,
        now: float,
        quota: str | None,
        wish: KeyRequest,
        search: Candidates,
    ) -> Lease | None:
        """A lease on the first key with room; else `search` knows each key's wait, or why a request can never fit."""
        if len(ready) > 1:
            ready = self._strategy(ready, self, model, now, wish.prefix)
            if wish.avoid:
                ready = sorted(ready, key=lambda key: key.upstream in wish.avoid)
        for key in ready:
            where = (quota or key.quota or key.label, model)
            if self._learned is not None and (wait := self._learned.wait(where, tokens, now)):
                search.cooling.append(wait)
                continue
            reservation: Reservation | None = None
            if self.limited:
                allowance = self.rate_limiter(key, model, now, quota)
                if allowance is not None:
                    answer = allowance.reserve(tokens, now)
                    if isinstance(answer, Wait):
                        search.throttled.append(answer.seconds)
                        continue
                    if isinstance(answer, ExceedsLimit):
                        search.too_large = answer.reason
                        continue
                    reservation = answer
            self._leased(key, model, tokens, now, where, wish)
            return Lease(key, reservation, tokens)
        return None

    def _leased(self, key: UpstreamKey, model: str, tokens: int, now: float, where: Where, wish: KeyRequest) -> None:
        self.used(key)
        self._states.leased(key.label, model, now)
        if key.upstream < len(self._breakers):
            self._breakers[key.upstream].sends(now)
        if self._learned is not None:
            self._learned.take(where, tokens)
        if wish.prefix:
            self.affinity.record(wish.prefix, key.label, now)

    def used(self, key: UpstreamKey) -> None:
        """Notes that a key is in use now: the least recently used one is the next."""
        self._uses += 1
        self.last_used[key.label] = self._uses

    def rate_limiter(self, key: UpstreamKey, model: str, now: float, quota: str | None = None) -> RateLimiter | None:
        """The windows of (quota, model); None where no limit applies."""
        limits = limits_for({**self._limits, **key.limits}, model) if key.limits else limits_for(self._limits, model)
        if limits == Limits():
            return None
        where = (quota or key.quota or key.label, model)
        found = self._allowances.get(where)
        if found is None:
            if len(self._allowances) >= _MAX_RATE_LIMITERS:
                self._forget(now)
            found = self._allowances[where] = self._opened(where, limits)
        return found

    def _opened(self, where: tuple[str, str], limits: Limits) -> RateLimiter:
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

    def headroom(self, key: UpstreamKey, model: str, now: float) -> float:
        """Share of the tightest limit still free, configured or learned, 0..1; 1 without limits."""
        free = 1.0
        if self._learned is not None:
            free = self._learned.headroom((key.quota or key.label, model), now)
        if not self.limited:
            return free
        allowance = self.rate_limiter(key, model, now)
        return free if allowance is None else min(free, allowance.headroom(now))

    def by_headroom(self, keys: Sequence[UpstreamKey], model: str, now: float) -> list[UpstreamKey]:
        """Most headroom first; ties, and keys without known limits, by least recent use."""
        # Rounded, so that a hair's difference between two idle keys does not pin all traffic to one of them.
        return sorted(keys, key=lambda k: (-round(self.headroom(k, model, now), 2), self.last_used.get(k.label, 0)))

    # -- what an answer teaches ------------------------------------------------------------------------------------

    def observe_headers(
        self, key: UpstreamKey, model: str, headers: Mapping[str, str], now: float, quota: str | None = None
    ) -> None:
        """Takes note of what an answer's headers say of the key's limits."""
        if self._learned is not None:
            self._learned.record((quota or key.quota or key.label, model), headers, now)

    def record_outcome(
        self, key: UpstreamKey, model: str, outcome: OutcomeKind, now: float, wait: float, reason: str, floor: int = 0
    ) -> None:
        """Takes note of an outcome. wait: seconds a rate-limited key cools; floor: as in KeyState."""
        self._states.record(key.label, model, outcome, now, wait, reason, floor)

    def active_states(self, label: str, model: str, now: float) -> dict[str, KeyState]:
        """What stands against a key's use for `model` now, by kind and the model it is about: `rests *`, `cools M` …"""
        return self._states.active(label, model, now)

    def apply_remote_state(self, label: str, model: str, status: str, now: float, wait: float, reason: str) -> None:
        """Takes over a state that another proxy has learned of."""
        self._states.mark(label, model, Status(status), now, now + wait, reason)

    # -- after a reload ------------------------------------------------------------------------------------------------

    def inherit(self, old: KeyPool, same: Set[str], now: float) -> None:
        """Takes over what still counts of the ring before: every window, and of the keys with a label in `same`
        that they cool or are exhausted. What was rejected gets another chance.
        """
        self._states.inherit(old._states, same, now)
        if self._learned is not None and old._learned is not None:
            self._learned = old._learned
        self.affinity = old.affinity
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
                    "model": printable_name(model),
                    "state": state.status.value,
                    "since_s": round(now - state.since, 3),
                    "until_s": round(state.until - now, 3),
                    "reason": state.reason,
                }
                | ({"probing": True} if state.probes else {})
                | ({"from_tokens": state.floor} if state.floor else {})
                for label, model, state in self._states.current(now)
                if label == key.label
            ]
            quota = key.quota or key.label
            usage = {
                printable_name(model): a.usage(now) for (name, model), a in self._allowances.items() if name == quota
            }
            whole = next((s["state"] for s in states if s["model"] == ANY_MODEL), "ready")
            row = {
                "name": key.label,
                "quota": quota,
                "priority": key.priority,
                "state": whole,
                "states": states,
                "limits": usage,
            }
            if self._learned is not None:
                told = ((model, self._learned.usage((quota, model), now)) for model in self._learned.models(quota))
                row["learned"] = {printable_name(model): use for model, use in told if use}
            rows.append(row)
        return rows

    def free(self, now: float) -> dict[str, float]:
        """By key label, the share still free of its tightest limit, of whichever model, 0..1; for metrics."""
        shares: dict[str, float] = {}
        for (quota, _), allowance in self._allowances.items():
            shares[quota] = min(shares.get(quota, 1.0), allowance.headroom(now))
        for quota, share in self._learned.free(now) if self._learned is not None else ():
            shares[quota] = min(shares.get(quota, 1.0), share)
        return {key.label: shares.get(key.quota or key.label, 1.0) for key in self.keys}

    def counts(self, now: float) -> dict[str, int]:
        """Keys by state over all models (the worst one counts), for metrics."""
        worst = {key.label: Status.READY for key in self.keys}
        order = list(Status)
        for label, _, state in self._states.current(now):
            if label in worst and order.index(state.status) > order.index(worst[label]):
                worst[label] = state.status
        return {status.value: sum(1 for value in worst.values() if value is status) for status in Status}
