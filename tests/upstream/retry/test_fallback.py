"""Fallback models (docs/keys-and-limits.md)."""

from __future__ import annotations

import pytest

from proxy.protocol.options import NO_OPTIONS
from proxy.protocol.request import Client, ProxyRequest, parse_body
from proxy.protocol.routes import parse_target
from proxy.upstream.retry.fallback import fallbacks_for, with_model

TABLE = {"gpt-4o": ("gpt-4o-mini", "gpt-4.1"), "gpt-4*": ("gpt-4o-mini",), "*": ("o1",)}


@pytest.mark.parametrize(
    ("model", "others"),
    [("gpt-4o", ("gpt-4o-mini", "gpt-4.1")), ("gpt-4-turbo", ("gpt-4o-mini",)), ("o3", ("o1",)), ("o1", ())],
)
def test_the_exact_name_wins_over_the_longest_glob(model: str, others: tuple[str, ...]) -> None:
    assert fallbacks_for(TABLE, model) == others


def test_without_configuration_there_is_no_fallback() -> None:
    assert fallbacks_for({}, "gpt-4o") == ()


def request(target: str, body: bytes) -> ProxyRequest:
    return ProxyRequest.from_body(
        body,
        parse_body(body),
        lambda _, model: model or "gpt-4o",
        route=parse_target(target),
        headers=(),
        options=NO_OPTIONS,
        client=Client(),
        id="id",
        deadline=9.0,
    )


def test_only_the_model_of_the_body_changes() -> None:
    first = request("/v1/chat/completions", b'{ "model": "gpt-4o",  "n": 1.0 }')
    other = with_model(first, "o1")
    assert other.body == b'{ "model": "o1",  "n": 1.0 }'
    assert (other.model, other.body_model, other.document) == ("o1", "o1", {"model": "o1", "n": 1.0})
    assert (other.id, other.deadline, other.route) == (first.id, first.deadline, first.route)


def test_a_deployment_in_the_path_is_replaced() -> None:
    other = with_model(request("/openai/deployments/mine/chat/completions?api-version=1", b"{}"), "o1")
    assert (other.route.deployment, other.route.shape, other.route.path) == (None, "openai", "/chat/completions")
    assert other.route.query == "api-version=1"
    assert other.body == b'{"model":"o1"}'
