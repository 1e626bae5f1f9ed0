"""Upstream URLs in headers never name the upstream's host to a client (docs/headers.md)."""

from __future__ import annotations

import pytest

from proxy.protocol.locations import own_location, own_locations

BASE = "https://internal.corp:8443/v1"
FILE = "/files/f"


@pytest.mark.parametrize(
    ("location", "own"),
    [
        (f"{BASE}/files/g?a=b", "/v1/files/g?a=b"),
        ("/v1/files/g", "/v1/files/g"),
        ("g", "/v1/files/g"),
        ("./g", "/v1/files/g"),
        ("../batches/b", "/v1/batches/b"),
        ("?after=g", "/v1/files/f?after=g"),
        ("HTTPS://Internal.Corp:8443/v1/files/g", "/v1/files/g"),
        ("//internal.corp:8443/v1/files/g", "/v1/files/g"),
        (f"{BASE}/files/g#part", "/v1/files/g"),
        ("https://internal.corp:8443/other/g", None),
        ("https://internal.corp:8443/v1evil/g", None),
        ("https://internal.corp:9999/v1/files/g", None),
        ("https://internal.corp/v1/files/g", None),
        ("https://user@internal.corp:8443/v1/files/g", None),
        ("https://10.0.0.7/v1/files/g", None),
        ("http://files.elsewhere.example/v1/files/g", None),
        ("//elsewhere.example/v1/files/g", None),
        ("/admin", None),
        ("https://internal.corp:8443/v1/%2e%2e/..%2f../admin", None),
        ("ftp://internal.corp:8443/v1/files/g", None),
        ("https://[::1/v1", None),
        ("https://internal.corp:x/v1/files/g", None),
        ("javascript:alert(1)", None),
    ],
)
def test_a_location_below_the_base_url_is_a_path_of_the_proxy(location: str, own: str | None) -> None:
    assert own_location(location, f"{BASE}/files/f?x=1", "/v1/files/f?x=1", FILE) == own


@pytest.mark.parametrize(
    ("target", "own"),
    [
        ("/files/f", "/files/g"),
        ("/openai/v1/files/f", "/openai/v1/files/g"),
        ("/_/tag=a:b/v1/files/f", "/_/tag=a:b/v1/files/g"),
    ],
)
def test_the_path_has_the_shape_that_the_client_asked_in(target: str, own: str) -> None:
    assert own_location(f"{BASE}/files/g", f"{BASE}/files/f", target, FILE) == own


def test_an_upstream_behind_tls_may_name_itself_with_plain_http() -> None:
    asked = "https://api.corp/v1/files/f"
    assert own_location("http://api.corp/v1/files/g", asked, "/v1/files/f", FILE) == "/v1/files/g"


AZURE = "https://name.openai.azure.com/openai"
IMAGES = "/images/generations:submit"


@pytest.mark.parametrize(
    ("asked", "target", "location", "own"),
    [
        (f"{AZURE}/v1/files/f", "/v1/files/f", f"{AZURE}/v1/files/g", "/v1/files/g"),
        (f"{AZURE}/v1/files/f", "/openai/v1/files/f", f"{AZURE}/v1/files/g", "/openai/v1/files/g"),
        (f"{AZURE}/files/f", "/v1/files/f", f"{AZURE}/files/g?api-version=v", "/v1/files/g?api-version=v"),
        (
            f"{AZURE}/deployments/d/files/f",
            "/_/tag=a:b/openai/deployments/d/files/f",
            f"{AZURE}/operations/images/1?api-version=v",
            "/_/tag=a:b/openai/operations/images/1?api-version=v",
        ),
        (f"{AZURE}/deployments/d/files/f", "/v1/files/f", f"{AZURE}/operations/images/1", None),
    ],
)
def test_the_urls_of_azure(asked: str, target: str, location: str, own: str | None) -> None:
    assert own_location(location, asked, target, FILE) == own


def test_what_lies_elsewhere_goes() -> None:
    headers = [(b"Location", b"/v1/a"), (b"Operation-Location", b"https://evil/v1")]
    assert own_locations(headers, f"{BASE}/files/f", "/v1/files/f", FILE) == [(b"Location", b"/v1/a")]
