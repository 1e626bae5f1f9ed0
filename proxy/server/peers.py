"""What the other workers know: asked by the routes for operators, so that any worker answers for all of them."""

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
    """seat: None where there are none; number: this worker's."""

    def __init__(self, seat: WorkerLink | None) -> None:
        self._seat = seat
        self.number = seat.number if seat is not None else 0

    @property
    def any(self) -> bool:
        return self._seat is not None

    def answer(self, local: Mapping[str, LocalAnswer]) -> None:
        """What we answer from now on, by kind, when others ask."""
        if self._seat is not None:
            self._seat.channel.handlers |= {kind: partial(_packed, each) for kind, each in local.items()}

    async def ask(self, kind: str, body: bytes = b"") -> list[Any]:
        """The others' answers; who does not answer in time is left out."""
        if self._seat is None:
            return []
        return [unpack(answer, Any)[0] for answer in await self._seat.ask(kind, body)]

    async def receipt(self, id_: str) -> Receipt | None:
        for found in await self.ask("receipt", id_.encode("utf-8", "surrogateescape")):
            if found is not None:
                return msgspec.convert(found, Receipt)
        return None

    async def entries(self, key: str) -> list[Entry]:
        """What the others have in memory under this key."""
        answers = await self.ask("entries", key.encode("utf-8", "surrogateescape"))
        return [msgspec.convert(entry, Entry) for answer in answers for entry in answer]

    async def metrics(self, registry: CollectorRegistry) -> bytes:
        """All workers' metrics as text."""
        mine = self.counts(registry)
        return text_of(mine if self._seat is None else await self._seat.metrics(mine))

    def counts(self, registry: CollectorRegistry) -> list[Family]:
        """This worker's metrics."""
        return [family.of_worker(self.number) for family in families_of(registry.collect())]


async def _packed(local: LocalAnswer, body: bytes) -> bytes:
    return pack(await local(body))


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
    """As much of a registry as the exposition asks for."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def text_of(families: Iterable[Family]) -> bytes:
    """For one scrape (Prometheus exposition format 0.0.4)."""
    metrics = []
    for family in families:
        metric = Metric(family.name, family.help, family.kind)
        for name, labels, value in family.samples:
            metric.add_sample(name, dict(labels), value)
        metrics.append(metric)
    return generate_latest(_Collected(metrics))
