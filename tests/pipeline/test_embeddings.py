"""Batches of embeddings as the client and the upstream see them: only what is new goes up, each text once."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.embeddings import MAX_ITEMS
from proxy.cache.lookup import digest_of_request
from proxy.config.settings import CacheSettings, TtlSettings
from proxy.protocol.options import Options
from proxy.protocol.request import Client
from tests.pipeline.clock import run, virtual_time
from tests.pipeline.fixture import PipelineFixture, Result, settings
from tests.pipeline.script import Move, Responds, ScriptedTransport, Sent, error, says, streams

EMBEDDINGS = "/v1/embeddings"
MODEL = "text-embedding-3-small"
RATE = 0.00000002


def vector(text: object) -> str:
    """A text's vector: another for each text."""
    code = sum((at + 1) * ord(c) for at, c in enumerate(str(text))) % 65521
    return base64.b64encode(struct.pack("<2f", float(code), 0.5)).decode()


def tokens(text: object) -> int:
    return len(text) if isinstance(text, list) else len(str(text).split())


def embed(sent: Sent, **fields: Any) -> Responds:
    """What the API answers, the items in any order."""
    asked = sent.json()["input"]
    texts = asked if isinstance(asked, list) and not isinstance(asked[0], int) else [asked]
    data = [{"object": "embedding", "index": at, "embedding": vector(text)} for at, text in enumerate(texts)]
    used = sum(map(tokens, texts))
    usage = {"prompt_tokens": used, "total_tokens": used}
    return says({"object": "list", "data": data[::-1], "model": MODEL, "usage": usage} | fields)


class Batches(PipelineFixture):
    def __init__(self, *moves: Move, answer: Callable[[Sent], Move] = embed, **cache: Any) -> None:
        super().__init__(
            config=settings(cache=CacheSettings(**cache)), transport=ScriptedTransport(*moves, otherwise=answer)
        )

    async def embed(self, given: Any, options: Options | None = None, **fields: Any) -> Result:
        more = {name: fields.pop(name) for name in ("client", "target") if name in fields}
        document = {"model": MODEL, "input": given} | fields
        return await self.ask(document, options, **({"target": EMBEDDINGS} | more))

    @property
    def sent(self) -> list[Any]:
        """The inputs that went up."""
        return [sent.json()["input"] for sent in self.transport.sent]


def right(told: Result, texts: list[Any]) -> None:
    rows = told.json()["data"]
    assert [(row["index"], row["embedding"]) for row in rows] == [(at, vector(text)) for at, text in enumerate(texts)]


@virtual_time
async def test_only_new_texts_are_sent() -> None:
    pipeline = Batches()
    first = await pipeline.embed(["one", "two words"])
    assert (first.cache, first.reason, first.headers["Cache-Status"]) == (
        "miss",
        "new",
        "openai-proxy; fwd=uri-miss; stored",
    )
    second = await pipeline.embed(["now three words", "two words", "one", "four"], dimensions=None)
    assert second.cache == "miss"  # null is another request than absent
    second = await pipeline.embed(["now three words", "two words", "one", "four"])
    assert pipeline.sent[2:] == [["now three words", "four"]]
    right(second, ["now three words", "two words", "one", "four"])
    assert second.cache == "partial"
    assert second.reason == "2 of 4 new"
    assert second.headers["Cache-Status"] == "openai-proxy; fwd=partial; stored"
    assert second.json()["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert second.headers["X-Proxy-Prompt-Tokens"] == "4"
    assert second.headers["X-Proxy-Saved-Tokens"] == "3"
    assert (second.cost, second.headers["X-Proxy-Cost-Saved-USD"]) == ("0.00000008", "0.00000006")
    assert second.headers["X-Proxy-Cost-Status"] == "estimated"  # the saving: two texts shared three tokens
    receipt = pipeline.receipt
    assert (receipt.cache, receipt.cost_usd, receipt.saved_usd) == ("partial", "0.00000008", "0.00000006")
    assert (receipt.cost_status, receipt.answer_model, receipt.attempts) == ("estimated", MODEL, 1)
    pipeline.assert_nothing_leaked(MODEL)


@virtual_time
async def test_vectors_are_returned_in_order_and_unchanged() -> None:
    rows = [{"index": at, "embedding": vector(text), "object": "embedding"} for at, text in enumerate("ab")]
    ordered = says({"data": rows, "zz": 1.0, "model": MODEL})
    pipeline = Batches(ordered, says({"data": rows[::-1], "zz": 1.0, "model": MODEL}))
    first, second = await pipeline.embed(["a", "b"]), await pipeline.embed(["a", "b"], Options(namespace="n"))
    assert first.body == b"".join(step for step in ordered.body if isinstance(step, bytes))
    right(second, ["a", "b"])
    assert (await pipeline.embed(["a", "b"], Options(namespace="n"))).body == second.body


@virtual_time
async def test_a_batch_of_cached_texts_is_a_hit() -> None:
    pipeline = Batches()
    await pipeline.embed(["a", "b c"])
    await pipeline.embed(["d e f", "g"])
    made = await pipeline.embed(["g", "b c", "a"])
    again = await pipeline.embed(["g", "b c", "a"])
    assert (made.cache, len(pipeline.sent)) == ("hit", 2)
    right(made, ["g", "b c", "a"])
    assert made.body == again.body
    assert made.hit is not None
    usage = made.json()["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] == made.hit.entry.usage.prompt_tokens  # type: ignore[union-attr]
    assert made.hit.entry.estimated
    assert made.hit.entry.body == b""  # what is remembered of its headers holds no vectors


@virtual_time
async def test_an_equal_batch_gets_identical_bytes() -> None:
    pipeline = Batches()
    for texts in (["a", "b"], ["a"], "b", ["x", "x", "y"], [[1, 2], [3]], [[7]], [7]):
        one, two = await pipeline.embed(texts), await pipeline.embed(texts)
        assert two.cache == "hit"
        assert one.body == two.body, texts
    pipeline.assert_nothing_leaked(MODEL)


@virtual_time
async def test_single_texts_and_batches_share_entries() -> None:
    pipeline = Batches()
    single = await pipeline.embed("first of all")
    assert pipeline.transport.sent[0].body == pipeline.request({"model": MODEL, "input": "first of all"}).body
    batch = await pipeline.embed(["second", "first of all"])
    assert (batch.cache, pipeline.sent[1:]) == ("partial", [["second"]])
    assert batch.headers["X-Proxy-Saved-Tokens"] == "3"
    assert batch.headers["X-Proxy-Cost-Status"] == "exact"  # bought alone, counted alone
    alone, listed = await pipeline.embed("second"), await pipeline.embed(["second"])
    assert (alone.cache, listed.cache, alone.body == listed.body) == ("hit", "hit", True)
    right(alone, ["second"])
    assert alone.hit is not None
    assert not alone.hit.entry.estimated
    right(single, ["first of all"])
    # found by its bytes the next time, like any other
    body = orjson.dumps({"model": MODEL, "input": "second"})
    request = pipeline.request({"model": MODEL, "input": "second"}, target=EMBEDDINGS, body=body)
    await pipeline.handler.handle(request, lambda: None, digest_of_request(EMBEDDINGS, "", body))
    assert pipeline.peek(EMBEDDINGS, "", body) is not None


@virtual_time
async def test_duplicate_texts_are_sent_and_counted_once() -> None:
    pipeline = Batches()
    told = await pipeline.embed(["a", "b b", "a", "a"])
    assert pipeline.sent == [["a", "b b"]]
    assert (told.cache, told.cost) == ("miss", "0.00000006")
    assert "X-Proxy-Saved-Tokens" not in told.headers
    right(told, ["a", "b b", "a", "a"])
    assert [row["index"] for row in told.json()["data"]] == [0, 1, 2, 3]
    assert told.json()["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert (await pipeline.embed(["b b", "a", "b b"])).cache == "hit"


@virtual_time
async def test_token_arrays_are_counted_exactly() -> None:
    pipeline = Batches()
    await pipeline.embed([[1, 2, 3], [4]])
    told = await pipeline.embed([[4], [5, 6], [1, 2, 3]])
    assert (told.cache, pipeline.sent[1]) == ("partial", [[5, 6]])
    right(told, [[4], [5, 6], [1, 2, 3]])
    assert told.headers["X-Proxy-Saved-Tokens"] == "4"
    assert told.headers["X-Proxy-Cost-Status"] == "exact"
    assert (await pipeline.embed("[5, 6]")).cache == "miss"
    assert (await pipeline.embed(["5", "6"])).cache == "miss"
    assert (await pipeline.embed([5, 6])).cache == "hit"


@virtual_time
async def test_only_the_input_of_the_request_changes() -> None:
    pipeline = Batches()
    await pipeline.embed(["a"])
    body = (
        b'{ "user":"u\\u0041",\n "input" : [ "a", "\\u00e9" ], "model": "text-embedding-3-small" , "dimensions":1.0e1}'
    )
    first = b'{"model":"text-embedding-3-small","input":"a","dimensions":1.0e1}'
    for raw in (first, body):
        await pipeline.serve(pipeline.request(orjson.loads(raw), target=EMBEDDINGS, body=raw))
    assert pipeline.transport.sent[-1].body == body.replace(b'[ "a", "\\u00e9" ]', '["é"]'.encode())
    assert pipeline.transport.sent[-2].body == first


@virtual_time
async def test_parts_of_the_request_key_are_parts_of_each_texts_key() -> None:
    pipeline = Batches()
    await pipeline.embed(["a", "b"])
    for more in (
        {"dimensions": 2},
        {"encoding_format": "float"},
        {"model": "text-embedding-3-large"},
        {"options": Options(namespace="other")},
        {"options": Options(sample="1")},
        {"client": Client("other", "other")},
        {"target": f"{EMBEDDINGS}?x=1"},
    ):
        told = await pipeline.embed(["b", "a"], **more)
        assert told.cache == "miss", more
    assert len(pipeline.sent) == 8
    assert (await pipeline.embed(["b", "a"], user="somebody")).cache == "hit"


@virtual_time
async def test_a_request_with_unknown_fields_is_cached_as_a_whole() -> None:
    pipeline = Batches()
    await pipeline.embed(["a", "b"])
    told = await pipeline.embed(["b", "c", "c"], late_chunking=True)
    assert (told.cache, pipeline.sent[-1]) == ("miss", ["b", "c", "c"])
    assert (await pipeline.embed(["b", "c", "c"], late_chunking=True)).cache == "hit"


@virtual_time
async def test_caching_by_text_can_be_switched_off() -> None:
    pipeline = Batches(embeddings_per_item=False)
    await pipeline.embed(["a", "b"])
    told = await pipeline.embed(["a", "a", "c"])
    assert (told.cache, pipeline.sent[-1]) == ("miss", ["a", "a", "c"])
    assert (await pipeline.embed("a")).cache == "miss"


@virtual_time
async def test_cache_control_applies_to_each_text() -> None:
    pipeline = Batches(ttl=TtlSettings(embeddings=100.0))
    await pipeline.embed(["a", "b"])
    await pipeline.clock.sleep(60.0)
    await pipeline.embed(["c", "d"], Options(ttl=10.0))
    assert (await pipeline.embed(["a", "c"], Options(only_if_cached=True))).cache == "hit"
    refused = await pipeline.embed(["a", "e"], Options(only_if_cached=True))
    assert (refused.refused, len(pipeline.sent)) == ("not_cached", 2)
    told = await pipeline.embed(["a", "c"], Options(max_age=30))
    assert (told.cache, pipeline.sent[-1]) == ("partial", ["a"])
    told = await pipeline.embed(["a", "b"], Options(no_cache=True))
    assert (told.cache, told.reason, pipeline.sent[-1]) == ("miss", "no-cache", ["a", "b"])
    told = await pipeline.embed(["c", "x"], Options(no_store=True))
    assert (told.cache, pipeline.sent[-1]) == ("bypass", ["c", "x"])
    await pipeline.clock.sleep(30.0)
    told = await pipeline.embed(["a", "c", "d"])  # c and d had ten seconds, c was bought again by nobody
    assert (told.cache, pipeline.sent[-1]) == ("partial", ["c", "d"])
    await pipeline.clock.sleep(100.0)
    assert (await pipeline.embed(["d", "c"])).cache == "miss"


@virtual_time
async def test_the_age_is_that_of_the_oldest_text() -> None:
    pipeline = Batches(ttl=TtlSettings(embeddings=100.0))
    await pipeline.embed(["a", "b"])
    await pipeline.clock.sleep(60.0)
    await pipeline.embed(["c", "d"])
    made = await pipeline.embed(["c", "a"])
    assert made.hit is not None
    wall = pipeline.clock.wall()
    assert (made.hit.entry.age(wall), made.hit.entry.remaining(wall)) == (60, 40)


@virtual_time
async def test_large_batches_are_sent_in_parts() -> None:
    pipeline = Batches()
    texts = [f"text {n}" for n in range(2 * MAX_ITEMS + 5)]
    told = await pipeline.embed([*texts, texts[0]])
    assert [len(part) for part in pipeline.sent] == [MAX_ITEMS, MAX_ITEMS, 5]
    right(told, [*texts, texts[0]])
    assert told.cache == "miss"
    assert told.attempts == 3
    assert told.json()["usage"]["prompt_tokens"] == 2 * len(texts)
    assert pipeline.receipt.usage is not None
    assert pipeline.receipt.usage.prompt_tokens == 2 * len(texts)
    assert len(pipeline.receipts) == 1
    again = await pipeline.embed([*texts, texts[0]])
    assert (again.cache, again.body == told.body) == ("hit", True)
    pipeline.assert_nothing_leaked(MODEL)


@virtual_time
async def test_if_a_part_fails_its_error_is_returned_and_the_others_are_stored() -> None:
    calls: list[int] = []

    def answer(sent: Sent) -> Move:
        calls.append(1)
        return error(400, "too_bad") if len(calls) == 2 else embed(sent)

    pipeline = Batches(answer=answer)
    texts = [f"text {n}" for n in range(MAX_ITEMS + 5)]
    told = await pipeline.embed(texts)
    assert (told.status, told.json()["error"]["code"]) == (400, "too_bad")
    assert pipeline.receipt.cost_usd is not None  # the first part was paid for
    assert pipeline.receipt.error == "upstream_400"
    told = await pipeline.embed(texts)
    assert (told.cache, len(pipeline.sent[-1])) == ("partial", 5)
    right(told, texts)
    pipeline.assert_nothing_leaked(MODEL)


def _answer(**fields: Any) -> Responds:
    row = {"object": "embedding", "index": 0, "embedding": "AAAA"}
    return says(
        {"object": "list", "data": [row], "model": MODEL, "usage": {"prompt_tokens": 1, "total_tokens": 1}} | fields
    )


ROWS = [{"object": "embedding", "index": at, "embedding": "AAAA"} for at in range(3)]
BROKEN = {
    "one missing": _answer(data=ROWS[:1]),
    "one more": _answer(data=ROWS),
    "an index twice": _answer(data=[ROWS[0], ROWS[0]]),
    "empty vector": _answer(data=[ROWS[0], ROWS[1] | {"embedding": ""}]),
    "an error inside": _answer(data=ROWS[:2], error={"message": "no"}),
    "unknown fields": _answer(data=[ROWS[0], ROWS[1] | {"more": 1}]),
    "no list": says({"hello": 1}),
    "no JSON": Responds(200, (("Content-Type", "text/plain"),), (b"hello",)),
    "cut": Responds(200, body=(b'{"data": [',)),
    "a stream": streams(),
    "compressed": Responds(200, (("Content-Type", "application/json"), ("Content-Encoding", "exi")), (b"xx",)),
    "accepted": says({"data": ROWS[:2]}, 202),
}


@pytest.mark.parametrize("move", BROKEN.values(), ids=list(BROKEN))
@virtual_time
async def test_a_broken_answer_to_a_reduced_request_is_502(move: Move) -> None:
    pipeline = Batches()
    await pipeline.embed(["a"])
    pipeline.transport.queue.append(move)
    told = await pipeline.embed(["a", "b", "c"])
    assert (told.status, told.refused) == (502, "upstream_invalid_response")
    told = await pipeline.embed(["a", "b", "c"])
    assert told.cache == "partial"
    right(told, ["a", "b", "c"])
    pipeline.assert_nothing_leaked(MODEL)


@pytest.mark.parametrize("name", ["one missing", "one more", "unknown fields", "no list", "no JSON", "accepted"])
@virtual_time
async def test_a_broken_response_to_an_unchanged_request_is_passed(name: str) -> None:
    move = BROKEN[name]
    assert isinstance(move, Responds)
    pipeline = Batches(move)
    told = await pipeline.embed(["a", "b"])
    assert told.body == b"".join(step for step in move.body if isinstance(step, bytes))
    assert (told.status, told.cache) == (move.status, "miss")
    again = await pipeline.embed(["a"])
    assert (again.cache, pipeline.sent[-1]) == ("miss", ["a"])
    pipeline.assert_nothing_leaked(MODEL)


@virtual_time
async def test_parts_are_retried_like_any_request() -> None:
    pipeline = Batches()
    await pipeline.embed(["a"])
    pipeline.transport.queue += [error(500), error(503)]
    told = await pipeline.embed(["a", "b"])
    assert (told.cache, told.attempts, pipeline.sent[1:]) == ("partial", 3, [["b"]] * 3)
    pipeline.transport.queue.append(error(400, "bad_text"))
    told = await pipeline.embed(["a", "c"])
    assert (told.status, told.cache, pipeline.receipt.saved_usd) == (400, "partial", None)
    pipeline.assert_nothing_leaked(MODEL)


@virtual_time
async def test_vectors_of_two_models_are_not_mixed() -> None:
    pipeline = Batches()
    await pipeline.embed(["a", "b"])
    pipeline.transport.otherwise = lambda sent: embed(sent, model="another")
    told = await pipeline.embed(["a", "c"])
    assert (told.cache, told.reason, pipeline.sent[1:]) == ("miss", "model changed", [["c"], ["a"]])
    assert told.json()["model"] == "another"
    right(told, ["a", "c"])
    assert told.json()["usage"]["prompt_tokens"] == 2
    assert (await pipeline.embed(["a", "c"])).cache == "hit"
    models = iter(["one", "two"])
    pipeline.transport.otherwise = lambda sent: embed(sent, model=next(models))
    told = await pipeline.embed([f"t{n}" for n in range(MAX_ITEMS + 1)])
    assert told.refused == "upstream_invalid_response"


@virtual_time
async def test_without_usage_no_tokens_are_reported() -> None:
    pipeline = Batches(answer=lambda sent: embed(sent, usage=None))
    await pipeline.embed(["a", "b"])
    told = await pipeline.embed(["a", "c"])
    assert "usage" not in told.json()
    assert told.headers["X-Proxy-Cost-Status"] == "unknown"
    assert not {"X-Proxy-Cost-USD", "X-Proxy-Cost-Saved-USD", "X-Proxy-Saved-Tokens"} & set(told.headers)


@virtual_time
async def test_a_pool_key_in_a_response_is_masked_and_nothing_stored() -> None:
    leak = base64.b64encode(b"x").decode()
    pipeline = Batches()
    await pipeline.embed(["a"])
    key = "sk-k1"
    rows = [{"index": 0, "embedding": f"{key}{leak}"}]
    pipeline.transport.queue.append(says({"data": rows, "model": MODEL}))
    told = await pipeline.embed(["a", "b"])
    assert key.encode() not in told.body
    assert (await pipeline.embed(["b"])).cache == "miss"


@virtual_time
async def test_limits_are_reserved_for_the_texts_that_are_sent() -> None:
    pipeline = Batches()
    long = "word " * 2000
    await pipeline.embed([long.strip()])
    before = pipeline.used(model=MODEL)["tpm"]
    await pipeline.embed([long.strip(), "new"])
    assert pipeline.used(model=MODEL)["tpm"] - before == 1


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=8))
def test_any_batches_send_each_text_once(batches: list[list[int]]) -> None:
    async def told() -> None:
        pipeline = Batches()
        for batch in batches:
            texts = [f"the text {n}" for n in batch]
            right(await pipeline.embed(texts), texts)
        up = [text for part in pipeline.sent for text in part]
        assert len(up) == len(set(up))
        assert set(up) == {f"the text {n}" for batch in batches for n in batch}
        pipeline.assert_nothing_leaked(MODEL)

    run(told())
