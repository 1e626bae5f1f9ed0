from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cost.usage import MOST_TOKENS, Usage, usage_of

DEEP: list[Any] = []
for _ in range(1000):
    DEEP = [DEEP]

ENDPOINTS = ("chat", "completions", "embeddings", "responses", "moderations")


@pytest.mark.parametrize(
    ("endpoint", "usage", "expected"),
    [
        ("chat", {"prompt_tokens": 42, "completion_tokens": 287, "total_tokens": 329}, Usage(42, 287, 329)),
        ("completions", {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}, Usage(1, 2, 3)),
        ("chat", {"prompt_tokens": 5, "completion_tokens": 7}, Usage(5, 7, 12)),
        ("chat", {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": None}, Usage(5, 7, 12)),
        ("completions", {"prompt_tokens": 5, "total_tokens": 5}, Usage(5, 0, 5)),
        ("embeddings", {"prompt_tokens": 8, "total_tokens": 8}, Usage(8, 0, 8)),
        ("embeddings", {"prompt_tokens": 8}, Usage(8, 0, 8)),
        ("moderations", {"prompt_tokens": 8, "completion_tokens": 0}, Usage(8, 0, 8)),
        ("responses", {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}, Usage(3, 4, 7)),
        ("chat", {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, Usage(0, 0, 0)),
        ("chat", {"prompt_tokens": MOST_TOKENS, "completion_tokens": 0}, Usage(MOST_TOKENS, 0, MOST_TOKENS)),
        # The endpoint decides on the names.
        ("responses", {"prompt_tokens": 3, "completion_tokens": 4}, None),
        ("chat", {"input_tokens": 3, "output_tokens": 4}, None),
        # What is missing cannot be priced.
        ("chat", {}, None),
        ("chat", {"prompt_tokens": 5}, None),
        ("chat", {"completion_tokens": 5, "total_tokens": 9}, None),
        ("chat", {"prompt_tokens": 9, "total_tokens": 5}, None),
        # Nonsense.
        ("chat", {"prompt_tokens": -1, "completion_tokens": 2}, None),
        ("chat", {"prompt_tokens": True, "completion_tokens": 2}, None),
        ("chat", {"prompt_tokens": 1.0, "completion_tokens": 2}, None),
        ("chat", {"prompt_tokens": "1", "completion_tokens": 2}, None),
        ("chat", {"prompt_tokens": MOST_TOKENS + 1, "completion_tokens": 2}, None),
        ("chat", {"prompt_tokens": 1, "completion_tokens": [2]}, None),
        ("chat", {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": -3}, None),
        ("embeddings", {"prompt_tokens": 8, "total_tokens": float("nan")}, None),
    ],
)
def test_token_counts(endpoint: str, usage: dict[str, Any], expected: Usage | None) -> None:
    assert usage_of(endpoint, {"model": "m", "usage": usage}) == expected


@pytest.mark.parametrize(
    ("prompt_details", "completion_details", "expected"),
    [
        (None, None, Usage(100, 20, 120)),
        ({}, {}, Usage(100, 20, 120)),
        ({"cached_tokens": 64}, {"reasoning_tokens": 20}, Usage(100, 20, 120, 64)),
        ({"cached_tokens": None, "audio_tokens": None}, {"audio_tokens": None}, Usage(100, 20, 120)),
        ({"cached_tokens": 60, "cache_write_tokens": 40}, None, Usage(100, 20, 120, 60, 40)),
        ({"audio_tokens": 7}, {"audio_tokens": 5}, Usage(100, 20, 120, heard_tokens=7, spoken_tokens=5)),
        (
            {
                "cache_write_tokens": 9,
                "cache_write_tokens_details": {"ttl_30m_tokens": 6, "ttl_12h_tokens": 3},
            },
            None,
            Usage(100, 20, 120, 0, 9, unpriced=3),
        ),
        ({"cached_tokens": 101}, None, None),
        ({"cached_tokens": 60, "cache_write_tokens": 41}, None, None),
        ({"cached_tokens": -1}, None, None),
        ({"cached_tokens": True}, None, None),
        ({"cache_write_tokens": "9"}, None, None),
        ({"cache_write_tokens_details": {"ttl_12h_tokens": 0.5}}, None, None),
        ({"cache_write_tokens_details": 1}, None, None),
        ({"audio_tokens": 101}, None, None),
        ({"audio_tokens": {}}, None, None),
        (None, {"audio_tokens": 21}, None),
        (None, {"audio_tokens": -1}, None),
        ([], None, None),
        (None, "none", None),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "responses"])
def test_token_details(
    endpoint: str, prompt_details: object, completion_details: object, expected: Usage | None
) -> None:
    sent, received = ("input", "output") if endpoint == "responses" else ("prompt", "completion")
    usage = {
        f"{sent}_tokens": 100,
        f"{received}_tokens": 20,
        f"{sent}_tokens_details": prompt_details,
        f"{received}_tokens_details": completion_details,
    }
    assert usage_of(endpoint, {"usage": usage}) == expected


@pytest.mark.parametrize("answer", [None, 1, "usage", [], {}, {"usage": None}, {"usage": []}, {"usage": "4"}])
def test_responses_without_usage(answer: object) -> None:
    assert usage_of("chat", answer) is None


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_count = st.integers(-2, 200) | st.sampled_from([0, 1, 7, 10**12, 10**13]) | _json
_details = st.dictionaries(
    st.sampled_from(["cached_tokens", "cache_write_tokens", "audio_tokens", "cache_write_tokens_details"]),
    _count,
)
_names = st.sampled_from(["prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens"])
_usage = st.builds(
    lambda counts, details: {**counts, **{f"{name}_details": value for name, value in details.items()}},
    st.dictionaries(_names, _count),
    st.dictionaries(_names, _details | _json),
)


@given(
    endpoint=st.sampled_from(ENDPOINTS),
    answer=_json | st.builds(lambda usage: {"usage": usage}, _usage | _json),
)
def test_any_json_value_gives_usage_or_none(endpoint: str, answer: object) -> None:
    usage = usage_of(endpoint, answer)
    if usage is not None:
        assert 0 <= usage.cached_tokens + usage.cache_write_tokens <= usage.prompt_tokens <= MOST_TOKENS
        assert 0 <= usage.completion_tokens <= MOST_TOKENS
        assert usage.unpriced >= 0
        assert usage.total_tokens >= 0


@pytest.mark.parametrize(
    ("output", "tools", "searches", "files", "unpriced"),
    [
        ([], [], 0, 0, 0),
        (None, None, 0, 0, 0),
        ([{"type": "message"}, {"type": "function_call"}, {"type": "mcp_call"}, "odd", None], [], 0, 0, 0),
        ([{"type": "web_search_call", "action": {"type": "search", "query": "x"}}], [{"type": "web_search"}], 1, 0, 0),
        ([{"type": "web_search_call"}], [], 1, 0, 0),
        (
            [{"type": "web_search_call", "action": {"type": kind}} for kind in ("search", "open_page", "find")],
            [],
            1,
            0,
            0,
        ),
        ([{"type": "web_search_call"}], [{"type": "web_search_preview_2025_03_11"}], 0, 0, 1),
        ([{"type": []}, {"type": "web_search_call"}], [{"type": DEEP}], 1, 0, 0),
        ([{"type": "file_search_call"}] * 3, [], 0, 3, 0),
        ([{"type": "code_interpreter_call"}, {"type": "image_generation_call"}], [], 0, 0, 2),
    ],
)
def test_calls_of_hosted_tools(output: object, tools: object, searches: int, files: int, unpriced: int) -> None:
    answer = {"usage": {"input_tokens": 10, "output_tokens": 5}, "output": output, "tools": tools}
    got = usage_of("responses", answer)
    assert got == Usage(10, 5, 15, web_searches=searches, file_searches=files, unpriced=unpriced)
    chat = usage_of("chat", {"usage": {"prompt_tokens": 10, "completion_tokens": 5}, "output": output})
    assert chat == Usage(10, 5, 15), "only Responses say so"
