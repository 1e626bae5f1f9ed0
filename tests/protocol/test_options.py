"""Options of a request, by header and in the base URL."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.errors import ProxyError
from proxy.protocol.options import NO_OPTIONS, Options, from_headers, from_segment

HEADERS = {
    "X-Proxy-Cache-TTL": "ttl",
    "X-Proxy-Cache-Namespace": "namespace",
    "X-Proxy-Sample": "sample",
    "X-Proxy-Tag": "tag",
    "X-Proxy-Max-Wait": "max-wait",
    "X-Proxy-Timeout": "timeout",
    "X-Proxy-Max-Retries": "retries",
    "X-Proxy-Stream-Cost": "stream-cost",
    "X-Proxy-Run": "run",
    "X-Proxy-Max-Cost": "max-cost",
}
"""Header -> its name in a base URL."""

GOOD: list[tuple[str, str, dict[str, Any]]] = [
    ("X-Proxy-Cache-TTL", "3600", {"ttl": 3600.0}),
    ("X-Proxy-Cache-TTL", "1h", {"ttl": 3600.0}),
    ("X-Proxy-Cache-TTL", "0", {"ttl": 0.0}),
    ("X-Proxy-Cache-Namespace", "ci", {"namespace": "ci"}),
    ("X-Proxy-Cache-Namespace", "team/a:b~c", {"namespace": "team/a:b~c"}),
    ("X-Proxy-Cache-Namespace", "n" * 128, {"namespace": "n" * 128}),
    ("X-Proxy-Sample", "0", {"sample": "0"}),
    ("X-Proxy-Sample", "2", {"sample": "2"}),
    ("X-Proxy-Sample", "-1", {"sample": "-1"}),
    ("X-Proxy-Sample", "007", {"sample": "7"}),
    ("X-Proxy-Sample", "-0", {"sample": "0"}),
    ("X-Proxy-Tag", "team:search", {"tags": ("team:search",)}),
    ("X-Proxy-Tag", "a.b_c-1:any text: at all", {"tags": ("a.b_c-1:any text: at all",)}),
    ("X-Proxy-Max-Wait", "250ms", {"max_wait": 0.25}),
    ("X-Proxy-Max-Wait", "0", {"max_wait": 0.0}),
    ("X-Proxy-Timeout", "90", {"timeout": 90.0}),
    ("X-Proxy-Timeout", "1", {"timeout": 1.0}),
    ("X-Proxy-Timeout", "500ms", {"timeout": 0.5}),
    ("X-Proxy-Timeout", "2m", {"timeout": 120.0}),
    *[("X-Proxy-Max-Retries", str(number), {"max_retries": number}) for number in range(11)],
    ("X-Proxy-Stream-Cost", "comment", {"stream_cost": True}),
    ("X-Proxy-Stream-Cost", "Comment", {"stream_cost": True}),
    ("X-Proxy-Run", "eval-7", {"run": "eval-7"}),
    ("X-Proxy-Run", "!~" * 64, {"run": "!~" * 64}),
    ("X-Proxy-Max-Cost", "2.50", {"max_cost": Decimal("2.50")}),
    ("X-Proxy-Max-Cost", "0", {"max_cost": Decimal(0)}),
    ("X-Proxy-Max-Cost", ".000000000000000001", {"max_cost": Decimal("1e-18")}),
    ("X-Proxy-Max-Cost", "999999999.", {"max_cost": Decimal(999999999)}),
]


def quoted(text: str) -> str:
    """Percent-encoded to the last letter."""
    return "".join(f"%{byte:02X}" for byte in text.encode())


@pytest.mark.parametrize(("header", "value", "fields"), GOOD)
def test_an_option_by_header_and_in_the_base_url(header: str, value: str, fields: dict[str, Any]) -> None:
    expected = Options(**fields)
    assert from_headers(NO_OPTIONS, [(header, value)]) == expected
    assert from_headers(NO_OPTIONS, [(header.lower(), f"  {value} "), ("User-Agent", "x")]) == expected
    assert from_headers(NO_OPTIONS, [(header.upper(), value)]) == expected
    assert from_segment(f"{HEADERS[header]}={quoted(value)}") == expected
    if not set("/ ") & set(value):
        assert from_segment(f"{HEADERS[header]}={value}") == expected


BAD: list[tuple[str, list[str]]] = [
    ("X-Proxy-Cache-TTL", ["", "soon", "-1", "nan", "1e3", "1h30m", "5 m", "inf"]),
    ("X-Proxy-Cache-Namespace", ["", " ", "a b", "naïve", "n" * 129, "a\tb", "a\nb", "a\x00b", "\x7f"]),
    ("X-Proxy-Sample", ["", "one", "1.5", "+1", "1e3", "0x1", "1_0", "9" * 19, "--1", "-", "nan"]),
    ("X-Proxy-Tag", ["", "team", ":x", "team:", "te am:x", "tëam:x", "t" * 65 + ":x", "t:" + "x" * 129, "t:a\nb"]),
    ("X-Proxy-Max-Wait", ["", "-1", "auto", "nan", "1 s"]),
    ("X-Proxy-Timeout", ["", "0", "0s", "0ms", "-1", "never"]),
    ("X-Proxy-Max-Retries", ["", "11", "-1", "1.0", "+1", "x", "100", "00011", "000099999", "1e1", "²", "٣", "9" * 50]),
    ("X-Proxy-Stream-Cost", ["", "yes", "true", "1"]),
    ("X-Proxy-Run", ["", " ", "a b", "naïve", "n" * 129, "a\tb", "\x7f"]),
    ("X-Proxy-Max-Cost", ["", ".", "-1", "+1", "1e3", "nan", "inf", "1,5", "$1", "1" * 10, "0." + "1" * 19, "٣"]),
]


@pytest.mark.parametrize(("header", "value"), [(header, value) for header, values in BAD for value in values])
def test_a_malformed_one_is_a_400_that_names_it(header: str, value: str) -> None:
    with pytest.raises(ProxyError) as caught:
        from_headers(NO_OPTIONS, [(header, value)])
    refusal = caught.value
    assert (refusal.status, refusal.code, refusal.param, refusal.should_retry) == (400, "invalid_option", header, False)
    assert header in refusal.message
    with pytest.raises(ProxyError) as caught:
        from_segment(f"{HEADERS[header]}={quoted(value)}")
    assert (caught.value.status, caught.value.param) == (400, HEADERS[header])
    assert HEADERS[header] in caught.value.message


def test_a_malformed_value_is_not_repeated() -> None:
    """It could be a secret that got into the wrong header."""
    with pytest.raises(ProxyError) as caught:
        from_headers(NO_OPTIONS, [("X-Proxy-Cache-Namespace", "sk-secret with a space")])
    assert b"sk-secret" not in caught.value.body()


def test_no_header_gives_no_option() -> None:
    off = (NO_OPTIONS.no_cache, NO_OPTIONS.no_store, NO_OPTIONS.only_if_cached, NO_OPTIONS.stream_cost)
    assert off == (False, False, False, False)
    unset = (NO_OPTIONS.max_age, NO_OPTIONS.ttl, NO_OPTIONS.max_wait, NO_OPTIONS.timeout, NO_OPTIONS.max_retries)
    assert unset == (None,) * 5
    assert (NO_OPTIONS.namespace, NO_OPTIONS.sample, NO_OPTIONS.tags) == ("", "", ())


def test_other_headers_give_no_option() -> None:
    headers = [("Accept", "*/*"), ("X-Proxy-Unheard-Of", "1"), ("Authorization", "Bearer x"), ("X-Stainless-Lang", "p")]
    assert from_headers(NO_OPTIONS, headers) is NO_OPTIONS


# --- Cache-Control ----------------------------------------------------------------------------------------------------

CACHE_CONTROL: list[tuple[str, dict[str, Any]]] = [
    ("no-cache", {"no_cache": True}),
    ("no-store", {"no_store": True}),
    ("only-if-cached", {"only_if_cached": True}),
    ("max-age=60", {"max_age": 60}),
    ("max-age=0", {"max_age": 0}),
    ('max-age="60"', {"max_age": 60}),
    ("No-Cache, NO-STORE", {"no_cache": True, "no_store": True}),
    ("no-cache,max-age=5", {"no_cache": True, "max_age": 5}),
    ('no-cache="set-cookie"', {"no_cache": True}),
    ("", {}),
    (",, ,", {}),
    ("no-transform, max-stale=5, min-fresh=1, immutable, x=y", {}),
    ("stale-if-error=60", {"stale_if_error": 60}),
    ("no-cache, Stale-If-Error=0", {"no_cache": True, "stale_if_error": 0}),
    ("public,\tonly-if-cached ", {"only_if_cached": True}),
    ("max-age=999999999", {"max_age": 999_999_999}),
    ("max-age=99999999999999999999", {"max_age": 2**31}),
]


@pytest.mark.parametrize(("value", "fields"), CACHE_CONTROL)
def test_cache_control(value: str, fields: dict[str, Any]) -> None:
    assert from_headers(NO_OPTIONS, [("Cache-Control", value)]) == Options(**fields)
    assert from_headers(NO_OPTIONS, [("cache-control", value)]) == Options(**fields)


def test_several_cache_control_lines_add_up() -> None:
    headers = [("Cache-Control", "no-cache"), ("Cache-Control", "max-age=5, foo")]
    assert from_headers(NO_OPTIONS, headers) == Options(no_cache=True, max_age=5)


@pytest.mark.parametrize("value", ["max-age", "max-age=", "max-age=-1", "max-age=1.5", "max-age=soon", "max-age=²"])
def test_a_malformed_max_age(value: str) -> None:
    with pytest.raises(ProxyError) as caught:
        from_headers(NO_OPTIONS, [("Cache-Control", value)])
    assert (caught.value.code, caught.value.param) == ("invalid_option", "Cache-Control")
    assert "max-age" in caught.value.message


@pytest.mark.parametrize(
    ("segment", "fields"),
    [
        ("cache=no-cache", {"no_cache": True}),
        ("cache=no-store", {"no_store": True}),
        ("cache=only-if-cached", {"only_if_cached": True}),
        ("max-age=60", {"max_age": 60}),
        ("cache=no-cache;max-age=5", {"no_cache": True, "max_age": 5}),
        ("cache%3Dno-cache=", None),
        ("c%61che=no-c%61che", {"no_cache": True}),
    ],
)
def test_cache_directives_in_the_base_url(segment: str, fields: dict[str, Any] | None) -> None:
    if fields is None:
        with pytest.raises(ProxyError):
            from_segment(segment)
    else:
        assert from_segment(segment) == Options(**fields)


# --- several at once --------------------------------------------------------------------------------------------------


def test_the_documented_example() -> None:
    assert from_segment("namespace=ci;ttl=1h;tag=team:search") == Options(
        namespace="ci", ttl=3600.0, tags=("team:search",)
    )


def test_empty_parts_are_ignored() -> None:
    assert from_segment("") == NO_OPTIONS
    assert from_segment(";;ttl=1h;") == Options(ttl=3600.0)


def test_only_the_first_equals_sign_separates() -> None:
    assert from_segment("namespace=a=b") == Options(namespace="a=b")
    assert from_segment("namespace=a%3Bb") == Options(namespace="a;b")


@pytest.mark.parametrize(
    ("segment", "param"),
    [
        ("ttl", "ttl"),
        ("nonsense=1", "nonsense"),
        ("TTL=1h", "TTL"),
        ("=1", ""),
        ("cache=max-age", "cache"),
        ("cache=", "cache"),
        ("max-age=x", "max-age"),
        ("no-cache=1", "no-cache"),
        ("namespace=ci;bogus=2", "bogus"),
        ("x" * 200 + "=1", "x" * 64),
    ],
)
def test_a_malformed_segment(segment: str, param: str) -> None:
    with pytest.raises(ProxyError) as caught:
        from_segment(segment)
    assert (caught.value.code, caught.value.param) == ("invalid_option", param)


def test_tags_repeat_up_to_a_number() -> None:
    base = from_segment("tag=a:1;tag=b:2")
    assert from_headers(base, [("X-Proxy-Tag", "c:3")]).tags == ("a:1", "b:2", "c:3")
    sixteen = [("X-Proxy-Tag", f"n:{number}") for number in range(16)]
    assert len(from_headers(NO_OPTIONS, sixteen).tags) == 16
    with pytest.raises(ProxyError, match="at most 16"):
        from_headers(NO_OPTIONS, [*sixteen, ("X-Proxy-Tag", "one:more")])


def test_a_header_overrides_the_base_url() -> None:
    base = from_segment("ttl=1h;namespace=ci;retries=3")
    got = from_headers(base, [("X-Proxy-Cache-TTL", "5m"), ("Cache-Control", "no-store")])
    assert got == Options(ttl=300.0, namespace="ci", max_retries=3, no_store=True)
    assert base.ttl == 3600.0


# --- anything at all --------------------------------------------------------------------------------------------------

ANY = st.text() | st.text(st.sampled_from("=;a\udcff\ud800%"))
NAMES = st.sampled_from([*HEADERS, "Cache-Control", "X-Proxy-Run"]) | st.text("abc-XYZ", min_size=1)


def attempt(parse: Callable[[], Options]) -> Options | dict[str, Any]:
    """The options, or the error that the client sees."""
    try:
        return parse()
    except ProxyError as refusal:
        error: dict[str, Any] = json.loads(refusal.body())["error"]
        return error


@given(st.lists(st.tuples(NAMES, ANY | st.from_regex(r"[0-9a-z:=,\"-]{0,9}")), max_size=5))
def test_any_header_is_accepted_or_an_invalid_option(headers: list[tuple[str, str]]) -> None:
    got = attempt(lambda: from_headers(NO_OPTIONS, headers))
    assert isinstance(got, Options) or got["param"]


@given(ANY | st.from_regex(r"([a-z-]{1,9}=[0-9a-z%:]{0,6};){0,3}"))
def test_any_segment_is_accepted_or_an_invalid_option(segment: str) -> None:
    got = attempt(lambda: from_segment(segment))
    assert isinstance(got, Options) or got["code"] == "invalid_option"
