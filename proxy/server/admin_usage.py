"""`GET /_proxy/usage`: totals since the start of this process, and what the ledger says, by whatever is asked."""

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
    """The page's document. `by` (repeatable, or with commas), `since` and `until` as `openai-proxy report` takes them.

    now: Unix seconds. Raises ProxyError(invalid_option).
    """
    by: list[str] = []
    bounds: dict[str, float] = {}
    for name, value in parse_qsl(query, keep_blank_values=True, max_num_fields=50):
        if name == "by":
            by += value.split(",")
        elif name in ("since", "until"):
            try:
                bounds[name] = parse_moment(value.replace(" ", "+"), now)  # an offset whose plus was not escaped
            except ValueError as error:
                raise _expected(name, str(error)) from None
        else:
            raise _expected(printable(name, 40), "by, since or until")
    if not set(by) <= set(BY):
        raise _expected("by", f"some of {', '.join(BY)}")
    return await ledger.usage(list(dict.fromkeys(by)) or _DEFAULT, Span(bounds.get("since"), bounds.get("until")))


def _expected(name: str, what: str) -> ProxyError:
    return ProxyError("invalid_option", f"{name}: expected {what}", param=name)
