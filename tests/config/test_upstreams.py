from __future__ import annotations

from decimal import Decimal

import pytest

from proxy.config.settings import UpstreamSettings
from proxy.cost.pricing import PriceTable
from tests.config.kit import Load, problems


def only(load: Load, body: str) -> UpstreamSettings:
    (upstream,) = load(f"upstreams:\n- {{{body}}}").settings.upstreams
    return upstream


def test_an_openai_upstream(load: Load) -> None:
    body = "name: main, models: [gpt-*, o1], priority: 2, cache_as: eu, insecure: true"
    body += ", prices: {gpt-x: {input: 1, output: 2.5}}"
    assert only(load, body) == UpstreamSettings(
        name="main",
        models=("gpt-*", "o1"),
        priority=2,
        cache_as="eu",
        insecure=True,
        prices={"gpt-x": {"input": Decimal(1), "output": Decimal("2.5")}},
    )


@pytest.mark.parametrize(
    ("body", "api_version", "deployments"),
    [
        ("base_url: 'https://n.openai.azure.com'", "2024-10-21", {}),
        ("kind: azure, base_url: 'https://n.openai.azure.com/openai'", "2024-10-21", {}),
        ("base_url: 'https://n.openai.azure.com/openai/v1/'", None, {}),
        ("base_url: 'https://n.openai.azure.com/openai/v1', api_version: 2025-04-01-preview", "2025-04-01-preview", {}),
        ("base_url: 'https://n.openai.azure.com', api_version: 2023-05-15", "2023-05-15", {}),
        ("base_url: 'https://n.openai.azure.com', api_version: v1", None, {}),
        ("base_url: 'https://n.openai.azure.com', api_version: preview", "preview", {}),
        ("base_url: 'https://n.openai.azure.com/openai/deployments/d/chat/completions'", "2024-10-21", {"*": "d"}),
        (
            "base_url: 'https://n.openai.azure.com/openai/deployments/d', deployments: {gpt-4o: e}",
            "2024-10-21",
            {"gpt-4o": "e"},
        ),
    ],
)
def test_an_azure_upstream(load: Load, body: str, api_version: str | None, deployments: dict[str, str]) -> None:
    assert only(load, body) == UpstreamSettings(
        name="azure",
        kind="azure",
        base_url="https://n.openai.azure.com",
        api_version=api_version,
        deployments=deployments,
    )


def test_azures_openai_surface_may_be_called_as_openai(load: Load) -> None:
    upstream = only(load, "kind: openai, base_url: 'https://n.openai.azure.com/openai/v1/'")
    assert (upstream.kind, upstream.base_url) == ("openai", "https://n.openai.azure.com/openai/v1")


def test_names_by_default(load: Load) -> None:
    text = "upstreams:\n- {}\n- {base_url: 'https://a/v1'}\n- {base_url: 'https://n.openai.azure.com'}\n- {name: x}"
    assert [upstream.name for upstream in load(text).settings.upstreams] == ["openai", "openai-2", "azure", "x"]


def test_keys_share_limits_and_labels_over_all_upstreams(load: Load) -> None:
    text = "upstreams:\n- {name: a, keys: [{name: x, key: k1}]}\n- {name: b, keys: [{name: x, key: k2}]}"
    assert "settings.yaml:3: upstreams.1.keys.0: expected a key's name of its own" in problems(load, text)[0]
    keyless = "upstreams:\n- {name: a, base_url: 'http://127.0.0.1:9/v1'}\n- {name: b, keys: [{name: a, key: k2}]}"
    assert "found a again" in problems(load, keyless)[0]
    same_secret = "upstreams:\n- {name: a, keys: [k1]}\n- {name: b, keys: [k1]}"
    assert len(load(same_secret).settings.upstreams) == 2


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("kind: azure", "settings.yaml:2: upstreams.0.base_url: expected https://NAME.openai.azure.com, found nothing"),
        ("kind: gcp", "upstreams.0.kind: expected openai or azure, found 'gcp'"),
        ("base_url: api.openai.com", "upstreams.0.base_url: expected a base URL such as"),
        ("base_url: 'https://u:hunter2@h/v1'", "expected a base URL without user and password"),
        ("base_url: 'https://h/v1?key=hunter2'", "expected a base URL without a query"),
        ("base_url: 'https://h/v1#hunter2'", "expected a base URL without a fragment"),
        ("base_url: 'https://api.openai.com/v1/chat/completions'", "drop /chat/completions"),
        ("kind: openai, base_url: 'https://n.openai.azure.com'", "expected an OpenAI base URL, found Azure's"),
        ("kind: azure, base_url: 'https://n.openai.azure.com/v1'", "found a path that is not /openai"),
        ("base_url: 'https://n.openai.azure.com/openai/deployments/a:b'", "expected a deployment's name"),
        (
            "kind: azure, base_url: 'https://n.openai.azure.com', api_version: hunter2hunter2",
            "upstreams.0.api_version: expected an api-version such as",
        ),
        (
            "kind: azure, base_url: 'https://n.openai.azure.com', api_version: 2024-13-01",
            "found something else (not shown)",
        ),
        (
            "kind: azure, base_url: 'https://n.openai.azure.com', deployments: {gpt-4o: a b}",
            "upstreams.0.deployments.gpt-4o: expected a deployment's name",
        ),
        ("api_version: 2024-10-21", "upstreams.0.api_version: expected kind: azure beside this setting"),
        ("deployments: {a: b}", "upstreams.0.deployments: expected kind: azure beside this setting"),
        ("models: []", "upstreams.0.models: expected at least 1"),
        ("models: gpt-4o", "upstreams.0.models: expected a list"),
        ("priority: -1", "upstreams.0.priority: expected a whole number"),
        ("cache_as: 'a b'", "upstreams.0.cache_as: expected 1 to 128"),
        ("name: sk-hunter2", "upstreams.0.name: expected a name"),
        (
            "base_ulr: x",
            "upstreams.0.base_ulr: expected a setting of this section, found an unknown name; did you mean base_url?",
        ),
        ("prices: {gpt-x: {output: 1}}", "upstreams.0.prices.gpt-x: expected at least an input price"),
    ],
)
def test_mistakes(load: Load, body: str, expected: str) -> None:
    found = problems(load, f"upstreams:\n- {{{body}}}")
    assert len(found) == 1
    assert expected in found[0]
    assert "hunter2" not in found[0]


def test_mistakes_of_the_list(load: Load) -> None:
    assert (
        "settings.yaml:1: upstreams: expected a list of upstreams, found a table"
        in problems(load, "upstreams: {name: a}")[0]
    )
    assert "upstreams.0: expected a table" in problems(load, "upstreams: [https://a]")[0]
    twice = problems(load, "upstreams:\n- name: a\n- name: a")
    assert twice == ["settings.yaml:3: upstreams.1.name: expected a name of its own, found a again"]


def test_prices_are_those_the_table_takes(load: Load) -> None:
    text = "cost: {prices: {gpt-x*: {input: 2.50, cached_input: 1.25, cache_write: 3, output: 10}, e: {input: 0.02}}}"
    PriceTable(load(text).settings.cost.prices)
