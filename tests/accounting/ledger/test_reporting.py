"""Sums, percentiles, moments, and what another cache would have done."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.accounting.ledger.records import LedgerRecord, RecordKind
from proxy.accounting.ledger.reporting import BY, ReportRow, WhatIf, labels, ordered, parse_moment, percentiles, replay

DAY = 20_000
"""2024-10-04."""


def kind(**fields: Any) -> RecordKind:
    base = dict.fromkeys(RecordKind._fields, "")
    usual = {"model": "gpt-4o", "endpoint": "chat", "status": 200, "cache": "miss", "stream": False, "sampled": False}
    return RecordKind(**(base | usual | {"tags": ()} | fields))  # type: ignore[arg-type]


def row(**fields: Any) -> LedgerRecord:
    base: dict[str, Any] = dict.fromkeys(LedgerRecord._fields, 0) | {"requests": 1, "other": None, "rest": None}
    return LedgerRecord(**(base | fields))


def test_sums_of_rows() -> None:
    sums = ReportRow()
    bought = row(attempts=2, prompt=100, cached=60, completion=20, total=120, cost=2_250_000_000, saved=0)
    sums.add(kind(), bought)
    sums.add(kind(cache="hit"), row(requests=3, total=360, prompt=300, cost=0, saved=6_750_000_000))
    sums.add(kind(cache="stale"), row(total=120, cost=0, saved=2_250_000_000))
    sums.add(kind(cache="coalesced"), row(total=120, cost=0, saved=2_250_000_000))
    sums.add(kind(status=502, error="upstream_unreachable"), row(cost=None, saved=None, attempts=4))
    sums.add(kind(), row(cost=None, saved=None))
    sums.add(kind(), row(rest="0.0000000000005 0.25"))
    assert sums.as_json() == {
        "requests": 9,
        "hits": 4,
        "hit_rate": 0.4444,
        "coalesced": 1,
        "errors": 1,
        "prompt_tokens": 100,
        "cached_tokens": 60,
        "completion_tokens": 20,
        "total_tokens": 120,
        "saved_tokens": 600,
        "cost_usd": "0.0022500000005",
        "saved_usd": "0.261250",
        "unknown_cost": 1,
        "attempts": 6,
        **dict.fromkeys(["p50_ms", "p95_ms", "p99_ms"]),
        **dict.fromkeys(["first_byte_p50_ms", "first_byte_p95_ms", "first_byte_p99_ms"]),
    }


def test_empty_reports_divide_by_nothing() -> None:
    assert ReportRow().as_json()["hit_rate"] == 0.0


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300))
def test_percentiles_are_of_the_nearest_rank(slots: list[int]) -> None:
    found = percentiles(Counter(slots))
    for name, share in (("p50", 50), ("p95", 95), ("p99", 99)):
        rank = -(-share * len(slots) // 100)
        assert found[name] == sorted(slots)[rank - 1] / 10


@pytest.mark.parametrize(
    ("by", "fields", "wanted"),
    [
        (["day"], {}, [("2024-10-04",)]),
        (["month"], {}, [("2024-10",)]),
        (["model", "client"], {"client": "anna"}, [("gpt-4o", "anna")]),
        (["client", "key", "run", "error"], {}, [(None, None, None, None)]),
        (["tag"], {}, [(None,)]),
        (["tag"], {"tags": ("a:1", "a:1")}, [("a:1",)]),
        (["tag", "day"], {"tags": ("a:1", "b:2")}, [("a:1", "2024-10-04"), ("b:2", "2024-10-04")]),
        (["endpoint", "error"], {"error": "throttled"}, [("chat", "throttled")]),
    ],
)
def test_the_group_of_a_request(by: list[str], fields: dict[str, Any], wanted: list[tuple[str | None, ...]]) -> None:
    assert labels(by, kind(**fields), DAY) == wanted
    assert set(by) <= set(BY)


def test_the_order_of_rows() -> None:
    def sums(cost: int, requests: int = 1) -> ReportRow:
        return ReportRow(requests=requests, cost=cost)

    by_day = ordered(["day"], {("2024-10-05",): sums(9), ("2024-10-04",): sums(1)})
    assert [line["day"] for line in by_day] == ["2024-10-04", "2024-10-05"]
    by_model = ordered(["model"], {("a",): sums(1), (None,): sums(0, 9), ("b",): sums(5), ("c",): sums(0)})
    assert [line["model"] for line in by_model] == ["b", "a", None, "c"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("7d", 1e9 - 604800),
        ("90", 1e9 - 90),
        ("2001-09-09", 999993600.0),
        ("2001-09-09T01:46:40", 1e9),
        ("2001-09-09 01:46:40", 1e9),
        ("2001-09-09T01:46:40Z", 1e9),
        ("2001-09-09T03:46:40+02:00", 1e9),
    ],
)
def test_points_in_time(text: str, wanted: float) -> None:
    assert parse_moment(text, 1e9) == wanted


@pytest.mark.parametrize("text", ["", "tomorrow", "2001-13-01", "7 days", "-7d"])
def test_invalid_points_in_time(text: str) -> None:
    with pytest.raises(ValueError, match="a duration back such as 7d"):
        parse_moment(text, 1e9)


# --- what if ----------------------------------------------------------------------------------------------------------

KINDS = {
    1: kind(),
    2: kind(cache="hit"),
    3: kind(sampled=True),
    4: kind(status=500, error="upstream_500"),
}
S = 1000


def what(rows: list[tuple[int, int, int, int, int, int]], text: str) -> tuple[int, int, Decimal, Decimal]:
    found = replay(rows, KINDS, WhatIf.parse(text))
    assert found["requests"] == sum(one[2] for one in rows)
    total = sum(one[3] + one[4] for one in rows)
    spent, saved = Decimal(found["what_if_cost_usd"]), Decimal(found["what_if_saved_usd"])
    assert spent + saved == Decimal(total).scaleb(-12)  # every answer is either bought or saved
    return found["hits"], found["what_if_hits"], spent, saved


def test_a_longer_ttl_has_more_hits() -> None:
    dollar = 10**12
    rows = [(n * 3600 * S, 1, 1, dollar, 0, 7) for n in range(5)]
    assert what(rows, "ttl=30m") == (0, 0, Decimal(5), Decimal(0))
    assert what(rows, "ttl=90m") == (0, 2, Decimal(3), Decimal(2))
    assert what(rows, "ttl=7d") == what(rows, "when=always") == (0, 4, Decimal(1), Decimal(4))


def test_a_shorter_ttl_has_fewer_hits() -> None:
    rows = [(0, 1, 1, 10**12, 0, 7), (1 * S, 2, 3, 0, 3 * 10**12, 7), (100 * S, 2, 1, 0, 10**12, 7)]
    assert what(rows, "ttl=1h") == (4, 4, Decimal(1), Decimal(4))
    assert what(rows, "ttl=10s") == (4, 3, Decimal(2), Decimal(3))


def test_hits_stored_before_the_ledger_began() -> None:
    assert what([(0, 2, 3, 0, 3 * 10**12, 7)], "ttl=1h") == (3, 2, Decimal(1), Decimal(2))


def test_only_deterministic_requests_are_counted_if_configured() -> None:
    rows = [(n * S, which, 1, 10**12, 0, which) for n in range(3) for which in (1, 3)]
    assert what(rows, "when=always")[:2] == (0, 4)
    assert what(rows, "ttl=1h,when=deterministic")[:2] == (0, 2)


def test_errors_are_not_stored() -> None:
    rows = [(n * S, 4, 1, 0, 0, 9) for n in range(3)]
    assert what(rows, "ttl=7d")[:2] == (0, 0)
    assert replay([], KINDS, WhatIf())["what_if_hit_rate"] == 0.0


@pytest.mark.parametrize("text", ["", "ttl", "ttl=", "ttl=never", "when=sometimes", "size=1", "ttl=1h;when=always"])
def test_invalid_what_if_settings(text: str) -> None:
    with pytest.raises(ValueError, match=r"DURATION|duration"):
        WhatIf.parse(text)
