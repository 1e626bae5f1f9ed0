"""Both deny-lists, in any case and with any `Connection` header; masking of keys."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.headers import Raw, downstream_headers, is_request_option, storable_headers, upstream_headers
from proxy.protocol.masking import SecretMasker

HOP_BY_HOP = ["Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "TE"]
HOP_BY_HOP += ["Trailer", "Transfer-Encoding", "Upgrade"]

NEVER_UP = [*HOP_BY_HOP, "Authorization", "api-key", "Cookie", "Forwarded", "X-Forwarded-For", "X-Forwarded-Host"]
NEVER_UP += ["X-Forwarded-Proto", "X-Forwarded-Anything", "X-Real-IP", "Via", "Origin", "Referer", "Sec-Fetch-Site"]
NEVER_UP += ["Sec-Fetch-Mode", "Sec-CH-UA", "Sec-WebSocket-Key", "X-Proxy-Cache-TTL", "X-Proxy-Tag", "X-Proxy-Unknown"]
NEVER_UP += ["Cache-Control", "Host", "Content-Length"]

NEVER_DOWN = [*HOP_BY_HOP, "Set-Cookie", "Access-Control-Allow-Origin", "Access-Control-Expose-Headers"]
NEVER_DOWN += ["Access-Control-Anything", "Alt-Svc", "Strict-Transport-Security", "X-Proxy-Cost-USD", "X-Proxy-Cache"]
NEVER_DOWN += ["Content-Length", "Location", "Content-Location", "Operation-Location", "Azure-AsyncOperation"]

NEVER_ON_A_HIT = [
    "x-request-id",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
]
NEVER_ON_A_HIT += ["openai-processing-ms", "Date", "Age", "Retry-After", "retry-after-ms", "x-should-retry"]
NEVER_ON_A_HIT += ["apim-request-id", "CF-Ray", "Server-Timing"]

ORGANISATION = ["OpenAI-Organization", "OpenAI-Project"]

KEPT_UP = ["Content-Type", "Accept", "User-Agent", "OpenAI-Beta", "Idempotency-Key", "X-Stainless-Lang", "X-Custom"]
KEPT_UP += ["traceparent", "Accept-Language", "X-Client-Request-Id", "Content-Encoding", "x-ms-client-request-id"]
KEPT_DOWN = ["Content-Type", "x-request-id", "openai-processing-ms", "openai-version", "Date", "Server", "X-Custom"]
KEPT_DOWN += ["x-ratelimit-remaining-tokens", "Retry-After", "retry-after-ms", "x-should-retry", "WWW-Authenticate"]
KEPT_DOWN += ["Content-Disposition", "ETag", "Vary", "CF-Ray", "x-ms-region", "Content-Encoding"]


def spelled(name: str, seed: int) -> bytes:
    """`name` in some mixture of upper and lower case."""
    pick = random.Random(seed)
    return "".join(pick.choice((c.lower(), c.upper())) for c in name).encode()


def raw(names: list[str], seed: int = 0) -> list[Raw]:
    return [(spelled(name, seed + number), b"v") for number, name in enumerate(names)]


def lower(headers: list[tuple[str, str]] | list[Raw]) -> list[str]:
    return [(name.decode() if isinstance(name, bytes) else name).lower() for name, _ in headers]


# --- up ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pooled", [True, False])
def test_headers_not_sent_upstream(seed: int, pooled: bool) -> None:
    assert upstream_headers(raw(NEVER_UP, seed), pooled=pooled) == []


def test_headers_sent_upstream_unchanged() -> None:
    headers = [(spelled(name, number), f"value {number}".encode()) for number, name in enumerate(KEPT_UP)]
    assert upstream_headers(headers, pooled=True) == [(name.decode(), value.decode()) for name, value in headers]


def test_organisation_and_project_belong_to_the_pools_key() -> None:
    for seed in range(5):
        headers = raw(ORGANISATION, seed)
        assert upstream_headers(headers, pooled=True) == []
        assert lower(upstream_headers(headers, pooled=False)) == ["openai-organization", "openai-project"]


@pytest.mark.parametrize(
    "connection",
    [
        [b"X-Hop"],
        [b"close, X-Hop"],
        [b"x-hop,keep-alive"],
        [b" , X-HOP ,, close"],
        [b"close", b"x-hop"],
        [b"keep-alive", b"Upgrade,\tX-Hop"],
    ],
)
def test_headers_that_connection_names_are_dropped(connection: list[bytes]) -> None:
    headers: list[Raw] = [(b"Connection", value) for value in connection]
    headers += [(b"X-Hop", b"1"), (b"x-hop", b"2"), (b"X-Hope", b"3"), (b"X-Other", b"4")]
    assert upstream_headers(headers, pooled=True) == [("X-Hope", "3"), ("X-Other", "4")]
    assert downstream_headers(headers, pooled=True, decoded=False) == [(b"X-Hope", b"3"), (b"X-Other", b"4")]


def test_only_connection_names_headers() -> None:
    headers: list[Raw] = [(b"User-Agent", b"x-hop"), (b"Connectio1", b"x-hop"), (b"X-Hop", b"1")]
    assert downstream_headers([*headers, (b"Connection", b"close")], pooled=True, decoded=True) == headers


def test_the_order_of_the_headers_does_not_matter_to_connection() -> None:
    headers: list[Raw] = [(b"X-Hop", b"1"), (b"Connection", b"x-hop")]
    assert upstream_headers(headers, pooled=True) == []


def test_values_keep_their_bytes() -> None:
    value = "naïve ключ".encode()
    assert upstream_headers([(b"X-Note", value)], pooled=True)[0][1].encode() == value
    odd = b"\xff\xfe"
    assert upstream_headers([(b"X-Note", odd)], pooled=True)[0][1].encode("utf-8", "surrogateescape") == odd


# --- down -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("decoded", [True, False])
def test_headers_not_sent_to_the_client(seed: int, pooled: bool, decoded: bool) -> None:
    assert downstream_headers(raw(NEVER_DOWN, seed), pooled=pooled, decoded=decoded) == []


def test_headers_sent_to_the_client_unchanged() -> None:
    headers = raw(KEPT_DOWN)
    assert downstream_headers(headers, pooled=True, decoded=False) == headers


def test_repeated_headers_stay_repeated_and_in_order() -> None:
    headers: list[Raw] = [(b"Vary", b"a"), (b"X-A", b"1"), (b"vary", b"b")]
    assert downstream_headers(headers, pooled=True, decoded=True) == headers
    assert upstream_headers(headers, pooled=True) == [("Vary", "a"), ("X-A", "1"), ("vary", "b")]


def test_organisation_and_project_of_a_pool_key_are_dropped() -> None:
    headers = raw(ORGANISATION)
    assert downstream_headers(headers, pooled=True, decoded=False) == []
    assert downstream_headers(headers, pooled=False, decoded=False) == headers


def test_content_encoding_of_a_decoded_body_is_dropped() -> None:
    for seed in range(5):
        headers = raw(["Content-Encoding", "Content-Type"], seed)
        assert downstream_headers(headers, pooled=True, decoded=False) == headers
        assert lower(downstream_headers(headers, pooled=True, decoded=True)) == ["content-type"]


NAMES = st.text(
    st.sampled_from("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_0123456789"), min_size=1, max_size=20
)


@given(st.lists(st.tuples(NAMES, st.binary(max_size=20)), max_size=8), st.booleans(), st.booleans())
def test_unknown_headers_are_forwarded(headers: list[tuple[str, bytes]], pooled: bool, decoded: bool) -> None:
    """Two deny-lists: an unknown header of tomorrow passes both, with its value, in its place."""
    prefixes = ("x-forwarded-", "sec-", "x-proxy-", "access-control-", "proxy-")
    named = {name.lower() for name in [*NEVER_UP, *NEVER_DOWN, *ORGANISATION]} | {"content-encoding"}
    named |= {"x-api-key", "expect", "pragma", "set-cookie2", "http2-settings"}  # more than is documented
    unknown: list[Raw] = [
        (name.encode(), value)
        for name, value in headers
        if name.lower() not in named and not name.lower().startswith(prefixes)
    ]
    assert downstream_headers(unknown, pooled=pooled, decoded=decoded) == unknown
    up = upstream_headers(unknown, pooled=pooled)
    assert [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in up] == unknown


# --- kept with an entry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_headers_not_stored(seed: int) -> None:
    assert storable_headers(raw(NEVER_ON_A_HIT, seed)) == ()


def test_headers_stored() -> None:
    headers = raw(["Content-Type", "openai-version", "x-ms-region", "X-Custom"])
    assert storable_headers(headers) == tuple(headers)


# --- what closes the fast lane --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Cache-Control", "OpenAI-Beta", "X-Proxy-Sample", "X-Proxy-Cache-TTL", "X-Proxy-New"])
def test_headers_that_are_request_options(name: str) -> None:
    for seed in range(5):
        assert is_request_option(spelled(name, seed))


@pytest.mark.parametrize(
    "name", ["Accept", "Authorization", "User-Agent", "X-Stainless-Retry-Count", "X-Prox", "Pragma"]
)
def test_headers_that_are_no_request_options(name: str) -> None:
    assert not is_request_option(name.encode())


# --- masks ------------------------------------------------------------------------------------------------------------

KEY = "sk-proj-0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"Incorrect API key provided: {KEY}.", "Incorrect API key provided: ***."),
        (KEY, "***"),
        (f"{KEY}{KEY} and {KEY}", "****** and ***"),
        (f'{{"error": {{"message": "{KEY}"}}}}', '{"error": {"message": "***"}}'),
        ("sk-proj-0123456789abcde", "sk-proj-0123456789abcde"),
        ("", ""),
    ],
)
def test_a_full_key_is_masked(text: str, masked: str) -> None:
    masker = SecretMasker([KEY])
    assert masker.mask(text.encode()) == masked.encode()
    assert masker.mask_text(text) == masked
    assert masker.found_in(text.encode()) is (text != masked)


def test_a_key_that_begins_with_another_is_masked_whole() -> None:
    for secrets in (["sk-abc", "sk-abcdef"], ["sk-abcdef", "sk-abc"], ["bcde", "sk-abcdef", "sk-abc"]):
        assert SecretMasker(secrets).mask(b"x sk-abcdef y sk-abc z") == b"x *** y *** z"


SECRETS = st.lists(st.text(st.sampled_from("abc1"), min_size=4, max_size=10), max_size=5)


@given(SECRETS, st.lists(st.integers(0, 4) | st.text(st.sampled_from("abc1 "), max_size=4), max_size=12))
def test_no_key_is_left(secrets: list[str], story: list[int | str]) -> None:
    masker = SecretMasker(secrets)
    parts = [part if isinstance(part, str) else (secrets[part] if part < len(secrets) else "-") for part in story]
    masked = masker.mask(" ".join(parts).encode())
    assert not masker.found_in(masked)
    if not masker.found_in(" ".join(parts).encode()):
        assert masked == " ".join(parts).encode()


def test_without_keys_nothing_is_masked() -> None:
    assert SecretMasker([]).mask(b"anything") == b"anything"
    assert not SecretMasker([]).found_in(b"")
    assert SecretMasker([""]).mask(b"abc") == b"abc"
    assert not SecretMasker(["", "abc"]).found_in(b"abc")  # too short to be a key: it would blot out words
