"""What an account keeps or has sealed goes back to it, on the five endpoints (docs/keys-and-limits.md)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import orjson
import pytest

from proxy.config.secret import Secret
from proxy.config.settings import KeySettings, RetrySettings, Settings
from proxy.coordination import NO_COORDINATION
from proxy.protocol.request import Client
from proxy.services import build_services
from proxy.upstream.keys.object_owners import key_made_by
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import PipelineFixture, Result, ask, pool, settings
from tests.pipeline.script import DONE, ScriptedTransport, Sent, chunk, event, says, streams

RESPONSES = "/v1/responses"
KEYS = ("k1", "k2", "k3")


def config(*keys: str, **sections: Any) -> Settings:
    return settings(pool(*keys or KEYS), selection="round_robin", retry=RetrySettings(jitter=0.0), **sections)


class Organizations:
    """An upstream whose keys belong to different accounts: every id says whose it is."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def __call__(self, sent: Sent) -> Any:
        asked, account = sent.json(), f"{sent.key}{next(self._numbers)}"
        if "messages" in asked:
            return self._chat(account, asked)
        made: dict[str, Any] = {"id": f"resp_{account}", "object": "response", "status": "completed", "error": None}
        made |= {"model": "gpt-4o", "output": self._items(account), "conversation": asked.get("conversation")}
        if not asked.get("stream"):
            return says(made)
        items = [{"type": "response.output_item.done", "item": item} for item in made["output"]]
        begun = {"type": "response.created", "response": made | {"output": [], "status": "in_progress"}}
        done = {"type": "response.completed", "response": made}
        return streams([event(each) for each in (begun, *items, done)])

    @staticmethod
    def _items(account: str) -> list[dict[str, Any]]:
        written = {"type": "container_file_citation", "container_id": f"cntr_{account}", "file_id": f"cfile_{account}"}
        content = {"type": "output_text", "text": "x", "annotations": [written]}
        return [
            {"id": f"rs_{account}", "type": "reasoning", "summary": [], "encrypted_content": f"sealed by {account}"},
            {"id": f"msg_{account}", "type": "message", "role": "assistant", "content": [content]},
            {"id": f"fc_{account}", "type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
            {"id": f"mcpr_{account}", "type": "mcp_approval_request"},
        ]

    @staticmethod
    def _chat(account: str, asked: Any) -> Any:
        id_, audio = f"chatcmpl-{account}", {"id": f"audio_{account}", "data": "AAAA", "transcript": "x"}
        if asked.get("stream"):
            chunks = [chunk("x", id=id_), chunk(None, "stop", id=id_)]
            chunks[1]["choices"][0]["delta"] = {"audio": audio}
            return streams([*map(event, chunks), DONE])
        message = {"role": "assistant", "content": "x", "audio": audio}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return says({"id": id_, "object": "chat.completion", "model": "gpt-4o", "choices": choices})


def of(settings: Settings | None = None) -> PipelineFixture:
    return PipelineFixture(transport=ScriptedTransport(otherwise=Organizations()), config=settings or config())


COUNT = itertools.count(1)


async def respond(pipeline: PipelineFixture, client: Client = Client(), **fields: Any) -> Result:  # noqa: B008 (frozen)
    body = {"model": "gpt-4o", "input": f"q{next(COUNT)}"} | fields
    return await pipeline.ask(body, target=RESPONSES, client=client)


async def account_of_k2(pipeline: PipelineFixture, **fields: Any) -> str:
    """Let the second key make a response; return the account that its ids name."""
    while True:
        made = await respond(pipeline, **fields)
        if (key := pipeline.transport.keys[-1]) == "k2":
            text = made.body.decode()
            start = text.index("resp_") + len("resp_")
            return text[start : text.index('"', start)]
        assert key in KEYS


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [fields, {"role": "user", "content": f"q{next(COUNT)}"}]}


def naming(account: str) -> list[dict[str, Any]]:
    """Requests that name what the account keeps or has sealed, each in its own way."""
    reasoning = {"type": "reasoning", "summary": []}
    return [
        {"previous_response_id": f"resp_{account}"},
        item(type="item_reference", id=f"rs_{account}"),
        item(type="item_reference", id=f"msg_{account}"),
        item(id=f"fc_{account}"),
        item(**reasoning, id=f"rs_{account}"),
        item(**reasoning, encrypted_content=f"sealed by {account}"),
        item(type="mcp_approval_response", approval_request_id=f"mcpr_{account}", approve=True),
        {"tools": [{"type": "code_interpreter", "container": f"cntr_{account}"}]},
        item(role="user", content=[{"type": "input_file", "file_id": f"cfile_{account}"}]),
    ]


@pytest.mark.parametrize("stream", [False, True])
@virtual_time
async def test_what_a_response_made_goes_to_the_key_that_made_it(stream: bool) -> None:
    pipeline = of()
    account = await account_of_k2(pipeline, stream=stream)
    for fields in naming(account):
        for _ in range(2):
            await respond(pipeline, **fields)
            assert pipeline.transport.keys[-1] == "k2", fields
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_unknown_objects_go_to_the_first_usable_key() -> None:
    pipeline = of()
    for fields in [*naming("x"), {"prompt": {"id": "pmpt_x"}}, {"conversation": "conv_x"}]:
        for _ in range(2):
            await respond(pipeline, **fields)
            assert pipeline.transport.keys[-1] == "k1", fields


@virtual_time
async def test_other_requests_are_spread_over_the_keys() -> None:
    pipeline = of()
    call = {"type": "function_call_output", "call_id": "call_1", "output": "file-1"}
    for fields in ({}, {"metadata": {"file_id": "file-1"}}, item(**call), {"user": "user_1"}):
        for _ in range(3):
            await respond(pipeline, **fields)
        assert set(pipeline.transport.keys[-3:]) == set(KEYS), fields


@pytest.mark.parametrize("stream", [False, True])
@virtual_time
async def test_audio_of_a_chat_goes_to_the_key_that_made_it(stream: bool) -> None:
    pipeline = of()
    for _ in range(2):
        made = await pipeline.ask(ask(f"q{next(COUNT)}", stream=stream, modalities=["text", "audio"]))
        audio = made.body.decode()
        id_ = audio[audio.index("audio_") :].partition('"')[0]
        key = pipeline.transport.keys[-1]
        history = [{"role": "assistant", "audio": {"id": id_}}, {"role": "user", "content": f"q{next(COUNT)}"}]
        await pipeline.ask({"model": "gpt-4o", "messages": history})
        assert pipeline.transport.keys[-1] == key
        await pipeline.ask(ask(f"q{next(COUNT)}"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("store", [False, True])
@virtual_time
async def test_the_owner_of_a_chat_is_remembered_if_it_is_stored(store: bool, stream: bool) -> None:
    pipeline = of()
    made = await pipeline.ask(ask(store=store, stream=stream))
    text = made.body.decode()
    id_ = text[text.index("chatcmpl-") :].partition('"')[0]
    found = await pipeline.services.object_owners.find([id_])
    assert [owner.maker for owner in found.values()] == ([pipeline.services.pool.keys[0].maker] if store else [])


@virtual_time
async def test_a_reload_in_another_order_forgets_nothing() -> None:
    pipeline = of()
    account = await account_of_k2(pipeline)
    again = of(config("k3", "k2", "k1", "k4"))
    again.services.object_owners = pipeline.services.object_owners
    reloaded = build_services(config("k4", "k3", "k2"), pipeline.clock, pipeline.services)
    assert reloaded.object_owners is pipeline.services.object_owners
    owners = await reloaded.object_owners.find([f"resp_{account}"])
    made_by = key_made_by(reloaded.pool, owners[f"resp_{account}"].maker)
    assert made_by is not None
    assert made_by.label == "k2"


@virtual_time
async def test_the_place_and_the_name_of_a_key_mean_nothing() -> None:
    """Two proxies list the same keys, unnamed, in different orders."""

    def listing(*secrets: str) -> Settings:
        keys = tuple(KeySettings(f"key-{n}", Secret(secret)) for n, secret in enumerate(secrets))
        return replace(config(), upstreams=(replace(pool(*KEYS), keys=keys),))

    def makers(*secrets: str) -> dict[str, str]:
        services = build_services(listing(*secrets), of().clock, coordination=NO_COORDINATION)
        return dict(zip(secrets, [key.maker for key in services.pool.keys], strict=True))

    one, other = makers("sk-1", "sk-2", "sk-3"), makers("sk-3", "sk-2", "sk-1")
    assert one == other
    assert len(set(one.values())) == 3


# --- clients ----------------------------------------------------------------------------------------------------------

ANNA, BEN = Client("anna", "name anna"), Client("ben", "name ben")


@pytest.mark.parametrize("keys", [("k1",), KEYS])
@pytest.mark.parametrize("stream", [False, True])
@virtual_time
async def test_an_object_belongs_to_the_client_that_made_it(stream: bool, keys: tuple[str, ...]) -> None:
    pipeline = of(config(*keys))
    made = (await respond(pipeline, ANNA, stream=stream)).body.decode()
    account = made[made.index("resp_") + len("resp_") :].partition('"')[0]
    sent = len(pipeline.transport.sent)
    for fields in naming(account):
        refused = await respond(pipeline, BEN, **fields)
        if "encrypted_content" in orjson.dumps(fields).decode():
            assert refused.status == 200  # who has it was given it
            sent += 1
            continue
        assert (refused.status, refused.refused) == (404, "object_not_found"), fields
        assert len(pipeline.transport.sent) == sent
    for fields in naming(account):
        assert (await respond(pipeline, ANNA, **fields)).status == 200
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_clients_that_share_a_cache_share_their_objects() -> None:
    pipeline = of()
    cleo, dora = Client("cleo", "namespace team"), Client("dora", "namespace team")
    made = (await respond(pipeline, cleo)).json()
    assert (await respond(pipeline, dora, previous_response_id=made["id"])).status == 200
    assert (await respond(pipeline, BEN, previous_response_id=made["id"])).status == 404


@virtual_time
async def test_what_a_client_names_is_not_made_its_own() -> None:
    pipeline = of()
    await respond(pipeline, ANNA, conversation="conv_x")  # nobody knows whose it is
    assert (await respond(pipeline, BEN, conversation="conv_x")).status == 200


@virtual_time
async def test_of_two_previous_responses_none_is_taken() -> None:
    """Upstreams may read the first of two fields of one name, or the last."""
    pipeline = of()
    made = (await respond(pipeline, ANNA)).json()["id"].encode()
    for names in ((made, b"x"), (b"x", made)):
        first, last = (b'"previous_response_id": "%s"' % name for name in names)
        body = b'{"model": "gpt-4o", "input": "x", ' + first + b", " + last + b"}"
        assert (await pipeline.ask(orjson.loads(body), body=body, target=RESPONSES, client=BEN)).status == 400
