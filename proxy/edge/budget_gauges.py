"""What is known of budgets, as gauges. There are as many as the settings name."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Gauge

from ..budgets import Budgets

_LABELS: Final = ("client", "period")


class BudgetGauges:
    """client: '' for the whole proxy; period: day or month."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._limit = Gauge("openai_proxy_budget_limit_usd", "What may be spent.", _LABELS, registry=registry)
        self._spent = Gauge(
            "openai_proxy_budget_spent_usd", "What has been spent, as far as known.", _LABELS, registry=registry
        )
        self._held = Gauge(
            "openai_proxy_budget_held_usd", "What requests under way may cost.", _LABELS, registry=registry
        )
        self._warned = Gauge(
            "openai_proxy_budget_warning", "1 once cost.budget.warn_at is reached.", _LABELS, registry=registry
        )

    def show(self, budgets: Budgets) -> None:
        """As they stand now."""
        for gauge in (self._limit, self._spent, self._held, self._warned):
            gauge.clear()  # a reload may have taken some away
        wall = budgets.wall()
        for account in budgets.accounts:
            for pot in account.at(wall):
                labels = account.name, pot.kind
                self._limit.labels(*labels).set(float(pot.limit))
                self._spent.labels(*labels).set(float(pot.spent))
                self._held.labels(*labels).set(float(account.held + account.others_held))
                self._warned.labels(*labels).set(pot.warned)
