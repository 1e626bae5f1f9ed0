"""JSON that only some parsers take, and what is no JSON at all."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.core.lenient import parse_leniently, sayable

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
@example([-(10**18), math.inf])
def test_ordinary_json_is_read_as_ever(document: Any) -> None:
    assert parse_leniently(json.dumps(document).encode()) == json.loads(json.dumps(document))


@pytest.mark.parametrize(
    ("body", "document"),
    [
        (b'{"a": NaN, "b": 1}', {"a": math.nan, "b": 1}),
        (b'{"a": Infinity, "b": -Infinity}', {"a": math.inf, "b": -math.inf}),
        (b'{"a": "\\ud800"}', {"a": "\ud800"}),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b'{"a": 1e400}', {"a": math.inf}),
        (b'{"a": NaN, "b": 9007199254740993}', {"a": math.nan, "b": 9007199254740993}),
    ],
)
def test_what_others_take(body: bytes, document: Any) -> None:
    assert repr(parse_leniently(body)) == repr(document)


def test_a_huge_integer_costs_no_time_and_is_a_number() -> None:
    for body in (b'{"a": %b}' % (b"9" * 1_000_000), b'{"b": NaN, "a": %b}' % (b"9" * 100_000)):
        assert parse_leniently(body)["a"] > 1e18


@pytest.mark.parametrize("deep", [b'{"a":' * 5000 + b"1" + b"}" * 5000, b"[" * 100_000, b"[" * 5000 + b"]" * 5000])
def test_too_deep_stands_as_an_empty_object(deep: bytes) -> None:
    assert parse_leniently(deep) == {}


@given(st.text() | st.text(st.sampled_from("a\ud800\udfff\u20ac")))
def test_a_name_can_be_said_again(name: str) -> None:
    said = sayable(name)
    assert orjson.loads(orjson.dumps(said)) == said
    if not any("\ud800" <= c <= "\udfff" for c in name):
        assert said == name


BROKEN = [b"", b" ", b"{", b'{"a"}', b"{'a': 1}", b'{"a": 1,}', b"\xff", b'"\xff"', b"nul", b'{"a": 1} x', b"\x00"]


@pytest.mark.parametrize("body", BROKEN)
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(ValueError):
        parse_leniently(body)


@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_a_value_error(body: bytes) -> None:
    try:
        parse_leniently(body)
    except ValueError:
        pass
