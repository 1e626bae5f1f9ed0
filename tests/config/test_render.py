from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest
import yaml

from proxy.config.description import Section
from proxy.config.render import lines, plain
from proxy.config.schema import SETTINGS
from proxy.config.settings import Settings
from tests.config.kit import Load

FULL = """
server:
  port: 9
  admin_key: hunter2-admin
  ops: '[::1]:99'
  client_keys: [{name: a, key: hunter2-client, namespace: n}, {key: hunter2-more}]
upstreams:
- base_url: https://n.openai.azure.com
  keys: [{name: k, key: 'hunter2,hunter3', organization: org-1, quota: q, limits: {rpm: 5}}]
  deployments: {gpt-4o: d}
  cache_as: eu
  prices: {gpt-x: {input: 0.15}}
- keys: [hunter2-openai]
- {name: local, base_url: 'http://127.0.0.1:999/v1', insecure: true, models: ['llama*']}
throttle: {limits: {'gpt-*': {rpm: 1, tpm: 2}}}
retry: {budget: 0.5}
"""


def test_no_secret_is_shown(load: Load) -> None:
    loaded = load(FULL, {"REDIS_URL": "redis://:hunter2@h"})
    text = "\n".join(lines(loaded))
    assert "hunter" not in text + repr(loaded) + repr(plain(loaded.settings))
    assert text.count("***") == 7


def test_what_is_shown_is_yaml_that_means_the_same(load: Load) -> None:
    shown = "\n".join(lines(load(FULL)))
    document = yaml.safe_load(shown)
    assert document["server"]["port"] == 9
    assert document["upstreams"][0]["keys"][1]["name"] == "k-2"
    assert document["upstreams"][0]["deployments"] == {"gpt-4o": "d"}
    assert document["upstreams"][0]["api_version"]
    assert document["throttle"]["limits"] == {"gpt-*": {"rpm": 1, "tpm": 2}}
    again = load("\n".join(lines(load())))
    assert again.settings == Settings()


def test_sources_are_beside_the_values(load: Load) -> None:
    environ = {"OPENAI_API_KEY": "sk-a,sk-b"}
    shown = list(lines(load("server:\n  port: 9\n", environ, log__level="debug")))
    assert any(line.startswith("  port: 9 ") and line.endswith("# settings.yaml:2") for line in shown)
    assert any(line.startswith("  level: debug") and line.endswith("# flag --log-level") for line in shown)
    assert sum(line.endswith("# env OPENAI_API_KEY") for line in shown) == 5
    assert any(line.startswith("    chat: 24h") and line.endswith("# default") for line in shown)


@pytest.mark.parametrize("section", [SETTINGS])
def test_every_field_has_a_description_and_the_reverse(section: Section) -> None:
    def compare(section: Section, value: object) -> None:
        assert is_dataclass(value)
        assert not isinstance(value, type)
        assert [field.name for field in fields(value)] == list(section.settings)
        for name, setting in section.settings.items():
            assert isinstance(setting.kind, Section) == is_dataclass(getattr(value, name))
            if isinstance(setting.kind, Section):
                compare(setting.kind, getattr(value, name))

    compare(section, Settings())
