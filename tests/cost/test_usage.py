from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cost.usage import MAX_TOKENS, Usage, usage_of

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
        ("chat", {"prompt_tokens": MAX_TOKENS, "completion_tokens": 0}, Usage(MAX_TOKENS, 0, MAX_TOKENS)),
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
        ("chat", {"prompt_tokens": MAX_TOKENS + 1, "completion_tokens": 2}, None),
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
        assert 0 <= usage.cached_tokens + usage.cache_write_tokens <= usage.prompt_tokens <= MAX_TOKENS
        assert 0 <= usage.completion_tokens <= MAX_TOKENS
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


def test_searches_that_did_not_end_have_no_known_price() -> None:
    output = [{"type": kind, "status": "failed"} for kind in ("web_search_call", "file_search_call")]
    got = usage_of("responses", {"usage": {"input_tokens": 10, "output_tokens": 5}, "output": output})
    assert got == Usage(10, 5, 15, unpriced=2)


@pytest.mark.parametrize(
    ("billable", "searches", "unpriced"),
    [(2, 2, 0), (3, 3, 0), (1, 0, 2), (0, 0, 2), (None, 2, 0), (-1, 2, 0), ("2", 2, 0)],
)
def test_the_number_of_billable_searches_counts(billable: object, searches: int, unpriced: int) -> None:
    """One search may send several requests; a smaller number means that some were discounted."""
    answer = {
        "usage": {"input_tokens": 10, "output_tokens": 5},
        "output": [{"type": "web_search_call", "action": {"type": "search"}, "status": "completed"}] * 2,
        "tool_usage": {"web_search": {"num_requests": billable}},
    }
    assert usage_of("responses", answer) == Usage(10, 5, 15, web_searches=searches, unpriced=unpriced)


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({"accepted_prediction_tokens": 5, "rejected_prediction_tokens": 10}, Usage(100, 20, 120)),
        ({"accepted_prediction_tokens": 11, "rejected_prediction_tokens": 10}, None),
        ({"rejected_prediction_tokens": -1}, None),
        ({"reasoning_tokens": 20}, Usage(100, 20, 120)),
        ({"audio_tokens": 5, "image_tokens": 7}, Usage(100, 20, 120, spoken_tokens=5, drawn_tokens=7)),
        ({"audio_tokens": 15, "image_tokens": 7}, None),
    ],
)
def test_parts_of_the_completion(details: dict[str, int], expected: Usage | None) -> None:
    """Predicted tokens, also rejected ones, are part of the completion and cost the same."""
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "completion_tokens_details": details}
    assert usage_of("chat", {"usage": usage}) == expected


@pytest.mark.parametrize(
    ("total", "reasoning", "expected"),
    [
        (420, 300, Usage(100, 20, 420, extra_reasoning_tokens=300)),  # xAI
        (420, 0, Usage(100, 20, 420, unpriced=300)),  # Gemini: thoughts are in the total alone
        (420, 299, Usage(100, 20, 420, unpriced=300)),
        (120, 15, Usage(100, 20, 120)),
        (100, 0, Usage(100, 20, 100)),
    ],
)
def test_tokens_beside_prompt_and_completion(total: int, reasoning: int, expected: Usage) -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "total_tokens": total,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
    assert usage_of("chat", {"usage": usage}) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 36}, Usage(100, 20, 120, 64)),  # DeepSeek
        ({"cached_tokens": 64}, Usage(100, 20, 120, 64)),  # Moonshot
        ({"cached_tokens": 64, "prompt_tokens_details": {"cached_tokens": 32}}, Usage(100, 20, 120, 32)),
        ({"cached_tokens": 101}, None),
        ({"cached_tokens": "64"}, None),
        ({"num_search_queries": 2}, Usage(100, 20, 120, unpriced=2)),  # Perplexity
        ({"num_sources_used": 3}, Usage(100, 20, 120, unpriced=3)),  # xAI
        ({"server_tool_use": {"web_search_requests": 1}}, Usage(100, 20, 120, unpriced=1)),
        ({"server_tool_use": {"web_search_requests": None}, "num_sources_used": "3"}, Usage(100, 20, 120)),
    ],
)
def test_spellings_of_other_providers(fields: dict[str, Any], expected: Usage | None) -> None:
    assert usage_of("chat", {"usage": {"prompt_tokens": 100, "completion_tokens": 20, **fields}}) == expected


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        (
            {"text_tokens": 10, "audio_tokens": 20},
            Usage(100, 0, 100, 64, heard_tokens=40, cached_text_tokens=10, cached_audio_tokens=20),
        ),
        ({"audio_tokens": 41}, None),
        ({"text_tokens": 45, "audio_tokens": 20}, None),
        ({"image_tokens": 1}, None),
        ([], None),
    ],
)
def test_kinds_of_cached_tokens(details: object, expected: Usage | None) -> None:
    prompt = {"cached_tokens": 64, "audio_tokens": 40, "cached_tokens_details": details}
    usage = {"prompt_tokens": 100, "completion_tokens": 0, "prompt_tokens_details": prompt}
    assert usage_of("chat", {"usage": usage}) == expected


@pytest.mark.parametrize(
    ("endpoint", "usage", "expected"),
    [
        (
            "audio",
            {"type": "tokens", "input_tokens": 14, "input_token_details": {"audio_tokens": 12}, "output_tokens": 45},
            Usage(14, 45, 59, heard_tokens=12),
        ),
        ("audio", {"type": "duration", "seconds": 3}, None),
        (
            "images",
            {"input_tokens": 50, "input_tokens_details": {"image_tokens": 40}, "output_tokens": 1056},
            Usage(50, 1056, 1106, image_tokens=40, drawn_tokens=1056),
        ),
        (
            "images",
            {"input_tokens": 50, "output_tokens": 1100, "output_tokens_details": {"image_tokens": 1056}},
            Usage(50, 1100, 1150, drawn_tokens=1056),
        ),
        ("batches", {"prompt_tokens": 3, "completion_tokens": 4}, Usage(3, 4, 7)),
    ],
)
def test_usage_on_other_routes(endpoint: str, usage: dict[str, Any], expected: Usage | None) -> None:
    assert usage_of(endpoint, {"usage": usage}) == expected


@pytest.mark.parametrize(
    ("fields", "stated"),
    [
        ({"cost": 0.00014}, "0.00014"),  # OpenRouter
        ({"cost": 0}, "0"),
        ({"cost": 1.4e-07}, "0.00000014"),
        ({"cost": 0.01, "is_byok": False, "cost_details": {"upstream_inference_cost": 0.01}}, "0.01"),
        ({"cost": 0.001, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.02}}, "0.021"),
        ({"cost": {"input_tokens_cost": 0.001, "total_cost": 0.006}}, "0.006"),  # Perplexity
        ({"cost_in_usd_ticks": 37_756_000}, "0.0037756"),  # xAI
        ({"cost": None, "cost_in_usd_ticks": None}, ""),
        ({"cost": "0.01"}, ""),
        ({"cost": True}, ""),
        ({"cost": -1}, ""),
        ({"cost": 10**400}, ""),
        ({"cost": float("nan")}, ""),
        ({"cost": []}, ""),
    ],
)
def test_a_cost_that_the_upstream_states(fields: dict[str, Any], stated: str) -> None:
    got = usage_of("chat", {"usage": {"prompt_tokens": 100, "completion_tokens": 20, **fields}})
    assert got == Usage(100, 20, 120, stated_cost=stated)


def test_a_fee_for_the_use_of_ones_own_key_is_not_the_cost() -> None:
    for details in ({}, None, {"upstream_inference_cost": None}):
        fields = {"cost": 0.001, "is_byok": True, "cost_details": details}
        got = usage_of("chat", {"usage": {"prompt_tokens": 100, "completion_tokens": 20, **fields}})
        assert got == Usage(100, 20, 120, unpriced=1)
