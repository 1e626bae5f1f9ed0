"""Which headers pass, in both directions (contract 6). Two deny-lists: what is not named passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def _named_by_connection(raw: Sequence[Raw]) -> frozenset[bytes]:
    return frozenset(
        token.strip().lower()
        for name, value in raw
        if name.lower() == b"connection"
        for token in value.split(b",")
        if token.strip()
    )


def upstream_headers(raw: Sequence[Raw], *, pooled: bool) -> list[tuple[str, str]]:
    """The client's headers that go up. pooled: organisation and project belong to the pool's key, so the client's stay."""
    named = _named_by_connection(raw)
    out = []
    for name, value in raw:
        lower = name.lower()
        if lower in _NEVER_UP or lower.startswith(_NEVER_UP_PREFIXES) or lower in named:
            continue
        if pooled and lower in _OF_THE_KEY:
            continue
        out.append((name.decode("latin-1"), value.decode("utf-8", "surrogateescape")))
    return out


def downstream_headers(raw: Sequence[Raw], *, pooled: bool, decoded: bool) -> list[Raw]:
    """The upstream's headers that go down. decoded: the body was decompressed, so its `Content-Encoding` no longer holds."""
    named = _named_by_connection(raw)
    return [
        (name, value)
        for name, value in raw
        if not (
            (lower := name.lower()) in _NEVER_DOWN
            or lower.startswith(_NEVER_DOWN_PREFIXES)
            or lower in named
            or (pooled and lower in _OF_THE_KEY)
            or (decoded and lower == b"content-encoding")
        )
    ]


def storable_headers(headers: Iterable[Raw]) -> tuple[Raw, ...]:
    """What of `downstream_headers` is true of the answer rather than of one request: kept with a stored entry."""
    return tuple(
        (name, value)
        for name, value in headers
        if (lower := name.lower()) not in _NOT_STORED and not lower.startswith(_NOT_STORED_PREFIXES)
    )


class Masker:
    """Takes full pool keys out of what an upstream says (contract 7, Secrets)."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = tuple(secret.encode() for secret in secrets if len(secret) >= 4)

    def found_in(self, data: bytes) -> bool:
        return any(secret in data for secret in self._secrets)

    def mask(self, data: bytes) -> bytes:
        for secret in self._secrets:
            if secret in data:
                data = data.replace(secret, b"***")
        return data
