"""Access: Host, Origin, client keys, the admin key (docs/security.md)."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp.web import BaseRequest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.config.secret import Secret
from proxy.config.settings import (
    CacheSettings,
    ClientKeySettings,
    KeySettings,
    ServerSettings,
    Settings,
    UpstreamSettings,
)
from proxy.protocol.errors import ProxyError
from proxy.protocol.request import Client
from proxy.server.access import ANONYMOUS, AccessControl, is_loopback

Headers = Mapping[str, str] | list[tuple[str, str]]
POOLED = (UpstreamSettings(keys=(KeySettings("openai-1", Secret("sk-pool")),)),)


def ask(headers: Headers = (), peer: object = ("127.0.0.1", 50000)) -> BaseRequest:  # type: ignore[assignment]
    """The parts of a request that access control uses. peer: the transport's `peername`."""
    transport = SimpleNamespace(get_extra_info=lambda name: peer if name == "peername" else None)
    return cast(BaseRequest, SimpleNamespace(headers=CIMultiDict(headers), transport=transport))


def keeper(*, pooled: bool = True, cache: CacheSettings | None = None, **server: Any) -> AccessControl:
    settings = Settings(server=ServerSettings(**server), cache=cache or CacheSettings())
    return AccessControl(Settings(settings.server, POOLED, cache=settings.cache) if pooled else settings)


def client_key(name: str, key: str, namespace: str | None = None) -> ClientKeySettings:
    return ClientKeySettings(name, hashlib.sha256(key.encode()).digest(), namespace)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def basic(password: str, user: str = "prometheus") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


# --- Host -------------------------------------------------------------------------------------------------------------


def host_accepted(gate: AccessControl, *hosts: str) -> bool:
    try:
        gate.check_host(ask([("Host", host) for host in hosts]))
    except ProxyError as refusal:
        found = (refusal.code, refusal.status)
        message = refusal.message
    else:
        return True
    assert found == ("host_not_allowed", 421)
    assert "server.allowed_hosts" in message
    return False


OURS = [
    "localhost",
    "127.0.0.1",
    "[::1]",
    "localhost:8484",
    "127.0.0.1:8484",
    "[::1]:8484",
    "LOCALHOST",
    "LocalHost:80",
]
OURS += ["localhost:1", "127.0.0.1:65535"]

FOREIGN = ["evil.example", "evil.example:8484", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost"]
FOREIGN += [
    "",
    " ",
    ":",
    ":8484",
    "localhost:",
    "localhost.",
    "localhost.:8484",
    "127.0.0.1.",
    "127.1",
    "0",
    "127.0.0.2",
]
FOREIGN += ["127.0.0.1@evil.example", "evil.example@127.0.0.1", "127.0.0.1:80@evil.example", "user:8484@localhost"]
FOREIGN += [
    "127.0.0.1:evil.example",
    "localhost:80:80",
    "localhost:-1",
    "localhost:+80",
    "localhost:٨٠",
    "localhost:80 ",
]
FOREIGN += ["::1", "[::1", "::1]", "[::1]x", "[::1].evil.example", "[::2]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:0:0:1]"]
FOREIGN += ["0x7f000001", "2130706433", "127.0.0.1#", "127.0.0.1/x", "127.0.0.1?", "127.0.0.1,evil.example", "*", "l*"]
FOREIGN += [
    "localhost\x00",
    "localhost\udcff",
    "ⓛocalhost",
    "localhost%00",
    "http://localhost",
    "0.0.0.0",
    "host.docker",
]


@pytest.mark.parametrize("host", OURS)
def test_the_proxys_own_hosts_are_accepted_in_any_spelling(host: str) -> None:
    gate = keeper()
    assert host_accepted(gate, host)
    assert host_accepted(gate, host)


@pytest.mark.parametrize("host", FOREIGN)
def test_any_other_host_is_421(host: str) -> None:
    gate = keeper()
    assert host_accepted(gate, "localhost")
    assert not host_accepted(gate, host)
    assert not host_accepted(gate, host)


def test_requests_need_exactly_one_host() -> None:
    assert not host_accepted(keeper())
    assert not host_accepted(keeper(), "localhost", "localhost")
    assert not host_accepted(keeper(), "localhost", "evil.example")


def test_allowed_hosts_are_accepted() -> None:
    gate = keeper(allowed_hosts=("Proxy.Example.com", "*.svc.local", "10.0.0.5"))
    for host in ("proxy.example.com", "PROXY.example.com:443", "a.svc.local", "a.b.SVC.local:80", "10.0.0.5:8484"):
        assert host_accepted(gate, host), host
    for host in ("example.com", "x.proxy.example.com", "svc.local", ".evil", "a.svc.local.evil", "10.0.0.50"):
        assert not host_accepted(gate, host), host


@pytest.mark.parametrize(
    ("address", "host"), [("192.168.1.5", "192.168.1.5:8484"), ("::1", "[::1]"), ("fd00::1", "[fd00::1]")]
)
def test_the_listening_address_is_accepted_as_host(address: str, host: str) -> None:
    assert host_accepted(keeper(host=address), host)


def test_remembered_hosts_are_bounded() -> None:
    gate = keeper(allowed_hosts=("*.example",))
    assert all(host_accepted(gate, f"h{number}.example:{number}") for number in range(3000))
    assert len(gate._accepted_hosts) <= 1024


@given(st.text(st.sampled_from("localhst127.0:[]@1 /#?,Z\u0660"), max_size=24))
def test_any_accepted_host_is_an_own_name_with_at_most_a_port(host: str) -> None:
    if host_accepted(keeper(), host):
        name, colon, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
        bare = name if colon else host
        assert bare.lower() in {"localhost", "127.0.0.1", "[::1]"}
        assert not colon or (port.isascii() and port.isdigit())


# --- Origin and Sec-Fetch-Site ----------------------------------------------------------------------------------------

APP = "https://app.example.com"


def origin_of(gate: AccessControl, **headers: str) -> str | None:
    return gate.check_origin(ask([(name.replace("_", "-"), value) for name, value in headers.items()]))


def test_requests_without_a_foreign_origin_are_accepted() -> None:
    assert origin_of(keeper()) is None
    assert origin_of(keeper(), Sec_Fetch_Mode="cors") is None  # what node's fetch sends
    for site in ("none", "same-origin", "None", "SAME-ORIGIN"):
        assert origin_of(keeper(), Sec_Fetch_Site=site) is None


BAD_ORIGINS = [
    "https://evil.example",
    "null",
    "",
    "http://localhost:3000",
    "file://",
    "chrome-extension://x",
    "http://",
]
BAD_ORIGINS += [
    "http://app.example.com",
    "https://app.example.com.evil",
    "https://app.example.com:444",
    "*",
    "https://x\udcff",
]
BAD_ORIGINS += ["https://app.example.com@evil", "https://evil/https://app.example.com", "app.example.com"]


@pytest.mark.parametrize("origin", BAD_ORIGINS)
@pytest.mark.parametrize("site", [None, "none", "same-origin", "cross-site"])
def test_a_foreign_origin_is_403(origin: str, site: str | None) -> None:
    headers = {"Origin": origin} | ({"Sec_Fetch_Site": site} if site else {})
    for gate in (keeper(), keeper(allowed_origins=(APP,))):
        with pytest.raises(ProxyError) as caught:
            origin_of(gate, **headers)
        assert (caught.value.code, caught.value.status) == ("origin_not_allowed", 403)
        assert caught.value.body()


@pytest.mark.parametrize("site", ["cross-site", "Cross-Site", "same-site", "", "unheard-of"])
def test_a_cross_site_request_without_an_origin_is_403(site: str) -> None:
    for gate in (keeper(), keeper(allowed_origins=(APP,))):
        with pytest.raises(ProxyError) as caught:
            origin_of(gate, Sec_Fetch_Site=site)
        assert caught.value.code == "origin_not_allowed"


@pytest.mark.parametrize("configured", [APP, APP + "/", "HTTPS://App.Example.com"])
def test_an_allowed_origin_is_returned_as_sent(configured: str) -> None:
    gate = keeper(allowed_origins=("http://localhost:3000", configured))
    assert origin_of(gate, Origin=APP, Sec_Fetch_Site="cross-site") == APP
    assert origin_of(gate, Origin="http://localhost:3000", Sec_Fetch_Site="same-site") == "http://localhost:3000"


GLOBS: dict[str, tuple[list[str], list[str]]] = {
    "vscode-webview://*": (
        ["vscode-webview://0f2k1ab9", "vscode-webview://1a2b3c:80", "VSCODE-WEBVIEW://x"],
        ["vscode-webviews://x", "https://x", "vscode-webview-evil://x", "vscode-webview://x/y", "null"],
    ),
    "vscode-file://*": (["vscode-file://vscode-app"], ["vscode-webview://vscode-app"]),
    "http://localhost:*": (
        ["http://localhost:3000", "http://localhost:5173"],
        ["http://localhost", "https://localhost:3000", "http://localhost:3000@evil", "http://localhost.evil:1"],
    ),
    "https://*.example.com": (
        ["https://app.example.com", "https://a.b.example.com"],
        ["https://example.com", "https://evil.com/.example.com", "https://x.example.com.evil", "http://a.example.com"],
    ),
    "https://*.example.com:8443": (
        ["https://app.example.com:8443"],
        ["https://b.example.com", "https://x:1.example.com:8443"],
    ),
    "null": (["null"], ["", "nul", "https://null"]),
}


@pytest.mark.parametrize("glob", GLOBS)
def test_globs_of_origins_and_null(glob: str) -> None:
    gate = keeper(allowed_origins=(APP, glob))
    allowed, refused = GLOBS[glob]
    for origin in (*allowed, APP):
        assert origin_of(gate, Origin=origin, Sec_Fetch_Site="cross-site") == origin
    for origin in refused:
        with pytest.raises(ProxyError):
            origin_of(gate, Origin=origin)


def test_two_origins_are_none() -> None:
    gate = keeper(allowed_origins=(APP,))
    with pytest.raises(ProxyError):
        gate.check_origin(ask([("Origin", APP), ("Origin", "https://evil.example")]))


# --- clients ----------------------------------------------------------------------------------------------------------

GUARDED: dict[str, Any] = {
    "client_keys": (client_key("anna", "pk-anna"), client_key("ben", "pk-ben"), client_key("cy", "ключ"))
}


@pytest.mark.parametrize(
    "headers",
    [
        bearer("pk-anna"),
        {"authorization": "bearer pk-anna"},
        {"AUTHORIZATION": "BEARER   pk-anna "},
        {"api-key": "pk-anna"},
        {"Api-Key": " pk-anna"},
        {"Authorization": "Basic x", "api-key": "pk-anna"},
    ],
)
def test_a_client_key_as_bearer_or_api_key(headers: dict[str, str]) -> None:
    assert keeper(**GUARDED).client(ask(headers)).name == "anna"
    assert keeper(pooled=False, **GUARDED).client(ask(headers)).name == "anna"


def test_each_client_key_is_its_own_client() -> None:
    gate = keeper(**GUARDED)
    clients = [gate.client(ask(bearer(key))) for key in ("pk-anna", "pk-ben", "ключ")]
    assert [client.name for client in clients] == ["anna", "ben", "cy"]
    assert len({client.cache_partition for client in clients}) == 3
    assert all(client.auth is None for client in clients)  # it stays here


NO_GOOD_KEY: list[Headers] = [
    {},
    bearer("pk-wrong"),
    bearer(""),
    bearer("pk-ann"),
    bearer("pk-annaa"),
    bearer("PK-ANNA"),
    bearer("sk-pool"),
    bearer("\udcff\udcfe"),
    {"Authorization": "pk-anna"},
    {"Authorization": "Token pk-anna"},
    basic("pk-anna"),
    {"api-key": ""},
    {"api-key": "pk-wrong"},
    {"x-api-key": "pk-anna"},
    [("Authorization", "Bearer pk-anna"), ("Authorization", "Bearer pk-wrong")],
    [("Authorization", "Bearer pk-anna"), ("Authorization", "Bearer pk-anna")],
    [("api-key", "pk-anna"), ("api-key", "pk-wrong")],
    {"Authorization": "Bearer pk-wrong", "api-key": "pk-anna"},
]


@pytest.mark.parametrize("pooled", [True, False])
def test_every_missing_or_wrong_client_key_gets_the_same_401(pooled: bool) -> None:
    bodies = set()
    for headers in NO_GOOD_KEY:
        with pytest.raises(ProxyError) as caught:
            keeper(pooled=pooled, **GUARDED).client(ask(headers))
        assert (caught.value.code, caught.value.status, caught.value.should_retry) == ("invalid_client_key", 401, False)
        assert ("WWW-Authenticate", "Bearer") in caught.value.headers
        bodies.add(caught.value.body())
    assert len(bodies) == 1


def test_without_client_keys_every_client_is_anonymous() -> None:
    gate = keeper()
    for headers in ({}, bearer("anything"), {"api-key": "x"}):
        assert gate.client(ask(headers)) is ANONYMOUS
    assert Client() == ANONYMOUS


def test_clients_have_separate_caches_unless_shared() -> None:
    keys = (
        client_key("a", "ka"),
        client_key("b", "kb", "team"),
        client_key("c", "kc", "team"),
        client_key("team", "kt"),
    )

    def scopes(gate: AccessControl) -> list[str]:
        return [gate.client(ask(bearer(key))).cache_partition for key in ("ka", "kb", "kc", "kt")]

    a, b, c, team = scopes(keeper(client_keys=keys))
    assert b == c
    assert len({a, b, team}) == 3  # a client named like a namespace is not in it
    assert len(set(scopes(keeper(client_keys=keys, cache=CacheSettings(shared=True))))) == 1


# --- pass-through -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "auth"),
    [
        ({}, None),
        (bearer("sk-mine"), ("bearer", "sk-mine")),
        ({"api-key": "0123"}, ("api-key", "0123")),
        ({"api-key": "  "}, None),
        (basic("x"), None),
        ([("Authorization", "Bearer a"), ("Authorization", "Bearer b")], None),
    ],
)
def test_in_pass_through_the_clients_credential_is_kept(headers: Headers, auth: tuple[str, str] | None) -> None:
    client = keeper(pooled=False).client(ask(headers))
    assert (client.name, client.auth) == ("", auth)
    assert "sk-mine" not in client.cache_partition + repr(client)


def test_in_pass_through_each_credential_has_its_own_cache() -> None:
    gate = keeper(pooled=False)
    asked: list[Headers] = [
        {},
        bearer("a"),
        bearer("b"),
        {"api-key": "a"},
        {**bearer("a"), "OpenAI-Organization": "o"},
        {**bearer("a"), "OpenAI-Project": "o"},
    ]
    scopes = [gate.client(ask(headers)).cache_partition for headers in asked]
    assert len(set(scopes)) == len(asked)
    assert scopes == [gate.client(ask(headers)).cache_partition for headers in asked]
    assert all(scopes)


@pytest.mark.parametrize("headers", [bearer("\udcff"), {"api-key": "\udcff"}, {"OpenAI-Organization": "\udcff"}])
def test_a_credential_that_is_not_utf_8_is_401(headers: Headers) -> None:
    """aiohttp decodes header bytes that are not UTF-8 to lone surrogates, which cannot be sent upstream unchanged."""
    with pytest.raises(ProxyError) as caught:
        keeper(pooled=False).client(ask(headers))
    assert (caught.value.code, caught.value.status) == ("invalid_client_key", 401)


# --- operators --------------------------------------------------------------------------------------------------------


def admin_refusal(gate: AccessControl, request: BaseRequest) -> ProxyError:
    assert not gate.is_admin(request)
    with pytest.raises(ProxyError) as caught:
        gate.check_admin(request)
    assert (caught.value.code, caught.value.status) == ("invalid_client_key", 401)
    return caught.value


SECRET = "admin:se:cret"


@pytest.mark.parametrize(
    "headers",
    [
        bearer(SECRET),
        {"authorization": f"BEARER {SECRET} "},
        basic(SECRET),
        basic(SECRET, user=""),
        basic(SECRET, user="anybody at all"),
    ],
)
@pytest.mark.parametrize("peer", [("127.0.0.1", 1), ("203.0.113.9", 1)])
def test_the_admin_key_is_accepted_as_bearer_or_password(headers: dict[str, str], peer: object) -> None:
    gate = keeper(admin_key=Secret(SECRET))
    assert gate.is_admin(ask(headers, peer))
    gate.check_admin(ask(headers, peer))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("nope"),
        bearer(""),
        bearer(SECRET[:-1]),
        basic("nope"),
        basic("", user=SECRET),
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic"},
        {"Authorization": "Basic \udcff"},
        {"Authorization": "Basic " + base64.b64encode(SECRET.encode()).decode()},
        {"Authorization": f"Digest {SECRET}"},
        {"Authorization": SECRET},
        {"api-key": SECRET},
        bearer("\udcff"),
    ],
)
def test_with_an_admin_key_a_local_client_needs_it_too(headers: dict[str, str]) -> None:
    refusal = admin_refusal(keeper(admin_key=Secret(SECRET)), ask(headers))
    assert "server.admin_key" in refusal.message
    assert SECRET.encode() not in refusal.body()
    assert any(name == "WWW-Authenticate" and "Basic" in value for name, value in refusal.headers)


LOCAL = [("127.0.0.1", 1), ("127.8.9.10", 1), ("::1", 1, 0, 0), ("::ffff:127.0.0.1", 1, 0, 0), ("::1%lo", 1, 0, 1)]
UNIX = ["", "/tmp/client.sock", b"\x00abstract"]
REMOTE = [
    ("192.168.1.9", 1),
    ("10.0.0.1", 1),
    ("203.0.113.9", 1),
    ("::ffff:203.0.113.9", 1, 0, 0),
    ("fe80::1%eth0", 1, 0, 2),
]
REMOTE += [("0.0.0.0", 1), ("::", 1, 0, 0), ("localhost", 1), ("", 1)]


@pytest.mark.parametrize("peer", [*LOCAL, *UNIX])
def test_without_an_admin_key_local_clients_are_admitted(peer: object) -> None:
    assert is_loopback(ask(peer=peer))
    keeper().check_admin(ask(peer=peer))


@pytest.mark.parametrize("peer", [*REMOTE, None])
def test_without_an_admin_key_remote_clients_are_refused(peer: object) -> None:
    """None: the TCP client had disconnected."""
    assert not is_loopback(ask(peer=peer))
    headers = {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1", **bearer("x")}
    assert "this machine" in admin_refusal(keeper(), ask(headers, peer)).message


def test_a_closed_connection_is_not_local() -> None:
    assert not is_loopback(cast(BaseRequest, SimpleNamespace(transport=None)))
