"""Receipts: what they hold, and that their number is bounded (docs/costs-and-budgets.md)."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.accounting.receipt import RECEIPTS_KEPT, Receipt, Receipts
from proxy.cache.entry import Entry, Form
from proxy.cost.usage import Usage

PROMISED = {"id", "model", "cost_usd", "saved_usd", "cost_status", "prompt_tokens", "completion_tokens", "client"}


def receipt(id_: str = "a1", **fields: Any) -> Receipt:
    base: dict[str, Any] = {
        "client": "",
        "endpoint": "chat",
        "model": "gpt-4o",
        "status": 200,
        "cache": "miss",
        "finished_at": 1.0,
    }
    return Receipt(id=id_, **(base | fields))


def entry(form: Form = "json", cost: str | None = "0.002250", usage: Usage | None = None) -> Entry:
    return Entry(
        key="k",
        form=form,
        status=200,
        headers=(),
        body=b"x" * 1000,
        usage_span=None,
        stored_at=0.0,
        ttl=60.0,
        endpoint="chat",
        model="gpt-4o",
        answer_model="gpt-4o-2024-08-06",
        usage=usage,
        cost=cost,
        namespace="",
        tags=(),
        sampled=False,
    )


def test_a_receipt_as_json() -> None:
    got = receipt(
        client="anna", cost_usd="0.002250", cost_status="exact", usage=Usage(100, 200, 300, 40), queue_ms=1.23456
    ).as_json()
    assert set(got) >= PROMISED
    assert (got["cost_usd"], got["cost_status"]) == ("0.002250", "exact")  # money is a string
    assert (got["prompt_tokens"], got["completion_tokens"], got["total_tokens"]) == (100, 200, 300)
    assert (got["cached_tokens"], got["client"], got["queue_ms"]) == (40, "anna", 1.235)
    assert orjson.loads(orjson.dumps(got)) == got


def test_a_receipt_has_every_field() -> None:
    fields = {
        "id": "a1",
        "client": "anna",
        "endpoint": "chat",
        "model": "gpt-4o",
        "answer_model": "gpt-4o-2024-08-06",
        "status": 200,
        "cache": "miss",
        "stream": True,
        "upstream": "openai",
        "key": "openai-1",
        "attempts": 2,
        "cost_usd": "0.002250",
        "saved_usd": "0.000000",
        "cost_status": "exact",
        "error": "client_gone",
        "tags": ("team:search",),
        "run": "eval-7",
        "upstream_code": "rate_limit_exceeded",
        "retries": ("k1: 429 rate_limit_exceeded",),
    }
    times = {"queue_ms": 0.12345, "upstream_ms": 2.34567, "total_ms": 3.45678, "finished_at": 1.23456}
    got = Receipt(reason="new", usage=Usage(100, 200, 300, 40), **fields, **times).as_json()  # type: ignore[arg-type]
    assert got == fields | {
        "cache_reason": "new",
        "traceparent": None,
        "first_byte_ms": 3.457,
        "tags": ["team:search"],
        "retries": ["k1: 429 rate_limit_exceeded"],
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "completion_tokens": 200,
        "total_tokens": 300,
        **{name: round(value, 3) for name, value in times.items()},
    }


def test_a_model_that_is_not_unicode_can_be_written() -> None:
    """JSON bodies may hold lone surrogates, in either direction."""
    got = orjson.loads(orjson.dumps(receipt(model="gpt-\ud800", answer_model="é\udfff").as_json()))
    assert (got["model"], got["answer_model"]) == ("gpt-\\ud800", "é\\udfff")


def test_unknown_values_are_null_instead_of_zero() -> None:
    got = receipt().as_json()
    for name in ("cost_usd", "saved_usd", "prompt_tokens", "completion_tokens", "total_tokens", "client", "error"):
        assert got[name] is None, name
    assert got["cost_status"] == "unknown"


@pytest.mark.parametrize("form", ["json", "sse"])
def test_the_receipt_of_a_hit(form: Form) -> None:
    receipts = Receipts()
    receipts.put_hit("h1", "anna", entry(form, usage=Usage(1, 2, 3)), 12.0)
    got = receipts.get("h1")
    assert got is not None
    assert (got.id, got.client, got.cache, got.status, got.attempts) == ("h1", "anna", "hit", 200, 0)
    assert (got.cost_usd, got.saved_usd, got.cost_status) == ("0.000000", "0.002250", "exact")
    assert (got.model, got.answer_model, got.stream) == ("gpt-4o", "gpt-4o-2024-08-06", form == "sse")
    assert (got.usage, got.finished_at) == (Usage(1, 2, 3), 12.0)


def test_a_hit_of_unknown_price_saves_an_unknown_amount() -> None:
    receipts = Receipts()
    receipts.put_hit("h1", "", entry(cost=None), 1.0)
    got = receipts.get("h1")
    assert got is not None
    assert got.saved_usd is None


def test_the_latest_receipts_are_kept() -> None:
    receipts = Receipts(kept=3)
    for number in range(5):
        if number % 2:
            receipts.put_hit(f"r{number}", "", entry(), 0.0)
        else:
            receipts.put(receipt(f"r{number}"))
    assert [receipts.get(f"r{number}") is not None for number in range(5)] == [False, False, True, True, True]
    assert receipts.get("never") is None
    for hits in (False, True):
        for number in range(9):
            if hits:
                receipts.put_hit(f"s{number}", "", entry(), 0.0)
            else:
                receipts.put(receipt(f"s{number}"))
        assert [number for number in range(9) if receipts.get(f"s{number}")] == [6, 7, 8]
    assert RECEIPTS_KEPT >= 1000


def test_a_receipt_written_again_replaces_the_first() -> None:
    receipts = Receipts(kept=2)
    receipts.put(receipt("a"))
    receipts.put(receipt("a", status=499))
    got = receipts.get("a")
    assert got is not None
    assert got.status == 499
