"""The pool of keys: which key serves a request, and what each response says about it (`docs/keys-and-limits.md`).

All methods are synchronous: one event loop needs no lock, and a key is chosen and its limits reserved in one step.
What a response does to the state of a key is the table in `states`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Final

from msgspec import structs

from ...config.limits import Limits, limits_for
from ..limits.clients import MakeRateLimiter
from ..limits.learned import UpstreamLimits
from ..limits.rate_limiter import ExceedsLimit, RateLimiter, Reservation, Wait
from ..retry.circuit_breaker import CircuitBreaker
from .key_report import key_report
from .last_resort import LastResort
from .lease import ANY_KEY, Candidates, KeyRequest, Lease, NoKey, NotReady, UpstreamKey, by_priority
from .prompt_affinity import PromptAffinity
from .states import ANY_MODEL, PROBE_SPACING, UNUSABLE_FOR, KeyOutcome, KeyState, KeyStates, StateChange, Status

__all__ = [
    "ANY_MODEL",
    "UNUSABLE_FOR",
    "KeyOutcome",
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
"""The order in which ready keys are tried: (keys, pool, model, now, prefix as in `KeyRequest`) -> keys."""


def _in_memory(where: tuple[str, str], limits: Limits, use: float) -> RateLimiter:
    return RateLimiter(limits, use)


class KeyPool:
    """strategy: orders ready keys. limits: `throttle.limits`. use: the share of each limit to use.

    breakers: in the order of the upstreams. learned: None if limits are not learned from responses.
    """

    def __init__(
        self,
        keys: Sequence[UpstreamKey],
        strategy: Strategy,
        limits: Mapping[str, Limits],
        use: float = 1.0,
        make_limiter: MakeRateLimiter | None = None,
        *,
        breakers: Sequence[CircuitBreaker] = (),
        learned: UpstreamLimits | None = None,
    ) -> None:
        self._make_limiter = make_limiter or _in_memory
        self.keys = tuple(keys)
        self._strategy = strategy
        self._limits = limits
        self.limited = bool(limits) or any(key.limits for key in keys)
        self._use = use
        self._breakers = tuple(breakers)
        self._learned = learned
        self._states = KeyStates()
        self._last_resort = LastResort()
        self._rate_limiters: OrderedDict[tuple[str, str], RateLimiter] = OrderedDict()
        self._serving: dict[tuple[str, str], tuple[tuple[UpstreamKey, ...], ...]] = {}
        self._by_label = {key.label: key for key in self.keys}
        self.affinity = PromptAffinity()
        self.last_used: dict[str, float] = {}
        self._uses = 0
        self._previous_limiters: dict[tuple[str, str], RateLimiter] = {}
        self.turns: dict[str, int] = {}
        self.credit: dict[str, dict[str, float]] = {}

    @property
    def counts_tokens(self) -> bool:
        """Whether the estimate of a request's tokens has any effect."""
        return self.limited or (self._learned is not None and self._learned.counts_tokens)

    # -- which keys -------------------------------------------------------------------------------------------------

    def serving(self, model: str, deployment: str = "") -> tuple[tuple[UpstreamKey, ...], ...]:
        """Return the keys whose upstream serves `model`, in groups of rising priority number.

        deployment: that in the path, which decides on Azure; "" for none.
        """
        groups = self._serving.get((model, deployment))
        if groups is None:
            groups = by_priority([key for key in self.keys if key.serves(model, deployment)])
            if len(self._serving) >= 4096:
                self._serving.clear()
            self._serving[model, deployment] = groups
        return groups

    def is_usable(self, key: UpstreamKey, model: str, now: float) -> bool:
        """Return whether a key may serve `model` now, or will soon: it may be cooling, but it does not rest."""
        return self._states.blocking(key.label, key.name_of(model), now)[0] is None and not self._breaker_wait(key, now)

    def by_label(self, label: str) -> UpstreamKey | None:
        return self._by_label.get(label)

    def state(self, label: str, model: str, now: float) -> KeyState | None:
        """Return the state that keeps a key from use for `model` at `now` (of two the longer one); None if ready."""
        unusable, cooling = self._states.blocking(label, model, now)
        if unusable is None or cooling is None:
            return unusable or cooling
        return max(unusable, cooling, key=lambda state: state.until)

    def _groups(self, model: str, request: KeyRequest) -> tuple[tuple[UpstreamKey, ...], ...]:
        groups = self.serving(model, request.deployment) if request.groups is None else request.groups
        if request.pinned_to:
            key = self._by_label.get(request.pinned_to)
            return ((key,),) if key is not None else ()
        if request.min_priority is not None:
            return tuple(group for group in groups if group[0].priority > request.min_priority)
        return groups

    def other_ready(self, than: str, model: str, excluded: set[str], now: float, request: KeyRequest = ANY_KEY) -> bool:
        """Return whether another key than `than` could be used now, or will be within `PROBE_SPACING`."""
        return any(
            key.label != than
            and key.label not in excluded
            and not self._breaker_wait(key, now)
            and (
                (state := self.state(key.label, key.name_of(model, request.deployment), now)) is None
                or (state.probes and state.until - now <= PROBE_SPACING)
            )
            for group in self._groups(model, request)
            for key in group
        )

    def has_lower_group(self, model: str, priority: int, excluded: set[str], request: KeyRequest = ANY_KEY) -> bool:
        """Return whether there are keys of higher priority numbers."""
        groups = self._groups(model, structs.replace(request, min_priority=priority, pinned_to=""))
        return any(key.label not in excluded for group in groups for key in group)

    def all_breakers_open(self, model: str, priority: int, now: float, request: KeyRequest = ANY_KEY) -> bool:
        """Return whether the breakers of all upstreams of that priority are open."""
        groups = self._groups(model, request)
        return all(self._breaker_wait(key, now) for group in groups for key in group if key.priority == priority)

    def cooling_for(self, model: str, now: float, request: KeyRequest = ANY_KEY) -> float | None:
        """Return the seconds until the first cooling key is ready again; None if none is cooling."""
        keys = [key for group in self._groups(model, request) for key in group]
        states = [self.state(key.label, key.name_of(model, request.deployment), now) for key in keys]
        return min((s.until - now for s in states if s is not None and s.status is Status.COOLING), default=None)

    def _breaker_wait(self, key: UpstreamKey, now: float) -> float:
        """Return the seconds for which the breaker of the key's upstream stays open."""
        return self._breakers[key.upstream].wait(now) if key.upstream < len(self._breakers) else 0.0

    def lease(
        self,
        model: str,
        tokens: int,
        excluded: frozenset[str],
        now: float,
        quota: str | None = None,
        request: KeyRequest = ANY_KEY,
    ) -> Lease | NotReady | NoKey:
        """Return a ready key with `tokens` reserved, or how long to wait, or why waiting cannot help.

        excluded: labels of the keys that have failed this request. quota: overrides the keys' own (pass-through: one a
        credential).
        """
        groups = self._groups(model, request)
        if not groups:
            return NoKey("no_usable_key", "no configured upstream serves this model")
        single = request.min_priority is None and sum(map(len, groups)) == 1
        search = Candidates(model, tokens, now, quota, request)
        for group in groups:
            ready = [key for key in group if key.label not in excluded and self._is_ready(key, search, single)]
            lease = self._reserve_first(ready, search)
            if lease is not None:
                return lease
        if not search.cooling and not search.throttled and search.too_large is None:
            lease = self._reserve_first(search.missing, search) or self._try_rejected(search, excluded)
            if lease is not None:
                return lease
        return search.result()

    def _try_rejected(self, search: Candidates, excluded: frozenset[str]) -> Lease | None:
        """Return a lease on a rejected key, if this request may be the one in a second that uses them."""
        if not (search.rejected and self._last_resort.allows(search.model, excluded, search.now)):
            return None
        key = min(search.rejected, key=lambda key: (key.priority, self.last_used.get(key.label, 0)))
        self._last_resort.record(search.model, excluded | {key.label}, search.now)
        return self._reserve_first((key,), search)

    def _is_ready(self, key: UpstreamKey, search: Candidates, single: bool) -> bool:
        """Return whether the key is ready; if not, note the reason in `search`. single: there is no other key."""
        wait = self._breaker_wait(key, search.now)
        if wait:
            search.breaker_open.append(wait)
            return False
        unusable, cooling = self._states.blocking(key.label, search.name_of(key), search.now, search.request.route)
        if single:
            unusable = None  # without another key the upstream's own answer helps more than the proxy's
        if unusable is not None and unusable.status is not Status.MISSING:
            search.unusable.append(f"{key.label} {unusable.status.value}")
            if unusable.status is Status.REJECTED and cooling is None:
                search.rejected.append(key)
        elif cooling is not None and search.tokens >= cooling.floor:
            search.cooling.append(cooling.until - search.now)
        elif unusable is not None:
            search.missing.append(key)
        else:
            return True
        return False

    def _reserve_first(self, ready: Sequence[UpstreamKey], search: Candidates) -> Lease | None:
        """Return a lease on the first key with room; if there is none, note in `search` why each key has none."""
        model, tokens, now, request = search.model, search.tokens, search.now, search.request
        if len(ready) > 1:
            ready = self._strategy(ready, self, request.deployment or model, now, request.prefix)
            if request.avoid:
                ready = sorted(ready, key=lambda key: key.upstream in request.avoid)
        for key in ready:
            where = search.quota_of(key)
            if self._learned is not None and (wait := self._learned.wait(where, tokens, now)):
                search.cooling.append(wait)
                continue
            reservation: Reservation | None = None
            if self.limited and request.groups is None:
                rate_limiter = self.rate_limiter(key, model, now, search.quota, request.deployment)
                if rate_limiter is not None:
                    result = rate_limiter.reserve(tokens, now)
                    if isinstance(result, Wait):
                        search.throttled.append(result.seconds)
                        continue
                    if isinstance(result, ExceedsLimit):
                        search.too_large = result.reason
                        continue
                    reservation = result
            self._record_lease(key, search)
            return Lease(key, reservation, tokens, where[1])
        return None

    def _record_lease(self, key: UpstreamKey, search: Candidates) -> None:
        self.mark_used(key)
        self._states.record_lease(key.label, search.name_of(key), search.now)
        if key.upstream < len(self._breakers):
            self._breakers[key.upstream].sends(search.now)
        if self._learned is not None:
            self._learned.record_sent(search.quota_of(key), search.tokens)
        if search.request.prefix:
            self.affinity.record(search.request.prefix, key.label, search.now)

    def mark_used(self, key: UpstreamKey) -> None:
        """Note that a key is used now, for the order by least recent use."""
        self._uses += 1
        self.last_used[key.label] = self._uses

    def rate_limiter(
        self, key: UpstreamKey, model: str, now: float, quota: str | None = None, deployment: str = ""
    ) -> RateLimiter | None:
        """Return the limits of (quota, model); None if no limit applies. deployment: as in `KeyRequest`."""
        names = key.names_of(model, deployment)
        limits = limits_for({**self._limits, **key.limits} if key.limits else self._limits, *names)
        if limits == Limits():
            return None
        where = (quota or key.quota or key.label, names[0])
        found = self._rate_limiters.get(where)
        if found is None:
            if len(self._rate_limiters) >= _MAX_RATE_LIMITERS:
                self._forget_idle(now)
            found = self._rate_limiters[where] = self._new_limiter(where, limits)
        return found

    def _new_limiter(self, where: tuple[str, str], limits: Limits) -> RateLimiter:
        """Return what was there before a reload, with the limits of now, or else a new rate limiter."""
        previous = self._previous_limiters.pop(where, None)
        if previous is None:
            return self._make_limiter(where, limits, self._use)
        previous.change(limits, self._use)
        return previous

    def _forget_idle(self, now: float) -> None:
        for where in [where for where, rate_limiter in self._rate_limiters.items() if rate_limiter.idle(now)]:
            del self._rate_limiters[where]

    def reset(self) -> None:
        """Clear the limits. Requests in flight keep their place under `concurrency`."""
        for rate_limiter in self._rate_limiters.values():
            rate_limiter.reset()

    def headroom(self, key: UpstreamKey, model: str, now: float) -> float:
        """Return the share of the tightest limit still free, configured or learned, 0 to 1; 1 without limits."""
        free = 1.0
        if self._learned is not None:
            free = self._learned.headroom((key.quota or key.label, key.name_of(model)), now)
        if not self.limited:
            return free
        rate_limiter = self.rate_limiter(key, model, now)
        return free if rate_limiter is None else min(free, rate_limiter.headroom(now))

    def by_headroom(self, keys: Sequence[UpstreamKey], model: str, now: float) -> list[UpstreamKey]:
        """Return the keys, most headroom first; ties, and keys without known limits, by least recent use."""
        # Rounded, so that a tiny difference between two idle keys does not send all traffic to one of them.
        return sorted(keys, key=lambda k: (-round(self.headroom(k, model, now), 2), self.last_used.get(k.label, 0)))

    # -- what a response says ---------------------------------------------------------------------------------------

    def observe_headers(
        self, key: UpstreamKey, model: str, headers: Mapping[str, str], now: float, quota: str | None = None
    ) -> None:
        """Remember what a response's headers say of the key's limits."""
        if self._learned is not None:
            self._learned.record((quota or key.quota or key.label, model), headers, now)

    def record_outcome(self, key: UpstreamKey, model: str, outcome: KeyOutcome) -> StateChange | None:
        """Change the key's state by what became of a request. Return the change, if it is one."""
        return self._states.record(key.label, model, outcome)

    def active_states(self, label: str, model: str, now: float) -> dict[str, KeyState]:
        """Return the states that keep a key from use for `model` now, by kind and model: `rests *`, `cools M` …"""
        return self._states.active(label, model, now)

    def apply_remote_state(self, label: str, model: str, state: KeyState) -> StateChange | None:
        """Take over a state that another proxy has observed; return the change."""
        return self._states.mark(label, model, state)

    # -- after a reload ------------------------------------------------------------------------------------------------

    def inherit(self, old: KeyPool, same: Set[str], now: float) -> None:
        """Take over what still counts of the pool before: every window, and the states of the keys in `same`.

        same: labels of the keys that stay. Rejected keys get another try.
        """
        self._states.inherit(old._states, same, now)
        if self._learned is not None and old._learned is not None:
            self._learned = old._learned
        self.affinity = old.affinity
        self.last_used.update(old.last_used)
        self._uses = old._uses
        self._previous_limiters = {**old._previous_limiters, **old._rate_limiters}

    # -- what operators see ----------------------------------------------------------------------------------------

    def report(self, now: float) -> list[dict[str, Any]]:
        """Return what `GET /_proxy/keys` shows: labels, states with seconds from now, use of each limit. No secrets."""
        return key_report(self.keys, self._states, self._rate_limiters, self._learned, now)

    def headroom_by_label(self, now: float) -> dict[str, float]:
        """Return by key label the share still free of its tightest limit over all models, 0 to 1; for metrics."""
        shares: dict[str, float] = {}
        for (quota, _), rate_limiter in self._rate_limiters.items():
            shares[quota] = min(shares.get(quota, 1.0), rate_limiter.headroom(now))
        for quota, share in self._learned.headrooms(now) if self._learned is not None else ():
            shares[quota] = min(shares.get(quota, 1.0), share)
        return {key.label: shares.get(key.quota or key.label, 1.0) for key in self.keys}

    def counts_by_state(self, now: float) -> dict[str, int]:
        """Return the number of keys in each state over all models (the worst state counts); for metrics."""
        worst = {key.label: Status.READY for key in self.keys}
        order = list(Status)
        for label, _, state in self._states.current(now):
            if label in worst and order.index(state.status) > order.index(worst[label]):
                worst[label] = state.status
        return {status.value: sum(1 for value in worst.values() if value is status) for status in Status}
