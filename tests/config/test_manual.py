"""The JSON Schema accepts what the proxy accepts, and refuses what an editor should mark."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from proxy.config.manual import json_schema
from tests.config.kit import Load, problems

ROOT = Path(__file__).resolve().parents[2]
SCHEMA: dict[str, Any] = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


class EditorLoader(yaml.SafeLoader):
    """Reads YAML 1.2 as editors do: a date is a text."""


EditorLoader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def mistakes(text: str) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(yaml.load(text, EditorLoader))]


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_repositorys_file_and_its_examples_are_valid() -> None:
    text = (ROOT / "config.yaml").read_text("utf-8")
    assert mistakes(text) == []
    examples = re.sub(r"^# (?=upstreams:$|client_keys:$|  )", "", text, flags=re.MULTILINE).replace("…", "1")
    document = yaml.load(re.sub(r"^\s*openai-proxy .*\n", "", examples, flags=re.MULTILINE), EditorLoader)
    assert [upstream["name"] for upstream in document["upstreams"]] == ["openai", "azure"]
    document["server"]["client_keys"] = document.pop("client_keys")
    assert [error.message for error in VALIDATOR.iter_errors(document)] == []


GOOD = [
    "",
    "server:\ncache: {ttl: }",
    "server: {port: '${PORT:-8485}', max_body: 1048576, drain_timeout: 90, ops: , admin_key: {key: '${K:-a1b2}'}}",
    "cache: {backend: off, ttl: {chat: 1.5h, embeddings: 250ms}, memory_size: 1.5KiB}",
    "upstreams:\n- {}\n- base_url: https://a.example/v1\n  keys: [abc, {key: def, limits: {rpm: 5}}]",
    "upstreams: [{keys: abc}]",
    "upstreams: [{keys: [{key: abc, limits: {'gpt-*': {rpm: 5}}}], models: ['gpt-*', 5]}]",
    "throttle: {tier: 1, use: 0.5, max_wait: auto, limits: {gpt-4o: {tpm: 1000}}}",
    "cost: {prices: {gpt-x: {input: 0.15}}, budget: {usd_per_day: 5}}",
    "retry: {ambiguous: off, fallbacks: {a: [b]}}",
    "server: {client_keys: [{name: a, key: a-long-enough-client-key, limits: {rpm: 60, usd_per_day: 2.5}}]}",
]


@pytest.mark.parametrize("text", GOOD)
def test_what_the_proxy_accepts_is_valid(load: Load, text: str) -> None:
    assert problems(load, text) == []
    assert mistakes(text) == []


def test_commands_and_key_files_are_valid() -> None:
    assert mistakes("upstreams: [{keys: [{key_command: [cat, key]}, {key_file: key}]}]") == []


@pytest.mark.parametrize(
    "text",
    [
        "sever: {}",
        "server: {port: 99999}",
        "server: {port: many}",
        "server: {workers: 0}",
        "server: []",
        "cache: {backend: disk}",
        "cache: {ttl: {chat: 7 dayz}}",
        "cache: {memory_size: 10MB}",
        "cache: {shared: maybe}",
        "upstreams: {name: a}",
        "upstreams: [{base_ulr: x}]",
        "upstreams: [{models: []}]",
        "upstreams: [{keys: [{key: abc, nmae: x}]}]",
        "throttle: {limits: {gpt-4: {rpm: -1}}}",
        "throttle: {use: 1.01}",
        "cost: {prices: {gpt-x: {output: 1}}}",
        "cost: {prices: {gpt-x: {input: 1, in: 1}}}",
        "server: {client_keys: [{key_sha256: abc}]}",
        "retry: {fallbacks: {a: []}}",
    ],
)
def test_mistakes_of_the_proxy_are_mistakes_of_the_schema(load: Load, text: str) -> None:
    assert problems(load, text) != []
    assert mistakes(text) != []


def test_descriptions_and_defaults_are_there_for_editors() -> None:
    port = SCHEMA["properties"]["server"]["properties"]["port"]
    assert (port["default"], port["anyOf"][0]["maximum"]) == (8484, 65535)
    assert "Port" in port["description"]
    body = SCHEMA["properties"]["server"]["properties"]["max_body"]
    assert body["default"] == "64MiB"

    def described(schema: dict[str, Any]) -> None:
        for name, inner in schema.get("properties", {}).items():
            assert inner["description"].endswith((".", "…")), name
            described(inner)

    described(SCHEMA)
