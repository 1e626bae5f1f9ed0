"""What is written down of a request: exact money, bounded names, nothing of the text."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.accounting.ledger.records import (
    MAX_NAME,
    MAX_TAGS,
    HitCounter,
    amount,
    dollars,
    error_receipt,
    kind_id,
    kind_of,
    record_of,
)
from proxy.accounting.receipt import Receipt
from proxy.cache.entry import Entry
from proxy.cost.pricing import usd
from proxy.cost.usage import Usage


def receipt(**fields: Any) -> Receipt:
    base: dict[str, Any] = {"id": "a", "client": "", "endpoint": "chat", "model": "gpt-4o", "status": 200}
    return Receipt(**(base | {"cache": "miss", "finished_at": 1.5} | fields))


@pytest.mark.parametrize(
    ("text", "whole", "rest"),
    [
        ("0.000000", 0, "0"),
        ("0.002250", 2_250_000_000, "0"),
        ("0.00000015", 150_000, "0"),
        ("0.000000000001", 1, "0"),
        ("0.0000000000015", 1, "5E-13"),
        ("999.5", 999_500_000_000_000, "0"),
        ("1000000000000000", 0, "1000000000000000"),
        ("1000000.000000000000000000000001", 0, "1000000.000000000000000000000001"),
    ],
)
def test_amounts_are_stored_as_integers(text: str, whole: int, rest: str) -> None:
    assert amount(text) == (whole, Decimal(rest))


def test_an_unknown_amount_stays_unknown() -> None:
    assert amount(None) == (None, Decimal(0))
    row = record_of(receipt(), 7)
    assert (row.cost, row.saved, row.rest) == (None, None, None)


@given(
    st.lists(
        st.tuples(st.decimals(0, 10**15, allow_nan=False, places=24), st.integers(1, 10**6)), min_size=1, max_size=20
    )
)
def test_sums_are_exact(amounts: list[tuple[Decimal, int]]) -> None:
    parts = [amount(usd(one), count) for one, count in amounts]
    total = dollars(sum(whole or 0 for whole, _ in parts), *(rest for _, rest in parts))
    assert Fraction(total) == sum(Fraction(one) * count for one, count in amounts)
    assert all(0 <= (whole or 0) <= 10**15 for whole, _ in parts)


def test_a_receipt_as_a_row() -> None:
    usage = Usage(100, 20, 120, cached_tokens=64)
    row = record_of(
        receipt(
            usage=usage,
            attempts=2,
            cost_usd="0.002250",
            saved_usd="0.000000",
            queue_ms=1.0,
            upstream_ms=300.1234,
            total_ms=301.0,
            first_byte_ms=20.0,
            cache_key="f" * 64,
        ),
        7,
    )
    assert row._asdict() == {
        "time": 1500,
        "kind": 7,
        "requests": 1,
        "attempts": 2,
        "prompt": 100,
        "cached": 64,
        "completion": 20,
        "total": 120,
        "other": None,
        "cost": 2_250_000_000,
        "saved": 0,
        "rest": None,
        "queue": 1000,
        "upstream": 300_123,
        "duration": 301_000,
        "first": 20_000,
        "digest": 2**60 - 1,
    }


def test_a_plain_response_has_its_first_byte_at_the_end() -> None:
    assert record_of(receipt(total_ms=3.0), 1).first == 3000


def test_rarer_tokens_are_kept_by_kind() -> None:
    usage = Usage(100, 20, 120, heard_tokens=50, cache_write_tokens=3, web_searches=1)
    other = record_of(receipt(usage=usage), 1, 2).other
    assert other is not None
    assert msgspec.json.decode(other) == {"heard_tokens": 100, "cache_write_tokens": 6, "web_searches": 2}


def test_equal_hits_are_one_row() -> None:
    usage = Usage(100, 20, 120)
    entry = Entry(
        *("ab" * 32, "sse", 200, (), b"", None, 0.0, 60.0, "chat", "gpt-4o", "gpt-4o-2024"),
        *(usage, "0.002250", "ci", ("stored:by",), True),
    )
    hits = HitCounter(entry, "anna", ("team:a",), "nightly", 1.5, 0.25)
    hits.count, hits.milliseconds = 4, 1.0
    got = hits.receipt()
    kind, row = kind_of(got), record_of(got, 1, hits.count)
    assert (kind.cache, kind.client, kind.model, kind.answer_model) == ("hit", "anna", "gpt-4o", "gpt-4o-2024")
    assert (kind.stream, kind.sampled, kind.tags, kind.run) == (True, True, ("team:a",), "nightly")
    assert (row.requests, row.total, row.cost, row.saved) == (4, 480, 0, 9_000_000_000)
    assert (row.duration, row.attempts) == (250, 0)


def test_names_are_cut_and_can_be_written() -> None:
    kind = kind_of(
        receipt(
            model="m" * 10_000, answer_model="é\ud800" * 500, tags=tuple(f"t:{n}" for n in range(99)), run="r" * 999
        )
    )
    assert len(kind.model) == len(kind.run) == MAX_NAME
    assert kind.answer_model.startswith("é\\ud800é")
    kind.answer_model.encode()
    assert len(kind.tags) == MAX_TAGS


def test_a_kind_has_one_number_everywhere() -> None:
    one, other = kind_of(receipt()), kind_of(receipt(tags=("team:a",)))
    assert kind_id(one) == kind_id(kind_of(receipt(id="b", total_ms=7.0))) != kind_id(other)
    assert 0 <= kind_id(one) < 2**63


def test_a_refused_request_as_a_row() -> None:
    got = error_receipt("invalid_json", 400, "anna", "chat", 2.0)
    assert (kind_of(got).error, kind_of(got).status, record_of(got, 1, 3).requests) == ("invalid_json", 400, 3)
