"""Reports of the ledger: totals by day, model, client …, percentiles of times, and what another cache would do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import product
from typing import Any, Final

from ...cost.pricing import usd
from ...protocol.durations import parse_duration
from .records import LedgerRecord, RecordKind, dollars

BY: Final = ("day", "month", "model", "endpoint", "client", "key", "tag", "run", "error")
"""What a report can be grouped by. Days and months are UTC, as on OpenAI's usage page."""

FREE: Final = frozenset({"hit", "stale", "coalesced"})
"""Cache statuses of requests that cost nothing."""

SLOT: Final = 100
"""The resolution of times, in microseconds."""

DAY: Final = 86_400_000
_PERCENTILES: Final = (("p50", 0.50), ("p95", 0.95), ("p99", 0.99))
_EPOCH: Final = date(1970, 1, 1)

Label = tuple[str | None, ...]
"""The group of a request: one text for each thing that the report is grouped by; None: the request has none."""


@dataclass(slots=True)
class ReportRow:
    """Totals of several requests. Amounts are in 1e-12 USD and an exact rest in USD.

    latency, first: the number of requests by time in units of `SLOT`.
    """

    requests: int = 0
    hits: int = 0
    coalesced: int = 0
    errors: int = 0
    unknown: int = 0
    attempts: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    total: int = 0
    saved_tokens: int = 0
    cost: int = 0
    saved: int = 0
    cost_rest: Decimal = Decimal(0)
    saved_rest: Decimal = Decimal(0)
    latency: Counter[int] = field(default_factory=Counter)
    first: Counter[int] = field(default_factory=Counter)

    def count(self, cache: str, status: int, error: str, requests: int, unpriced: int) -> None:
        """Count `requests` of one kind. unpriced: how many of them have no known cost."""
        self.requests += requests
        if cache in ("hit", "stale"):
            self.hits += requests
        elif cache == "coalesced":
            self.coalesced += requests
        if error:
            self.errors += requests
        elif status < 300:
            self.unknown += unpriced

    def tokens(self, cache: str, attempts: int, prompt: int, cached: int, completion: int, total: int) -> None:
        self.attempts += attempts
        if cache in FREE:
            self.saved_tokens += total
        else:
            self.prompt += prompt
            self.cached += cached
            self.completion += completion
            self.total += total

    def add(self, kind: RecordKind, row: LedgerRecord) -> None:
        """Add one row, without its times."""
        self.count(kind.cache, kind.status, kind.error, row.requests, row.requests if row.cost is None else 0)
        self.tokens(kind.cache, row.attempts, row.prompt, row.cached, row.completion, row.total)
        self.cost += row.cost or 0
        self.saved += row.saved or 0
        if row.rest is not None:
            self.add_rest(row.rest)

    def add_rest(self, rest: str) -> None:
        """Add what a row's integers leave out."""
        cost, _, saved = rest.partition(" ")
        self.cost_rest = dollars(0, self.cost_rest, Decimal(cost))
        self.saved_rest = dollars(0, self.saved_rest, Decimal(saved))

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON: amounts as decimal text, `hit_rate` from 0 to 1, times in milliseconds or None."""
        row: dict[str, Any] = {
            "requests": self.requests,
            "hits": self.hits,
            "hit_rate": round(self.hits / self.requests, 4) if self.requests else 0.0,
            "coalesced": self.coalesced,
            "errors": self.errors,
            "prompt_tokens": self.prompt,
            "cached_tokens": self.cached,
            "completion_tokens": self.completion,
            "total_tokens": self.total,
            "saved_tokens": self.saved_tokens,
            "cost_usd": usd(dollars(self.cost, self.cost_rest)),
            "saved_usd": usd(dollars(self.saved, self.saved_rest)),
            "unknown_cost": self.unknown,
            "attempts": self.attempts,
        }
        for prefix, times in (("", self.latency), ("first_byte_", self.first)):
            row |= {f"{prefix}{name}_ms": value for name, value in percentiles(times).items()}
        return row


def percentiles(times: Counter[int]) -> dict[str, float | None]:
    """Return the 50th, 95th and 99th percentile (nearest rank) in milliseconds. times: counts by units of `SLOT`."""
    if not times:
        return {name: None for name, _ in _PERCENTILES}
    found: dict[str, float | None] = {}
    seen, total = 0, sum(times.values())
    wanted = [(name, max(1, -int(-share * total // 1))) for name, share in _PERCENTILES]
    for slot in sorted(times):
        seen += times[slot]
        while wanted and seen >= wanted[0][1]:
            found[wanted.pop(0)[0]] = slot * SLOT / 1000
    return found


def day_of(number: int) -> str:
    """Return the date, as in `2026-11-21`, of a number of days since 1970."""
    return (_EPOCH + timedelta(days=number)).isoformat()


def labels(by: Sequence[str], kind: RecordKind, day: int) -> list[Label]:
    """Return the groups of a request of this kind: several if it has several tags. day: days since 1970."""
    choices: list[Sequence[str | None]] = []
    for name in by:
        match name:
            case "day":
                choices.append((day_of(day),))
            case "month":
                choices.append((day_of(day)[:7],))
            case "tag":
                choices.append(tuple(dict.fromkeys(kind.tags)) or (None,))
            case _:
                choices.append((getattr(kind, name) or None,))
    return list(product(*choices))


def ordered(by: Sequence[str], groups: dict[Label, ReportRow]) -> list[dict[str, Any]]:
    """Return the rows of a report: by time if it is grouped by time first, otherwise by cost, the highest first."""
    items = list(groups.items())
    items.sort(key=lambda item: tuple(text or "" for text in item[0]))
    if by[0] not in ("day", "month"):
        items.sort(key=lambda item: (-dollars(item[1].cost, item[1].cost_rest), -item[1].requests))
    return [dict(zip(by, label, strict=True)) | sums.as_json() for label, sums in items]


def parse_moment(text: str, now: float) -> float:
    """Return the Unix seconds of `7d` (before `now`), `2026-11-01` or `2026-11-01T12:00` (UTC, or with an offset).

    Raises ValueError, which says what is expected.
    """
    try:
        return now - parse_duration(text)
    except ValueError:
        pass
    try:
        found = datetime.fromisoformat(text.strip())
        return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError("a duration back such as 7d, or a date such as 2026-11-01 or 2026-11-01T12:00") from None


# --- what if ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WhatIf:
    """Another cache. ttl: seconds; None: forever, since the ledger does not know what was evicted."""

    ttl: float | None = None
    deterministic: bool = False

    @classmethod
    def parse(cls, text: str) -> WhatIf:
        """Parse `ttl=7d`, `when=deterministic`, `when=always`, or several with commas. Raises ValueError."""
        ttl, deterministic = None, False
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name == "ttl":
                ttl = parse_duration(value)
            elif name == "when" and value in ("always", "deterministic"):
                deterministic = value == "deterministic"
            else:
                raise ValueError("ttl=DURATION, when=deterministic or when=always, several with commas")
        return cls(ttl, deterministic)


def replay(
    rows: Iterable[tuple[int, int, int, int, int, int]], kinds: dict[int, RecordKind], what: WhatIf
) -> dict[str, Any]:
    """Return what a cache like `what` would have done for these requests, beside what was done.

    A good response is stored if the cache has none, and expires after the ttl; a hit saves what it cost.

    rows: (milliseconds, kind, count, cost, saved, digest), ordered by time.
    """
    ttl = None if what.ttl is None else int(what.ttl * 1000)
    uncacheable = {number for number, kind in kinds.items() if kind.error or kind.status != 200}
    free = {number for number, kind in kinds.items() if kind.cache in FREE}
    sampled = {number for number, kind in kinds.items() if kind.sampled} if what.deterministic else set()
    stored: dict[int, int] = {}
    requests = was_hit = hits = was_saved = saved = was_spent = spent = 0
    for time, kind, count, cost, spared, digest in rows:
        requests += count
        was_spent += cost
        was_saved += spared
        if kind in uncacheable:
            spent += cost
            continue
        each = (cost + spared) // count
        if kind in free:
            was_hit += count
        if kind in sampled:
            spent += each * count
            continue
        ends = stored.get(digest)
        if ends is not None and (ttl is None or time < ends):
            hits += count
            saved += each * count
            continue
        stored[digest] = 0 if ttl is None else time + ttl
        spent += each
        hits += count - 1
        saved += each * (count - 1)
    return {
        "requests": requests,
        "hits": was_hit,
        "hit_rate": round(was_hit / requests, 4) if requests else 0.0,
        "cost_usd": usd(dollars(was_spent)),
        "saved_usd": usd(dollars(was_saved)),
        "what_if_hits": hits,
        "what_if_hit_rate": round(hits / requests, 4) if requests else 0.0,
        "what_if_cost_usd": usd(dollars(spent)),
        "what_if_saved_usd": usd(dollars(saved)),
    }
