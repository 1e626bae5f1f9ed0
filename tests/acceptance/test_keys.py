"""A client does not notice a bad key while a good one is left (docs/keys-and-limits.md)."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests import upstream_answers
from tests.client import Address, Client, ask
from tests.launch import AT_ONCE, CANARY, Launch, secret, settings
from tests.ledger import Request
from tests.scripted_upstream import Answer, ScriptedUpstream, Step

NAMES = ("k1", "k2", "k3")


def by_key(**answers: Step) -> Callable[[Request], Answer]:
    """A script: what each key (by its name) gets; the others a good answer."""

    def script(request: Request) -> Answer:
        for name, answer in answers.items():
            if request.key == secret(name):
                return answer
        return upstream_answers.behave(request)

    return script


def keys_asked(upstream: ScriptedUpstream) -> list[str]:
    names = {secret(name): name for name in NAMES}
    return [names[key or ""] for key in upstream.keys]


BAD = {
    "401": upstream_answers.unauthorized(),
    "403": upstream_answers.forbidden(),
    "429": upstream_answers.rate_limited("30"),
    "429 without a hint": upstream_answers.rate_limited(),
    "insufficient_quota": upstream_answers.insufficient_quota(),
    "404 model_not_found": upstream_answers.model_not_found(),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
async def test_a_bad_key_is_invisible(launch: Launch, upstream: ScriptedUpstream, client: Client, bad: Step) -> None:
    proxy = launch(settings(upstream.port, NAMES, retry={"max_retries": 0, "base_delay": "60s", "max_delay": "90s"}))
    upstream.script = by_key(k1=bad, k2=bad)
    answers = [await client.send(proxy, ask()) for _ in range(4)]
    assert [a.status for a in answers] == [200] * 4
    assert [a.headers["X-Proxy-Key"] for a in answers] == ["k3"] * 4
    assert all(a.seconds < AT_ONCE for a in answers)  # changing key costs no wait
    asked = keys_asked(upstream)
    assert asked.count("k1") <= 1
    assert asked.count("k2") <= 1  # each was found out once


async def test_a_pool_of_three_one_invalid_one_out_of_quota(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, NAMES))
    upstream.script = by_key(k1=upstream_answers.unauthorized(), k2=upstream_answers.insufficient_quota())
    for stream in (False, True, False):
        answer = await client.send(proxy, ask(stream=stream))
        assert (answer.status, answer.headers["X-Proxy-Key"]) == (200, "k3")
    states = {key["label"] if "label" in key else key["name"]: key for key in await listed(client, proxy)}
    assert set(states) == set(NAMES)
    assert "rejected" in str(states["k1"])
    assert "exhausted" in str(states["k2"])


async def listed(client: Client, proxy: Address) -> list[dict[str, object]]:
    """Return the rows of /_proxy/keys: a list, or a list under `keys`."""
    answer = await client.get(proxy, "/_proxy/keys")
    assert answer.status == 200
    assert CANARY.search(answer.body.decode()) is None  # labels, never keys
    document = answer.json()
    rows = document["keys"] if isinstance(document, dict) else document
    assert isinstance(rows, list)
    return rows


async def test_a_429_cools_for_retry_after(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, NAMES[:2], selection="round_robin"))
    upstream.queue("/v1/chat/completions", upstream_answers.rate_limited("1"))
    await client.send(proxy, ask())
    cooled, since = keys_asked(upstream)[0], upstream.requests[0].at
    for _ in range(4):
        await client.send(proxy, ask())
    assert cooled not in [request.key for request in upstream.requests[1:] if request.at - since < 1.0]
    while time.monotonic() - since < 1.1:
        await client.send(proxy, ask())
    for _ in range(2):
        await client.send(proxy, ask())
    assert cooled in keys_asked(upstream)[-2:]


async def test_cooling_is_per_model(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, NAMES[:2]))

    def script(request: Request) -> Answer:
        if request.key == secret("k1") and request.json()["model"] == "gpt-4o":
            return upstream_answers.model_not_found()
        return upstream_answers.behave(request)

    upstream.script = script
    for _ in range(3):
        assert (await client.send(proxy, ask())).headers["X-Proxy-Key"] == "k2"
    used = {(await client.send(proxy, ask(model="gpt-4o-mini"))).headers["X-Proxy-Key"] for _ in range(4)}
    assert "k1" in used


async def test_a_500_is_not_the_keys_fault(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, NAMES[:2], selection="round_robin"))
    upstream.queue("/v1/chat/completions", upstream_answers.server_error())
    for _ in range(5):
        assert (await client.send(proxy, ask())).status == 200
    assert set(keys_asked(upstream)[2:]) == {"k1", "k2"}


@pytest.mark.parametrize("bad", ["401", "403", "404 model_not_found"])
async def test_if_every_key_is_bad_the_last_response_is_passed(
    launch: Launch, upstream: ScriptedUpstream, client: Client, bad: str
) -> None:
    proxy = launch(settings(upstream.port, NAMES))
    upstream.always(BAD[bad])
    answer = await client.send(proxy, ask())
    assert answer.status == int(bad[:3])
    assert answer.headers["X-Proxy-Error"] == "no_usable_key"
    assert answer.headers["X-Should-Retry"] == "false"
    assert sorted(keys_asked(upstream)) == ["k1", "k2", "k3"]
    codes = ("invalid_api_key", "unsupported_country_region_territory", "model_not_found")
    codes = ("invalid_api_key", "unsupported_country_region_territory", "model_not_found")
    assert answer.json()["error"]["code"] in codes


async def test_without_a_key_left_to_ask_the_code_is_no_usable_key(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    """Once rejected, the keys rest for 10 minutes: the second request asks nobody, or one of them again."""
    proxy = launch(settings(upstream.port, NAMES[:1]))
    upstream.always(upstream_answers.unauthorized())
    answers = [await client.send(proxy, ask()) for _ in range(2)]
    assert answers[0].status == 401
    assert [a.headers.get("X-Proxy-Error") for a in answers] == ["no_usable_key"] * 2
    assert answers[1].status == 502 if upstream.count == 1 else answers[1].status == 401


async def test_if_every_key_cools_too_long_the_429_names_the_soonest(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    config = settings(upstream.port, NAMES[:2], throttle={"max_wait": "20s"}, retry={"max_retries": 0})
    proxy = launch(config)
    upstream.queue("/v1/chat/completions", upstream_answers.rate_limited("90"), upstream_answers.rate_limited("60"))
    first = await client.send(proxy, ask())
    assert first.status == 429
    second = await client.send(proxy, ask())
    assert (second.status, second.error) == (429, "keys_cooling")
    assert 40 <= float(second.headers["Retry-After"]) <= 61
    assert 40_000 <= float(second.headers["retry-after-ms"]) <= 61_000
    assert second.seconds < AT_ONCE
    assert upstream.count == 2


async def test_if_every_key_cools_for_a_moment_the_request_waits(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, NAMES[:1]))
    upstream.queue("/v1/chat/completions", upstream_answers.rate_limited("0.7"))
    answer = await client.send(proxy, ask())
    assert answer.status == 200
    assert 0.65 < answer.seconds < AT_ONCE


async def test_exhausted_keys_alone_pass_the_429_on(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, NAMES[:1]))
    upstream.always(upstream_answers.insufficient_quota())
    answer = await client.send(proxy, ask())
    assert (answer.status, answer.json()["error"]["code"]) == (429, "insufficient_quota")
    assert upstream.count == 1  # not retried on the same key
    assert answer.headers["X-Should-Retry"] == "false"


async def test_organization_and_project_belong_to_the_key(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    config = settings(upstream.port, NAMES[:1])
    config["upstreams"][0]["keys"][0] |= {"organization": "org-pool", "project": "proj_pool"}
    proxy = launch(config)
    await client.send(proxy, ask(), {"OpenAI-Organization": "org-client", "OpenAI-Project": "proj_client"})
    assert upstream.last.all("openai-organization") == ["org-pool"]
    assert upstream.last.all("openai-project") == ["proj_pool"]


async def test_the_clients_organization_is_not_sent_with_pooled_keys(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    """The organization belongs to the key, so the client's must not be sent with it."""
    proxy = launch(settings(upstream.port, NAMES[:1]))
    await client.send(proxy, ask(), {"OpenAI-Organization": "org-client"})
    assert upstream.last.header("openai-organization") is None


async def test_round_robin_takes_turns(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, NAMES, selection="round_robin"))
    for _ in range(6):
        await client.send(proxy, ask())
    asked = keys_asked(upstream)
    assert sorted(asked[:3]) == list(NAMES)
    assert asked[:3] == asked[3:]


async def test_without_limits_the_least_recently_used_key_is_taken(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, NAMES))
    for _ in range(6):
        await client.send(proxy, ask())
    assert sorted(keys_asked(upstream)[:3]) == list(NAMES)
    assert sorted(keys_asked(upstream)[3:]) == list(NAMES)


async def test_headroom_selects_the_key_with_most_room(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    config = settings(upstream.port, NAMES[:2], selection="headroom")
    for key, rpm in zip(config["upstreams"][0]["keys"], (10, 100), strict=True):
        key["limits"] = {"*": {"rpm": rpm}}
    proxy = launch(config)
    for _ in range(11):
        await client.send(proxy, ask())
    asked = keys_asked(upstream)
    assert asked.count("k2") >= 9
    assert asked.count("k1") >= 1


async def test_the_pool_from_the_environment(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    env = {
        "OPENAI_API_KEY": f" {secret('k1')} , {secret('k2')} ",
        "OPENAI_API_BASE": f"http://127.0.0.1:{upstream.port}/v1/",
        "OPENAI_ORG_ID": "org-env",
        "OPENAI_PROJECT_ID": "proj_env",
    }
    proxy = launch(None, env)
    labels = {(await client.send(proxy, ask())).headers["X-Proxy-Key"] for _ in range(2)}
    assert labels == {"openai-1", "openai-2"}
    assert set(keys_asked(upstream)) == {"k1", "k2"}
    assert upstream.last.target == "/v1/chat/completions"
    assert upstream.last.header("openai-organization") == "org-env"
    assert upstream.last.header("openai-project") == "proj_env"


async def test_stateful_routes_use_one_fixed_key(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, NAMES, selection="round_robin"))
    for path in ("/v1/files", "/v1/batches", "/v1/files/f-1", "/v1/vector_stores"):
        await client.get(proxy, path)
    assert set(keys_asked(upstream)) == {"k1"}


async def test_models_rotates_away_from_a_bad_key(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    """GET may be sent again with another key."""
    proxy = launch(settings(upstream.port, NAMES[:2]))
    upstream.script = by_key(k1=upstream_answers.unauthorized())
    answers = [await client.get(proxy, "/v1/models") for _ in range(2)]
    assert [a.status for a in answers] == [200, 200]


async def test_a_second_upstream_serves_when_the_first_is_out(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    config = settings(upstream.port, NAMES[:1])
    config["upstreams"].append(
        {
            "name": "spare",
            "priority": 1,
            "base_url": f"http://127.0.0.1:{upstream.port}/spare/v1",
            "keys": [{"name": "k2", "key": secret("k2")}],
        }
    )
    proxy = launch(config)
    assert (await client.send(proxy, ask())).headers["X-Proxy-Upstream"] == "openai"
    upstream.queue("/v1/chat/completions", upstream_answers.rate_limited("30"))
    answers = [await client.send(proxy, ask()) for _ in range(2)]
    assert [(a.status, a.headers["X-Proxy-Upstream"]) for a in answers] == [(200, "spare")] * 2
    assert upstream.last.target == "/spare/v1/chat/completions"


async def test_models_decide_the_upstream(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    config = settings(upstream.port, NAMES[:1])
    config["upstreams"][0]["models"] = ["gpt-*"]
    local = {"name": "local", "base_url": f"http://127.0.0.1:{upstream.port}/local/v1", "models": ["llama*"]}
    config["upstreams"].append(local)
    proxy = launch(config)
    answer = await client.send(proxy, ask(model="llama-3"))
    assert answer.headers["X-Proxy-Upstream"] == "local"
    assert upstream.last.target == "/local/v1/chat/completions"
    assert upstream.last.key is None  # where any upstream has keys, one without is called without a credential
