"""What is known of budgets, as gauges. There are as many as the settings name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric

from ..accounting.budgets.budgets import Budgets

_LABELS: Final = ("client", "period")


def budget_gauges(budgets: Budgets | None) -> Iterator[Metric]:
    """As they stand now. client: '' for the whole proxy; period: day or month."""
    limit = GaugeMetricFamily("openai_proxy_budget_limit_usd", "What may be spent.", labels=_LABELS)
    spent = GaugeMetricFamily("openai_proxy_budget_spent_usd", "What has been spent, as far as known.", labels=_LABELS)
    held = GaugeMetricFamily("openai_proxy_budget_held_usd", "What requests under way may cost.", labels=_LABELS)
    about = "1 once cost.budget.warn_at is reached."
    warned = GaugeMetricFamily("openai_proxy_budget_warning", about, labels=_LABELS)
    if budgets is not None:
        wall = budgets.wall()
        for account, pot in ((one, pot) for one in budgets.accounts for pot in one.at(wall)):
            labels = account.name, pot.kind
            limit.add_metric(labels, float(pot.limit))
            spent.add_metric(labels, float(pot.spent))
            held.add_metric(labels, float(account.held + account.others_held))
            warned.add_metric(labels, float(pot.warned))
    yield from (limit, spent, held, warned)
