"""What several workers of one proxy know, as one: metrics, states of keys, counts.

Metrics add up where that says something: counters, histograms, and the gauges of `SUMMED`. Any other gauge is each
worker's own (of a state, or a share): it gets a label that says whose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

import msgspec

from ..cost.pricing import usd

SUMMED: Final = frozenset(
    {
        "openai_proxy_in_flight",
        "openai_proxy_queue_depth",
        "openai_proxy_cache_entries",
        "openai_proxy_cache_bytes",
    }
)
"""Gauges of which the sum is what the whole proxy has."""

WORKER: Final = "worker"

_MONEY: Final = ("cost_usd", "saved_usd")

Labels = tuple[tuple[str, str], ...]


class Family(msgspec.Struct, frozen=True):
    """A metric of one worker: samples by name and labels, in their order."""

    name: str
    help: str
    kind: str
    samples: list[tuple[str, Labels, float]]

    @property
    def adds_up(self) -> bool:
        """Whether its samples still count when their worker is gone."""
        return self.kind in ("counter", "histogram", "summary")

    def of_worker(self, number: int) -> Family:
        """With a label that says whose it is, where it does not add up."""
        if self.adds_up or self.name in SUMMED:
            return self
        mine = [(name, (*labels, (WORKER, str(number))), value) for name, labels, value in self.samples]
        return msgspec.structs.replace(self, samples=mine)


def summed(workers: Sequence[Sequence[Family]]) -> list[Family]:
    """All workers' metrics as one's, each sample the sum of those of its name and labels; of times of creation the
    first.
    """
    found: dict[str, Family] = {}
    sums: dict[str, dict[tuple[str, Labels], float]] = {}
    for families in workers:
        for family in families:
            found.setdefault(family.name, family)
            samples = sums.setdefault(family.name, {})
            for name, labels, value in family.samples:
                old = samples.get((name, labels))
                if old is None:
                    samples[name, labels] = value
                else:
                    samples[name, labels] = min(old, value) if name.endswith("_created") else old + value
    return [
        msgspec.structs.replace(
            family, samples=[(name, labels, value) for (name, labels), value in sums[family.name].items()]
        )
        for family in found.values()
    ]


def added(one: Any, other: Any) -> Any:
    """Two workers' counts as one, in any depth: numbers added, all else as the first has it."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {
            name: added(one[name], other[name]) if name in one and name in other else one.get(name, other.get(name))
            for name in {**one, **other}
        }
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, int) or not isinstance(other, int):
        return one
    return one + other


_OF_THE_STORE: Final = ("entries", "bytes", "max_bytes", "file_bytes", "state")
"""What a store that all workers share says of itself; its other counts are each worker's."""


def statuses_joined(statuses: Sequence[dict[str, Any]], shared_store: bool) -> dict[str, Any]:
    """What each worker says of itself, for `GET /_proxy/status`; the settings are the same."""
    first = statuses[0]
    found = {name: first[name] for name in ("in_flight", "queue", "cache")}
    clients = first["clients"]
    for other in statuses[1:]:
        found = {name: added(found[name], other[name]) for name in found}
        clients = {name: _client_joined(one, other["clients"].get(name)) for name, one in clients.items()}
    if shared_store and first["cache"] is not None:
        found["cache"] |= {name: first["cache"][name] for name in _OF_THE_STORE if name in first["cache"]}
    workers = [{name: status[name] for name in ("worker", "pid", "uptime_s", "in_flight")} for status in statuses]
    uptime = max(status["uptime_s"] for status in statuses)
    workers.sort(key=lambda one: one["worker"])
    return first | found | {"uptime_s": uptime, "clients": clients, "workers": workers}


def _client_joined(one: dict[str, Any], other: dict[str, Any] | None) -> dict[str, Any]:
    """Requests and tokens add up; the use of limits is common knowledge, and who heard last knows most."""
    if other is None:
        return one
    joined: dict[str, Any] = added(one, other)
    return joined | {"limits": most_used(one["limits"], other["limits"])}


def usages_joined(usage: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`GET /_proxy/usage`, with the totals of all workers; what the file says is of all anyway."""
    total, ledger = usage["since_start"], usage["ledger"]
    for other in others:
        money = {name: usd(Decimal(total[name]) + Decimal(other["since_start"][name])) for name in _MONEY}
        total = added(total, other["since_start"]) | money
        if ledger is not None and other["ledger"] is not None:
            ledger = added(ledger, other["ledger"])
    requests = total["requests"]
    rate = round(total["hits"] / requests, 4) if requests else 0.0
    return usage | {"since_start": total | {"hit_rate": rate}, "ledger": ledger}


def pages_joined(pages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each worker's page of the list of what it has in memory, for `GET /_proxy/cache`, as one; in order of names."""
    names = {f"{row['key']}\n{row['form']}": row for page in reversed(pages) for row in page["entries"]}
    ends = [page["next"] for page in pages if page["next"]]
    end = min(ends, default="")  # beyond it some worker has more
    return {"entries": [names[name] for name in sorted(names) if not end or name <= end], "next": end}


def pools_joined(pools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What each worker knows of the pool, for `GET /_proxy/keys`: a key is as bad as any has found it, an upstream is
    left alone where any leaves it, and what is used of a limit is the most that any has heard of.
    """
    first, *others = pools
    keys = {row["name"]: row for row in first["keys"]}
    upstreams = {row["name"]: row for row in first["upstreams"]}
    for pool in others:
        for row in pool["keys"]:
            if row["name"] in keys:
                keys[row["name"]] = _key_joined(keys[row["name"]], row)
        for row in pool["upstreams"]:
            mine = upstreams.get(row["name"])
            if mine is not None and mine["state"] == "closed":
                upstreams[row["name"]] = row
    return {"keys": list(keys.values()), "upstreams": list(upstreams.values())}


def _key_joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    states = {state["model"]: state for state in one["states"]}
    for state in other["states"]:
        mine = states.get(state["model"])
        if mine is None or mine["until_s"] < state["until_s"]:
            states[state["model"]] = state
    limits = dict(one["limits"])
    for model, levels in other["limits"].items():
        limits[model] = most_used(limits.get(model, {}), levels)
    worse = one if one["state"] != "ready" else other
    return one | {"state": worse["state"], "states": list(states.values()), "limits": limits}


def most_used(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two views of the use of the same limits."""
    found = dict(one)
    for name, level in other.items():
        if name not in found or found[name]["used"] < level["used"]:
            found[name] = level
    return found
