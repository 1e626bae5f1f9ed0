"""Requests to the other workers, so that any worker can answer the admin routes for all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Metric, generate_latest

from ..accounting.receipt import Receipt
from ..cache.entry import Entry
from ..observability.aggregate import Family
from ..workers.shared_state import pack, unpack
from ..workers.worker import WorkerLink

LocalAnswer = Callable[[bytes], Awaitable[Any]]


class PeerWorkers:
    """The other workers. link: None if there are none. number: this worker's, from 1; 0 without workers."""

    def __init__(self, link: WorkerLink | None) -> None:
        self._link = link
        self.number = link.number if link is not None else 0

    @property
    def any(self) -> bool:
        return self._link is not None

    def answer(self, handlers: Mapping[str, LocalAnswer]) -> None:
        """Answer requests of other workers with these handlers from now on. handlers: by kind."""
        if self._link is not None:
            self._link.channel.handlers |= {kind: partial(_packed, handler) for kind, handler in handlers.items()}

    async def ask(self, kind: str, body: bytes = b"") -> list[Any]:
        """Return the answers of the other workers, without those that do not answer in time."""
        if self._link is None:
            return []
        return [unpack(answer, Any)[0] for answer in await self._link.ask_peers(kind, body)]

    async def receipt(self, id_: str) -> Receipt | None:
        for answer in await self.ask("receipt", id_.encode("utf-8", "surrogateescape")):
            if answer is not None:
                return msgspec.convert(answer, Receipt)
        return None

    async def entries(self, key: str) -> list[Entry]:
        """Return the entries that the other workers have in memory under this key."""
        answers = await self.ask("entries", key.encode("utf-8", "surrogateescape"))
        return [msgspec.convert(entry, Entry) for answer in answers for entry in answer]

    async def metrics(self, registry: CollectorRegistry) -> bytes:
        """Return all workers' metrics as text."""
        own = self.own_metrics(registry)
        return text_of(own if self._link is None else await self._link.metrics(own))

    def own_metrics(self, registry: CollectorRegistry) -> list[Family]:
        """Return this worker's metrics."""
        return [family.of_worker(self.number) for family in families_of(registry.collect())]


async def _packed(handler: LocalAnswer, body: bytes) -> bytes:
    return pack(await handler(body))


def families_of(metrics: Iterable[Metric]) -> list[Family]:
    return [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            [(sample.name, tuple(sample.labels.items()), float(sample.value)) for sample in metric.samples],
        )
        for metric in metrics
    ]


class _Collected:
    """The part of a registry that `generate_latest` uses."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def text_of(families: Iterable[Family]) -> bytes:
    """Return the text of one scrape (Prometheus exposition format 0.0.4)."""
    metrics = []
    for family in families:
        metric = Metric(family.name, family.help, family.kind)
        for name, labels, value in family.samples:
            metric.add_sample(name, dict(labels), value)
        metrics.append(metric)
    return generate_latest(_Collected(metrics))
