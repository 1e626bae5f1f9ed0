"""Azure upstreams and Azure clients (docs/clients.md)."""

from __future__ import annotations

import pytest

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import Config, Launch, secret, settings
from tests.scripted_upstream import ScriptedUpstream

AZURE_PATH = "/openai/deployments/my-gpt4o/chat/completions"


def azure(port: int, **more: object) -> Config:
    entry: Config = {
        "name": "az",
        "kind": "azure",
        "base_url": f"http://127.0.0.1:{port}",
        "api_version": "2024-10-21",
        "deployments": {"gpt-4o": "my-gpt4o"},
        "keys": [{"name": "k1", "key": secret("k1")}],
    }
    config = settings(port)
    config["upstreams"] = [{k: v for k, v in (entry | more).items() if v is not None}]
    return config


@pytest.mark.parametrize("path", ["", "/", "/openai", "/openai/"])
async def test_an_openai_client_reaches_azure_by_any_spelling(
    launch: Launch, upstream: ScriptedUpstream, client: Client, path: str
) -> None:
    proxy = launch(azure(upstream.port, base_url=f"http://127.0.0.1:{upstream.port}{path}"))
    body = b'{"model": "gpt-4o", "messages": [{"role": "user", "content": "\\u00e4"}] }'
    answer = await client.send(proxy, body, {"Authorization": "Bearer mine"})
    assert answer.status == 200
    assert upstream.last.target == f"{AZURE_PATH}?api-version=2024-10-21"
    assert upstream.last.all("api-key") == [secret("k1")]
    assert upstream.last.header("authorization") is None
    assert upstream.last.body == body
    assert answer.headers["X-Proxy-Upstream"] == "az"
    assert answer.headers["X-Proxy-Cost-USD"] == "0.002250"


async def test_a_stream_from_azure(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(azure(upstream.port))
    first = upstream_answers.event(upstream_answers.chunk(None, prompt_filter_results=[]) | {"id": "", "model": ""})
    events = [first, *upstream_answers.chat_events(include_usage=True)]
    upstream.always(*upstream_answers.stream(events))
    question = ask(stream=True)
    for cache in ("miss", "hit"):
        answer = await client.send(proxy, question)
        assert answer.cache == cache
        assert answer.body == b"".join(events[:-2] + events[-1:])


async def test_embeddings_and_models_on_azure(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(azure(upstream.port, deployments={"text-embedding-*": "embed"}))
    await client.send(proxy, {"model": "text-embedding-3-small", "input": "a"}, path="/v1/embeddings")
    assert upstream.last.target == "/openai/deployments/embed/embeddings?api-version=2024-10-21"
    await client.get(proxy, "/v1/models")
    assert upstream.last.target == "/openai/models?api-version=2024-10-21"


async def test_a_model_without_a_mapping_is_its_own_deployment(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    """AzureOpenAI itself reads `model` in this way."""
    proxy = launch(azure(upstream.port, deployments=None))
    await client.send(proxy, ask())
    assert upstream.last.path == "/openai/deployments/gpt-4o/chat/completions"


async def test_an_unquoted_api_version_is_text(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(
        f"""
upstreams:
  - name: az
    kind: azure
    base_url: http://127.0.0.1:{upstream.port}
    api_version: 2024-10-21
    deployments: {{gpt-4o: my-gpt4o}}
    keys: [{secret("k1")}]
"""
    )
    answer = await client.send(proxy, ask())
    assert upstream.last.query == "api-version=2024-10-21"
    assert answer.headers["X-Proxy-Key"] == "az-1"


async def test_a_base_url_of_the_v1_surface_is_taken_as_such(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(azure(upstream.port, api_version=None, base_url=f"http://127.0.0.1:{upstream.port}/openai/v1/"))
    answer = await client.send(proxy, b'{"model": "gpt-4o",  "messages": [{"role":"user","content":"v1"}]}')
    assert answer.status == 200
    assert upstream.last.path == "/openai/v1/chat/completions"
    assert upstream.last.key == secret("k1")
    assert (upstream.last.header("api-key") is None) != (upstream.last.header("authorization") is None)
    # There the deployment is the body's model: only that field changes, in place.
    assert upstream.last.body == b'{"model": "my-gpt4o",  "messages": [{"role":"user","content":"v1"}]}'


async def test_azure_from_the_environment(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    env = {
        "AZURE_OPENAI_ENDPOINT": f"http://127.0.0.1:{upstream.port}/",
        "AZURE_OPENAI_API_KEY": secret("k1"),
        "OPENAI_API_VERSION": "2024-06-01",
    }
    proxy = launch(None, env)
    assert (await client.send(proxy, ask())).status == 200
    assert upstream.last.target == "/openai/deployments/gpt-4o/chat/completions?api-version=2024-06-01"
    assert upstream.last.header("api-key") == secret("k1")


# Azure-shaped clients.


async def test_an_azure_client_on_an_azure_upstream(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    """The deployment in the path decides; the client's api-version wins."""
    proxy = launch(azure(upstream.port))
    body = b'{"messages":[{"role":"user","content":"az"}], "model":"gpt-4o"}'
    path = "/openai/deployments/custom/chat/completions?api-version=2023-05-15"
    answer = await client.send(proxy, body, {"api-key": "mine"}, path)
    assert answer.status == 200
    assert upstream.last.target == path
    assert upstream.last.body == body
    assert upstream.last.all("api-key") == [secret("k1")]
    other = path.replace("2023-05-15", "2024-06-01")
    assert (await client.send(proxy, body, {"api-key": "mine"}, other)).cache == "miss"
    assert (await client.send(proxy, body, {"api-key": "mine"}, path)).cache == "hit"


async def test_an_azure_client_on_an_openai_upstream(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port))
    path = "/openai/deployments/custom/chat/completions?api-version=2024-06-01"
    body = b'{"messages":[{"role":"user","content":"az on openai"}], "model":"gpt-4o"}'
    answer = await client.send(proxy, body, {"api-key": "mine"}, path)
    assert answer.status == 200
    assert upstream.last.path == "/v1/chat/completions"
    assert upstream.last.body == body
    assert upstream.last.all("authorization") == [f"Bearer {secret('k1')}"]
    assert upstream.last.header("api-key") is None


async def test_without_a_model_in_the_body_the_deployment_is_the_model(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port))
    path = "/openai/deployments/gpt-4o-mini/chat/completions?api-version=2024-06-01"
    body = {"messages": [{"role": "user", "content": "no model"}]}
    assert (await client.send(proxy, body, {"api-key": "mine"}, path)).status == 200
    assert upstream.last.json() == body | {"model": "gpt-4o-mini"}


@pytest.mark.parametrize("kind", ["openai", "azure"])
async def test_the_v1_surface_of_azure(launch: Launch, upstream: ScriptedUpstream, client: Client, kind: str) -> None:
    if kind == "openai":
        proxy = launch(settings(upstream.port))
    else:
        proxy = launch(azure(upstream.port, api_version=None, deployments=None))
    for headers in ({"api-key": "mine"}, {"Authorization": "Bearer mine"}):
        answer = await client.send(proxy, ask(), headers, "/openai/v1/chat/completions")
        assert answer.status == 200
        wanted = "/v1/chat/completions" if kind == "openai" else "/openai/v1/chat/completions"
        assert upstream.last.path == wanted


async def test_options_come_before_azure_paths(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(azure(upstream.port))
    path = "/_/namespace=ci;ttl=1h/openai/deployments/custom/chat/completions?api-version=2024-06-01"
    answer = await client.send(proxy, ask(), {"api-key": "mine"}, path)
    assert answer.status == 200
    assert upstream.last.path == "/openai/deployments/custom/chat/completions"


async def test_a_missing_deployment_is_tried_elsewhere(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    config = azure(upstream.port)
    config["upstreams"] += settings(upstream.port, ("k2",))["upstreams"]
    config["upstreams"][1]["priority"] = 1
    proxy = launch(config)
    missing = {"error": {"code": "DeploymentNotFound", "message": "The API deployment does not exist."}}
    upstream.queue(AZURE_PATH, upstream_answers.reply(404, missing))
    answer = await client.send(proxy, ask())
    assert (answer.status, answer.headers["X-Proxy-Upstream"]) == (200, "openai")
    assert [r.path for r in upstream.requests] == [AZURE_PATH, "/v1/chat/completions"]
    assert upstream.last.header("api-key") is None


async def test_two_upstreams_do_not_share_answers(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    """The identity of the upstreams that serve the model is in the key."""
    question = ask()
    proxies = [launch(azure(upstream.port)), launch(settings(upstream.port))]
    keys = {(await client.send(proxy, question)).headers["X-Proxy-Cache-Key"] for proxy in proxies}
    assert len(keys) == 2
