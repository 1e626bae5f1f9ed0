"""What a client key may use: its models, and limits of its own, held once a request and ended once."""

from __future__ import annotations

import pytest

from proxy.config.limits import Limits
from proxy.protocol.errors import ProxyError
from proxy.protocol.request import Client
from proxy.upstream.limits.clients import ClientLimits, ClientReservation, check_any_model, check_model

ANNA = Client("anna", models=("gpt-4o-mini", "text-embedding-*"))
BEN = Client("ben")


def refused(*args: object) -> str:
    with pytest.raises(ProxyError) as refusal:
        check_model(*args)  # type: ignore[arg-type]
    assert refusal.value.status == 403
    return refusal.value.code


@pytest.mark.parametrize("model", ["gpt-4o-mini", "text-embedding-3-small"])
def test_models_that_are_named_may_be_used(model: str) -> None:
    check_model(ANNA, model)
    check_model(BEN, model)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4o-mini-2024-07-18", "GPT-4o-mini", "", "ft:gpt-4o-mini:x"])
def test_other_models_are_a_403(model: str) -> None:
    assert refused(ANNA, model) == "model_not_allowed"
    check_model(BEN, model)


def test_every_model_that_could_be_served_must_be_allowed() -> None:
    check_model(ANNA, "gpt-4o-mini", "text-embedding-3-large")
    with pytest.raises(ProxyError):
        check_model(ANNA, "gpt-4o-mini", "gpt-4o")


def test_a_model_that_cannot_be_read_counts_as_any() -> None:
    check_any_model(BEN)
    check_any_model(Client("carla", models=("gpt-*", "*")))
    with pytest.raises(ProxyError) as refusal:
        check_any_model(ANNA)
    assert (refusal.value.status, refusal.value.code) == (403, "model_not_allowed")


def book() -> ClientLimits:
    return ClientLimits({"anna": Limits(rpm=2, tpm=1000, concurrency=2), "ben": Limits()})


def held(clients: ClientLimits, tokens: int = 10, now: float = 0.0, who: Client = ANNA) -> ClientReservation:
    hold = clients.reserve(who, tokens, now)
    assert hold is not None
    return hold


def test_beyond_the_limit_it_is_refused_with_an_honest_delay() -> None:
    clients = book()
    held(clients).settle(10)
    held(clients, now=1.0).settle(10)
    with pytest.raises(ProxyError) as refusal:
        clients.reserve(ANNA, 10, 20.0)
    assert (refusal.value.status, refusal.value.code, refusal.value.should_retry) == (429, "client_limit", None)
    assert refusal.value.retry_after == pytest.approx(40.6)
    held(clients, now=20.0 + 40.61)


def test_other_clients_are_not_affected() -> None:
    clients = book()
    for _ in range(50):
        held(clients, who=BEN)
    assert clients.reserve(Client(), 10, 0.0) is None
    assert clients.headers(BEN, 0.0) == clients.headers(Client(), 0.0) == ()


def test_a_request_larger_than_the_limit_never_goes() -> None:
    with pytest.raises(ProxyError) as refusal:
        book().reserve(ANNA, 1001, 0.0)
    assert (refusal.value.code, refusal.value.retry_after) == ("request_exceeds_limit", None)


def test_only_sent_requests_count_and_only_once() -> None:
    clients = book()
    for _ in range(10):
        held(clients, 900).cancel()
    hold = held(clients, 900)
    hold.settle(100)
    hold.settle(500)
    hold.cancel()
    unknown = held(clients, 200)
    assert clients.headers(ANNA, 0.0) == (("X-Proxy-Client-Limit", "rpm=2/2, tpm=300/1000, concurrency=1/2"),)
    unknown.settle(None)
    assert clients.report(0.0) == {
        "anna": {
            "requests": 2,
            "tokens": 300,
            "running": 0,
            "limits": {
                "rpm": {"limit": 2, "used": 2},
                "tpm": {"limit": 1000, "used": 300},
                "concurrency": {"limit": 2, "used": 0},
            },
        },
        "ben": {"requests": 0, "tokens": 0, "running": 0, "limits": {}},
    }


def test_a_client_at_its_concurrency_is_told_to_come_back_soon() -> None:
    clients = ClientLimits({"anna": Limits(concurrency=1)})
    first = held(clients)
    with pytest.raises(ProxyError) as refusal:
        clients.reserve(ANNA, 1, 0.0)
    assert refusal.value.retry_after == 1.0
    first.settle(1)
    held(clients)


def test_a_reset_clears_usage_but_not_requests_in_flight() -> None:
    clients = book()
    running = held(clients, 500)
    held(clients).settle(10)
    clients.reset()
    assert clients.headers(ANNA, 0.0) == (("X-Proxy-Client-Limit", "rpm=0/2, tpm=0/1000, concurrency=1/2"),)
    running.settle(900)
    assert clients.headers(ANNA, 0.0) == (("X-Proxy-Client-Limit", "rpm=0/2, tpm=0/1000, concurrency=0/2"),)


def test_tokens_are_estimated_only_if_a_limit_counts_them() -> None:
    assert book().counts_tokens
    assert not ClientLimits({"a": Limits(rpm=1)}).counts_tokens
    assert not ClientLimits({}).counts_tokens
