"""A response stored in either form gives the official SDK the same object (docs/caching.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai")

from tests import upstream_answers  # noqa: E402
from tests.cache.test_convert import ITEM, PAIRS, RESPONSE, TEXT_PAIRS, _bare  # noqa: E402
from tests.launch import ProxyProcess  # noqa: E402
from tests.scripted_upstream import ScriptedUpstream  # noqa: E402

FORMS = ["plain", "stream"]
WITH_USAGE: Any = {"include_usage": True}
ASKING: dict[str, Any] = {"n=2": {"n": 2}, "logprobs": {"logprobs": True}, "logprobs of a refusal": {"logprobs": True}}
MATRIX = ["content", "tools", "n=2", "refusal", "logprobs", "legacy function call", "custom tool"]
MATRIX += ["logprobs of a refusal"]


@pytest.fixture
def sdk(proxy: ProxyProcess) -> Iterator[Any]:
    with openai.OpenAI(base_url=proxy.base_url, api_key="sk-unused", max_retries=0) as client:
        yield client


def says(upstream: ScriptedUpstream, form: str, document: Any, stream: bytes) -> None:
    """The upstream answers in this form; in the other it would be an error."""
    upstream.always(
        *([upstream_answers.reply(200, document)] if form == "plain" else upstream_answers.stream([stream]))
    )


def chat(sdk: Any, form: str, **asked: Any) -> Any:
    if form == "plain":
        return _bare(sdk.chat.completions.create(**asked).model_dump(warnings=False))
    with sdk.chat.completions.stream(**asked, stream_options=WITH_USAGE) as events:
        return _bare(events.until_done().current_completion_snapshot.model_dump(warnings=False))


@pytest.mark.parametrize("read_as", FORMS)
@pytest.mark.parametrize("stored_as", FORMS)
@pytest.mark.parametrize("name", MATRIX)
def test_chat(sdk: Any, upstream: ScriptedUpstream, name: str, stored_as: str, read_as: str) -> None:
    stream, document = PAIRS[name]
    says(upstream, stored_as, document, stream)
    messages = [{"role": "user", "content": f"both forms {name} {stored_as} {read_as}"}]
    asked: Any = {"model": "gpt-4o", "messages": messages, **ASKING.get(name, {})}
    for form in (stored_as, read_as, read_as):
        assert chat(sdk, form, **asked) == _bare(document), form
    assert upstream.count == 1


def texts(sdk: Any, form: str, **asked: Any) -> Any:
    """A completions answer; the SDK has no accumulator for its stream, so here is one."""
    if form == "plain":
        return _bare(sdk.completions.create(**asked).model_dump(warnings=False))
    answer: dict[str, Any] = {"choices": {}}
    for chunk in sdk.completions.create(**asked, stream=True, stream_options=WITH_USAGE):
        result = chunk.model_dump(warnings=False)
        for choice in result.pop("choices"):
            known = answer["choices"].setdefault(choice["index"], {"index": choice["index"], "text": ""})
            known["text"] += choice["text"]
            known["finish_reason"] = choice["finish_reason"] or known.get("finish_reason")
            for column, items in (choice["logprobs"] or {}).items():
                if items is not None:
                    known.setdefault("logprobs", {}).setdefault(column, []).extend(items)
        answer |= {field: value for field, value in result.items() if value is not None}
    answer["choices"] = [answer["choices"][index] for index in sorted(answer["choices"])]
    return _bare(answer)


@pytest.mark.parametrize("read_as", FORMS)
@pytest.mark.parametrize("stored_as", FORMS)
@pytest.mark.parametrize("name", TEXT_PAIRS)
def test_completions(sdk: Any, upstream: ScriptedUpstream, name: str, stored_as: str, read_as: str) -> None:
    stream, document = TEXT_PAIRS[name]
    says(upstream, stored_as, document, stream)
    prompt = f"both forms {name} {stored_as} {read_as}"
    asked: Any = {"model": "gpt-3.5-turbo-instruct", "prompt": prompt} | ({"n": 2} if name == "n=2" else {})
    for form in (stored_as, read_as, read_as):
        assert texts(sdk, form, **asked) == _bare(document), form
    assert upstream.count == 1


TOKEN = {"token": "Hi", "bytes": [72, 105], "logprob": -0.5, "top_logprobs": []}
CONTENT: dict[str, Any] = ITEM["content"][0]
OUTPUTS: dict[str, list[Any]] = {
    "content": [ITEM],
    "tools": [
        {"type": "function_call", "id": f"fc_{n}", "call_id": f"c{n}", "name": "f", "arguments": "{}", "status": done}
        for n, done in enumerate(["completed"] * 2)
    ],
    "refusal": [ITEM | {"content": [{"type": "refusal", "refusal": "No."}]}],
    "logprobs": [ITEM | {"content": [CONTENT | {"logprobs": [TOKEN]}]}],
    "reasoning": [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "xyz"}, ITEM],
}


def response_stream(response: dict[str, Any]) -> bytes:
    """What the accumulator of the SDK needs: the beginning, every item, the end."""
    events: list[dict[str, Any]] = [{"type": "response.created", "response": response | {"output": [], "usage": None}}]
    for index, item in enumerate(response["output"]):
        events.append({"type": "response.output_item.added", "output_index": index, "item": item | {"content": []}})
        events.append({"type": "response.output_item.done", "output_index": index, "item": item})
    events.append({"type": "response.completed", "response": response})
    lines = [json.dumps(event | {"sequence_number": number}) for number, event in enumerate(events)]
    return b"".join(b"event: x\ndata: " + line.encode() + b"\n\n" for line in lines)


def respond(sdk: Any, form: str, **asked: Any) -> Any:
    if form == "plain":
        return _bare(sdk.responses.create(**asked).model_dump(warnings=False))
    with sdk.responses.stream(**asked) as events:
        return _bare(events.get_final_response().model_dump(warnings=False))


@pytest.mark.parametrize("read_as", FORMS)
@pytest.mark.parametrize("stored_as", FORMS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_responses(sdk: Any, upstream: ScriptedUpstream, name: str, stored_as: str, read_as: str) -> None:
    """A stream of a stored plain answer would have to invent some fifty kinds of event: it is a miss, stored beside."""
    document = RESPONSE | {"output": OUTPUTS[name]}
    asked: Any = {"model": "gpt-4o", "input": f"both forms {name} {stored_as} {read_as}"}
    for form in (stored_as, read_as, read_as, stored_as):
        says(upstream, form, document, response_stream(document))
        assert respond(sdk, form, **asked) == _bare(document), form
    assert upstream.count == (2 if (stored_as, read_as) == ("plain", "stream") else 1)
