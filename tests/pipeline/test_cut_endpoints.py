"""Truncated responses of the other endpoints: cut at every byte, or whole JSON that lacks a part."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.pipeline.clock import run, virtual_time
from tests.pipeline.fixture import PipelineFixture
from tests.pipeline.script import DONE, JSON, Responds, dump, event, says, streams
from tests.pipeline.test_cut import broken, ended, judge

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
MESSAGE = {"type": "message", "status": "completed", "content": [{"type": "output_text", "text": "Hi"}]}


def text(index: int, finish: str | None = "stop") -> dict[str, Any]:
    return {"index": index, "text": "a", "logprobs": None, "finish_reason": finish}


def request(content: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {"index": 0, "message": message, "finish_reason": "stop"}


WHOLE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "chat, n=2": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "n": 2},
        {"choices": [request("a"), request("b") | {"index": 1}], "usage": USAGE},
    ),
    "completions": (
        "/v1/completions",
        {"prompt": ["a", "b"], "max_tokens": 5},
        {"choices": [text(0), text(1, "length")], "usage": USAGE},
    ),
    "embeddings": (
        "/v1/embeddings",
        {"input": ["a", "b"]},
        {"data": [{"index": 0, "embedding": [0.5]}, {"index": 1, "embedding": "AAAA"}], "usage": USAGE},
    ),
    "responses": ("/v1/responses", {"input": "x"}, {"status": "completed", "output": [MESSAGE]}),
    "moderations": (
        "/v1/moderations",
        {"input": ["a", "b"]},
        {"results": [{"flagged": False}, {"flagged": True}]},
    ),
}
LISTS = {"chat, n=2": "choices", "completions": "choices", "embeddings": "data"}
LISTS |= {"responses": "output", "moderations": "results"}


@pytest.mark.parametrize("kind", ["broken", "ended"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_json_answer_cut_at_every_byte(name: str, kind: str) -> None:
    target, asked, answer = WHOLE[name]
    document = {"model": "gpt-4o"} | asked
    whole = dump(answer)

    async def tell() -> None:
        for at in range(len(whole) + (kind == "broken")):
            steps = broken(whole[:at]) if kind == "broken" else ended(whole[:at])
            pipeline = PipelineFixture(Responds(200, (JSON,), steps), says(answer), says(answer))
            result = await pipeline.ask(document, target=target)
            assert (result.status, result.refused, result.attempts) == (502, "upstream_invalid_response", 1)
            assert (await pipeline.ask(document, target=target)).cache == "miss"
            assert (await pipeline.ask(document, target=target)).cache == "hit"
            pipeline.assert_nothing_leaked()

    run(tell())


@pytest.mark.parametrize("name", WHOLE)
@virtual_time
async def test_json_without_a_required_part_is_passed_and_not_stored(name: str) -> None:
    target, asked, answer = WHOLE[name]
    document = {"model": "gpt-4o"} | asked
    for lacking in lacks(answer, LISTS[name]):
        pipeline = PipelineFixture(says(lacking), says(lacking))
        for _ in range(2):
            result = await pipeline.ask(document, target=target)
            assert (result.status, result.cache, result.json()) == (200, "miss", lacking), lacking
        pipeline.assert_nothing_leaked()


def lacks(answer: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """`answer` without its list, without one item of it, with one item without one of what says that it is whole."""
    found = [{name: value for name, value in answer.items() if name != part}, answer | {part: None}]
    found.append(answer | {"error": {"message": "quota"}})
    for index, item in enumerate(answer[part]):
        shorter = copy.deepcopy(answer)
        del shorter[part][index]
        found.append(shorter)
        for name in item.keys() & {"finish_reason", "embedding", "message", "text", "content"}:
            emptied = copy.deepcopy(answer)
            emptied[part][index][name] = None
            found.append(emptied)
    if "status" in answer:
        found += [answer | {"status": status} for status in ("incomplete", "in_progress", "failed", None)]
    return found


@pytest.mark.parametrize("kind", ["broken", "ended"])
@pytest.mark.parametrize("prompts", [1, 2])
def test_a_completions_stream_cut_at_every_byte(kind: str, prompts: int) -> None:
    def chunk(*choices: dict[str, Any]) -> bytes:
        return event({"id": "c", "object": "text_completion", "choices": list(choices)})

    parts = [chunk(text(index, None)) for index in range(prompts)]
    parts += [chunk(text(index) | {"text": ""}) for index in range(prompts)]
    whole = b"".join([*parts, DONE])
    last = len(whole) - len(DONE)
    document = {
        "model": "gpt-4o",
        "prompt": ["x"] * prompts,
        "stream": True,
        "stream_options": {"include_usage": False},
    }

    async def tell() -> None:
        for at in range(len(whole)):
            pipeline = PipelineFixture(
                streams(broken(whole[:at]) if kind == "broken" else ended(whole[:at])),
                streams([whole]),
            )
            result = await pipeline.ask(document, target="/v1/completions")
            if kind == "ended" and at in (last, len(whole) - 1, len(whole) - 2):
                assert not result.broken  # all choices have ended: odd, but finished
            else:
                judge(result, whole, at)
            again = await pipeline.ask(document, target="/v1/completions")
            assert (again.cache, again.body, again.broken) == ("miss", whole, False)
            assert (await pipeline.ask(document, target="/v1/completions")).cache == "hit"
            pipeline.assert_nothing_leaked()

    run(tell())
