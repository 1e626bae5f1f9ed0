"""Metrics and reports of several workers, merged into those of one proxy.

Counters, histograms and the gauges of `SUMMED` are added. Any other gauge, a state or a share, gets a label `worker`.
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
"""Gauges whose sum over the workers is the proxy's value."""

WORKER: Final = "worker"

_MONEY: Final = ("cost_usd", "saved_usd")

Labels = tuple[tuple[str, str], ...]


class Family(msgspec.Struct, frozen=True):
    """A metric of one worker. samples: (name, labels, value)."""

    name: str
    help: str
    kind: str
    samples: list[tuple[str, Labels, float]]

    @property
    def adds_up(self) -> bool:
        """True if the samples still count after their worker has ended."""
        return self.kind in ("counter", "histogram", "summary")

    def of_worker(self, number: int) -> Family:
        """Return the family with a label `worker` if it cannot be summed."""
        if self.adds_up or self.name in SUMMED:
            return self
        labelled = [(name, (*labels, (WORKER, str(number))), value) for name, labels, value in self.samples]
        return msgspec.structs.replace(self, samples=labelled)


def summed(workers: Sequence[Sequence[Family]]) -> list[Family]:
    """Add the workers' samples by name and labels. Of creation times the earliest stays."""
    merged: dict[str, Family] = {}
    sums: dict[str, dict[tuple[str, Labels], float]] = {}
    for families in workers:
        for family in families:
            merged.setdefault(family.name, family)
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
        for family in merged.values()
    ]


def added(one: Any, other: Any) -> Any:
    """Add two reports at any depth: integers are added, any other value is that of `one`."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {
            name: added(one[name], other[name]) if name in one and name in other else one.get(name, other.get(name))
            for name in {**one, **other}
        }
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, int) or not isinstance(other, int):
        return one
    return one + other


_SHARED_STORE_FIELDS: Final = ("entries", "bytes", "max_bytes", "file_bytes", "state")
"""Fields that are the same in every worker if the store is shared; its other counts are per worker."""


def statuses_joined(statuses: Sequence[dict[str, Any]], shared_store: bool) -> dict[str, Any]:
    """Merge the workers' statuses for `GET /_proxy/status`. shared_store: all workers use one SQLite or Redis store."""
    first = statuses[0]
    counts = {name: first[name] for name in ("in_flight", "queue", "cache")}
    clients = first["clients"]
    for other in statuses[1:]:
        counts = {name: added(counts[name], other[name]) for name in counts}
        clients = {name: _client_joined(client, other["clients"].get(name)) for name, client in clients.items()}
    if shared_store and first["cache"] is not None:
        counts["cache"] |= {name: first["cache"][name] for name in _SHARED_STORE_FIELDS if name in first["cache"]}
    workers = [{name: status[name] for name in ("worker", "pid", "uptime_s", "in_flight")} for status in statuses]
    uptime = max(status["uptime_s"] for status in statuses)
    workers.sort(key=lambda worker: worker["worker"])
    return first | counts | {"uptime_s": uptime, "clients": clients, "workers": workers}


def _client_joined(one: dict[str, Any], other: dict[str, Any] | None) -> dict[str, Any]:
    """Add requests and tokens. Limits are shared, so the higher use is the more recent one."""
    if other is None:
        return one
    joined: dict[str, Any] = added(one, other)
    return joined | {"limits": most_used(one["limits"], other["limits"])}


def usages_joined(usage: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add the other workers' totals to `usage`, for `GET /_proxy/usage`. The ledger's rows are of all workers."""
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
    """Merge the workers' pages of entries in memory, for `GET /_proxy/cache`, ordered by key and form."""
    entries = {f"{entry['key']}\n{entry['form']}": entry for page in reversed(pages) for entry in page["entries"]}
    ends = [page["next"] for page in pages if page["next"]]
    end = min(ends, default="")  # some worker has more entries after it
    return {"entries": [entries[name] for name in sorted(entries) if not end or name <= end], "next": end}


def pools_joined(pools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge what the workers know of the pool, for `GET /_proxy/keys`.

    A key has the worst state that any worker knows, a breaker is open if it is in any worker, and the use of a limit
    is the highest.
    """
    first, *others = pools
    keys = {row["name"]: row for row in first["keys"]}
    upstreams = {row["name"]: row for row in first["upstreams"]}
    for pool in others:
        for row in pool["keys"]:
            if row["name"] in keys:
                keys[row["name"]] = _key_joined(keys[row["name"]], row)
        for row in pool["upstreams"]:
            known = upstreams.get(row["name"])
            if known is not None and known["state"] == "closed":
                upstreams[row["name"]] = row
    return {"keys": list(keys.values()), "upstreams": list(upstreams.values())}


def _key_joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    states = {state["model"]: state for state in one["states"]}
    for state in other["states"]:
        known = states.get(state["model"])
        if known is None or known["until_s"] < state["until_s"]:
            states[state["model"]] = state
    limits = dict(one["limits"])
    for model, levels in other["limits"].items():
        limits[model] = most_used(limits.get(model, {}), levels)
    worse = one if one["state"] != "ready" else other
    return one | {"state": worse["state"], "states": list(states.values()), "limits": limits}


def most_used(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two reports of the same limits: the higher use wins."""
    merged = dict(one)
    for name, level in other.items():
        if name not in merged or merged[name]["used"] < level["used"]:
            merged[name] = level
    return merged
