"""Token usage as the provider's answer states it: the only source the cost of a request is computed from.

Field names: OpenAI's `CompletionUsage` (chat, completions), `CreateEmbeddingResponse.Usage` and
`ResponseUsage` (responses).
"""

from __future__ import annotations

import msgspec

MOST_TOKENS = 10**12
"""More than this in one answer is nonsense: the largest context windows hold about 10**6 tokens."""


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one answer; the prompt includes cached and cache-write ones, the completion reasoning."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    unpriced_tokens: int = 0
    """Tokens the price table has no rate for (audio, 12-hour cache writes): if any, the cost is unknown."""


NO_TOKENS = Usage(0, 0, 0)
"""For answers that have no usage because they are free: moderations."""


def usage_of(endpoint: str, answer: object) -> Usage | None:
    """The usage in a parsed answer of chat, completions, embeddings, responses or moderations; never raises.

    None: there is none, or it is nonsense (negative, not an integer, above MOST_TOKENS, more cached than
    prompt tokens), so that a wrong number is never priced. A missing total is the sum; a missing completion
    count is the total less the prompt, and 0 for embeddings, which have none. Moderations carry no usage,
    hence None, but they are free: price them with NO_TOKENS. For the usage object of a stream's event pass
    `{"usage": usage}`.
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
    if cached is None or written is None or heard is None or spoken is None:
        return None
    if cached + written > prompt or heard > prompt or spoken > completion:
        return None
    # Writes are priced for the 30-minute retention; 12 hours cost more, and only this detail tells.
    kept: int | None = 0
    if isinstance(prompt_details, dict):
        kept = _detail(prompt_details.get("cache_write_tokens_details"), "ttl_12h_tokens")
    if kept is None:
        return None
    return Usage(prompt, completion, total, cached, written, heard + spoken + kept)


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
