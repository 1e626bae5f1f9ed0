"""proxy.cache.miss_reason: a miss names what differs from the nearest stored request, and nothing else."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy.cache.entry import Entry
from proxy.cache.key import KeyParts, cache_key, canonical
from proxy.cache.miss_reason import (
    MAIN_FIELDS,
    MAX_FIELDS,
    RecentRequests,
    differences,
    field_digests_of,
    nearest,
    shown_names,
    why_missed,
)
from tests.cache.test_key import json_objects, json_values

BODY: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "Hi"}],
    "temperature": 0,
    "top_p": 1,
    "seed": 7,
    "stop": None,
    "vendor": {"deep": [1]},
}
PARTS = KeyParts("chat", "\n", "gpt-4o\n", "https://api.openai.com/v1", "", "", "", b"")


def request(body: Any = None, /, **parts: Any) -> KeyParts:
    raw = json.dumps(BODY if body is None else body).encode()
    return msgspec.structs.replace(PARTS, body=canonical(raw, frozenset({"stream"})), **parts)


def entry(parts: KeyParts, **fields: Any) -> Entry:
    key, traits = cache_key(parts), field_digests_of(parts)
    blank = Entry(key, "json", 200, (), b"", None, 0.0, 100.0, parts.endpoint, "", None, None, None, "", (), False)
    return msgspec.structs.replace(blank, **({"traits": traits} | fields))


def reason(recent: RecentRequests, parts: KeyParts, scope: str = "", wall: float = 1.0) -> str:
    return recent.reason(scope, parts.endpoint, cache_key(parts), field_digests_of(parts), wall)


def knowing(*known: KeyParts) -> RecentRequests:
    recent = RecentRequests()
    for parts in known:
        recent.add("", entry(parts))
    return recent


class TestTraits:
    def test_each_part_and_field_has_a_digest_and_no_text_is_kept(self) -> None:
        traits = field_digests_of(request(namespace="name a\nci", beta="v2", sample="1", query="x=1"))
        names = [trait.split(":")[0] for trait in traits.split()]
        parts = ["model", "namespace", "upstreams", "OpenAI-Beta", "sample", "query"]
        assert names == [*parts, "messages", "seed", "stop", "temperature", "top_p", "vendor"]
        assert all(len(trait.split(":")[1]) == 16 for trait in traits.split())
        assert "Hi" not in traits

    def test_the_spelling_of_json_does_not_matter(self) -> None:
        other = b'{"vendor":{"deep":[1]},"messages":[{"content":"\\u0048i","role":"user"}],"model":"gpt-4o"}'
        same = {"model": BODY["model"], "messages": BODY["messages"], "vendor": BODY["vendor"]}
        assert field_digests_of(request(same)) == field_digests_of(
            msgspec.structs.replace(PARTS, body=canonical(other, frozenset()))
        )

    def test_field_names_equal_to_parts_and_unusual_names_are_distinct(self) -> None:
        body = {"sample": 1, "body.sample": 2, "a b": 3, "x:y\r\n": 4, "é": 5, "": 6}
        names = [trait.rpartition(":")[0] for trait in field_digests_of(request(body, sample="1")).split()]
        assert names == ["model", "upstreams", "sample", "", "a%20b", "body.body.sample", "body.sample", *names[-2:]]
        assert names[-2:] == ["x%3Ay%0D%0A", "%C3%A9"]

    def test_too_many_or_too_long_field_names_have_no_digests(self) -> None:
        assert field_digests_of(request({f"f{i}": 1 for i in range(MAX_FIELDS)}))
        assert field_digests_of(request({f"f{i}": 1 for i in range(MAX_FIELDS + 1)})) == ""
        assert field_digests_of(request({"x" * 65: 1})) == ""
        assert reason(knowing(request({"x" * 65: 1})), request({"x" * 65: 2})) == "new"

    @given(json_objects)
    def test_any_body_has_digests(self, body: dict[str, Any]) -> None:
        assert field_digests_of(request(body)).isascii()

    @pytest.mark.parametrize("number", [b"-0", b"1e2", b"1E400", b"1e9999999", b"1" * 100_000])
    def test_numbers_of_any_size_have_digests(self, number: bytes) -> None:
        body = b'{"n":%b,"o":[%b]}' % (number, number)
        assert len(field_digests_of(msgspec.structs.replace(PARTS, body=canonical(body, frozenset()))).split()) == 4

    def test_any_header_bytes_have_a_digest(self) -> None:
        assert differences(field_digests_of(request(beta="\udcff")), field_digests_of(request(beta="\udcfe"))) == [
            "OpenAI-Beta"
        ]


class TestDifferences:
    @given(st.sampled_from(sorted(BODY)), json_values)
    def test_a_changed_field_is_named(self, field: str, value: Any) -> None:
        other = BODY | {field: value}
        assume(json.dumps(value) != json.dumps(BODY[field]))
        recent = knowing(
            request(), request({"model": "m", "messages": "x"}), request(BODY | {"messages": "elsewhere", "n": 2})
        )
        assert reason(recent, request(other)) == ("new" if field == "messages" else f"differs: {field}")

    @given(st.sampled_from(sorted(BODY)))
    def test_a_missing_field_is_named(self, field: str) -> None:
        shorter = {name: value for name, value in BODY.items() if name != field}
        expected = "new" if field == "messages" else f"differs: {field}"
        assert reason(knowing(request()), request(shorter)) == expected
        assert reason(knowing(request(shorter)), request()) == expected

    @pytest.mark.parametrize(
        ("parts", "name"),
        [
            ({"namespace": "\nci"}, "namespace"),
            ({"model": "gpt-4o-2024\n"}, "model"),
            ({"model": "gpt-4o\nmy-deployment"}, "model"),
            ({"model": "gpt-4o-2024\n", "upstreams": "elsewhere"}, "model"),
            ({"upstreams": "elsewhere"}, "upstreams"),
            ({"beta": "v2"}, "OpenAI-Beta"),
            ({"sample": "1"}, "sample"),
            ({"query": "api-version=1"}, "query"),
        ],
    )
    def test_a_differing_part_is_named(self, parts: dict[str, str], name: str) -> None:
        assert reason(knowing(request()), request(**parts)) == f"differs: {name}"
        assert reason(knowing(request(**parts)), request()) == f"differs: {name}"

    @pytest.mark.parametrize(("endpoint", "field"), MAIN_FIELDS.items())
    def test_a_request_with_other_content_is_new(self, endpoint: str, field: str) -> None:
        asked = [request({"model": "m", field: text, "x": 1}, endpoint=endpoint) for text in "ab"]
        assert reason(knowing(asked[0]), asked[1]) == "new"
        assert reason(knowing(asked[0]), request({"model": "m", field: "b", "x": 2}, endpoint=endpoint)) == "new"

    def test_the_nearest_request_is_compared(self) -> None:
        far = request(BODY | {"temperature": 1, "top_p": 0.5, "seed": 1})
        near = request(BODY | {"temperature": 1, "top_p": 0.5})
        for order in ((far, near), (near, far)):
            assert reason(knowing(*order), request()) == "differs: temperature, top_p"
            assert reason(knowing(*order), request(BODY | {"temperature": 1})) == "differs: top_p"

    def test_the_nearest_request_of_any_content_is_found(self) -> None:
        one, other = (
            field_digests_of(request(BODY | {"seed": 1, "n": 2})),
            field_digests_of(request(BODY | {"seed": 1})),
        )
        asked = field_digests_of(request())
        candidates = [("none", ""), ("one", one), ("other", other), ("later", other)]
        assert nearest(candidates, asked) == ("other", ["seed"])
        assert nearest([*candidates, ("same", asked)], asked) == ("same", [])
        assert nearest(candidates, "") is nearest([("none", "")], asked) is None

    def test_at_most_three_differences_are_named(self) -> None:
        assert shown_names(["a", "b", "c"]) == "differs: a, b, c"
        assert shown_names(["a", "b", "c", "d"]) == "differs: a, b, c, ..."

    def test_other_endpoints_and_clients_are_not_compared(self) -> None:
        recent = knowing(request())
        assert reason(recent, request(BODY | {"seed": 1}, endpoint="responses")) == "new"
        assert reason(recent, request(BODY | {"seed": 1}, namespace="b\n"), scope="b") == "new"

    def test_an_equal_request_is_gone_or_expired(self) -> None:
        recent = knowing(request(), *(request(BODY | {"seed": seed}) for seed in range(10, 20)))
        assert reason(recent, request()) == "gone"
        assert reason(recent, request(), wall=100.0) == "expired"
        assert reason(recent, request(BODY | {"seed": 1}), wall=100.0) == "new"

    def test_after_clearing_every_request_is_new(self) -> None:
        recent = knowing(request())
        recent.clear()
        assert reason(recent, request(BODY | {"seed": 1})) == "new"
        recent.add("", entry(request(), traits=""))
        assert reason(recent, request(BODY | {"seed": 1})) == "new"

    def test_remembered_requests_are_bounded(self) -> None:
        recent = RecentRequests(kept=8)
        for number in range(100):
            recent.add("", entry(request(BODY | {"messages": str(number), "n": number})))
            recent.add("", entry(request(BODY | {"n": number})))
        assert len(recent._by_question) == len(recent._expiries) == 8
        assert sum(map(len, recent._by_question.values())) <= 32


WALL = 50.0


@pytest.mark.parametrize(
    ("ages", "max_age", "wants_usage", "expected"),
    [
        ((None, None), None, False, None),
        ((100, None), None, False, ("expired", "stale")),
        ((None, 100), None, False, ("expired", "stale")),
        ((100, 100), 5, False, ("expired", "stale")),
        ((10, None), 5, False, ("max-age", "request")),
        ((None, 10), 5, False, ("max-age", "request")),
        ((100, 10), 5, False, ("max-age", "request")),
        ((None, 10), None, False, ("stored in the other form", "uri-miss")),
        ((100, 10), None, False, ("stored in the other form", "uri-miss")),
        ((10, None), None, True, ("stored without usage", "uri-miss")),
    ],
)
def test_the_reason_why_a_stored_entry_is_not_served(
    ages: tuple[int | None, int | None], max_age: int | None, wants_usage: bool, expected: tuple[str, str] | None
) -> None:
    stored = [
        None if age is None else entry(request(), form=form, stored_at=WALL - age)
        for age, form in zip(ages, ("sse", "json"), strict=True)
    ]
    assert why_missed(stored[0], stored[1], WALL, max_age, wants_usage) == expected


def test_comparing_is_fast() -> None:
    """A few us; generous, as this machine may be busy."""
    recent, parts = knowing(request()), request(BODY | {"seed": 1})
    start = time.process_time()
    for _ in range(2000):
        reason(recent, parts)
    assert time.process_time() - start < 1
