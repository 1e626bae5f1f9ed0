"""`GET /_proxy/usage`: totals since this process started, and rows of the ledger."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qsl

from ..accounting.ledger.ledger import Ledger
from ..accounting.ledger.reader import Span
from ..accounting.ledger.reporting import BY, parse_moment
from ..protocol.errors import ProxyError
from ..protocol.routes import printable

_DEFAULT: Final = ["day"]


async def usage(ledger: Ledger, query: str, now: float) -> dict[str, Any]:
    """Return the usage report.

    query: `by` (may be repeated, or list several with commas), `since` and `until`, as in `openai-proxy report`.
    now: Unix seconds. Raises ProxyError(invalid_option).
    """
    by: list[str] = []
    bounds: dict[str, float] = {}
    for name, value in parse_qsl(query, keep_blank_values=True, max_num_fields=50):
        if name == "by":
            by += value.split(",")
        elif name in ("since", "until"):
            try:
                bounds[name] = parse_moment(value.replace(" ", "+"), now)  # the plus of an offset may be unescaped
            except ValueError as error:
                raise _invalid(name, str(error)) from None
        else:
            raise _invalid(printable(name, 40), "by, since or until")
    if not set(by) <= set(BY):
        raise _invalid("by", f"some of {', '.join(BY)}")
    return await ledger.usage(list(dict.fromkeys(by)) or _DEFAULT, Span(bounds.get("since"), bounds.get("until")))


def _invalid(name: str, expected: str) -> ProxyError:
    return ProxyError("invalid_option", f"{name}: expected {expected}", param=name)
