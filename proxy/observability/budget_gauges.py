"""Gauges of budgets: one set for the whole proxy and one for each client key that has a budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric

from ..accounting.budgets.budgets import Budgets

_LABELS: Final = ("client", "period")


def budget_gauges(budgets: Budgets | None) -> Iterator[Metric]:
    """Yield the gauges as they stand now. client: "" for the whole proxy; period: day or month."""
    limit = GaugeMetricFamily("openai_proxy_budget_limit_usd", "Budget in USD.", labels=_LABELS)
    spent = GaugeMetricFamily("openai_proxy_budget_spent_usd", "Known cost in this period in USD.", labels=_LABELS)
    held = GaugeMetricFamily("openai_proxy_budget_held_usd", "Estimated cost of requests in flight.", labels=_LABELS)
    help_ = "1 if the spending has reached cost.budget.warn_at."
    warned = GaugeMetricFamily("openai_proxy_budget_warning", help_, labels=_LABELS)
    if budgets is not None:
        wall = budgets.wall()
        for account in budgets.accounts:
            for period in account.at(wall):
                labels = account.name, period.kind
                limit.add_metric(labels, float(period.limit))
                spent.add_metric(labels, float(period.spent))
                held.add_metric(labels, float(account.held + account.others_held))
                warned.add_metric(labels, float(period.warned))
    yield from (limit, spent, held, warned)
