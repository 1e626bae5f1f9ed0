"""The headers the proxy adds (contract 6), as ready bytes: `X-Proxy-*`, `Cache-Status` (RFC 9211), `Server-Timing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from ..cache.embeddings import Savings
from ..cache.entry import Entry
from ..cost.pricing import Cost, usd
from ..cost.usage import Usage

CACHE_NAME: Final = "openai-proxy"
ZERO_COST: Final = "0.000000"


class Timing(msgspec.Struct, frozen=True):
    """Milliseconds: waiting for a key; the upstream calls; everything."""

    queue: float = 0.0
    upstream: float = 0.0
    total: float = 0.0

    def header(self) -> str:
        own = max(0.0, self.total - self.queue - self.upstream)
        return f"queue;dur={self.queue:.1f}, upstream;dur={self.upstream:.1f}, proxy;dur={own:.1f}"


def lines_of(headers: Sequence[tuple[str, str]]) -> str:
    """Return header lines as text."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers])


def usage_lines(usage: Usage | None) -> str:
    if usage is None:
        return ""
    return (
        f"X-Proxy-Prompt-Tokens: {usage.prompt_tokens}\r\nX-Proxy-Cached-Tokens: {usage.cached_tokens}\r\n"
        f"X-Proxy-Completion-Tokens: {usage.completion_tokens}\r\nX-Proxy-Total-Tokens: {usage.total_tokens}\r\n"
    )


def cost_lines(cost: Cost | None, usage: Usage | None, savings: Savings | None = None) -> str:
    """Cost and tokens of an answer that was bought just now. No cost line at all where the cost is unknown.

    savings: of the part of it that was not bought.
    """
    lines = f"X-Proxy-Cost-USD: {usd(cost.usd)}\r\n" if cost is not None else ""
    lines += f"X-Proxy-Cost-Status: {cost_status(cost, savings)}\r\n"
    if savings is not None and savings.cost is not None:
        lines += f"X-Proxy-Cost-Saved-USD: {savings.cost}\r\n"
    if savings is not None and savings.usage is not None:
        lines += f"X-Proxy-Saved-Tokens: {savings.usage.total_tokens}\r\n"
    return lines + usage_lines(usage)


TRAILERS: Final = (
    "X-Proxy-Cost-USD, X-Proxy-Cost-Status, X-Proxy-Cost-Saved-USD, X-Proxy-Prompt-Tokens, X-Proxy-Cached-Tokens, "
    "X-Proxy-Completion-Tokens, X-Proxy-Total-Tokens"
)
"""What `cost_lines` may say of a stream, after its end."""


def cost_status(cost: Cost | None, savings: Savings | None = None) -> str:
    """`estimated` also where the cost is exact, but what was saved rests on apportioned token counts."""
    if cost is None:
        return "unknown"
    return "estimated" if savings is not None and savings.estimated else cost.status


def cache_status(forward: str, detail: str, stored: bool, collapsed: bool = False) -> str:
    """`Cache-Status` of an answer that came from upstream; collapsed: by another's call."""
    text = f"{CACHE_NAME}; fwd={forward}"
    if collapsed:
        text += "; collapsed"
    if stored:
        text += "; stored"
    return f"{text}; detail={token(detail)}" if detail else text


def stale_lines(entry: Entry, wall: float, why: str, forwarded: bool) -> str:
    """How an answer past its lifetime says so (RFC 9211 section 2): while it is refreshed it is a hit with a negative
    ttl; where it stands in for a failure the request was forwarded.
    """
    status = f"{CACHE_NAME}; {'fwd=stale' if forwarded else 'hit'}; ttl={entry.remaining(wall)}; detail={token(why)}"
    return f"Age: {entry.age(wall)}\r\nCache-Status: {status}\r\nX-Proxy-Cache-Reason: {why}\r\n"


def token(text: str) -> str:
    """A structured-field token where `text` is one, else a string (RFC 8941 section 3.3), which is printable ASCII."""
    if text.isascii() and text[:1].isalpha() and all(c.isalnum() or c in "-_.:/" for c in text):
        return text
    shown = "".join(c if " " <= c <= "~" else "?" for c in text)
    return '"' + shown.replace("\\", "\\\\").replace('"', '\\"') + '"'


def cost_comment(cost: Cost | None, usage: Usage | None) -> bytes:
    """The SSE comment that carries a stream's cost: one line, one newline, so that no SDK takes it for an event."""
    parts = [f"x-proxy-cost-usd={usd(cost.usd)}" if cost is not None else "x-proxy-cost-status=unknown"]
    if cost is not None and cost.status != "exact":
        parts.append(f"x-proxy-cost-status={cost.status}")
    if usage is not None:
        parts.append(f"x-proxy-prompt-tokens={usage.prompt_tokens}")
        parts.append(f"x-proxy-completion-tokens={usage.completion_tokens}")
    return f": {' '.join(parts)}\n".encode()
