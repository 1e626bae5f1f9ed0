"""Token usage as a response states it: the only source of a request's cost (`docs/costs-and-budgets.md`).

Field names: OpenAI's `CompletionUsage` (chat, completions), `CreateEmbeddingResponse.Usage`, `ResponseUsage`
(responses), `ImagesResponse.Usage`, and the usage of transcriptions; further ones are named where they are read.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, Final

import msgspec

MAX_TOKENS: Final = 10**12
"""A larger count in one response is nonsense: the largest context windows hold about 10**6 tokens."""

_MAX_COST: Final = 10**6
_TICKS_PER_USD: Final = Decimal(10**10)


class Usage(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What one response used.

    The prompt includes cached, cache-write, audio and image tokens; the completion includes reasoning, prediction,
    audio and image tokens. heard_tokens: audio in the prompt. spoken_tokens: audio in the completion. image_tokens:
    images in the prompt, if the provider counts them apart. drawn_tokens: images in the completion. cached_text_tokens,
    cached_audio_tokens, cached_image_tokens: the kinds of cached tokens, if the provider tells them apart.
    extra_reasoning_tokens: reasoning that the provider does not include in the completion. web_searches,
    file_searches: calls of hosted tools that are billed by the call. unpriced: tokens and calls for which nobody has a
    rate (12-hour cache writes, containers); if there are any, the cost is unknown. stated_cost: USD as the upstream
    itself states them, a plain decimal; '' if it does not.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    heard_tokens: int = 0
    spoken_tokens: int = 0
    image_tokens: int = 0
    web_searches: int = 0
    file_searches: int = 0
    unpriced: int = 0
    cached_text_tokens: int = 0
    cached_audio_tokens: int = 0
    cached_image_tokens: int = 0
    drawn_tokens: int = 0
    extra_reasoning_tokens: int = 0
    stated_cost: str = ""

    @property
    def plain(self) -> bool:
        """Whether it is text alone, which is nearly always so."""
        return not (
            self.heard_tokens
            or self.spoken_tokens
            or self.image_tokens
            or self.drawn_tokens
            or self.web_searches
            or self.file_searches
            or self.extra_reasoning_tokens
            or self.unpriced
        )


NO_TOKENS: Final = Usage(0, 0, 0)
"""The usage of responses that have none because they are free: moderations."""


def usage_of(endpoint: str, answer: object) -> Usage | None:
    """Return the usage in a parsed response; None if it has none, or if it is nonsense. Never raises.

    Nonsense is a count that is negative, no integer or above MAX_TOKENS, or a part that is larger than the whole, so
    that a wrong number is never priced. A missing total is the sum. A missing completion count is the total less the
    prompt, and 0 for embeddings, which have none. Moderations have no usage, hence None, but they are free: price them
    with NO_TOKENS.

    endpoint: chat, completions, embeddings, responses or moderations, which have their own names for the counts; on
    other routes (`images`, `audio` …) either set of names is read. answer: the response; for the usage object of a
    stream's chunk `{"usage": usage}`; for a stream of the Responses API its `response`, since its output and
    `tool_usage` say which tools were called.
    """
    if not isinstance(answer, dict):
        return None
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    sent, received = _names(endpoint, usage)
    totals = _totals(endpoint, usage, sent, received)
    if totals is None:
        return None
    prompt, completion, total = totals
    inner, outer = _prompt_parts(usage, sent, prompt), _completion_parts(endpoint, usage, received, completion)
    if inner is None or outer is None:
        return None
    cached, written, heard, pictured, cached_text, cached_audio, cached_image, kept = inner
    spoken, drawn, reasoning = outer
    outside = max(total - prompt - completion, 0) if endpoint != "embeddings" else 0
    # xAI counts reasoning beside the completion, and the total has both. Any other rest cannot be explained.
    extra = reasoning if outside == reasoning else 0
    searches, files, others = _calls(answer) if endpoint == "responses" else (0, 0, 0)
    stated, whole = _stated_cost(usage)
    return Usage(
        prompt,
        completion,
        total,
        cached,
        written,
        heard,
        spoken,
        pictured,
        searches,
        files,
        kept + others + outside - extra + _searches_of_others(usage) + (not whole),
        cached_text,
        cached_audio,
        cached_image,
        drawn,
        extra,
        stated,
    )


def _names(endpoint: str, usage: dict[str, Any]) -> tuple[str, str]:
    """Return the names of the prompt's and the completion's count."""
    if endpoint in ("chat", "completions", "embeddings", "moderations"):
        return "prompt_tokens", "completion_tokens"
    if endpoint == "responses" or "input_tokens" in usage:
        return "input_tokens", "output_tokens"
    return "prompt_tokens", "completion_tokens"


def _totals(endpoint: str, usage: dict[str, Any], sent: str, received: str) -> tuple[int, int, int] | None:
    prompt = _count(usage.get(sent))
    completion = _count(usage.get(received), default=-1)
    total = _count(usage.get("total_tokens"), default=-1)
    if prompt is None or completion is None or total is None:
        return None
    if completion < 0:
        completion = 0 if endpoint == "embeddings" else total - prompt
        if completion < 0:
            return None
    return prompt, completion, prompt + completion if total < 0 else total


def _prompt_parts(usage: dict[str, Any], sent: str, prompt: int) -> tuple[int, ...] | None:
    """Return of the prompt: cached, written to the cache, audio, images; of the cached tokens: text, audio, images;
    and the tokens written to the cache for 12 hours. None: nonsense.
    """
    details = usage.get(f"{sent}_details")
    if details is None:
        details = usage.get(f"{sent[:-1]}_details")  # `input_token_details`, in the Audio API
    parts = _counts(details, ("cached_tokens", "cache_write_tokens", "audio_tokens", "image_tokens"))
    if parts is None:
        return None
    cached, written, heard, pictured = parts
    if not cached:  # DeepSeek, Moonshot
        found = _count(usage.get("prompt_cache_hit_tokens", usage.get("cached_tokens")), default=0)
        if found is None:
            return None
        cached = found
    if cached + written > prompt or heard + pictured > prompt:
        return None
    inner: dict[str, Any] = details if isinstance(details, dict) else {}
    by_kind, by_time = inner.get("cached_tokens_details"), inner.get("cache_write_tokens_details")
    if by_kind is None and by_time is None:
        return cached, written, heard, pictured, 0, 0, 0, 0
    kinds = _counts(by_kind, ("text_tokens", "audio_tokens", "image_tokens"))
    # Writes are priced for the 30-minute retention; 12 hours cost more, and only this detail tells.
    kept = _counts(by_time, ("ttl_12h_tokens",))
    if kinds is None or kept is None or sum(kinds) > cached or kinds[1] > heard or kinds[2] > pictured:
        return None
    return cached, written, heard, pictured, *kinds, *kept


def _completion_parts(
    endpoint: str, usage: dict[str, Any], received: str, completion: int
) -> tuple[int, int, int] | None:
    """Return of the completion: audio, images, reasoning. None: nonsense.

    Accepted and rejected prediction tokens are part of the completion and billed like it, so they are only checked.
    """
    details = usage.get(f"{received}_details")
    if details is None:
        return 0, completion if endpoint == "images" else 0, 0  # the Images API makes nothing else
    parts = _counts(
        details,
        (
            "audio_tokens",
            "image_tokens",
            "reasoning_tokens",
            "accepted_prediction_tokens",
            "rejected_prediction_tokens",
        ),
    )
    if parts is None or parts[0] + parts[1] > completion or parts[3] + parts[4] > completion:
        return None
    return parts[0], parts[1], parts[2]


def _counts(details: object, names: tuple[str, ...]) -> list[int] | None:
    """Return counts of a `…_tokens_details` object, 0 where the provider leaves one or all out. None: nonsense."""
    if details is None:
        return [0] * len(names)
    if not isinstance(details, dict):
        return None
    counts = []
    for name in names:
        count = details.get(name, 0)
        if type(count) is not int or not 0 <= count <= MAX_TOKENS:
            if count is not None:
                return None
            count = 0
        counts.append(count)
    return counts


_UNPRICED_CALLS: Final = frozenset({"code_interpreter_call", "image_generation_call", "shell_call"})
"""Output items whose tools are billed by container or by another model's tokens."""


def _calls(answer: dict[str, Any]) -> tuple[int, int, int]:
    """Return (web searches, file searches, calls without a known price) of a response of the Responses API.

    Only the `search` action of a web search is billed, to open a page is free; the preview tool has prices of its own
    (OpenAI: *Pricing*, Built-in tools; *Web search*, Output and citations). `tool_usage.web_search.num_requests` is
    the billable number; if it is smaller than what the output shows, some searches were discounted.
    """
    output = answer.get("output")
    searches = files = others = 0
    for item in output if isinstance(output, list) else ():
        kind = item.get("type") if isinstance(item, dict) else None
        if not isinstance(kind, str):
            continue
        done = item.get("status") in (None, "completed")
        if kind == "web_search_call":
            action = item.get("action")
            if not isinstance(action, dict) or action.get("type", "search") == "search":
                searches, others = (searches + 1, others) if done else (searches, others + 1)
        elif kind == "file_search_call":
            files, others = (files + 1, others) if done else (files, others + 1)
        elif kind in _UNPRICED_CALLS:
            others += 1
    billable = _billable_searches(answer)
    if billable is not None:
        searches, others = (billable, others) if billable >= searches else (0, others + searches)
    if _has_preview_tool(answer.get("tools")):
        return 0, files, others + searches
    return searches, files, others


def _billable_searches(answer: dict[str, Any]) -> int | None:
    tools = answer.get("tool_usage")
    search = tools.get("web_search") if isinstance(tools, dict) else None
    count = search.get("num_requests") if isinstance(search, dict) else None
    return _count(count)


def _has_preview_tool(tools: object) -> bool:
    return isinstance(tools, list) and any(
        isinstance(tool, dict) and isinstance(kind := tool.get("type"), str) and kind.startswith("web_search_preview")
        for tool in tools
    )


def _searches_of_others(usage: dict[str, Any]) -> int:
    """Return the searches that other providers bill by the call: Perplexity, xAI, and those that copy Anthropic."""
    searches = (_count(usage.get("num_search_queries"), 0) or 0) + (_count(usage.get("num_sources_used"), 0) or 0)
    tools = usage.get("server_tool_use")
    return searches + (_count(tools.get("web_search_requests"), 0) or 0 if isinstance(tools, dict) else 0)


def _stated_cost(usage: dict[str, Any]) -> tuple[str, bool]:
    """Return the cost that the upstream states, '' if none; and False if it states only a part of it.

    OpenRouter: `cost`, USD; with the user's own key at the provider (`is_byok`) that is OpenRouter's fee alone, and
    `cost_details.upstream_inference_cost` comes on top. Perplexity: `cost.total_cost`. xAI: `cost_in_usd_ticks`,
    10**10 a USD.
    """
    if "cost" not in usage and "cost_in_usd_ticks" not in usage:
        return "", True
    cost = usage.get("cost")
    amount = _amount(cost.get("total_cost") if isinstance(cost, dict) else cost)
    if amount is None:
        ticks = _amount(usage.get("cost_in_usd_ticks"), most=_MAX_COST * 10**10)
        return ("", True) if ticks is None else (format(ticks / _TICKS_PER_USD, "f"), True)
    if usage.get("is_byok") is True:
        details = usage.get("cost_details")
        inference = _amount(details.get("upstream_inference_cost")) if isinstance(details, dict) else None
        if inference is None:
            return "", False
        amount += inference
    return format(amount, "f"), True


def _amount(value: object, most: int = _MAX_COST) -> Decimal | None:
    """Return a number of a JSON document as a decimal; None for anything else, for negative and for huge ones."""
    if type(value) is not int and not (type(value) is float and math.isfinite(value)):
        return None
    return Decimal(repr(value)) if 0 <= value <= most else None


def _count(value: object, default: int | None = None) -> int | None:
    """Return a token count; `default` for an absent one, None for nonsense. JSON's true and 3.0 are no counts."""
    if value is None:
        return default
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        return None
    return value
