"""Which headers are forwarded, by a deny-list for each direction (`docs/headers.md`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

Raw = tuple[bytes, bytes]

HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
"""RFC 9110 section 7.6.1. The headers that `Connection` names are hop-by-hop, too."""

LOCATIONS: Final = frozenset({b"location", b"content-location", b"operation-location", b"azure-asyncoperation"})
"""Headers that name a URL (RFC 9110 sections 8.7 and 10.2.2, and Azure's), which may be internal; see `locations`."""

_NOT_SENT_UPSTREAM: Final = HOP_BY_HOP | {
    b"authorization",
    b"api-key",
    b"x-api-key",
    b"host",
    b"content-length",
    b"expect",
    b"cookie",
    b"forwarded",
    b"x-real-ip",
    b"via",
    b"origin",
    b"referer",
    b"cache-control",
    b"pragma",
}
_NOT_SENT_UPSTREAM_PREFIXES: Final = (b"x-forwarded-", b"sec-", b"x-proxy-", b"proxy-")
_KEY_HEADERS: Final = frozenset({b"openai-organization", b"openai-project"})

_ENCODING: Final = frozenset({b"content-encoding"})
_NOT_SENT_DOWNSTREAM: Final = HOP_BY_HOP | {
    b"set-cookie",
    b"set-cookie2",
    b"alt-svc",
    b"strict-transport-security",
    b"content-length",
    *LOCATIONS,
}
_NOT_SENT_DOWNSTREAM_PREFIXES: Final = (b"access-control-", b"x-proxy-", b"proxy-")

_NOT_STORED: Final = frozenset(
    {
        b"x-request-id",
        b"openai-processing-ms",
        b"date",
        b"age",
        b"apim-request-id",
        b"x-ms-client-request-id",
        b"cf-ray",
        b"cf-cache-status",
        b"server-timing",
        b"retry-after",
        b"retry-after-ms",
        b"x-should-retry",
        b"content-encoding",
        b"report-to",
        b"nel",
        b"traceparent",
        b"tracestate",
    }
)
_NOT_STORED_PREFIXES: Final = (b"x-ratelimit-", b"x-envoy-")


_NO_NAMES: Final[frozenset[bytes]] = frozenset()


@lru_cache(1024)
def _connection_tokens(value: bytes) -> frozenset[bytes]:
    """Return the header names in a `Connection` value, without `close` and `keep-alive`."""
    return frozenset(token.strip().lower() for token in value.split(b",")) - {b"", b"close", b"keep-alive"}


class _HeaderRules(dict[bytes, tuple[str, bytes, int]]):
    """Header name as spelled -> (as text, in lower case, its rule). The rule of each name is looked up once."""

    def __init__(self, never: frozenset[bytes], prefixes: tuple[bytes, ...]) -> None:
        super().__init__()
        self._never = never
        self._prefixes = prefixes

    def __missing__(self, name: bytes) -> tuple[str, bytes, int]:
        lower = name.lower()
        rule = _FORWARDED
        if lower == b"connection":
            rule = _IS_CONNECTION
        elif lower in self._never or lower.startswith(self._prefixes):
            rule = _DROPPED
        entry = name.decode("latin-1"), lower, rule
        if len(self) < 4096 and len(name) <= 64:  # so that clients cannot fill the memory
            self[name] = entry
        return entry


_DROPPED: Final = 0
_FORWARDED: Final = 1
_IS_CONNECTION: Final = 2
_UP: Final = _HeaderRules(_NOT_SENT_UPSTREAM, _NOT_SENT_UPSTREAM_PREFIXES)
_DOWN: Final = _HeaderRules(_NOT_SENT_DOWNSTREAM, _NOT_SENT_DOWNSTREAM_PREFIXES)


@lru_cache(1024)
def _is_stored(name: bytes) -> bool:
    lower = name.lower()
    return lower not in _NOT_STORED and not lower.startswith(_NOT_STORED_PREFIXES)


@lru_cache(1024)
def is_request_option(name: bytes) -> bool:
    """Return whether a client's header of this name may change what the proxy does."""
    lower = name.lower()
    return lower.startswith(b"x-proxy-") or lower in (b"cache-control", b"openai-beta")


def upstream_headers(
    raw: Sequence[Raw], *, pooled: bool, dropped: frozenset[bytes] = _NO_NAMES
) -> list[tuple[str, str]]:
    """Return the client's headers that are sent upstream, without those in `dropped` (lower case).

    pooled: organisation and project are those of the pool's key, so the client's are dropped.
    """
    if pooled:
        dropped |= _KEY_HEADERS
    out = []
    named = _NO_NAMES
    for name, value in raw:
        text, lower, rule = _UP[name]
        if rule == _FORWARDED:
            if lower not in dropped:
                out.append((text, value.decode("utf-8", "surrogateescape")))
        elif rule == _IS_CONNECTION:
            named |= _connection_tokens(value)
    return [pair for pair in out if pair[0].lower().encode("latin-1") not in named] if named else out


def downstream_headers(raw: Sequence[Raw], *, pooled: bool, decoded: bool) -> list[Raw]:
    """Return the upstream's headers for the client. decoded: the body was decompressed, so `Content-Encoding` goes."""
    dropped = (_KEY_HEADERS if pooled else _NO_NAMES) | (_ENCODING if decoded else _NO_NAMES)
    out = []
    named = _NO_NAMES
    for pair in raw:
        _, lower, rule = _DOWN[pair[0]]
        if rule == _FORWARDED:
            if lower not in dropped:
                out.append(pair)
        elif rule == _IS_CONNECTION:
            named |= _connection_tokens(pair[1])
    return [pair for pair in out if pair[0].lower() not in named] if named else out


def storable_headers(headers: Iterable[Raw]) -> tuple[Raw, ...]:
    """Return those of `downstream_headers` that a stored response keeps: about the response, not about one request."""
    return tuple([pair for pair in headers if _is_stored(pair[0])])


EXPOSED: Final = (
    "X-Proxy-Request-Id",
    "X-Proxy-Cache",
    "X-Proxy-Cache-Reason",
    "X-Proxy-Cache-Key",
    "X-Proxy-Upstream",
    "X-Proxy-Key",
    "X-Proxy-Attempts",
    "X-Proxy-Client-Limit",
    "X-Proxy-Model",
    "X-Proxy-Cost-USD",
    "X-Proxy-Cost-Saved-USD",
    "X-Proxy-Cost-Status",
    "X-Proxy-Prompt-Tokens",
    "X-Proxy-Cached-Tokens",
    "X-Proxy-Completion-Tokens",
    "X-Proxy-Total-Tokens",
    "X-Proxy-Saved-Tokens",
    "X-Proxy-Run-Cost-USD",
    "X-Proxy-Run-Saved-USD",
    "X-Proxy-Error",
    "Cache-Status",
    "Age",
    "Server-Timing",
    "X-Request-Id",
    "openai-processing-ms",
    "openai-version",
    "Retry-After",
    "Retry-After-Ms",
    "X-Should-Retry",
    "Location",
    *(f"x-ratelimit-{kind}-{unit}" for kind in ("limit", "remaining", "reset") for unit in ("requests", "tokens")),
)
"""The headers that pages of an allowed origin may read (`docs/headers.md`): what SDKs and tools look at."""
