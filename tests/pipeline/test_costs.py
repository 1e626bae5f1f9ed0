"""Costs that are exact, and costs that stay unknown (docs/costs-and-budgets.md)."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

from proxy.config.settings import UpstreamSettings
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import PipelineFixture, ask, pool, settings
from tests.pipeline.script import chunk, completion, event, says, streams


@virtual_time
async def test_the_upstream_states_the_cost() -> None:
    """OpenRouter's `usage.cost` is the bill, whatever the model is called; streams have it in the usage chunk."""
    usage = {"prompt_tokens": 100, "completion_tokens": 200, "total_tokens": 300, "cost": 0.00014}
    answer = completion(model="vendor/model", usage=usage)
    pipeline = PipelineFixture(
        says(answer),
        streams([event(piece) for piece in (chunk("Hi", "stop"), {"choices": [], "usage": usage}, "[DONE]")]),
    )
    result = await pipeline.ask(ask(model="vendor/model"))
    assert (result.cost, result.headers["X-Proxy-Cost-Status"]) == ("0.000140", "exact")
    await pipeline.ask(ask("other", model="vendor/model", stream=True))
    assert (pipeline.receipt.cost_usd, pipeline.receipt.cost_status) == ("0.000140", "exact")


@virtual_time
async def test_a_tier_that_was_asked_for_and_not_confirmed_has_no_known_price() -> None:
    pipeline = PipelineFixture(says(completion()), says(completion(service_tier="priority")), says(completion()))
    assert (await pipeline.ask(ask("1", service_tier="priority"))).cost is None
    assert (await pipeline.ask(ask("2", service_tier="priority"))).cost == "0.003825"
    assert (await pipeline.ask(ask("3", service_tier="auto"))).cost == "0.002250"


@virtual_time
async def test_an_upstream_without_a_key_in_a_pool_has_only_prices_of_its_own() -> None:
    local = UpstreamSettings(name="vllm", base_url="http://vllm.test/v1", models=("local-*", "gpt-4o"))
    config = settings(pool("k1", models=("gpt-4o-mini",)), local)
    pipeline = PipelineFixture(says(completion()), config=config)
    result = await pipeline.ask()
    assert (result.cost, result.headers["X-Proxy-Cost-Status"]) == (None, "unknown")
    config = settings(pool("k1", models=("gpt-4o-mini",)), replace(local, prices="openai"))
    pipeline = PipelineFixture(says(completion()), config=config)
    assert (await pipeline.ask()).cost == "0.002250"


@virtual_time
async def test_the_price_of_an_azure_deployment_goes_before_that_of_its_model() -> None:
    ptu = UpstreamSettings(
        name="az",
        kind="azure",
        base_url="https://up.test",
        api_version="2024-10-21",
        deployments={"gpt-4o": "my-ptu"},
        prices={"my-ptu": {"input": Decimal(0), "output": Decimal(0)}, "gpt-4o*": {"input": Decimal(9)}},
        keys=pool("k1").keys,
    )
    pipeline = PipelineFixture(*[says(completion(model="gpt-4o-2024-08-06"))] * 3, config=settings(ptu))
    assert (await pipeline.ask()).cost == "0.000000"
    path = "/openai/deployments/my-ptu/chat/completions?api-version=2024-10-21"
    assert (await pipeline.ask(target=path)).cost == "0.000000"
    path = "/openai/deployments/other/chat/completions?api-version=2024-10-21"
    assert (await pipeline.ask(target=path)).cost is None  # an input price alone
