from __future__ import annotations

import hashlib

import pytest

from proxy.config.limits import Limits
from proxy.config.secret import Secret
from proxy.config.settings import UpstreamSettings
from tests.config.kit import Load, problems

AZURE = {"AZURE_OPENAI_ENDPOINT": "https://n.openai.azure.com/", "AZURE_OPENAI_API_KEY": "az1, az2"}


def keys(upstream: UpstreamSettings) -> list[str]:
    return [key.secret.reveal() for key in upstream.keys]


def test_a_pool_of_keys(load: Load) -> None:
    loaded = load(
        None, {"OPENAI_API_KEY": " sk-a , sk-b,sk-c ,", "OPENAI_ORGANIZATION": "org-2", "OPENAI_PROJECT_ID": "proj_1"}
    )
    (upstream,) = loaded.settings.upstreams
    assert (upstream.name, upstream.base_url, keys(upstream)) == (
        "openai",
        "https://api.openai.com/v1",
        ["sk-a", "sk-b", "sk-c"],
    )
    assert {(key.organization, key.project) for key in upstream.keys} == {("org-2", "proj_1")}
    assert not loaded.settings.passthrough
    assert loaded.sources["upstreams.0.keys.2"] == "env OPENAI_API_KEY"
    assert (
        load(None, {"OPENAI_API_KEY": "a", "OPENAI_ORG_ID": "org-1", "OPENAI_ORGANIZATION": "org-2"})
        .settings.upstreams[0]
        .keys[0]
        .organization
        == "org-1"
    )


def test_a_base_url_of_ones_own(load: Load) -> None:
    (upstream,) = load(None, {"OPENAI_API_BASE": "http://127.0.0.1:9/v1/"}).settings.upstreams
    assert (upstream.base_url, upstream.keys) == ("http://127.0.0.1:9/v1", ())
    environ = {
        "OPENAI_API_BASE": "https://n.openai.azure.com",
        "OPENAI_API_KEY": "k",
        "OPENAI_API_VERSION": "2024-06-01",
    }
    (upstream,) = load(None, environ).settings.upstreams
    assert (upstream.kind, upstream.api_version, keys(upstream)) == ("azure", "2024-06-01", ["k"])


def test_the_clients_variable_is_never_read(load: Load) -> None:
    loaded = load(None, {"OPENAI_BASE_URL": "http://127.0.0.1:8484/v1", "OPENAI_API_VERSION": "nonsense"})
    assert loaded.settings.upstreams == (UpstreamSettings(),)


def test_azure(load: Load) -> None:
    (upstream,) = load(None, AZURE).settings.upstreams
    assert (upstream.name, upstream.kind, upstream.api_version, keys(upstream)) == (
        "azure",
        "azure",
        "2024-10-21",
        ["az1", "az2"],
    )
    (upstream,) = load(None, {**AZURE, "OPENAI_API_VERSION": "2025-01-01-preview"}).settings.upstreams
    assert upstream.api_version == "2025-01-01-preview"
    both = load(None, {**AZURE, "OPENAI_API_KEY": "sk-a"}).settings.upstreams
    assert [upstream.name for upstream in both] == ["openai", "azure"]
    loaded = load(None, {"AZURE_OPENAI_API_KEY": "az"})
    assert loaded.settings.upstreams == (UpstreamSettings(),)
    assert loaded.warnings == ("AZURE_OPENAI_API_KEY is set without AZURE_OPENAI_ENDPOINT, and so is not used",)


@pytest.mark.parametrize("listed", ["upstreams:\n- {name: mine}", "upstreams: [{name: mine}]"])
def test_upstreams_of_the_file_come_alone(load: Load, listed: str) -> None:
    environ = {**AZURE, "OPENAI_API_KEY": "sk-your-key"}
    assert [u.name for u in load(listed, environ).settings.upstreams] == ["mine"]
    assert [u.name for u in load(None, {**environ, "PROXY__UPSTREAMS": "[{name: mine}]"}).settings.upstreams] == [
        "mine"
    ]


@pytest.mark.parametrize("listed", ["upstreams:", "upstreams: []"])
def test_an_empty_list_is_none(load: Load, listed: str) -> None:
    assert keys(load(listed, {"OPENAI_API_KEY": "sk-a"}).settings.upstreams[0]) == ["sk-a"]


def test_empty_variables_are_unset(load: Load) -> None:
    names = (
        "OPENAI_API_KEY",
        "OPENAI_API_BASE",
        "PROXY__SERVER__PORT",
        "PROXY_CLIENT_KEYS",
        "HTTPS_PROXY",
        "REDIS_URL",
    )
    loaded = load(None, dict.fromkeys(names, " "))
    assert loaded.settings == load().settings
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"OPENAI_API_KEY": "sk-your-hunter2"},
            "environment: upstreams.0.keys.0 (OPENAI_API_KEY): expected a key, found that the key openai-1 is a pl",
        ),
        ({"OPENAI_API_KEY": "sk-a,hunter 2"}, "the key openai-2 contains white space"),
        ({"OPENAI_API_KEY": "'hunter2'"}, "the key openai-1 contains a quote"),
        ({"OPENAI_API_KEY": "sk-a,sk-a"}, "openai-2 is the same as openai-1"),
        ({"OPENAI_API_KEY": ","}, "expected a key, found an empty text"),
        (
            {"OPENAI_API_BASE": "http://127.0.0.1:8484/v1"},
            "environment: upstreams.0.base_url (OPENAI_API_BASE): expected an upstream, found the proxy's own address",
        ),
        (
            {"OPENAI_API_BASE": "https://u:hunter2@h"},
            "(OPENAI_API_BASE): expected a base URL without user and password",
        ),
        (
            {"OPENAI_API_KEY": "sk-a", "OPENAI_ORG_ID": "a b"},
            "upstreams.0.keys.0.organization (OPENAI_ORG_ID): expected an id",
        ),
        (
            {**AZURE, "OPENAI_API_VERSION": "hunter2"},
            "upstreams.0.api_version (OPENAI_API_VERSION): expected an api-version",
        ),
        (
            {"AZURE_OPENAI_ENDPOINT": "n.openai.azure.com"},
            "upstreams.0.base_url (AZURE_OPENAI_ENDPOINT): expected a base URL",
        ),
        (
            {"PROXY_CLIENT_KEYS": "hunter2"},
            "environment: server.client_keys (PROXY_CLIENT_KEYS): expected name:key as entry 1, found no such pair",
        ),
        ({"PROXY_CLIENT_KEYS": ","}, "expected name:key as entry 1"),
        ({"PROXY_CLIENT_KEYS": "a:", "PROXY__SERVER__HOST": "0.0.0.0"}, "expected name:key as entry 1"),
        (
            {"PROXY_CLIENT_KEYS": "a:hunter2,b:hunter2"},
            "server.client_keys.1 (PROXY_CLIENT_KEYS): expected a key of its own",
        ),
        (
            {"PROXY__SERVER__PROT": "1"},
            "PROXY__SERVER__PROT: expected a setting of this section, found an unknown name; did you mean port?",
        ),
        ({"PROXY__PORT": "1"}, "did you mean server.port?"),
        ({"PROXY__": "1"}, "environment: PROXY__: expected a setting"),
        (
            {"PROXY__THROTTLE__LIMITS__GPT": "{}"},
            "expected PROXY__THROTTLE__LIMITS with a YAML value, found a name that goes further",
        ),
        (
            {"PROXY__SERVER__PORT": "many"},
            "environment: server.port (PROXY__SERVER__PORT): expected a whole number from 0 to 65535, found 'many'",
        ),
        (
            {"PROXY__SERVER__ALLOWED_HOSTS": "[a"},
            "environment: server.allowed_hosts (PROXY__SERVER__ALLOWED_HOSTS): expected YAML",
        ),
        (
            {"PROXY__UPSTREAMS": "[{keys: [hunter 2]}]"},
            "environment: upstreams.0.keys.0 (PROXY__UPSTREAMS): expected a key",
        ),
    ],
)
def test_mistakes(load: Load, environ: dict[str, str], expected: str) -> None:
    found = problems(load, None, environ)
    assert len(found) == 1
    assert expected in found[0]
    assert "hunter" not in found[0]


def test_any_setting_by_variable(load: Load) -> None:
    environ = {
        "PROXY__SERVER__PORT": "9000",
        "PROXY__SERVER__HOST": "::1",
        "PROXY__SERVER__SOCKET": "null",
        "PROXY__SERVER__ALLOWED_HOSTS": "[a, b]",
        "PROXY__CACHE": "{backend: off, ttl: {chat: 5m, completions: 6m}}",
        "PROXY__CACHE__TTL__CHAT": "1h",
        "PROXY__THROTTLE__LIMITS": '{"gpt-4o*": {rpm: 5}}',
        "PROXY__THROTTLE__USE": "0.5",
        "PROXY__SELECTION": "round_robin",
        "PROXY__LOG__LEVEL": "'debug'",
    }
    settings = load("cache: {ttl: {embeddings: 1d}}\nserver: {socket: /tmp/s}", environ).settings
    assert (settings.server.port, settings.server.host, settings.server.socket) == (9000, "::1", None)
    assert settings.server.allowed_hosts == ("a", "b")
    ttl = settings.cache.ttl
    assert (settings.cache.backend, ttl.chat, ttl.completions, ttl.embeddings) == ("off", 3600.0, 360.0, 86400.0)
    assert settings.throttle.limits == {"gpt-4o*": Limits(rpm=5)}
    assert (settings.throttle.use, settings.selection, settings.log.level) == (0.5, "round_robin", "debug")


def test_texts_need_no_yaml_quotes(load: Load) -> None:
    for text in ("a#b:c*d", "*abc", "a: b", "%x@y"):
        environ = {"PROXY__CACHE__PATH": text}
        assert load(None, environ).settings.cache.path == text
    assert load(None, {"PROXY__SERVER__ADMIN_KEY": "*a#b:c*d"}).settings.server.admin_key == Secret("*a#b:c*d")


def test_client_keys_by_variable(load: Load) -> None:
    environ = {"PROXY_CLIENT_KEYS": "alice:first-key-0123456789 , bob:with:colon-0123456789,"}
    clients = load(
        "server: {client_keys: [{name: carol, key: carols-key-0123456789}]}", environ
    ).settings.server.client_keys
    assert [(client.name, client.digest) for client in clients] == [
        ("alice", hashlib.sha256(b"first-key-0123456789").digest()),
        ("bob", hashlib.sha256(b"with:colon-0123456789").digest()),
    ]
    environ["PROXY__SERVER__CLIENT_KEYS"] = "[{name: dave, key: daves-key-0123456789}]"
    assert [client.name for client in load(None, environ).settings.server.client_keys] == ["dave"]
    assert load(None, {**environ, "PROXY__SERVER": "{port: 9}"}).settings.server.port == 9


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({"REDIS_URL": "redis://a:1/0", "REDIS_HOST": "b"}, "redis://a:1/0"),
        ({"REDIS_HOST": "b"}, "redis://b:6379"),
        ({"REDIS_HOST": "b", "REDIS_PORT": "7", "REDIS_PASSWORD": "p/w"}, "redis://:p%2Fw@b:7"),
        ({"REDIS_PASSWORD": "x"}, None),
    ],
)
def test_redis(load: Load, environ: dict[str, str], url: str | None) -> None:
    loaded = load(None, environ)
    found = loaded.settings.redis.url
    assert (found and found.reveal()) == url
    assert "p%2Fw" not in repr(loaded)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
def test_an_outgoing_proxy_is_not_read(load: Load, name: str) -> None:
    warnings = load(None, {name: "http://user:hunter2@proxy:3128"}).warnings
    assert warnings == (f"{name} is set, but not read: upstreams are called directly",)


def test_sections_by_variable_lie_over_each_other(load: Load) -> None:
    environ = {
        "PROXY__CACHE__TTL": "{chat: 2h, completions: 2h}",
        "PROXY__CACHE__TTL__CHAT": "1h",
        "PROXY__CACHE": "[]",
    }
    (problem,) = problems(load, None, environ)
    assert problem == "environment: cache (PROXY__CACHE): expected a table of settings, found a list"
    ttl = load(None, {name: value for name, value in environ.items() if name != "PROXY__CACHE"}).settings.cache.ttl
    assert (ttl.chat, ttl.completions) == (3600.0, 7200.0)
