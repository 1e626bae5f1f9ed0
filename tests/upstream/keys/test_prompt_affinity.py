"""Which prompts share an upstream's prompt cache, and how long a key is remembered."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.keys.prompt_affinity import MAX_PREFIXES, PREFIX_BYTES, TTL, PromptAffinity, prefix_of

LONG = "You are a helpful assistant. " * 200


def of(*texts: str, endpoint: str = "chat", model: str = "gpt-4o", **fields: Any) -> bytes:
    messages = [{"role": "user", "content": text} for text in texts]
    return prefix_of(endpoint, {"messages": messages, **fields}, model)


def test_text_after_the_prefix_does_not_matter() -> None:
    assert of(LONG, "a") == of(LONG, "b", "c")
    assert of(LONG, "a", temperature=1) == of(LONG, "a", user="u")


def test_the_prefix_matters() -> None:
    assert len({of(LONG), of("x" + LONG), of(LONG, model="o1"), of(LONG, tools=[{"name": "f"}])}) == 4


def test_short_prompts_have_no_prefix() -> None:
    assert of("Hello!") == of("Hello!", prompt_cache_key="k") == b""


def test_prompt_cache_key_decides_alone() -> None:
    assert of(LONG, prompt_cache_key="k") == of("x" + LONG, prompt_cache_key="k")
    assert of(LONG, prompt_cache_key="k") != of(LONG, prompt_cache_key="l")
    assert of(LONG, prompt_cache_key="k") != of(LONG, prompt_cache_key="k", model="o1")
    assert of(LONG, prompt_cache_key=7) == of(LONG, prompt_cache_key="") == of(LONG)


@pytest.mark.parametrize(
    ("endpoint", "document"),
    [
        ("responses", {"input": LONG}),
        ("responses", {"instructions": LONG, "input": "x"}),
        ("responses", {"input": [{"role": "user", "content": LONG}]}),
        ("completions", {"prompt": LONG}),
    ],
)
def test_every_endpoint_that_caches_prompts(endpoint: str, document: dict[str, Any]) -> None:
    assert prefix_of(endpoint, document, "gpt-4o")


def test_endpoints_without_prompt_caching_have_no_prefix() -> None:
    assert prefix_of("embeddings", {"input": LONG}, "m") == b""


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(JSONISH, st.text(max_size=5))
def test_no_value_raises(value: Any, model: str) -> None:
    document = {
        "messages": value,
        "input": [value],
        "tools": value,
        "prompt": [2**70, "\ud800"],
        "prompt_cache_key": value,
    }
    for endpoint in ("chat", "responses", "completions"):
        prefix_of(endpoint, {**document, "instructions": "x" * PREFIX_BYTES}, model + "\ud800")
        prefix_of(endpoint, document, model)


def test_a_key_is_remembered_for_an_hour_after_its_last_use() -> None:
    affinity = PromptAffinity()
    affinity.record(b"p", "k1", 0.0)
    assert (affinity.key_of(b"p", TTL - 1), affinity.key_of(b"p", TTL), affinity.key_of(b"q", 0.0)) == (
        "k1",
        None,
        None,
    )
    affinity.record(b"p", "k2", TTL - 1)
    assert affinity.key_of(b"p", 2 * TTL - 2) == "k2"


def test_memory_is_bounded() -> None:
    affinity = PromptAffinity()
    for number in range(MAX_PREFIXES + 10):
        affinity.record(str(number).encode(), "k", 0.0)
    assert (affinity.key_of(b"9", 0.0), affinity.key_of(b"10", 0.0)) == (None, "k")
