from __future__ import annotations

from prometheus_client import generate_latest

from proxy.observability.metrics import Metrics
from proxy.server.peers import PeerWorkers, families_of, text_of
from proxy.services import build_services
from proxy.system.clock import SYSTEM_CLOCK
from tests.pipeline.fixture import settings


def test_metrics_are_unchanged_by_serialisation() -> None:
    metrics = Metrics()
    metrics.record_refusal("invalid_json")
    text = metrics.render(build_services(settings(), SYSTEM_CLOCK), 3)
    assert text_of(families_of(metrics.registry.collect())) == text == generate_latest(metrics.registry)


async def test_a_single_process_has_no_peers() -> None:
    siblings = PeerWorkers(None)
    siblings.answer({})
    assert not siblings.any
    assert await siblings.ask("receipt", b"x") == []
    assert await siblings.receipt("x") is None
    assert await siblings.entries("x") == []
