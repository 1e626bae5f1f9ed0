"""The headers that the proxy adds to responses: `X-Proxy-*`, `Cache-Status` (RFC 9211), `Server-Timing`."""

from __future__ import annotations

from typing import Final

import msgspec

from ..cache.embeddings import Savings
from ..cache.entry import Entry
from ..cost.pricing import Cost, usd
from ..cost.usage import Usage

CACHE_NAME: Final = "openai-proxy"
ZERO_COST: Final = "0.000000"

Pairs = tuple[tuple[str, str], ...]
"""Headers as (name, value)."""


class Timing(msgspec.Struct, frozen=True):
    """Milliseconds: waiting for a key; the upstream attempts; everything."""

    queue: float = 0.0
    upstream: float = 0.0
    total: float = 0.0

    def header(self) -> str:
        own = max(0.0, self.total - self.queue - self.upstream)
        return f"queue;dur={self.queue:.1f}, upstream;dur={self.upstream:.1f}, proxy;dur={own:.1f}"


def lines_of(headers: Pairs) -> str:
    """Return headers as text, one line each."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers])


def usage_headers(usage: Usage | None) -> Pairs:
    """Return the tokens of a response; nothing if they are unknown."""
    if usage is None:
        return ()
    return (
        ("X-Proxy-Prompt-Tokens", str(usage.prompt_tokens)),
        ("X-Proxy-Cached-Tokens", str(usage.cached_tokens)),
        ("X-Proxy-Completion-Tokens", str(usage.completion_tokens)),
        ("X-Proxy-Total-Tokens", str(usage.total_tokens)),
    )


def cost_headers(cost: Cost | None, usage: Usage | None, savings: Savings | None = None) -> Pairs:
    """Return cost and tokens of a response that came from upstream. No cost header if the cost is unknown.

    savings: of the part of it that was cached or shared.
    """
    headers: Pairs = (("X-Proxy-Cost-USD", usd(cost.usd)),) if cost is not None else ()
    headers += (("X-Proxy-Cost-Status", cost_status(cost, savings)),)
    if savings is not None and savings.cost is not None:
        headers += (("X-Proxy-Cost-Saved-USD", savings.cost),)
    if savings is not None and savings.usage is not None:
        headers += (("X-Proxy-Saved-Tokens", str(savings.usage.total_tokens)),)
    return headers + usage_headers(usage)


TRAILERS: Final = (
    "X-Proxy-Cost-USD, X-Proxy-Cost-Status, X-Proxy-Cost-Saved-USD, X-Proxy-Prompt-Tokens, X-Proxy-Cached-Tokens, "
    "X-Proxy-Completion-Tokens, X-Proxy-Total-Tokens"
)
"""What `cost_headers` may say of a stream, after its end."""


def cost_status(cost: Cost | None, savings: Savings | None = None) -> str:
    """Return exact, estimated or unknown. An exact cost is estimated if the savings rest on split token counts."""
    if cost is None:
        return "unknown"
    return "estimated" if savings is not None and savings.estimated else cost.status


def cache_status(fwd: str, detail: str, stored: bool, collapsed: bool = False) -> str:
    """Return `Cache-Status` of a response from upstream. collapsed: another request fetched it."""
    text = f"{CACHE_NAME}; fwd={fwd}"
    if collapsed:
        text += "; collapsed"
    if stored:
        text += "; stored"
    return f"{text}; detail={token(detail)}" if detail else text


def stale_headers(entry: Entry, wall: float, why: str, forwarded: bool) -> Pairs:
    """Return how a stale response says that it is one (RFC 9211 section 2).

    While it is revalidated it is a hit with a negative ttl; in place of a failure the request was forwarded.
    """
    status = f"{CACHE_NAME}; {'fwd=stale' if forwarded else 'hit'}; ttl={entry.remaining(wall)}; detail={token(why)}"
    return ("Age", str(entry.age(wall))), ("Cache-Status", status), ("X-Proxy-Cache-Reason", why)


def token(text: str) -> str:
    """Return a structured-field token if `text` is one, else a string of printable ASCII (RFC 8941 section 3.3)."""
    if text.isascii() and text[:1].isalpha() and all(c.isalnum() or c in "-_.:/" for c in text):
        return text
    shown = "".join(c if " " <= c <= "~" else "?" for c in text)
    return '"' + shown.replace("\\", "\\\\").replace('"', '\\"') + '"'


def cost_comment(cost: Cost | None, usage: Usage | None) -> bytes:
    """Return the SSE comment with a stream's cost: one line and one newline, so that no SDK takes it for an event."""
    parts = [f"x-proxy-cost-usd={usd(cost.usd)}" if cost is not None else "x-proxy-cost-status=unknown"]
    if cost is not None and cost.status != "exact":
        parts.append(f"x-proxy-cost-status={cost.status}")
    if usage is not None:
        parts.append(f"x-proxy-prompt-tokens={usage.prompt_tokens}")
        parts.append(f"x-proxy-completion-tokens={usage.completion_tokens}")
    return f": {' '.join(parts)}\n".encode()
