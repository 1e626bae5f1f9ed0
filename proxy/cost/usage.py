"""Token usage as the provider's answer states it: the only source the cost of a request is computed from.

Field names: OpenAI's `CompletionUsage` (chat, completions), `CreateEmbeddingResponse.Usage` and
`ResponseUsage` (responses).
"""

from __future__ import annotations

from typing import Any

import msgspec

MOST_TOKENS = 10**12
"""More than this in one answer is nonsense: the largest context windows hold about 10**6 tokens."""


class Usage(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Tokens of one answer; the prompt includes cached, cache-write, audio and image ones, the completion reasoning and
    audio. web_searches, file_searches: calls of hosted tools that are billed by the call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    heard_tokens: int = 0
    """Audio in the prompt."""
    spoken_tokens: int = 0
    """Audio in the completion."""
    image_tokens: int = 0
    """Images in the prompt, where the provider counts them apart."""
    web_searches: int = 0
    file_searches: int = 0
    unpriced: int = 0
    """Tokens and calls that nobody has a rate for (12-hour cache writes, containers): if any, the cost is unknown."""

    @property
    def plain(self) -> bool:
        """Whether it is text alone, which is nearly always."""
        return not (
            self.heard_tokens
            or self.spoken_tokens
            or self.image_tokens
            or self.web_searches
            or self.file_searches
            or self.unpriced
        )


NO_TOKENS = Usage(0, 0, 0)
"""For answers that have no usage because they are free: moderations."""


def usage_of(endpoint: str, answer: object) -> Usage | None:
    """The usage in a parsed answer of chat, completions, embeddings, responses or moderations; never raises.

    None: there is none, or it is nonsense (negative, not an integer, above MOST_TOKENS, more cached than
    prompt tokens), so that a wrong number is never priced. A missing total is the sum; a missing completion
    count is the total less the prompt, and 0 for embeddings, which have none. Moderations carry no usage,
    hence None, but they are free: price them with NO_TOKENS. For the usage object of a stream's event pass
    `{"usage": usage}`; of a Responses stream the whole `response`, whose output says which tools were called.
    """
    if not isinstance(answer, dict):
        return None
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    sent, received = "prompt_tokens", "completion_tokens"
    if endpoint == "responses":
        sent, received = "input_tokens", "output_tokens"
    prompt = _count(usage.get(sent))
    completion = _count(usage.get(received), default=-1)
    total = _count(usage.get("total_tokens"), default=-1)
    if prompt is None or completion is None or total is None:
        return None
    if completion < 0:
        completion = 0 if endpoint == "embeddings" else total - prompt
        if completion < 0:
            return None
    if total < 0:
        total = prompt + completion

    prompt_details, completion_details = usage.get(f"{sent}_details"), usage.get(f"{received}_details")
    cached = _detail(prompt_details, "cached_tokens")
    written = _detail(prompt_details, "cache_write_tokens")
    heard = _detail(prompt_details, "audio_tokens")
    spoken = _detail(completion_details, "audio_tokens")
    pictured = _detail(prompt_details, "image_tokens")
    if cached is None or written is None or heard is None or spoken is None or pictured is None:
        return None
    if cached + written > prompt or heard + pictured > prompt or spoken > completion:
        return None
    # Writes are priced for the 30-minute retention; 12 hours cost more, and only this detail tells.
    kept: int | None = 0
    if isinstance(prompt_details, dict):
        kept = _detail(prompt_details.get("cache_write_tokens_details"), "ttl_12h_tokens")
    if kept is None:
        return None
    searches, files, others = _calls(answer) if endpoint == "responses" else (0, 0, 0)
    return Usage(
        prompt, completion, total, cached, written, heard, spoken, pictured, searches, files, unpriced=kept + others
    )


_UNPRICED_CALLS = frozenset({"code_interpreter_call", "image_generation_call", "shell_call"})
"""Output items whose tools are billed by container or by another model's tokens, which no answer tells."""


def _calls(answer: dict[str, Any]) -> tuple[int, int, int]:
    """(web searches, file searches, calls that nobody can price) of a Responses answer.

    Only the `search` action of a web search is billed, opening a page found is not; the preview tool has prices of its
    own (OpenAI: *Pricing*, Built-in tools; *Web search*, Output and citations).
    """
    output = answer.get("output")
    if not isinstance(output, list):
        return 0, 0, 0
    searches = files = others = 0
    for item in output:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "web_search_call":
            action = item.get("action")
            if not isinstance(action, dict) or action.get("type", "search") == "search":
                searches += 1
        elif kind == "file_search_call":
            files += 1
        elif isinstance(kind, str) and kind in _UNPRICED_CALLS:
            others += 1
    tools = answer.get("tools")
    preview = isinstance(tools, list) and any(
        isinstance(tool, dict) and isinstance(kind := tool.get("type"), str) and kind.startswith("web_search_preview")
        for tool in tools
    )
    return (0, files, others + searches) if preview else (searches, files, others)


def _count(value: object, default: int | None = None) -> int | None:
    """A token count; `default` for an absent one, None for nonsense. JSON's true and 3.0 are no counts."""
    if value is None:
        return default
    if type(value) is not int or not 0 <= value <= MOST_TOKENS:
        return None
    return value


def _detail(details: object, name: str) -> int | None:
    """One count of a `…_tokens_details` object; 0 where the provider leaves it or the whole object out."""
    if details is None:
        return 0
    if not isinstance(details, dict):
        return None
    return _count(details.get(name), default=0)
