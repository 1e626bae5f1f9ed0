"""The scrapes of several processes as one: what each has counted adds up; of what all see alike, the worst is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_LEAST: Final = frozenset({"openai_proxy_limits_sound", "openai_proxy_key_headroom_ratio"})
_MOST: Final = frozenset({"openai_proxy_keys", "openai_proxy_breaker_state"})


class _Sum(Collector):
    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}
        self._values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}

    def add(self, family: Metric) -> None:
        self._families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        values = self._values.setdefault(family.name, {})
        for sample in family.samples:
            where = sample.name, tuple(sample.labels.items())
            before = values.get(where)
            if before is None:
                values[where] = sample.value
            elif family.name in _LEAST:
                values[where] = min(before, sample.value)
            elif family.name in _MOST:
                values[where] = max(before, sample.value)
            else:
                values[where] = before + sample.value

    def collect(self) -> Iterator[Metric]:
        for name, family in self._families.items():
            for (sample, labels), value in self._values[name].items():
                family.add_sample(sample, dict(labels), value)
            yield family


def merged(texts: Iterable[bytes]) -> bytes:
    """One scrape of several, each as `Metrics.render` gives it."""
    sum_, registry = _Sum(), CollectorRegistry()
    for text in texts:
        for family in text_string_to_metric_families(text.decode()):
            sum_.add(family)
    registry.register(sum_)
    return generate_latest(registry)
