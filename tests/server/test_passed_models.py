"""Routes that are passed through obey the rules of the five endpoints: models, keys, limits, budgets and costs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from proxy.config.limits import Limits
from proxy.config.settings import (
    BreakerSettings,
    BudgetSettings,
    ClientKeySettings,
    CostSettings,
    RetrySettings,
    ServerSettings,
    Settings,
    ThrottleSettings,
    UpstreamSettings,
)
from tests.pipeline.fixture import pool, settings
from tests.pipeline.script import JSON, SSE, Responds, dump, error, event, rate_limited, says
from tests.server.kit import Answer, RunningProxy, chunked, raw_connection, request, running_proxy

pytestmark = pytest.mark.slow

IMAGES, SPEECH, COMPACT = "/v1/images/generations", "/v1/audio/speech", "/v1/responses/compact"
TRANSCRIPTIONS = "/v1/audio/transcriptions"
OK = says({"ok": 1})
LLAMA = replace(pool("local"), name="local", models=("llama*",), base_url="http://local.test/v1")
GPT = replace(pool("k1"), models=("gpt*", "tts*", "whisper*"))
TWO = settings(LLAMA, GPT)
BOUND = "b0und"


def form(*fields: tuple[str, str], file: bytes | None = b"RIFF", after: tuple[tuple[str, str], ...] = ()) -> bytes:
    """Return a form with a file between its fields."""
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in fields]
    if file is not None:
        head = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        parts.append(head + file)
    parts += [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in after]
    return b"".join([f"--{BOUND}\r\n".encode() + part + b"\r\n" for part in parts]) + f"--{BOUND}--\r\n".encode()


def upload(body: bytes) -> dict[str, Any]:
    return {"body": body, "headers": [("Content-Type", f"multipart/form-data; boundary={BOUND}")]}


def clients(config: Settings, *models: str, **more: Any) -> Settings:
    key = ClientKeySettings("a", hashlib.sha256(b"key-a").digest(), None, models, **more)
    return replace(config, server=ServerSettings(client_keys=(key,)))


async def by_a(server: RunningProxy, target: str, body: Any = None, **more: Any) -> Answer:
    headers = [("Authorization", "Bearer key-a"), *more.pop("headers", ())]
    return await server.ask(more.pop("method", "POST"), target, body, headers)


# --- which upstream ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "ask"),
    [
        (IMAGES, {"body": {"model": "gpt-image-1", "prompt": "x"}}),
        (SPEECH, {"body": {"input": "x", "model": "tts-1"}}),
        (COMPACT, {"body": {"model": "gpt-4o", "input": "x"}}),
        ("/v1/realtime/client_secrets", {"body": {"session": {"type": "realtime", "model": "gpt-realtime"}}}),
        ("/v1/engines/gpt-4o/completions", {"body": {"prompt": "x"}}),
        ("/v1/realtime/calls?model=gpt-realtime", {"body": b"v=0", "headers": [("Content-Type", "application/sdp")]}),
        (TRANSCRIPTIONS, upload(form(("model", "whisper-1"), ("language", "en")))),
        (TRANSCRIPTIONS, upload(form(("language", "en"), ("model", "whisper-1"), file=b"x" * 300_000))),
    ],
)
async def test_the_model_of_a_request_decides_its_upstream(target: str, ask: dict[str, Any]) -> None:
    async with running_proxy(*[OK] * 3, config=TWO) as server:
        for _ in range(3):
            assert (await server.ask(target=target, **ask)).status == 200
        assert server.transport.keys == ["k1"] * 3
        assert server.transport.sent[0].url.startswith("http://up.test/v1/")
        assert all(receipt.model for receipt in server.receipts)


async def test_a_model_that_nobody_serves_is_sent_nowhere() -> None:
    async with running_proxy(config=TWO) as server:
        answer = await server.ask(target=IMAGES, body={"model": "flux", "prompt": "x"})
        assert (answer.status, answer.error) == (502, "no_usable_key")


async def test_a_large_or_compressed_body_is_not_read_and_goes_anywhere() -> None:
    async with running_proxy(OK, OK, OK, config=TWO) as server:
        large = b'{"model": "gpt-image-1", "prompt": "' + b"x" * 1_100_000 + b'"}'
        assert (await server.ask(target=IMAGES, body=large)).status == 200
        assert server.transport.sent[0].body == large
        async with raw_connection(server.port) as line:
            headers = [("Transfer-Encoding", "chunked"), ("Content-Type", "application/json")]
            line.send(request(target=IMAGES, headers=headers) + chunked(large[:9], large[9:]))
            assert (await line.answer()).status == 200
        assert server.transport.sent[1].body == large
        packed = [("Content-Type", "application/json"), ("Content-Encoding", "gzip")]
        assert (await server.ask(target=IMAGES, body=b"\x1f\x8b", headers=packed)).status == 200
        assert server.receipts[-1].model == ""


async def test_key_states_of_a_model_and_limits_hold_on_passed_routes() -> None:
    config = settings(pool("k1", "k2"), throttle=ThrottleSettings(limits={"gpt-image-1": Limits(rpm=3)}, max_wait=0.0))
    image = {"model": "gpt-image-1", "prompt": "x"}
    async with running_proxy(rate_limited("99"), *[OK] * 5, config=config) as server:
        assert (await server.ask(target=IMAGES, body=image)).status == 429
        limited = server.transport.keys[0]
        for _ in range(3):
            assert (await server.ask(target=IMAGES, body=image)).status == 200
        assert limited not in server.transport.keys[1:]  # it cools for this model
        answer = await server.ask(target=IMAGES, body=image)
        assert (answer.status, answer.error) == (429, "throttled")
        assert (await server.ask(target=SPEECH, body={"model": "tts-1"})).status == 200


async def test_breakers_and_priorities_hold_on_passed_routes() -> None:
    first = replace(pool("k1"), name="first")
    second = replace(pool("k2"), name="second", priority=1)
    config = settings(first, second, breaker=BreakerSettings(failures=2), retry=RetrySettings(max_retries=0))
    async with running_proxy(error(500), error(500), OK, config=config) as server:
        for status in (500, 500, 200):
            assert (await server.ask(target=IMAGES, body={"model": "gpt-image-1"})).status == status
        assert server.transport.keys == ["k1", "k1", "k2"]


# --- Azure ------------------------------------------------------------------------------------------------------------

NAMES = {"gpt-4o": "my4o", "gpt-image-1": "my-img", "whisper-1": "my-whisper"}
AZURE = UpstreamSettings("az", "azure", "https://az.test", api_version="v", deployments=NAMES, keys=pool("k1").keys)


async def test_a_request_in_openais_shape_goes_to_the_deployment_of_its_model() -> None:
    async with running_proxy(*[OK] * 3, config=settings(AZURE)) as server:
        await server.ask(target=IMAGES, body={"model": "gpt-image-1", "prompt": "x"})
        await server.ask(target=COMPACT, body={"model": "gpt-4o", "input": "x"})
        await server.ask(target=TRANSCRIPTIONS, **upload(form(("model", "whisper-1"))))
        image, compact, audio = server.transport.sent
        assert image.url == "https://az.test/openai/deployments/my-img/images/generations?api-version=v"
        assert compact.json()["model"] == "my4o"
        assert audio.url == "https://az.test/openai/deployments/my-whisper/audio/transcriptions?api-version=v"


@pytest.mark.parametrize("size", [4, 300_000])
async def test_a_form_names_the_deployment_where_the_path_does_not(size: int) -> None:
    async with running_proxy(OK, config=settings(replace(AZURE, api_version=None))) as server:
        sound = b"x" * size
        fields = ("language", "en"), ("model", "whisper-1")
        assert (await server.ask(target=TRANSCRIPTIONS, **upload(form(*fields, file=sound)))).status == 200
        [sent] = server.transport.sent
        assert sent.url == "https://az.test/openai/v1/audio/transcriptions"
        assert sent.body == form(fields[0], ("model", "my-whisper"), file=sound)
        assert sent.headers.get("Content-Length") in (None, str(len(sent.body)))


async def test_a_form_without_a_model_gets_the_deployments_on_an_openai_upstream() -> None:
    async with running_proxy(OK, config=settings(pool("k1"))) as server:
        target = "/openai/deployments/whisper-1/audio/transcriptions?api-version=v"
        await server.ask(target=target, **upload(form(("language", "en"))))
        assert server.transport.sent[0].body == form(("model", "whisper-1"), ("language", "en"))


# --- client keys ------------------------------------------------------------------------------------------------------

ALLOWED = ("whisper-1", "gpt-4o-mini")


@pytest.mark.parametrize(
    ("target", "body"),
    [
        (IMAGES, {"model": "gpt-image-1"}),
        (IMAGES, {"prompt": "no model"}),
        (IMAGES, b'{"model":"gpt-image-1","model":"gpt-4o-mini"}'),
        (IMAGES, b'{"model":"gpt-4o-mini","Model":"gpt-image-1"}'),
        (COMPACT, {"model": "gpt-4o"}),
        ("/v1/responses/input_tokens", {"model": "gpt-4o"}),
        ("/v1/batches", {"input_file_id": "file-1", "model": "gpt-4o-mini"}),
        ("/v1/evals", {"model": "gpt-4o-mini"}),
        ("/v1/threads/thread_1/runs", {"assistant_id": "asst_1"}),
        ("/v1/engines/gpt-4o/completions", {"model": "gpt-4o-mini"}),
        ("/v1/realtime/client_secrets", {"session": {"model": "gpt-realtime"}}),
        ("/v1/something/new", {"model": "gpt-4o"}),
        ("/openai/deployments/gpt-image-1/images/generations?api-version=v", {"prompt": "x"}),
        ("/_/namespace=x/v1/images/generations", {"model": "gpt-image-1"}),
    ],
)
async def test_a_client_cannot_run_another_model_on_any_route(target: str, body: Any) -> None:
    async with running_proxy(config=clients(settings(), *ALLOWED)) as server:
        answer = await by_a(server, target, body)
        assert (answer.status, answer.error) == (403, "model_not_allowed")


async def test_a_client_may_run_its_models_and_use_routes_without_any() -> None:
    async with running_proxy(*[OK] * 6, config=clients(settings(), *ALLOWED)) as server:
        for target, body in (
            (COMPACT, {"model": "gpt-4o-mini"}),
            ("/v1/files", b"x"),
            ("/v1/responses/resp_1/cancel", b""),
            ("/v1/chat/completions/chatcmpl_1", {"metadata": {}}),
            ("/v1/conversations", {}),
        ):
            assert (await by_a(server, target, body)).status == 200
        answer = await by_a(server, TRANSCRIPTIONS, **upload(form(("model", "whisper-1"))))
        assert answer.status == 200


@pytest.mark.parametrize("size", [4, 500_000])
@pytest.mark.parametrize("name", ["model", "MODEL"])
async def test_a_second_model_in_a_form_is_refused_wherever_it_stands(size: int, name: str) -> None:
    async with running_proxy(OK, config=clients(settings(), *ALLOWED)) as server:
        fields = [("model", "whisper-1")]
        body = form(*fields, file=b"x" * size, after=((name, "gpt-4o-transcribe"),))
        answer = await by_a(server, TRANSCRIPTIONS, **upload(body))
        assert (answer.status, answer.error) == (403, "model_not_allowed")
        twice = form(*fields, (name, "gpt-4o-transcribe"), file=b"x" * size)
        assert (await by_a(server, TRANSCRIPTIONS, **upload(twice))).error == "model_not_allowed"


async def test_limits_and_budgets_of_clients_hold_on_passed_routes() -> None:
    limited = clients(settings(), "*", limits=Limits(rpm=1))
    async with running_proxy(OK, config=limited) as server:
        assert (await by_a(server, IMAGES, {"model": "gpt-image-1"})).status == 200
        assert (await by_a(server, IMAGES, {"model": "gpt-image-1"})).error == "client_limit"
    spent = says({"usage": {"input_tokens": 1_000_000, "output_tokens": 0}, "model": "gpt-4o"})
    config = clients(settings(), "*", usd_per_day=Decimal("1"))
    async with running_proxy(spent, OK, config=config) as server:
        assert (await by_a(server, COMPACT, {"model": "gpt-4o", "input": "x"})).status == 200
        answer = await by_a(server, COMPACT, {"model": "gpt-4o", "input": "x"})
        assert (answer.status, answer.error) == (429, "budget_exceeded")
        assert (await by_a(server, "/v1/files", b"x")).status == 200


async def test_a_request_of_unknown_model_is_refused_beyond_the_budget() -> None:
    cost = CostSettings(budget=BudgetSettings(usd_per_day=Decimal(0)))
    async with running_proxy(OK, config=settings(cost=cost)) as server:
        assert (await server.ask(target="/v1/batches", body={})).error == "budget_exceeded"
        assert (await server.ask("GET", "/v1/batches")).status == 200


# --- usage and cost ---------------------------------------------------------------------------------------------------

PRICES = {"m": {"input": Decimal(1), "output": Decimal(2), "image_output": Decimal(40)}}
PRICED = settings(cost=CostSettings(prices=PRICES))
USAGE = {"input_tokens": 100, "output_tokens": 50, "total_tokens": 150}


async def test_the_cost_of_a_small_response_is_in_its_headers_and_its_receipt() -> None:
    async with running_proxy(says({"object": "response.compaction", "usage": USAGE}), config=PRICED) as server:
        headers = [("X-Proxy-Tag", "team:x"), ("Accept-Encoding", "br")]
        answer = await server.ask(target=COMPACT, body={"model": "m", "input": "x"}, headers=headers)
        assert answer.json()["usage"] == USAGE
        assert (answer.get("X-Proxy-Cost-USD"), answer.get("X-Proxy-Cost-Status")) == ("0.000200", "exact")
        assert answer.get("X-Proxy-Total-Tokens") == "150"
        [receipt] = server.receipts
        assert (receipt.model, receipt.cost_usd, receipt.tags) == ("m", "0.000200", ("team:x",))
        assert receipt.usage is not None
        assert receipt.usage.prompt_tokens == 100
        assert server.transport.sent[0].headers["Accept-Encoding"] == "identity"  # else the usage could not be read


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ((JSON,), (b'{"data":[{"b64_json":"' + b"A" * 400_000, b'"}],', b'"usage":' + dump(USAGE) + b"}")),
        ((SSE,), (event({"type": "image_generation.partial_image"}), event({"type": "done", "usage": USAGE}))),
    ],
)
async def test_the_cost_of_a_long_response_or_a_stream_is_in_its_receipt(headers: Any, body: Any) -> None:
    async with running_proxy(Responds(200, headers, body), config=PRICED) as server:
        answer = await server.ask(target=IMAGES, body={"model": "m", "prompt": 'a "usage": {"input_tokens": 9}'})
        assert answer.body == b"".join(body)
        assert answer.get("X-Proxy-Cost-Status") == "unknown"
        await server.settled()
        assert server.receipts[0].cost_usd == "0.002100"


async def test_what_is_read_again_costs_nothing() -> None:
    stored = says({"object": "response", "model": "m", "usage": USAGE})
    async with running_proxy(stored, config=PRICED) as server:
        await server.ask("GET", "/v1/responses/resp_1")
        assert server.receipts[0].cost_usd is None


async def test_streams_of_events_are_not_held_back_by_other_proxies() -> None:
    own = (("Cache-Control", "no-store"), ("x-accel-buffering", "yes"))
    async with running_proxy(Responds(200, (SSE,)), Responds(200, (SSE, *own)), config=settings()) as server:
        answer = await server.ask(target=SPEECH, body={"model": "tts-1", "stream_format": "sse"})
        assert (answer.get("Cache-Control"), answer.get("X-Accel-Buffering")) == ("no-cache", "no")
        answer = await server.ask(target=SPEECH, body={"model": "tts-1", "stream_format": "sse"})
        assert (answer.get("Cache-Control"), answer.get("X-Accel-Buffering")) == ("no-store", "yes")


# --- lists of models --------------------------------------------------------------------------------------------------


def listed(*names: str) -> Responds:
    return says({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


async def listing(server: RunningProxy, **lists: Responds) -> list[str]:
    server.transport.otherwise = lambda sent: lists[sent.key]
    answer = await by_a(server, "/v1/models", method="GET")
    assert answer.status == 200, answer
    return [item["id"] for item in answer.json()["data"]]


async def test_the_list_of_models_is_the_union_of_what_may_be_used() -> None:
    async with running_proxy(config=clients(TWO)) as server:
        for _ in range(3):
            models = await listing(server, local=listed("llama-3", "gpt-oss"), k1=listed("gpt-4o", "o3", "tts-1"))
            assert models == ["llama-3", "gpt-4o", "tts-1"]
        assert await listing(server, local=error(500), k1=listed("gpt-4o")) == ["gpt-4o"]
        assert server.receipts[-1].status == 200
    both = settings(replace(LLAMA, models=("*",)), GPT)
    async with running_proxy(config=clients(both, "gpt-4o", "llama*")) as server:
        models = await listing(server, local=listed("llama-3", "gpt-4o", "x"), k1=listed("gpt-4o", "gpt-4"))
        assert models == ["llama-3", "gpt-4o"]


async def test_if_no_upstream_lists_models_the_first_ones_error_is_returned() -> None:
    async with running_proxy(config=settings(LLAMA, GPT, retry=RetrySettings(max_retries=0))) as server:
        server.transport.otherwise = lambda sent: error(400 if sent.key == "local" else 500, message=f"by {sent.key}")
        answer = await server.ask("GET", "/v1/models")
        assert (answer.status, answer.json()["error"]["message"]) == (400, "by local")
        assert server.receipts[-1].error == "upstream_400"


async def test_one_upstream_that_serves_everything_gives_its_own_list() -> None:
    odd = says({"object": "list", "data": [{"name": "no id"}], "more": True})
    async with running_proxy(odd, config=settings()) as server:
        assert (await server.ask("GET", "/v1/models")).json()["more"] is True


async def test_a_model_is_looked_up_at_an_upstream_that_serves_it() -> None:
    async with running_proxy(*[OK] * 4, config=clients(TWO, "gpt*", "llama*")) as server:
        for name, key in (("gpt-4o", "k1"), ("llama-3", "local"), ("gpt-4o", "k1")):
            assert (await by_a(server, f"/v1/models/{name}", method="GET")).status == 200
            assert server.transport.keys[-1] == key
        assert (await by_a(server, "/v1/models/tts-1", method="GET")).error == "model_not_allowed"
