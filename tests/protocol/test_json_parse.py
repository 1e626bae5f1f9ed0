"""JSON that only some parsers take, and what is no JSON at all."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.protocol.json_parse import MAX_DEPTH, is_deeper, parse_leniently, printable_name

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def nested(lists: int, inmost: bytes) -> bytes:
    return b'{"a":' + b"[" * lists + inmost + b"]" * lists + b"}"


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
def test_texts_that_orjson_refuses(body: bytes, document: Any) -> None:
    assert repr(parse_leniently(body)) == repr(document)


def test_a_huge_integer_costs_no_time_and_is_a_number() -> None:
    for body in (b'{"a": %b}' % (b"9" * 1_000_000), b'{"b": NaN, "a": %b}' % (b"9" * 100_000)):
        assert parse_leniently(body)["a"] > 1e18


def test_what_strict_parsing_takes_is_read_to_the_depth_that_it_takes() -> None:
    assert parse_leniently(nested(1023, b"1"))["a"]
    assert parse_leniently(nested(1024, b"1")) == {}


@pytest.mark.parametrize("odd", [b"NaN", b'"\\ud800"'])
def test_what_only_others_take_is_read_to_the_depth_that_has_a_key(odd: bytes) -> None:
    assert parse_leniently(nested(MAX_DEPTH - 1, odd))["a"]
    assert parse_leniently(nested(MAX_DEPTH, odd)) == {}


# Where the standard library stops: at 990 (Python 3.11), 1,500 (3.12), 10,000 (3.13), or by the size of the stack.
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 500, 995, 1200, 5000, 12_000, 100_000])
def test_too_deep_stands_as_an_empty_object_on_every_python(depth: int) -> None:
    for deep in (b'{"a":' * depth + b"NaN" + b"}" * depth, b"[" * depth, b"[" * depth + b"NaN" + b"]" * depth):
        assert parse_leniently(deep) == {}


@given(JSON)
@example({"[[": '{"]\\'})
@example([[], {}, [[{"a": []}]]])
def test_depth_is_that_of_the_document(document: Any) -> None:
    depth = deepest(document)
    for text in (json.dumps(document).encode(), json.dumps(document, ensure_ascii=False, indent=1).encode()):
        assert depth == 0 or is_deeper(text, depth - 1)
        assert not is_deeper(text, depth)


def deepest(document: Any) -> int:
    if isinstance(document, dict):
        return 1 + max(map(deepest, document.values()), default=0)
    return 1 + max(map(deepest, document), default=0) if isinstance(document, list) else 0


def test_brackets_in_texts_are_not_counted() -> None:
    text = b'{"a":NaN,"b":"' + b"[" * 1000 + b'\\"{"}'
    assert parse_leniently(text)["b"] == "[" * 1000 + '"{'
    with pytest.raises(ValueError):  # its end is missing
        parse_leniently(text[:-3])


@given(st.text() | st.text(st.sampled_from("a\ud800\udfff\u20ac")))
def test_a_name_can_be_written_as_json(name: str) -> None:
    said = printable_name(name)
    assert orjson.loads(orjson.dumps(said)) == said
    if not any("\ud800" <= c <= "\udfff" for c in name):
        assert said == name


BROKEN = [b"", b" ", b"{", b'{"a"}', b"{'a': 1}", b'{"a": 1,}', b"\xff", b'"\xff"', b"nul", b'{"a": 1} x', b"\x00"]


@pytest.mark.parametrize("body", BROKEN)
def test_texts_that_are_no_json(body: bytes) -> None:
    with pytest.raises(ValueError):
        parse_leniently(body)


@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_a_value_error(body: bytes) -> None:
    try:
        parse_leniently(body)
    except ValueError:
        pass
