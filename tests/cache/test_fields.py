"""proxy.cache.fields: every field of OpenAI's requests has a line, and what the line says is what happens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.fields import FIELDS, HOSTED_TOOLS, LABELS, dropped_fields, request_bypass
from proxy.cache.key import canonical
from proxy.config.settings import CacheSettings
from tests.cache.test_key import json_values
from tests.sdk_schema import CLIENT_RUN, SDK, fields_of, tool_types

LINES = [(endpoint, name, verdict) for endpoint, fields in FIELDS.items() for name, verdict in fields.items()]
IGNORED = CacheSettings().ignore_fields

BYPASSING: dict[str, Any] = {
    "store": True,
    "tools": [{"type": "web_search"}],
    "audio": {"voice": "alloy"},
    "modalities": ["text", "audio"],
    "web_search_options": {},
    "background": True,
    "conversation": "conv_1",
}
HARMLESS: dict[str, Any] = {
    "store": False,
    "tools": [{"type": "function"}],
    "audio": None,
    "modalities": ["text"],
    "web_search_options": None,
    "background": False,
    "conversation": None,
}


def key_of(endpoint: str, document: dict[str, Any]) -> bytes:
    return canonical(json.dumps(document).encode(), dropped_fields(endpoint, IGNORED))


@pytest.mark.parametrize("endpoint", SDK)
def test_every_field_of_the_sdk_has_a_line(endpoint: str) -> None:
    assert fields_of(endpoint) <= FIELDS[endpoint].keys()


def test_every_tool_of_the_sdk_has_a_decision() -> None:
    kinds = tool_types()
    assert kinds >= {"function", "mcp", "custom"}
    assert {kind for kind in kinds if not kind.startswith(HOSTED_TOOLS)} == CLIENT_RUN


def test_fields_ignored_by_default() -> None:
    assert set(IGNORED) == LABELS


@pytest.mark.parametrize(("endpoint", "name", "verdict"), LINES)
def test_the_table_decides_the_key(endpoint: str, name: str, verdict: str) -> None:
    values = [None, False, 0, "", "x", 1, 1.5, [], {}, ["x"], {"x": 1}, BYPASSING.get(name), HARMLESS.get(name)]
    without = key_of(endpoint, {})
    for value in values:
        changes = key_of(endpoint, {name: value}) != without
        assert changes is (verdict in ("in", "echoed", "bypass"))
    result = {request_bypass(endpoint, {name: value}) is not None for value in values}
    assert result == ({True, False} if verdict == "bypass" else {False})


@pytest.mark.parametrize(("endpoint", "name", "verdict"), LINES)
def test_values_that_bypass_the_cache(endpoint: str, name: str, verdict: str) -> None:
    if verdict == "bypass":
        assert request_bypass(endpoint, {name: BYPASSING[name]})
        assert request_bypass(endpoint, {name: HARMLESS[name]}) is None


@given(st.sampled_from(list(FIELDS)), st.text(st.characters(exclude_categories=["Cs"])), json_values)
def test_unknown_fields_are_in_the_key(endpoint: str, name: str, value: Any) -> None:
    if name not in {field for fields in FIELDS.values() for field in fields}:
        assert key_of(endpoint, {name: value}) != key_of(endpoint, {})
        assert request_bypass(endpoint, {name: value}) is None


@given(st.dictionaries(st.sampled_from(sorted({name for _, name, _ in LINES})), json_values))
def test_no_value_of_any_field_raises(document: dict[str, Any]) -> None:
    for endpoint in FIELDS:
        reason = request_bypass(endpoint, document)
        assert reason is None or (reason.startswith("uncacheable: ") and reason.isascii() and reason.isprintable())
