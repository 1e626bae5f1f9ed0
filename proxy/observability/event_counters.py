"""Counters of what the process itself notices: changes of state, and background tasks that were started again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, Metric

from ..system.state_changes import STATE_CHANGES
from ..system.tasks import RESTARTS
from .aggregate import Family, Labels

_HELP: Final = "Changes of state of keys, breakers, stores, limiters, budgets and workers."


def own_changes() -> Family:
    """Return the changes of state that the supervisor has counted: it is not scraped itself."""
    name = "openai_proxy_state_changes"
    samples: list[tuple[str, Labels, float]] = [
        (f"{name}_total", (("kind", kind), ("name", thing), ("state", state)), float(count))
        for (kind, thing, state), count in STATE_CHANGES.items()
    ]
    return Family(name, _HELP, "counter", samples)


def counted_changes() -> Iterator[Metric]:
    """Yield the counters. What a worker counts is added to what the others count."""
    changes = CounterMetricFamily("openai_proxy_state_changes", _HELP, labels=["kind", "name", "state"])
    for labels, count in STATE_CHANGES.items():
        changes.add_metric(labels, count)
    help_ = "Background tasks that ended and were started again."
    restarts = CounterMetricFamily("openai_proxy_background_task_restarts", help_, labels=["task"])
    for task, count in RESTARTS.items():
        restarts.add_metric([task], count)
    yield from (changes, restarts)
