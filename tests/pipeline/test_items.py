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
    scene = Batches()
    first = await scene.embed(["one", "two words"])
    assert (first.cache, first.reason, first.headers["Cache-Status"]) == (
        "miss",
        "new",
        "openai-proxy; fwd=uri-miss; stored",
    )
    second = await scene.embed(["now three words", "two words", "one", "four"], dimensions=None)
    assert second.cache == "miss"  # null is another request than absent
    second = await scene.embed(["now three words", "two words", "one", "four"])
    assert scene.sent[2:] == [["now three words", "four"]]
    right(second, ["now three words", "two words", "one", "four"])
    assert second.cache == "partial"
    assert second.reason == "2 of 4 new"
    assert second.headers["Cache-Status"] == "openai-proxy; fwd=partial; stored"
    assert second.json()["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert second.headers["X-Proxy-Prompt-Tokens"] == "4"
    assert second.headers["X-Proxy-Saved-Tokens"] == "3"
    assert (second.cost, second.headers["X-Proxy-Cost-Saved-USD"]) == ("0.00000008", "0.00000006")
    assert second.headers["X-Proxy-Cost-Status"] == "estimated"  # the saving: two texts shared three tokens
    receipt = scene.receipt
    assert (receipt.cache, receipt.cost_usd, receipt.saved_usd) == ("partial", "0.00000008", "0.00000006")
    assert (receipt.cost_status, receipt.answer_model, receipt.attempts) == ("estimated", MODEL, 1)
    scene.assert_nothing_leaked(MODEL)


@virtual_time
async def test_vectors_are_returned_in_order_and_unchanged() -> None:
    rows = [{"index": at, "embedding": vector(text), "object": "embedding"} for at, text in enumerate("ab")]
    ordered = says({"data": rows, "zz": 1.0, "model": MODEL})
    scene = Batches(ordered, says({"data": rows[::-1], "zz": 1.0, "model": MODEL}))
    first, second = await scene.embed(["a", "b"]), await scene.embed(["a", "b"], Options(namespace="n"))
    assert first.body == b"".join(step for step in ordered.body if isinstance(step, bytes))
    right(second, ["a", "b"])
    assert (await scene.embed(["a", "b"], Options(namespace="n"))).body == second.body


@virtual_time
async def test_a_batch_of_cached_texts_is_a_hit() -> None:
    scene = Batches()
    await scene.embed(["a", "b c"])
    await scene.embed(["d e f", "g"])
    made = await scene.embed(["g", "b c", "a"])
    again = await scene.embed(["g", "b c", "a"])
    assert (made.cache, len(scene.sent)) == ("hit", 2)
    right(made, ["g", "b c", "a"])
    assert made.body == again.body
    assert made.hit is not None
    usage = made.json()["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] == made.hit.entry.usage.prompt_tokens  # type: ignore[union-attr]
    assert made.hit.entry.estimated
    assert made.hit.entry.body == b""  # what is remembered of its headers holds no vectors


@virtual_time
async def test_an_equal_batch_gets_identical_bytes() -> None:
    scene = Batches()
    for texts in (["a", "b"], ["a"], "b", ["x", "x", "y"], [[1, 2], [3]], [[7]], [7]):
        one, two = await scene.embed(texts), await scene.embed(texts)
        assert two.cache == "hit"
        assert one.body == two.body, texts
    scene.assert_nothing_leaked(MODEL)


@virtual_time
async def test_single_texts_and_batches_share_entries() -> None:
    scene = Batches()
    single = await scene.embed("first of all")
    assert scene.transport.sent[0].body == scene.request({"model": MODEL, "input": "first of all"}).body
    batch = await scene.embed(["second", "first of all"])
    assert (batch.cache, scene.sent[1:]) == ("partial", [["second"]])
    assert batch.headers["X-Proxy-Saved-Tokens"] == "3"
    assert batch.headers["X-Proxy-Cost-Status"] == "exact"  # bought alone, counted alone
    alone, listed = await scene.embed("second"), await scene.embed(["second"])
    assert (alone.cache, listed.cache, alone.body == listed.body) == ("hit", "hit", True)
    right(alone, ["second"])
    assert alone.hit is not None
    assert not alone.hit.entry.estimated
    right(single, ["first of all"])
    # found by its bytes the next time, like any other
    body = orjson.dumps({"model": MODEL, "input": "second"})
    request = scene.request({"model": MODEL, "input": "second"}, target=EMBEDDINGS, body=body)
    await scene.handler.handle(request, lambda: None, digest_of_request(EMBEDDINGS, "", body))
    assert scene.peek(EMBEDDINGS, "", body) is not None


@virtual_time
async def test_duplicate_texts_are_sent_and_counted_once() -> None:
    scene = Batches()
    told = await scene.embed(["a", "b b", "a", "a"])
    assert scene.sent == [["a", "b b"]]
    assert (told.cache, told.cost) == ("miss", "0.00000006")
    assert "X-Proxy-Saved-Tokens" not in told.headers
    right(told, ["a", "b b", "a", "a"])
    assert [row["index"] for row in told.json()["data"]] == [0, 1, 2, 3]
    assert told.json()["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert (await scene.embed(["b b", "a", "b b"])).cache == "hit"


@virtual_time
async def test_token_arrays_are_counted_exactly() -> None:
    scene = Batches()
    await scene.embed([[1, 2, 3], [4]])
    told = await scene.embed([[4], [5, 6], [1, 2, 3]])
    assert (told.cache, scene.sent[1]) == ("partial", [[5, 6]])
    right(told, [[4], [5, 6], [1, 2, 3]])
    assert told.headers["X-Proxy-Saved-Tokens"] == "4"
    assert told.headers["X-Proxy-Cost-Status"] == "exact"
    assert (await scene.embed("[5, 6]")).cache == "miss"
    assert (await scene.embed(["5", "6"])).cache == "miss"
    assert (await scene.embed([5, 6])).cache == "hit"


@virtual_time
async def test_only_the_input_of_the_request_changes() -> None:
    scene = Batches()
    await scene.embed(["a"])
    body = (
        b'{ "user":"u\\u0041",\n "input" : [ "a", "\\u00e9" ], "model": "text-embedding-3-small" , "dimensions":1.0e1}'
    )
    first = b'{"model":"text-embedding-3-small","input":"a","dimensions":1.0e1}'
    for raw in (first, body):
        await scene.serve(scene.request(orjson.loads(raw), target=EMBEDDINGS, body=raw))
    assert scene.transport.sent[-1].body == body.replace(b'[ "a", "\\u00e9" ]', '["é"]'.encode())
    assert scene.transport.sent[-2].body == first


@virtual_time
async def test_parts_of_the_request_key_are_parts_of_each_texts_key() -> None:
    scene = Batches()
    await scene.embed(["a", "b"])
    for more in (
        {"dimensions": 2},
        {"encoding_format": "float"},
        {"model": "text-embedding-3-large"},
        {"options": Options(namespace="other")},
        {"options": Options(sample="1")},
        {"client": Client("other", "other")},
        {"target": f"{EMBEDDINGS}?x=1"},
    ):
        told = await scene.embed(["b", "a"], **more)
        assert told.cache == "miss", more
    assert len(scene.sent) == 8
    assert (await scene.embed(["b", "a"], user="somebody")).cache == "hit"


@virtual_time
async def test_a_request_with_unknown_fields_is_cached_as_a_whole() -> None:
    scene = Batches()
    await scene.embed(["a", "b"])
    told = await scene.embed(["b", "c", "c"], late_chunking=True)
    assert (told.cache, scene.sent[-1]) == ("miss", ["b", "c", "c"])
    assert (await scene.embed(["b", "c", "c"], late_chunking=True)).cache == "hit"


@virtual_time
async def test_caching_by_text_can_be_switched_off() -> None:
    scene = Batches(embeddings_per_item=False)
    await scene.embed(["a", "b"])
    told = await scene.embed(["a", "a", "c"])
    assert (told.cache, scene.sent[-1]) == ("miss", ["a", "a", "c"])
    assert (await scene.embed("a")).cache == "miss"


@virtual_time
async def test_cache_control_applies_to_each_text() -> None:
    scene = Batches(ttl=TtlSettings(embeddings=100.0))
    await scene.embed(["a", "b"])
    await scene.clock.sleep(60.0)
    await scene.embed(["c", "d"], Options(ttl=10.0))
    assert (await scene.embed(["a", "c"], Options(only_if_cached=True))).cache == "hit"
    refused = await scene.embed(["a", "e"], Options(only_if_cached=True))
    assert (refused.refused, len(scene.sent)) == ("not_cached", 2)
    told = await scene.embed(["a", "c"], Options(max_age=30))
    assert (told.cache, scene.sent[-1]) == ("partial", ["a"])
    told = await scene.embed(["a", "b"], Options(no_cache=True))
    assert (told.cache, told.reason, scene.sent[-1]) == ("miss", "no-cache", ["a", "b"])
    told = await scene.embed(["c", "x"], Options(no_store=True))
    assert (told.cache, scene.sent[-1]) == ("bypass", ["c", "x"])
    await scene.clock.sleep(30.0)
    told = await scene.embed(["a", "c", "d"])  # c and d had ten seconds, c was bought again by nobody
    assert (told.cache, scene.sent[-1]) == ("partial", ["c", "d"])
    await scene.clock.sleep(100.0)
    assert (await scene.embed(["d", "c"])).cache == "miss"


@virtual_time
async def test_the_age_is_that_of_the_oldest_text() -> None:
    scene = Batches(ttl=TtlSettings(embeddings=100.0))
    await scene.embed(["a", "b"])
    await scene.clock.sleep(60.0)
    await scene.embed(["c", "d"])
    made = await scene.embed(["c", "a"])
    assert made.hit is not None
    wall = scene.clock.wall()
    assert (made.hit.entry.age(wall), made.hit.entry.remaining(wall)) == (60, 40)


@virtual_time
async def test_large_batches_are_sent_in_parts() -> None:
    scene = Batches()
    texts = [f"text {n}" for n in range(2 * MAX_ITEMS + 5)]
    told = await scene.embed([*texts, texts[0]])
    assert [len(part) for part in scene.sent] == [MAX_ITEMS, MAX_ITEMS, 5]
    right(told, [*texts, texts[0]])
    assert told.cache == "miss"
    assert told.attempts == 3
    assert told.json()["usage"]["prompt_tokens"] == 2 * len(texts)
    assert scene.receipt.usage is not None
    assert scene.receipt.usage.prompt_tokens == 2 * len(texts)
    assert len(scene.receipts) == 1
    again = await scene.embed([*texts, texts[0]])
    assert (again.cache, again.body == told.body) == ("hit", True)
    scene.assert_nothing_leaked(MODEL)


@virtual_time
async def test_if_a_part_fails_its_error_is_returned_and_the_others_are_stored() -> None:
    calls: list[int] = []

    def answer(sent: Sent) -> Move:
        calls.append(1)
        return error(400, "too_bad") if len(calls) == 2 else embed(sent)

    scene = Batches(answer=answer)
    texts = [f"text {n}" for n in range(MAX_ITEMS + 5)]
    told = await scene.embed(texts)
    assert (told.status, told.json()["error"]["code"]) == (400, "too_bad")
    assert scene.receipt.cost_usd is not None  # the first part was paid for
    assert scene.receipt.error == "upstream_400"
    told = await scene.embed(texts)
    assert (told.cache, len(scene.sent[-1])) == ("partial", 5)
    right(told, texts)
    scene.assert_nothing_leaked(MODEL)


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
    "compressed": Responds(200, (("Content-Type", "application/json"), ("Content-Encoding", "br")), (b"xx",)),
    "accepted": says({"data": ROWS[:2]}, 202),
}


@pytest.mark.parametrize("move", BROKEN.values(), ids=list(BROKEN))
@virtual_time
async def test_a_broken_answer_to_a_reduced_request_is_502(move: Move) -> None:
    scene = Batches()
    await scene.embed(["a"])
    scene.transport.queue.append(move)
    told = await scene.embed(["a", "b", "c"])
    assert (told.status, told.refused) == (502, "upstream_invalid_response")
    told = await scene.embed(["a", "b", "c"])
    assert told.cache == "partial"
    right(told, ["a", "b", "c"])
    scene.assert_nothing_leaked(MODEL)


@pytest.mark.parametrize("name", ["one missing", "one more", "unknown fields", "no list", "no JSON", "accepted"])
@virtual_time
async def test_a_broken_response_to_an_unchanged_request_is_passed(name: str) -> None:
    move = BROKEN[name]
    assert isinstance(move, Responds)
    scene = Batches(move)
    told = await scene.embed(["a", "b"])
    assert told.body == b"".join(step for step in move.body if isinstance(step, bytes))
    assert (told.status, told.cache) == (move.status, "miss")
    again = await scene.embed(["a"])
    assert (again.cache, scene.sent[-1]) == ("miss", ["a"])
    scene.assert_nothing_leaked(MODEL)


@virtual_time
async def test_parts_are_retried_like_any_request() -> None:
    scene = Batches()
    await scene.embed(["a"])
    scene.transport.queue += [error(500), error(503)]
    told = await scene.embed(["a", "b"])
    assert (told.cache, told.attempts, scene.sent[1:]) == ("partial", 3, [["b"]] * 3)
    scene.transport.queue.append(error(400, "bad_text"))
    told = await scene.embed(["a", "c"])
    assert (told.status, told.cache, scene.receipt.saved_usd) == (400, "partial", None)
    scene.assert_nothing_leaked(MODEL)


@virtual_time
async def test_vectors_of_two_models_are_not_mixed() -> None:
    scene = Batches()
    await scene.embed(["a", "b"])
    scene.transport.otherwise = lambda sent: embed(sent, model="another")
    told = await scene.embed(["a", "c"])
    assert (told.cache, told.reason, scene.sent[1:]) == ("miss", "model changed", [["c"], ["a"]])
    assert told.json()["model"] == "another"
    right(told, ["a", "c"])
    assert told.json()["usage"]["prompt_tokens"] == 2
    assert (await scene.embed(["a", "c"])).cache == "hit"
    models = iter(["one", "two"])
    scene.transport.otherwise = lambda sent: embed(sent, model=next(models))
    told = await scene.embed([f"t{n}" for n in range(MAX_ITEMS + 1)])
    assert told.refused == "upstream_invalid_response"


@virtual_time
async def test_without_usage_no_tokens_are_reported() -> None:
    scene = Batches(answer=lambda sent: embed(sent, usage=None))
    await scene.embed(["a", "b"])
    told = await scene.embed(["a", "c"])
    assert "usage" not in told.json()
    assert told.headers["X-Proxy-Cost-Status"] == "unknown"
    assert not {"X-Proxy-Cost-USD", "X-Proxy-Cost-Saved-USD", "X-Proxy-Saved-Tokens"} & set(told.headers)


@virtual_time
async def test_a_pool_key_in_a_response_is_masked_and_nothing_stored() -> None:
    leak = base64.b64encode(b"x").decode()
    scene = Batches()
    await scene.embed(["a"])
    key = "sk-k1"
    rows = [{"index": 0, "embedding": f"{key}{leak}"}]
    scene.transport.queue.append(says({"data": rows, "model": MODEL}))
    told = await scene.embed(["a", "b"])
    assert key.encode() not in told.body
    assert (await scene.embed(["b"])).cache == "miss"


@virtual_time
async def test_limits_are_reserved_for_the_texts_that_are_sent() -> None:
    scene = Batches()
    long = "word " * 2000
    await scene.embed([long.strip()])
    before = scene.used(model=MODEL)["tpm"]
    await scene.embed([long.strip(), "new"])
    assert scene.used(model=MODEL)["tpm"] - before == 1


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=8))
def test_any_batches_send_each_text_once(batches: list[list[int]]) -> None:
    async def told() -> None:
        scene = Batches()
        for batch in batches:
            texts = [f"the text {n}" for n in batch]
            right(await scene.embed(texts), texts)
        up = [text for part in scene.sent for text in part]
        assert len(up) == len(set(up))
        assert set(up) == {f"the text {n}" for batch in batches for n in batch}
        scene.assert_nothing_leaked(MODEL)

    run(told())
