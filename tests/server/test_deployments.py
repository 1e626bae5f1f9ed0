"""On Azure the deployment decides: key states, limits, models and prices, whatever the body's `model` says."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from proxy.config.limits import Limits
from proxy.config.settings import (
    ClientKeySettings,
    CostSettings,
    RetrySettings,
    ServerSettings,
    ThrottleSettings,
    UpstreamSettings,
)
from tests.pipeline.fixture import ask, pool, settings
from tests.pipeline.script import Move, error, rate_limited, says
from tests.server.kit import Answer, RunningProxy, running_proxy

pytestmark = pytest.mark.slow

KEYS = pool("k1", "k2").keys
AZURE = UpstreamSettings(
    "az", "azure", "https://az.test", api_version="v", deployments={"gpt-4o": "my4o"}, keys=KEYS[:1]
)
ONCE = RetrySettings(max_retries=0)


async def asked(server: RunningProxy, deployment: str, text: str = "Hi", **more: Any) -> Answer:
    path = more.pop("path", "chat/completions")
    target = f"/openai/deployments/{deployment}/{path}?api-version=v"
    return await server.ask(target=target, body=ask(text, **more), headers=[("Authorization", "Bearer key-a")])


@pytest.mark.parametrize("path", ["chat/completions", "images/generations"])
async def test_one_deployments_429_does_not_stop_another(path: str) -> None:
    config = settings(AZURE, retry=ONCE, throttle=ThrottleSettings(max_wait=0.0))
    async with running_proxy(rate_limited("20"), says(), config=config) as server:
        assert (await asked(server, "busy", path=path)).status == 429
        assert (await asked(server, "free", path=path)).status == 200
        assert (await asked(server, "busy", "again", path=path)).error == "keys_cooling"
        states = (await server.ask("GET", "/_proxy/keys")).json()["keys"][0]["states"]
        assert [state["model"] for state in states] == ["busy"]


async def test_a_missing_deployment_is_missing_for_it_alone() -> None:
    config = settings(replace(AZURE, keys=KEYS))

    def answer(sent: Any) -> Move:
        return error(404, "DeploymentNotFound") if sent.key == "k1" and "/gone/" in sent.url else says()

    async with running_proxy(config=config) as server:
        server.transport.otherwise = answer
        for number in range(4):
            assert (await asked(server, "gone", str(number))).status == 200
            assert (await asked(server, "here", str(number))).status == 200
        gone = [sent.key for sent in server.transport.sent if "/gone/" in sent.url]
        here = [sent.key for sent in server.transport.sent if "/here/" in sent.url]
        assert (gone.count("k1"), "k1" in here) == (1, True)


async def test_limits_are_those_of_the_deployment() -> None:
    limits = {"small": Limits(rpm=1), "gpt-4o": Limits(rpm=2)}
    config = settings(AZURE, throttle=ThrottleSettings(limits=limits, max_wait=0.0))
    async with running_proxy(*[says()] * 20, config=config) as server:
        assert [(await asked(server, "small", f"s{n}")).status for n in range(2)] == [200, 429]
        for number in range(3):  # no limit, whatever the body's model
            assert (await asked(server, "large", f"l{number}")).status == 200
        # The deployment of gpt-4o, by its own name or by the model's, is one.
        assert (await asked(server, "my4o", "1")).status == 200
        assert (await server.ask(body=ask("2"))).status == 200
        assert (await asked(server, "my4o", "3")).error == "throttled"


async def test_models_of_an_upstream_and_of_a_client_are_those_of_the_deployment() -> None:
    async with running_proxy(*[says()] * 9, config=settings(replace(AZURE, models=("gpt-4o", "ptu")))) as server:
        assert (await asked(server, "ptu", model="whatever")).status == 200
        assert (await asked(server, "my4o", model="whatever")).status == 200
        assert (await asked(server, "other", model="gpt-4o")).error == "no_usable_key"
        assert (await server.ask(body=ask())).status == 200
    key = ClientKeySettings("a", hashlib.sha256(b"key-a").digest(), None, ("gpt-4o", "ptu"))
    config = replace(settings(AZURE), server=ServerSettings(client_keys=(key,)))
    async with running_proxy(*[says()] * 9, config=config) as server:
        for deployment, status in (("ptu", 200), ("my4o", 200), ("other", 403)):
            for path in ("chat/completions", "images/generations"):
                for model in ("gpt-4o", "whatever"):
                    answer = await asked(server, deployment, model=model, path=path)
                    assert answer.status == status, (deployment, path, model)


async def test_a_price_for_the_deployment_goes_before_the_models() -> None:
    prices = {"ptu": {"input": Decimal(0), "output": Decimal(0)}}
    for config in (settings(replace(AZURE, prices=prices)), settings(AZURE, cost=CostSettings(prices=prices))):
        async with running_proxy(says(), says(), config=config) as server:
            answer = await asked(server, "ptu")
            assert (answer.get("X-Proxy-Cost-USD"), answer.get("X-Proxy-Cost-Status")) == ("0.000000", "exact")
            assert (await asked(server, "other")).get("X-Proxy-Cost-USD") != "0.000000"


async def test_beside_an_openai_upstream_the_bodys_model_counts_there() -> None:
    """Azure's 429 rests the deployment; the request goes to the other upstream under the body's model."""
    config = settings(AZURE, replace(pool("k2"), priority=1), retry=ONCE)
    async with running_proxy(rate_limited("20"), *[says()] * 3, config=config) as server:
        assert (await asked(server, "ptu")).status == 200
        assert [sent.key for sent in server.transport.sent] == ["k1", "k2"]
        assert server.transport.sent[1].json()["model"] == "gpt-4o"
        assert (await asked(server, "other", "2")).status == 200
        assert server.transport.keys[-1] == "k1"
