"""Counters of what the process itself notices: changes of state, and background tasks that were started again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, Metric

from ..system.state_changes import STATE_CHANGES
from ..system.tasks import RESTARTS
from .aggregate import Family

ACTIONS: Final[Counter[str]] = Counter()
"""How often operators have done what, since the start."""

log = logging.getLogger("proxy.operator")


def operator_action(action: str, who: str, what: str) -> None:
    """Count and log what an operator did. who, what: who asked for it, and how much was done."""
    ACTIONS[action] += 1
    log.info("%s by %s: %s", action, who, what, extra={"fields": {"action": action, "who": who}})


_HELP: Final = "Changes of state of keys, breakers, stores, limiters, budgets and workers."


def own_counters() -> list[Family]:
    """Return what the supervisor has counted: it is not scraped itself."""
    metrics = (metric for metric in counted_events() if metric.samples)
    return [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            [(sample.name, tuple(sample.labels.items()), float(sample.value)) for sample in metric.samples],
        )
        for metric in metrics
    ]


def counted_events() -> Iterator[Metric]:
    """Yield the counters. What a worker counts is added to what the others count."""
    changes = CounterMetricFamily("openai_proxy_state_changes", _HELP, labels=["kind", "name", "state"])
    for labels, count in STATE_CHANGES.items():
        changes.add_metric(labels, count)
    help_ = "Background tasks that ended and were started again."
    restarts = CounterMetricFamily("openai_proxy_background_task_restarts", help_, labels=["task"])
    for task, count in RESTARTS.items():
        restarts.add_metric([task], count)
    help_ = "What operators did: purges, imports, resets of limits, reloads."
    actions = CounterMetricFamily("openai_proxy_operator_actions", help_, labels=["action"])
    for action, count in ACTIONS.items():
        actions.add_metric([action], count)
    yield from (changes, restarts, actions)
