"""Batches as items: what is taken apart, what an item's key is made of; every vector comes back to its place."""

from __future__ import annotations

import base64
import json
import struct
from decimal import Decimal
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.embeddings import (
    MAX_CALL_TOKENS,
    MAX_ITEMS,
    CachedItem,
    EmbeddingBatch,
    answer_body,
    answer_from_items,
    apportion,
    cached_items,
    item_entries,
    read_answer,
    read_batch,
    savings_of,
    total_usage,
    vectors_of,
)
from proxy.cache.entry import Entry
from proxy.cache.key import KeyParts, cache_key, canonical
from proxy.cost.pricing import Cost
from proxy.cost.usage import Usage

DROP = frozenset({"stream", "stream_options", "user"})
PARTS = KeyParts("embeddings", "", "text-embedding-3-small", "https://api.openai.com/v1", "", "", "", b"")


def batch_of(given: Any, parts: KeyParts = PARTS, drop: frozenset[str] = DROP, **fields: Any) -> EmbeddingBatch | None:
    document = {"model": "text-embedding-3-small", "input": given} | fields
    raw = orjson.dumps(document)
    return read_batch(raw, document, msgspec.structs.replace(parts, body=canonical(raw, drop)), drop)


def taken_apart(given: Any, **fields: Any) -> EmbeddingBatch:
    batch = batch_of(given, **fields)
    assert batch is not None
    return batch


def entry(body: bytes = b"", **fields: Any) -> Entry:
    made = Entry(
        key="k", form="json", status=200, headers=(), body=body, usage_span=None, stored_at=1000.0, ttl=100.0,
        endpoint="embeddings", model="m", answer_model="m-1", usage=None, cost=None, namespace="", tags=(),
        sampled=False,
    )  # fmt: skip
    return msgspec.structs.replace(made, **fields)


def price(usage: Usage) -> Cost:
    return Cost(Decimal("0.00000002") * usage.prompt_tokens, "exact")


class TestRequests:
    @pytest.mark.parametrize(
        ("given", "texts", "order"),
        [
            ("a", [b'"a"'], [0]),
            (["a"], [b'"a"'], [0]),
            (["a", "b", "a"], [b'"a"', b'"b"'], [0, 1, 0]),
            (["é", "\u00e9", "e\u0301"], ['"é"'.encode(), '"e\u0301"'.encode()], [0, 0, 1]),
            (["a", "a "], [b'"a"', b'"a "'], [0, 1]),
            ([1, 2, 3], [b"[1,2,3]"], [0]),
            ([[1, 2], [3], [1, 2]], [b"[1,2]", b"[3]"], [0, 1, 0]),
            (["[1]", "1"], [b'"[1]"', b'"1"'], [0, 1]),
            (["", "x"], [b'""', b'"x"'], [0, 1]),
        ],
    )
    def test_the_items_of_a_batch(self, given: Any, texts: list[bytes], order: list[int]) -> None:
        batch = taken_apart(given)
        assert (list(batch.texts), list(batch.order)) == (texts, order)
        assert len(set(batch.keys)) == len(texts)

    @pytest.mark.parametrize(
        "given",
        [[], [[]], None, 1, {}, ["a", 1], [1, "a"], ["a", ["b"]], ["a", [1]], [[1], "a"], [[1], []], [[1], [2.0]],
         [1.0], [True], [[True]], [None], ["a", None], [{"text": "a"}], [[[1]]], [-1], [2**60]],
    )  # fmt: skip
    def test_input_that_is_not_a_list_is_not_split(self, given: Any) -> None:
        assert batch_of(given) is None

    def test_tokens_in_an_unusual_spelling_are_not_split(self) -> None:
        for raw in (b'{"input":[1, -0]}', b'{"input":[[-0]]}'):
            assert read_batch(raw, orjson.loads(raw), PARTS, DROP) is None

    def test_unknown_fields_prevent_splitting(self) -> None:
        assert batch_of(["a", "b"], late_chunking=True) is None
        assert batch_of(["a", "b"], zz_future=1) is None
        assert batch_of(["a", "b"], dimensions=3, encoding_format="base64", user="u", input_type="query") is not None
        assert batch_of(["a", "b"], drop=DROP | {"metadata"}, metadata={}) is not None

    def test_the_key_of_an_item_is_unique(self) -> None:
        one, two = taken_apart(["a", "b"]), taken_apart(["b", "a"])
        assert one.keys == two.keys[::-1]
        assert taken_apart("a").keys == taken_apart(["a"]).keys == one.keys[:1]
        assert taken_apart([7]).keys != taken_apart("[7]").keys
        for whole in ("a", ["a"], None):
            body = canonical(orjson.dumps({"model": PARTS.model, "input": whole}), DROP)
            assert cache_key(msgspec.structs.replace(PARTS, body=body)) not in one.keys

    @pytest.mark.parametrize("part", ["namespace", "model", "upstreams", "beta", "sample", "query"])
    def test_parts_of_the_request_key_are_in_the_items_key(self, part: str) -> None:
        other = msgspec.structs.replace(PARTS, **{part: "other"})
        assert set(taken_apart(["a"]).keys).isdisjoint(taken_apart(["a"], parts=other).keys)

    @pytest.mark.parametrize(
        "fields",
        [{"dimensions": 3}, {"dimensions": None}, {"encoding_format": "base64"}, {"encoding_format": "float"},
         {"input_type": "query"}, {"model": "other"}],
    )  # fmt: skip
    def test_other_fields_are_in_the_items_key(self, fields: dict[str, Any]) -> None:
        assert set(taken_apart(["a"]).keys).isdisjoint(taken_apart(["a"], **fields).keys)

    def test_ignored_fields_are_not_in_the_items_key(self) -> None:
        assert taken_apart(["a"], user="u", stream=False).keys == taken_apart(["a"]).keys

    @given(st.lists(st.text(max_size=5) | st.sampled_from(["a", "b"]), min_size=2, max_size=30), st.data())
    def test_spelling_does_not_change_an_items_key(self, texts: list[str], data: Any) -> None:
        if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
            return
        import json

        document = {"model": "m", "input": texts, "dimensions": 3}
        names = data.draw(st.permutations(list(document)))
        raw = json.dumps(
            {name: document[name] for name in names}, indent=data.draw(st.sampled_from([None, 3]))
        ).encode()
        other = read_batch(raw, document, PARTS, DROP)
        same = read_batch(orjson.dumps(document), document, PARTS, DROP)
        assert other == same
        assert other is not None
        assert [orjson.loads(other.texts[number]) for number in other.order] == texts

    def test_a_batch_within_the_limits_is_one_call(self) -> None:
        batch = taken_apart([str(n) for n in range(MAX_ITEMS)])
        assert batch.calls_to_make() == [tuple(range(MAX_ITEMS))]
        assert not batch.changes_request

    def test_a_batch_with_too_many_items_is_several_calls(self) -> None:
        batch = taken_apart([str(n % 5000) for n in range(10_000)])
        assert [len(part) for part in batch.calls_to_make()] == [2048, 2048, 904]
        assert sorted(number for part in batch.calls_to_make() for number in part) == list(range(5000))
        assert batch.changes_request

    def test_a_batch_with_too_many_tokens_is_several_calls(self) -> None:
        for items, sizes in (
            ([[n] * 100_000 for n in range(5)], [2, 2, 1]),
            ([f"{n}" * 400_000 for n in range(5)], [2, 2, 1]),
            ([[n] * (MAX_CALL_TOKENS + 1) for n in range(2)], [1, 1]),
        ):
            assert [len(part) for part in taken_apart(items).calls_to_make()] == sizes

    def test_found_and_fetched_items_are_not_fetched_again(self) -> None:
        batch = taken_apart(["a", "b", "c", "d"])
        batch = msgspec.structs.replace(batch, found={1: CachedItem(b"[1]", entry())})
        assert batch.calls_to_make() == [(0, 2, 3)]
        assert batch.calls_to_make({0, 3}) == [(2,)]
        assert batch.input((0, 2)) == b'["a","c"]'


VECTORS = st.binary(min_size=1, max_size=20).map(lambda b: b'"' + base64.b64encode(b) + b'"') | st.lists(
    st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5
).map(lambda floats: orjson.dumps(floats, option=orjson.OPT_INDENT_2))


class TestAnswers:
    @given(st.lists(VECTORS, min_size=1, max_size=10), st.randoms())
    def test_vectors_keep_their_bytes_and_order(self, vectors: list[bytes], random: Any) -> None:
        data = [b'{ "index": %d, "embedding": %b, "object":"embedding" }' % pair for pair in enumerate(vectors)]
        random.shuffle(data)
        body = (
            b'{"model": "m", "x": {"y": [1e400]}, "data": [' + b" ,\n".join(data) + b'], "usage": {"prompt_tokens": 9}}'
        )
        read = read_answer(body)
        assert vectors_of(read) == vectors
        assert (read["model"], read["usage"], read["error"]) == ("m", {"prompt_tokens": 9}, None)

    @pytest.mark.parametrize(
        "datum",
        [b'{"index":0,"embedding":[1],"extra":1}', b'{"index":0,"embedding":[ ]}', b'{"index":0,"embedding":""}',
         b'{"index":0,"embedding":{"a":1}}', b'{"index":0,"embedding":null}', b'{"index":0}', b'{"embedding":[1]}',
         b'{"index":"0","embedding":[1]}', '{"index":0,"embedding":"é"}'.encode()],
    )  # fmt: skip
    def test_responses_of_another_form_are_parsed_but_not_split(self, datum: bytes) -> None:
        body = b'{"data":[' + datum + b"]}"
        assert read_answer(body) == orjson.loads(body)

    @pytest.mark.parametrize("vector", [b"[1]", b'"AA"'])
    def test_deep_responses_are_not_split(self, vector: bytes) -> None:
        """No version of Python may be the one that decides how deep that is."""
        data = b'"data":[' + b",".join(b'{"index":%d,"embedding":%b}' % (n, vector) for n in range(2000)) + b"]"
        assert read_answer(b"{%b}" % data)["data"][7]["embedding"] == vector
        for deep in (b"[" * 900 + b"]" * 900, b"[" * 1020 + b"]" * 1020):
            for body in (b'{%b,"x":%b}' % (data, deep), b'{"data":[{"index":0,"embedding":%b}]}' % deep):
                assert type(read_answer(body)["data"][0]["embedding"]) is not bytes  # not taken apart
        for deep in (b"[" * 5000 + b"]" * 5000, b"[" * 100_000 + b"]" * 100_000):
            assert read_answer(b'{%b,"x":%b}' % (data, deep)) == {}

    @pytest.mark.parametrize("body", [b"", b"{", b'{"data":[{"index":0,"embedding":[1,,2]}]}', b'{"data":[]', b"\xff"])
    def test_invalid_json_raises(self, body: bytes) -> None:
        with pytest.raises(ValueError, match=r"\w"):
            read_answer(body)

    @pytest.mark.parametrize("body", [b"[]", b"1", b'{"data":null}', b'{"error":{"code":1}}', b'{"data":[NaN]}'])
    def test_other_documents_are_returned_unchanged(self, body: bytes) -> None:
        assert repr(read_answer(body)) == repr(json.loads(body))

    def test_a_joined_response_has_the_providers_form(self) -> None:
        body = answer_body({0: b"[0.10, 1e-3]", 1: b'"AAAA"'}, (1, 0, 1), "m", Usage(3, 0, 4))
        assert body == (
            b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":"AAAA"},'
            b'{"object":"embedding","index":1,"embedding":[0.10, 1e-3]},'
            b'{"object":"embedding","index":2,"embedding":"AAAA"}],"model":"m",'
            b'"usage":{"prompt_tokens":3,"total_tokens":4}}'
        )
        assert orjson.loads(answer_body({0: b"[1]"}, (0,), None, None)).keys() == {"object", "data"}


class TestShares:
    @given(st.integers(0, 10**12), st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
    def test_token_shares_add_up(self, total: int, weights: list[int]) -> None:
        shares = apportion(total, weights)
        assert sum(shares) == total
        whole = sum(max(weight, 1) for weight in weights)
        for share, weight in zip(shares, weights, strict=True):
            assert abs(share - total * max(weight, 1) / whole) <= 1 + total * 1e-12

    def test_counted_tokens_are_exact_and_texts_estimated(self) -> None:
        tokens, texts = taken_apart([[1, 2], [3], [4]]), taken_apart(["aaaaaa", "bbb"])
        template = entry(usage=Usage(4, 0, 4))
        exact = item_entries(template, tokens, (0, 1, 2), [b"[1]"] * 3, price)
        assert [(one.usage, one.estimated) for one in exact] == [(Usage(n, 0, n), False) for n in (2, 1, 1)]
        assert all(
            one.estimated for one in item_entries(entry(usage=Usage(5, 0, 5)), tokens, (0, 1), [b"[1]"] * 2, price)
        )
        shared = item_entries(entry(usage=Usage(9, 0, 9)), texts, (0, 1), [b"[1]"] * 2, price)
        assert [(one.usage, one.estimated) for one in shared] == [(Usage(6, 0, 6), True), (Usage(3, 0, 3), True)]
        alone = item_entries(entry(usage=Usage(9, 0, 9)), texts, (1,), [b"[1]"], price)
        assert [(one.usage, one.cost, one.estimated, one.key) for one in alone] == [
            (Usage(9, 0, 9), "0.00000018", False, texts.keys[1])
        ]

    def test_without_usage_there_are_no_counts(self) -> None:
        stored = item_entries(entry(), taken_apart(["a", "b"]), (0, 1), [b"[1]", b"[2]"], price)
        assert [(one.usage, one.cost, one.estimated) for one in stored] == [(None, None, False)] * 2
        assert (savings_of([CachedItem(b"", one) for one in stored]).usage, total_usage([None, Usage(1, 0, 1)])) == (
            None,
            None,
        )


class TestCached:
    @given(st.data())
    def test_any_set_of_cached_items_gives_vectors_in_order(self, data: Any) -> None:
        """Random batches with duplicates, random subsets cached, bought in an answer of any order."""
        given = data.draw(st.lists(st.sampled_from([f"text {n}" for n in range(12)]), min_size=1, max_size=40))
        batch = taken_apart(given)

        def vector(text: str) -> bytes:
            return b'"' + base64.b64encode(struct.pack("<2f", 0.5, float(text.split()[1]))) + b'"'

        def bought(numbers: tuple[int, ...]) -> list[Entry]:
            texts = orjson.loads(batch.input(numbers))
            assert len(texts) == len(set(texts))
            order = data.draw(st.permutations(range(len(texts))))
            rows = [b'{"index":%d,"embedding":%b}' % (index, vector(texts[index])) for index in order]
            answer = read_answer(b'{"data":[' + b",".join(rows) + b"]}")
            vectors = vectors_of(answer)
            assert vectors is not None
            return item_entries(entry(usage=Usage(len(texts) * 3, 0, len(texts) * 3)), batch, numbers, vectors, price)

        known = tuple(n for n in range(len(batch.texts)) if data.draw(st.booleans()))
        entries = dict(zip(known, bought(known), strict=True)) if known else {}
        found = cached_items(entries)
        assert found.keys() == entries.keys()
        batch = msgspec.structs.replace(batch, found=found)
        vectors = {number: one.vector for number, one in found.items()}
        for part in batch.calls_to_make():
            vectors |= {n: one.vector for n, one in cached_items(dict(zip(part, bought(part), strict=True))).items()}
        answer = orjson.loads(answer_body(vectors, batch.order, "m", None))
        assert [row["index"] for row in answer["data"]] == list(range(len(given)))
        assert [row["embedding"].encode() for row in answer["data"]] == [vector(text)[1:-1] for text in given]

    def test_entries_that_are_not_a_single_vector_are_misses(self) -> None:
        bodies = {
            0: b'{"data":[{"index":0,"embedding":[1]}]}',
            1: b'{"data":[{"index":0,"embedding":[1]},{"index":1,"embedding":[1]}]}',
            2: b'{"data":[{"index":0,"embedding":[1],"more":1}]}',
            3: b'{"error":{}}',
            4: b"broken",
            5: b'{"data":[]}',
        }
        assert cached_items({number: entry(body) for number, body in bodies.items()}).keys() == {0}

    def test_vectors_of_different_models_are_not_joined(self) -> None:
        body = b'{"data":[{"index":0,"embedding":[1]}]}'
        assert len(cached_items({0: entry(body), 1: entry(body)})) == 2
        assert cached_items({0: entry(body), 1: entry(body, answer_model="m-2")}) == {}

    def test_a_joined_response_has_the_oldest_age_and_the_earliest_expiry(self) -> None:
        old = entry(stored_at=100.0, ttl=1000.0, usage=Usage(2, 0, 2), cost="0.000002", tags=("a:b",))
        young = entry(stored_at=500.0, ttl=10.0, usage=Usage(3, 0, 3), cost="0.000003", estimated=True)
        batch = msgspec.structs.replace(
            taken_apart(["a", "b"]), found={0: CachedItem(b"[1]", young), 1: CachedItem(b"[2]", old)}
        )
        made, body = answer_from_items("whole", batch)
        assert (made.key, made.stored_at, made.expires_at, made.tags) == ("whole", 100.0, 510.0, ())
        assert (made.usage, made.cost, made.estimated) == (Usage(5, 0, 5), "0.000005", True)
        assert orjson.loads(body)["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
        assert [row["embedding"] for row in orjson.loads(body)["data"]] == [[1], [2]]
