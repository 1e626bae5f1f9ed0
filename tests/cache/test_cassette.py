"""proxy.cache.cassette: every entry comes back from its line, and a line that is no entry is refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.cassette import CassetteLineError, read, read_line, shareable_headers, write, write_line
from proxy.cache.entry import Entry
from proxy.cost.usage import Usage

texts = st.text(st.characters(codec="utf-8"), max_size=20)
counts = st.integers(0, 10**12)
seconds = st.floats(allow_nan=False, allow_infinity=False)
tokens = st.text("abcxyzABC-_!0189", min_size=1, max_size=12).map(str.encode)
values = st.binary(max_size=12).filter(lambda value: not set(value) & set(b"\r\n\0"))
bodies = st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    body = draw(bodies)
    span = st.tuples(st.integers(0, len(body)), st.integers(0, len(body))).map(lambda ends: (min(ends), max(ends)))
    return Entry(
        key=draw(texts),
        form=draw(st.sampled_from(("json", "sse"))),
        status=draw(st.integers(200, 599)),
        headers=shareable_headers(draw(st.lists(st.tuples(tokens, values), max_size=3))),
        body=body,
        usage_span=draw(st.none() | span),
        stored_at=draw(seconds),
        ttl=draw(seconds),
        endpoint=draw(texts),
        model=draw(texts),
        answer_model=draw(st.none() | texts),
        usage=draw(st.none() | st.builds(Usage, counts, counts, counts, counts, counts, counts)),
        cost=draw(st.none() | st.decimals(0, 10**6, places=12).map(lambda cost: f"{cost:f}")),
        namespace=draw(texts),
        tags=tuple(draw(st.lists(texts, max_size=3))),
        sampled=draw(st.booleans()),
        usage_asked=draw(st.booleans()),
        request=draw(st.none() | texts),
    )


def entry(**changes: Any) -> Entry:
    plain = Entry(
        key="ab" * 32,
        form="json",
        status=200,
        headers=((b"content-type", b"application/json"),),
        body=b'{"answer": "\xc3\xbc"}',
        usage_span=None,
        stored_at=1_800_000_000.25,
        ttl=3600.0,
        endpoint="chat",
        model="gpt-4o",
        answer_model="gpt-4o-2024-08-06",
        usage=Usage(10, 20, 30),
        cost="0.002250",
        namespace="ci",
        tags=("team:search",),
        sampled=False,
    )
    return msgspec.structs.replace(plain, **changes)


def changed(**members: Any) -> bytes:
    """The line of `entry()` with other members; `...` takes one out."""
    line = json.loads(write_line(entry())) | members
    return json.dumps({name: value for name, value in line.items() if value is not ...}).encode()


@given(entries())
def test_any_entry_is_read_back_from_its_line(one: Entry) -> None:
    line = write_line(one)
    assert read_line(line) == one
    assert line.count(b"\n") == 1
    assert line == write_line(read_line(line))


def test_the_form_of_a_line() -> None:
    """The format: whoever changes this changes what is committed in other people's repositories."""
    assert write_line(entry()).decode() == (
        '{"cassette":1,"key":"' + "ab" * 32 + '","form":"json","status":200,'
        '"headers":[["content-type","application/json"]],"usage_span":null,'
        '"stored_at":1800000000.25,"ttl":3600.0,"endpoint":"chat","model":"gpt-4o","answer_model":"gpt-4o-2024-08-06",'
        '"usage":{"prompt_tokens":10,"completion_tokens":20,"total_tokens":30},'
        '"cost":"0.002250","namespace":"ci","tags":["team:search"],'
        '"sampled":false,"body":"{\\"answer\\": \\"ü\\"}"}\n'
    )
    line = write_line(entry(request='{"model":"gpt-4o"}', body=b"\xff"))
    assert line.endswith(b',"request":"{\\"model\\":\\"gpt-4o\\"}","body_base64":"/w=="}\n')


def test_no_request_or_account_data_is_written() -> None:
    secret = [
        *((b"Authorization", b"Bearer sk-1"), (b"api-key", b"sk-1"), (b"Set-Cookie", b"a=sk-1"), (b"Cookie", b"sk-1")),
        *((b"x-request-id", b"sk-1"), (b"openai-organization", b"sk-1"), (b"x-ratelimit-limit-requests", b"sk-1")),
    ]
    line = write_line(entry(headers=(*secret, (b"openai-version", b"2020-10-01"))))
    assert b"sk-1" not in line
    assert read_line(line).headers == ((b"openai-version", b"2020-10-01"),)


def test_a_file_is_sorted_and_independent_of_the_order() -> None:
    several = [entry(key="b"), entry(key="a", form="sse"), entry(key="a"), entry(key="C")]
    lines = list(write(several))
    assert lines == list(write(reversed(several)))
    assert [(one.key, one.form) for one in read("f", lines)] == [
        ("C", "json"),
        ("a", "json"),
        ("a", "sse"),
        ("b", "json"),
    ]


def test_entries_that_json_cannot_hold_are_refused() -> None:
    for one in (entry(ttl=float("inf")), entry(stored_at=float("nan")), entry(model="\ud800")):
        with pytest.raises(ValueError):
            write_line(one)


BAD = [
    (b"nonsense", "not JSON"),
    (b"<<<<<<< HEAD", "not JSON"),
    (b"\xff", "not JSON"),
    (b"[]", "expected a JSON object"),
    (changed(cassette=...), "version 1, found none"),
    (changed(cassette=2), "version 1, found 2"),
    (changed(cassette=True), "version 1, found something else"),
    (changed(key=...), "missing required field `key`"),
    (changed(key=1), r"Expected `str`, got `int` - at `\$.key`"),
    (changed(form="xml"), "form"),
    (changed(novelty=1), "unknown member 'novelty'"),
    (changed(body=...), "one of `body` and `body_base64`"),
    (changed(body_base64=""), "one of `body` and `body_base64`"),
    (changed(body={}), "`body`: expected a text"),
    (changed(body=..., body_base64="?"), "expected base64"),
    (changed(headers=...), "list of"),
    (changed(headers=[["a"]]), "list of"),
    (changed(headers=[["a", "\u20ac"]]), "Latin-1"),
    (changed(headers=[["a", "b\r\nSet-Cookie: c"]]), "not a header"),
    (changed(headers=[["a b", "c"]]), "not a header"),
    (changed(headers=[["Authorization", "Bearer sk-1"]]), "no stored answer has"),
    (changed(headers=[["Transfer-Encoding", "chunked"]]), "no stored answer has"),
    (changed(status=99), "`status`"),
    (changed(usage_span=[0, 1000]), "`usage_span`"),
    (changed(usage_span=[3, 2]), "`usage_span`"),
    (changed(usage={"prompt_tokens": -1, "completion_tokens": 0, "total_tokens": 0}), "`usage`"),
    (changed(cost="much"), "`cost`"),
    (changed(cost="1\r\nX: y"), "`cost`"),
    (changed().replace(b"3600.0", b"1e999"), "."),
]


@pytest.mark.parametrize(("line", "why"), BAD)
def test_an_invalid_line_names_its_place_and_reason(line: bytes, why: str) -> None:
    lines = [write_line(entry(key="first")), b"\n", line + b"\n"]
    with pytest.raises(CassetteLineError, match=f"(?s)dir/file:3: .*{why}") as error:
        list(read("dir/file", lines))
    assert "sk-1" not in str(error.value)


def test_an_entry_is_in_a_file_once() -> None:
    with pytest.raises(CassetteLineError, match="f:3: the same key and form as line 1"):
        list(read("f", [write_line(entry()), b"\n", write_line(entry(model="other"))]))
