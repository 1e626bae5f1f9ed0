"""Which headers pass, in both directions (contract 6). Two deny-lists: what is not named passes."""

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
"""RFC 9110 section 7.6.1; with those that `Connection` names."""

_NEVER_UP: Final = HOP_BY_HOP | {
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
_NEVER_UP_PREFIXES: Final = (b"x-forwarded-", b"sec-", b"x-proxy-", b"proxy-")
_OF_THE_KEY: Final = frozenset({b"openai-organization", b"openai-project"})

_ENCODING: Final = frozenset({b"content-encoding"})
_NEVER_DOWN: Final = HOP_BY_HOP | {
    b"set-cookie",
    b"set-cookie2",
    b"alt-svc",
    b"strict-transport-security",
    b"content-length",
}
_NEVER_DOWN_PREFIXES: Final = (b"access-control-", b"x-proxy-", b"proxy-")

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


_NOTHING: Final[frozenset[bytes]] = frozenset()


@lru_cache(1024)
def _named_by(value: bytes) -> frozenset[bytes]:
    """The header names in a `Connection` value, but for the two that only say how the connection goes on."""
    return frozenset(token.strip().lower() for token in value.split(b",")) - {b"", b"close", b"keep-alive"}


class _Known(dict[bytes, tuple[str, bytes, int]]):
    """Header names as they were spelled -> (as text, in lower case, what becomes of them); each is judged once."""

    def __init__(self, never: frozenset[bytes], prefixes: tuple[bytes, ...]) -> None:
        super().__init__()
        self._never = never
        self._prefixes = prefixes

    def __missing__(self, name: bytes) -> tuple[str, bytes, int]:
        lower = name.lower()
        verdict = _PASSES
        if lower == b"connection":
            verdict = _NAMES_OTHERS
        elif lower in self._never or lower.startswith(self._prefixes):
            verdict = _STAYS
        judged = name.decode("latin-1"), lower, verdict
        if len(self) < 4096 and len(name) <= 64:  # bounded, whatever clients invent
            self[name] = judged
        return judged


_STAYS: Final = 0
_PASSES: Final = 1
_NAMES_OTHERS: Final = 2
_UP: Final = _Known(_NEVER_UP, _NEVER_UP_PREFIXES)
_DOWN: Final = _Known(_NEVER_DOWN, _NEVER_DOWN_PREFIXES)


@lru_cache(1024)
def _is_stored(name: bytes) -> bool:
    lower = name.lower()
    return lower not in _NOT_STORED and not lower.startswith(_NOT_STORED_PREFIXES)


@lru_cache(1024)
def is_request_option(name: bytes) -> bool:
    """Whether a client's header of this name may change what the proxy does."""
    lower = name.lower()
    return lower.startswith(b"x-proxy-") or lower in (b"cache-control", b"openai-beta")


def upstream_headers(
    raw: Sequence[Raw], *, pooled: bool, dropped: frozenset[bytes] = _NOTHING
) -> list[tuple[str, str]]:
    """The client's headers that go up, less those `dropped` (lower case).

    pooled: organisation and project are the pool key's, so the client's stay here.
    """
    if pooled:
        dropped |= _OF_THE_KEY
    out = []
    named = _NOTHING
    for name, value in raw:
        text, lower, verdict = _UP[name]
        if verdict == _PASSES:
            if lower not in dropped:
                out.append((text, value.decode("utf-8", "surrogateescape")))
        elif verdict == _NAMES_OTHERS:
            named |= _named_by(value)
    return [pair for pair in out if pair[0].lower().encode("latin-1") not in named] if named else out


def downstream_headers(raw: Sequence[Raw], *, pooled: bool, decoded: bool) -> list[Raw]:
    """The upstream's headers that go down. decoded: the body was decompressed, `Content-Encoding` no longer holds."""
    dropped = (_OF_THE_KEY if pooled else _NOTHING) | (_ENCODING if decoded else _NOTHING)
    out = []
    named = _NOTHING
    for pair in raw:
        _, lower, verdict = _DOWN[pair[0]]
        if verdict == _PASSES:
            if lower not in dropped:
                out.append(pair)
        elif verdict == _NAMES_OTHERS:
            named |= _named_by(pair[1])
    return [pair for pair in out if pair[0].lower() not in named] if named else out


def storable_headers(headers: Iterable[Raw]) -> tuple[Raw, ...]:
    """What of `downstream_headers` is true of the answer rather than of one request: kept with a stored entry."""
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
    "X-Request-Id",
    "Retry-After",
)
"""What a browser origin that may call gets to read (contract 7, Browsers)."""
