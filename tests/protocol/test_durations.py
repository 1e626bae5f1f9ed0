"""Durations in every spelling: in settings and options, and in upstream answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.durations import parse_composite, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("30s", 30.0),
        ("5m", 300.0),
        ("24h", 86_400.0),
        ("7d", 604_800.0),
        ("3600", 3600.0),
        ("0", 0.0),
        ("0s", 0.0),
        ("1.5", 1.5),
        ("1.5h", 5400.0),
        ("0.5ms", 0.0005),
        (" 30s ", 30.0),
        ("007", 7.0),
    ],
)
def test_a_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds, abs=1e-12)


NOT_DURATIONS = ["", " ", "s", "30 s", "-1", "-5s", "+5", "1e3", "nan", "inf", "1,5", ".5", "5.", "1_000", "5M", "5S"]
NOT_DURATIONS += ["5w", "1h30m", "6m0s", "0x10", "٣", "٣s", "１s", "5s\n5s", "5 minutes", "1" * 33, "None"]


@pytest.mark.parametrize("text", NOT_DURATIONS)
def test_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match="a duration such as"):
        parse_duration(text)


@given(st.text(max_size=40))
def test_nothing_else_is_raised(text: str) -> None:
    try:
        assert parse_duration(text) >= 0
    except ValueError:
        pass
    found = parse_composite(text)
    assert found is None or found >= 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6m0s", 360.0),
        ("1h", 3600.0),
        ("1h30m", 5400.0),
        ("500ms", 0.5),
        ("1s500ms", 1.5),
        ("8m38.4s", 518.4),
        ("1d2h3m4s5ms", 93_784.005),
        ("0s", 0.0),
        (" 20ms ", 0.02),
        ("17h36m28.8s", 63_388.8),
    ],
)
def test_a_sum_of_durations(text: str, seconds: float) -> None:
    assert parse_composite(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "30", "1.5", "6m0", "m", "6 m 0 s", "-6m", "6m-1s", "nan", "1" * 64 + "s", "٣s"])
def test_not_a_sum(text: str) -> None:
    assert parse_composite(text) is None


@given(st.integers(0, 10**6), st.sampled_from(["ms", "s", "m", "h", "d"]))
def test_a_single_part_means_the_same_to_both(number: int, unit: str) -> None:
    assert parse_composite(f"{number}{unit}") == pytest.approx(parse_duration(f"{number}{unit}"))
