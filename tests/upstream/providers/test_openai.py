"""The OpenAI provider, and what the table asks of every provider (docs/clients.md)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.routes import Shape, parse_target
from proxy.upstream.providers import openai
from proxy.upstream.providers.interface import UpstreamAddress
from proxy.upstream.providers.registry import PROVIDERS, model_named

BASE = "https://api.openai.com/v1"


def site(base_url: str = BASE, **deployments: str) -> UpstreamAddress:
    return UpstreamAddress("openai", "openai", base_url, None, deployments)


def url(target: str, base_url: str = BASE, model: str = "gpt-4o") -> str:
    return openai.url(site(base_url), parse_target(target), model)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/v1/chat/completions", "/chat/completions"),
        ("/chat/completions", "/chat/completions"),
        ("/_/ttl=1h/v1/chat/completions", "/chat/completions"),
        ("/v1/files?limit=2&after=a%2Fb", "/files?limit=2&after=a%2Fb"),
        ("/v1/files/a%20b/content", "/files/a%20b/content"),
        ("/v1/models/ft:gpt-4o:org::id", "/models/ft:gpt-4o:org::id"),
        ("/v1/models?", "/models"),
        ("/openai/deployments/d/chat/completions?api-version=2024-10-21", "/chat/completions"),
        ("/openai/deployments/d/chat/completions?api-version=1&x=2", "/chat/completions?x=2"),
        (
            "/openai/deployments/d/chat/completions?x=2&api-version=1&y=api-version=3",
            "/chat/completions?x=2&y=api-version=3",
        ),
        ("/openai/deployments/d/embeddings", "/embeddings"),
        ("/openai/models?api-version=1", "/models"),
        ("/openai/v1/responses", "/responses"),
        ("/openai/v1/responses?api-version=preview", "/responses"),
        ("/openai/v1/responses?x=1", "/responses?x=1"),
        ("/v1/chat/completions?api-version=1", "/chat/completions?api-version=1"),
    ],
)
def test_every_request_shape_becomes_openais(target: str, path: str) -> None:
    assert url(target) == BASE + path


@pytest.mark.parametrize(
    "base_url", ["http://127.0.0.1:1234/v1", "https://gateway.example/team/openai", "http://[::1]:80"]
)
def test_the_configured_base_url_is_used_for_any_target(base_url: str) -> None:
    for target in ("/v1/@evil.example/x", "/v1/models?x=@evil", "/v1/:80/x", "/chat/completions", "/v1/x?//evil"):
        assert url(target, base_url).startswith(base_url + "/")


@given(st.text(st.characters(codec="ascii")))
def test_no_target_leaves_the_base_url(text: str) -> None:
    from proxy.protocol.errors import ProxyError

    try:
        route = parse_target("/v1/" + text)
    except ProxyError:
        return
    for dialect in (openai,):
        assert dialect.url(site(), route, "m").startswith(BASE + "/")


@pytest.mark.parametrize(
    ("target", "body_model", "written"),
    [
        ("/v1/chat/completions", "gpt-4o", None),
        ("/v1/chat/completions", None, None),
        ("/openai/deployments/gpt-4o/chat/completions", "gpt-4o-mini", None),
        ("/openai/deployments/gpt-4o/chat/completions", None, "gpt-4o"),
        ("/openai/deployments/mine/chat/completions", None, "gpt-4o"),
        ("/openai/v1/responses", "gpt-4o", None),
    ],
)
def test_the_model_is_that_of_the_body_or_of_the_deployment(
    target: str, body_model: str | None, written: str | None
) -> None:
    here, route = site(**{"gpt-4o": "mine"}), parse_target(target)
    model = model_named([here], route, body_model)
    assert openai.body_model(here, route, model, body_model) == written


@pytest.mark.parametrize(
    ("organization", "project", "headers"),
    [
        (None, None, {}),
        ("org-1", None, {"OpenAI-Organization": "org-1"}),
        (None, "proj_1", {"OpenAI-Project": "proj_1"}),
        ("org-1", "proj_1", {"OpenAI-Organization": "org-1", "OpenAI-Project": "proj_1"}),
    ],
)
def test_the_credential_of_a_pool_key(organization: str | None, project: str | None, headers: dict[str, str]) -> None:
    got = openai.auth("sk-x", organization, project)
    assert dict(got) == {"Authorization": "Bearer sk-x"} | headers
    assert len(got) == 1 + len(headers)


@pytest.mark.parametrize("scheme", ["bearer", "api-key"])
def test_the_clients_own_credential_is_sent_as_bearer(scheme: str) -> None:
    assert openai.client_auth(scheme, "sk-mine") == (("Authorization", "Bearer sk-mine"),)


def test_the_cache_identity_is_the_base_url() -> None:
    assert openai.identity(site(), "a", "openai") == openai.identity(site(), "b", "azure")
    assert openai.identity(site(), "a", "openai") != openai.identity(site("http://localhost/v1"), "a", "openai")


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_of_providers() -> None:
    assert set(PROVIDERS) == {"openai", "azure"}


@pytest.mark.parametrize("kind", PROVIDERS)
@pytest.mark.parametrize("scheme", ["bearer", "api-key"])
def test_exactly_one_credential_is_sent(kind: str, scheme: str) -> None:
    dialect = PROVIDERS[kind]
    names = {"authorization", "api-key"}
    for headers in (dialect.auth("sk-x", "o", "p"), dialect.client_auth(scheme, "sk-x")):
        assert len([name for name, _ in headers if name.lower() in names]) == 1
        assert sum("sk-x" in value for _, value in headers) == 1


def test_providers_have_different_cache_identities() -> None:
    where = "https://x.openai.azure.com"
    assert len({dialect.identity(site(where), "m", "openai") for dialect in PROVIDERS.values()}) == len(PROVIDERS)


@pytest.mark.parametrize(
    ("target", "body_model", "model"),
    [
        ("/v1/chat/completions", "gpt-4o", "gpt-4o"),
        ("/v1/chat/completions", None, ""),
        ("/v1/chat/completions", "", ""),
        ("/openai/deployments/mine/chat/completions", "gpt-4o-mini", "gpt-4o-mini"),
        ("/openai/deployments/mine/chat/completions", None, "gpt-4o"),
        ("/openai/deployments/mine/chat/completions", "", "gpt-4o"),
        ("/openai/deployments/theirs/chat/completions", None, "theirs"),
        ("/openai/deployments/all-o/chat/completions", None, "all-o"),
        ("/openai/deployments/maybe/chat/completions", None, "maybe"),
        ("/openai/v1/responses", None, ""),
    ],
)
def test_the_model_of_a_request(target: str, body_model: str | None, model: str) -> None:
    azure_site = UpstreamAddress(
        "az", "azure", "https://x.openai.azure.com", None, {"gpt-4o": "mine", "o*": "all-o", "gpt-[45]?": "maybe"}
    )
    shape: Shape = parse_target(target).shape
    assert shape in ("openai", "azure", "azure-v1")
    assert model_named([site(), azure_site], parse_target(target), body_model) == model
