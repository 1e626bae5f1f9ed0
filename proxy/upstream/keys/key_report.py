"""What operators see of the keys: `GET /_proxy/keys`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...protocol.json_parse import printable_name
from ..limits.learned import UpstreamLimits
from ..limits.rate_limiter import RateLimiter
from .lease import UpstreamKey
from .states import ANY_MODEL, KeyStates


def key_report(
    keys: Sequence[UpstreamKey],
    states_of: KeyStates,
    rate_limiters: Mapping[tuple[str, str], RateLimiter],
    learned: UpstreamLimits | None,
    now: float,
) -> list[dict[str, Any]]:
    """Return a row for each key: its label, states with seconds from now, use of each limit. No secrets."""
    rows = []
    for key in keys:
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
            for label, model, state in states_of.current(now)
            if label == key.label
        ]
        quota = key.quota or key.label
        usage = {
            printable_name(model): rate_limiter.usage(now)
            for (name, model), rate_limiter in rate_limiters.items()
            if name == quota
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
        if learned is not None:
            by_model = ((model, learned.usage((quota, model), now)) for model in learned.models(quota))
            row["learned"] = {printable_name(model): use for model, use in by_model if use}
        rows.append(row)
    return rows
