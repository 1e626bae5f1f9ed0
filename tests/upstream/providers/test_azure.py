"""The Azure provider: deployments, api-version, credentials (docs/clients.md)."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.protocol.errors import ProxyError
from proxy.protocol.routes import parse_target
from proxy.upstream.providers import azure
from proxy.upstream.providers.interface import UpstreamAddress
from proxy.upstream.providers.registry import model_named

ROOT = "https://mine.openai.azure.com"
DEPLOYMENTS = {"gpt-4o": "my-gpt4o", "text-embedding-*": "embed", "gpt-*": "other", "gpt-4o-mini*": "mini"}


def site(api_version: str | None = "2024-10-21", root: str = ROOT, **deployments: str) -> UpstreamAddress:
    return UpstreamAddress("az", "azure", root, api_version, deployments or DEPLOYMENTS)


def url(target: str, model: str = "gpt-4o", api_version: str | None = "2024-10-21") -> str:
    whole = azure.url(site(api_version), parse_target(target), model)
    assert whole.startswith(f"{ROOT}/openai/")
    return whole.removeprefix(f"{ROOT}/openai")


V = "?api-version=2024-10-21"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        # An OpenAI client: the model's deployment, our api-version.
        ("/v1/chat/completions", f"/deployments/my-gpt4o/chat/completions{V}"),
        ("/chat/completions", f"/deployments/my-gpt4o/chat/completions{V}"),
        ("/v1/completions", f"/deployments/my-gpt4o/completions{V}"),
        ("/v1/embeddings", f"/deployments/my-gpt4o/embeddings{V}"),
        ("/v1/audio/speech", f"/deployments/my-gpt4o/audio/speech{V}"),
        ("/v1/images/generations", f"/deployments/my-gpt4o/images/generations{V}"),
        ("/v1/chat/completions?x=1", "/deployments/my-gpt4o/chat/completions?x=1&api-version=2024-10-21"),
        (
            "/v1/chat/completions?api-version=2025-01-01",
            "/deployments/my-gpt4o/chat/completions?api-version=2025-01-01",
        ),
        # Operations that know no deployment in the path.
        ("/v1/responses", f"/responses{V}"),
        ("/v1/models", f"/models{V}"),
        ("/v1/files/f1/content", f"/files/f1/content{V}"),
        ("/v1/batches?limit=1", "/batches?limit=1&api-version=2024-10-21"),
        # An Azure client: its own deployment and api-version win.
        (f"/openai/deployments/theirs/chat/completions{V}", f"/deployments/theirs/chat/completions{V}"),
        (
            "/openai/deployments/theirs/chat/completions?api-version=2023-05-15",
            "/deployments/theirs/chat/completions?api-version=2023-05-15",
        ),
        ("/openai/deployments/theirs/chat/completions", f"/deployments/theirs/chat/completions{V}"),
        ("/openai/deployments/a%20b/embeddings", f"/deployments/a%20b/embeddings{V}"),
        ("/openai/deployments/a%3Fb/embeddings", f"/deployments/a%3Fb/embeddings{V}"),
        ("/openai/models?api-version=2023-05-15", "/models?api-version=2023-05-15"),
        ("/openai/responses?api-version=2025-03-01-preview", "/responses?api-version=2025-03-01-preview"),
        ("/openai/files", f"/files{V}"),
        # The newer surface has no api-version of ours.
        ("/openai/v1/chat/completions", "/v1/chat/completions"),
        ("/openai/v1/responses?api-version=preview", "/v1/responses?api-version=preview"),
        ("/openai/v1/models", "/v1/models"),
    ],
)
def test_urls_with_an_api_version(target: str, expected: str) -> None:
    assert url(target) == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/responses?x=1", "/v1/responses?x=1"),
        ("/openai/v1/embeddings", "/v1/embeddings"),
        ("/openai/deployments/d/chat/completions?api-version=1", "/deployments/d/chat/completions?api-version=1"),
        ("/openai/files?api-version=1", "/files?api-version=1"),
    ],
)
def test_without_an_api_version_the_v1_surface_is_used(target: str, expected: str) -> None:
    assert url(target, api_version=None) == expected


def test_a_deployment_path_always_has_an_api_version() -> None:
    for target in ("/openai/deployments/d/chat/completions", "/openai/files"):
        assert "api-version=" in url(target, api_version=None)


def test_a_parameter_that_resembles_api_version_is_kept() -> None:
    assert url("/v1/models?x=api-version=1").endswith("?x=api-version=1&api-version=2024-10-21")
    assert url("/v1/models?xapi-version=1").endswith("&api-version=2024-10-21")


@pytest.mark.parametrize(
    ("model", "deployment"),
    [
        ("gpt-4o", "my-gpt4o"),
        ("gpt-4o-mini", "mini"),
        ("gpt-4o-mini-2024-07-18", "mini"),
        ("gpt-5", "other"),
        ("text-embedding-3-small", "embed"),
        ("o3", "o3"),
        ("GPT-4o", "GPT-4o"),
        ("ft:gpt 4o/x", "ft:gpt 4o/x"),
    ],
)
def test_the_deployment_of_a_model(model: str, deployment: str) -> None:
    assert azure.deployment_of(site(), model) == deployment
    path = urlsplit(url("/v1/chat/completions", model)).path
    assert unquote(path.split("/")[2]) == deployment
    assert path.count("/") == 4


@given(st.text())
@example(".")
@example("..")
@example("...")
@example("../..")
def test_model_stays_one_segment_of_the_path_or_is_refused(model: str) -> None:
    """The model is the client's text. A dot segment is refused: percent-encoding does not take its meaning away
    (RFC 3986 section 5.2.4)."""
    if model in (".", ".."):
        with pytest.raises(ProxyError) as refused:
            azure.url(site(), parse_target("/v1/chat/completions"), model)
        assert (refused.value.code, refused.value.param) == ("bad_request", "model")
        return
    got = urlsplit(azure.url(site(), parse_target("/v1/chat/completions"), model))
    assert f"{got.scheme}://{got.netloc}" == ROOT
    if model:
        assert got.path.startswith("/openai/deployments/")
        assert got.path.endswith("/chat/completions")
        assert got.path.count("/") == 5
        assert not {".", ".."} & set(got.path.split("/"))
    assert got.query == "api-version=2024-10-21"
    assert not got.fragment


def test_a_model_that_is_not_unicode_gives_a_valid_url() -> None:
    """A body may hold a lone surrogate; the upstream says 404 to it."""
    for text in ("\ud800", "a\udfffb"):
        assert azure.url(site(), parse_target("/v1/chat/completions"), text).isascii()


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_no_target_leaves_the_resource(text: str) -> None:
    for target in (f"/v1/{text}", f"/openai/{text}", f"/openai/deployments/{text}", f"/openai/deployments/{text}/x"):
        try:
            route = parse_target(target)
        except ProxyError:
            continue
        for api_version in ("2024-10-21", None):
            whole = azure.url(site(api_version), route, "m")
            assert whole.startswith(f"{ROOT}/openai/")
            assert not {".", ".."} & set(urlsplit(whole).path.split("/"))


@pytest.mark.parametrize(
    ("target", "api_version", "body_model", "written"),
    [
        # The path names the deployment: the body stays the client's.
        ("/v1/chat/completions", "2024-10-21", "gpt-4o", None),
        ("/v1/embeddings", "2024-10-21", "gpt-4o", None),
        ("/openai/deployments/theirs/chat/completions", "2024-10-21", "gpt-4o", None),
        ("/openai/deployments/theirs/chat/completions", None, "gpt-4o", None),
        ("/openai/deployments/theirs/chat/completions", None, None, None),
        # The body names it.
        ("/v1/responses", "2024-10-21", "gpt-4o", "my-gpt4o"),
        ("/v1/chat/completions", None, "gpt-4o", "my-gpt4o"),
        ("/openai/v1/chat/completions", "2024-10-21", "gpt-4o", "my-gpt4o"),
        ("/openai/responses", "2024-10-21", "gpt-4o", "my-gpt4o"),
        ("/openai/v1/chat/completions", None, "o3", None),
        ("/openai/v1/chat/completions", None, None, None),
    ],
)
def test_the_model_in_the_body(
    target: str, api_version: str | None, body_model: str | None, written: str | None
) -> None:
    here, route = site(api_version), parse_target(target)
    model = model_named([here], route, body_model)
    assert azure.body_model(here, route, model, body_model) == written


def test_the_credential_of_a_pool_key() -> None:
    assert azure.auth("0123abcd", "org", "proj") == (("api-key", "0123abcd"),)


@pytest.mark.parametrize(
    ("scheme", "token", "header"),
    [
        ("bearer", "0123abcd", ("api-key", "0123abcd")),
        ("api-key", "0123abcd", ("api-key", "0123abcd")),
        ("bearer", "eyJhbGciOi.x.y", ("Authorization", "Bearer eyJhbGciOi.x.y")),
        ("api-key", "eyJhbGciOi.x.y", ("api-key", "eyJhbGciOi.x.y")),
    ],
)
def test_the_clients_own_credential_is_sent(scheme: str, token: str, header: tuple[str, str]) -> None:
    assert azure.client_auth(scheme, token) == (header,)


def test_the_cache_identity_is_address_surface_version_and_deployment() -> None:
    """Another base URL, surface, api-version or deployment is another identity."""
    here = site()
    assert azure.identity(here, "gpt-4o", "openai") == azure.identity(site(), "gpt-4o", "azure")
    others = [
        azure.identity(site("2025-01-01"), "gpt-4o", "openai"),
        azure.identity(site(None), "gpt-4o", "azure"),
        azure.identity(here, "gpt-4o", "azure-v1"),
        azure.identity(site(root="https://other.openai.azure.com"), "gpt-4o", "openai"),
        azure.identity(here, "gpt-5", "openai"),
        azure.identity(site(**{"gpt-4o": "new"}), "gpt-4o", "openai"),
    ]
    assert len({azure.identity(here, "gpt-4o", "openai"), *others}) == 7
    assert azure.identity(here, "gpt-4o", "azure-v1") == azure.identity(site(None), "gpt-4o", "openai")
