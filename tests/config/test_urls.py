from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.problems import Invalid
from proxy.config.urls import AzureUrl, azure_url, openai_url, parse_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("https://api.openai.com", "https://api.openai.com/v1"),
        ("https://api.openai.com/", "https://api.openai.com/v1"),
        ("https://API.OpenAI.com:443/v1//", "https://api.openai.com/v1"),
        ("https://eu.api.openai.com", "https://eu.api.openai.com/v1"),
        ("https://gateway.example.com", "https://gateway.example.com"),
        ("https://gateway.example.com:8443/a/b/v1", "https://gateway.example.com:8443/a/b/v1"),
        ("http://127.0.0.1:11434/v1", "http://127.0.0.1:11434/v1"),
        ("http://[::1]:80/v1", "http://[::1]/v1"),
        ("http://my_service:8000/v1", "http://my_service:8000/v1"),
    ],
)
def test_openai_spellings(text: str, url: str) -> None:
    assert openai_url(parse_url(text)) == url


ROOT = "https://name.openai.azure.com"


@pytest.mark.parametrize(
    ("path", "v1", "deployment"),
    [
        ("", False, None),
        ("/", False, None),
        ("/openai", False, None),
        ("/openai/", False, None),
        ("/openai/v1", True, None),
        ("/openai/v1/", True, None),
        ("/openai/v1/chat/completions", True, None),
        ("/openai/deployments", False, None),
        ("/openai/deployments/my-gpt4o", False, "my-gpt4o"),
        ("/openai/deployments/my-gpt4o/", False, "my-gpt4o"),
        ("/openai/deployments/my-gpt4o/chat/completions", False, "my-gpt4o"),
    ],
)
@pytest.mark.parametrize(
    "host", ["name.openai.azure.com", "NAME.cognitiveservices.azure.com", "n.services.ai.azure.com"]
)
def test_azure_spellings_have_one_root(host: str, path: str, v1: bool, deployment: str | None) -> None:
    assert azure_url(parse_url(f"https://{host}{path}")) == AzureUrl(f"https://{host.lower()}", v1, deployment)


def test_a_gateways_prefix_stays() -> None:
    assert azure_url(parse_url("https://apim.example.com/team/openai/v1")) == AzureUrl(
        "https://apim.example.com/team", True, None
    )
    assert azure_url(parse_url("https://apim.example.com/team")).root == "https://apim.example.com/team"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "characters"),
        ("api.openai.com/v1", "no http"),
        ("ftp://api.openai.com", "no http"),
        ("https://user:hunter2@api.openai.com/v1", "user and password"),
        ("https://api.openai.com/v1?hunter2=1", "query"),
        ("https://api.openai.com/v1?", "query"),
        ("https://api.openai.com/v1#hunter2", "fragment"),
        ("https://api.openai.com/v1#", "fragment"),
        ("https:///v1", "host"),
        ("https://", "host"),
        ("https://api.openai.com:99999/v1", "malformed"),
        ("https://api.openai.com:0/v1", "port 0"),
        ("https://[::1/v1", "malformed"),
        ("https://[hunter2]/v1", "m"),
        ("https://api.openai.com\\@evil/v1", "characters"),
        ("https://api.openai.com /v1", "characters"),
        ("https://äpi.openai.com/v1", "characters"),
        ("https://a..b/v1", "host"),
        ("https://a%2fb/v1", "host"),
        ("https://a/b/../c", "path"),
        ("https://a//b", "path"),
        ("https://a/%2e%2e/b", "path"),
    ],
)
def test_what_is_no_base_url(text: str, reason: str) -> None:
    with pytest.raises(Invalid, match=reason) as error:
        parse_url(text)
    assert "hunter2" not in str(error.value)


def test_an_endpoints_url_is_no_base_url() -> None:
    with pytest.raises(Invalid, match="drop /chat/completions"):
        openai_url(parse_url("https://api.openai.com/v1/chat/completions"))


def test_azures_own_hosts_serve_only_openai() -> None:
    with pytest.raises(Invalid, match="not /openai"):
        azure_url(parse_url("https://name.openai.azure.com/v1"))


@given(st.text(max_size=40) | st.text(max_size=40).map(lambda text: f"https://{text}"))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    try:
        url = parse_url(text)
    except Invalid:
        return
    assert parse_url(str(url)) == url
