"""The report fits 80 columns whatever the numbers are; tests/acceptance/test_ledger.py tests its content."""

from __future__ import annotations

import pytest

from proxy.accounting.ledger.reporting import ReportRow
from proxy.cli.report import _cell, _count, _dollars, _name, _tables, _time


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (99_999, "99,999"),
        (100_000, "100k"),
        (999_400, "999k"),
        (999_600, "1.0M"),
        (12_345_678, "12.3M"),
        (123_456_789, "123M"),
        (5 * 10**9, "5.0G"),
        (5 * 10**12, "5.0T"),
        (10**16, "1e+16"),
    ],
)
def test_counts(number: int, text: str) -> None:
    assert _count(number) == text
    assert len(text) <= 6


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("0.000000", "0"),
        ("0.00000015", "<0.0001"),
        ("0.002250", "0.0022"),
        ("12.345678", "12.3457"),
        ("999.9999", "999.9999"),
        ("123456.789", "123456.79"),
    ],
)
def test_amounts(amount: str, text: str) -> None:
    assert _dollars(amount) == text
    assert len(text) <= 9


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(None, "-"), (0.2, "0.2 ms"), (9.94, "9.9 ms"), (999.4, "999 ms"), (1234.5, "1.23 s")]
)
def test_times(milliseconds: float | None, text: str) -> None:
    assert _time(milliseconds) == text


@pytest.mark.parametrize("names", [["x" * 99], ["x" * 99, None], ["x" * 99, "\x1b[31m" * 9, "\n" * 99], [None] * 5])
def test_first_column_fits(names: list[str | None]) -> None:
    assert len(_name(names)) <= 22
    assert _name(names).isprintable()


def test_full_table_fits_80_columns() -> None:
    most = ReportRow(
        requests=10**8, hits=10**8, errors=10**8, total=10**15, unknown=7, cost=123456 * 10**12, saved=10**17
    )
    row = most.as_json() | {"p50_ms": 599_999.0, "first_byte_p99_ms": 599_999.0}
    lines = _tables(["model"], [{"model": "m" * 99} | row, {"model": None} | row], row)
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "7 requests have no known cost, so COST USD is without them: see cost.prices"


@pytest.mark.parametrize(
    ("value", "cell"), [("=1+1", "'=1+1"), ("gpt-4o", "gpt-4o"), ("@x", "'@x"), (7, 7), (None, None)]
)
def test_formulas_are_quoted_in_csv(value: object, cell: object) -> None:
    assert _cell(value) == cell
