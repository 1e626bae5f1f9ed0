"""How many tokens a request will take, estimated without a tokenizer, for reservations (`docs/keys-and-limits.md`).

The actual usage corrects the estimate when the request is settled. A tokenizer would download its tables at run time,
and block the event loop for a long prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .media import SHORTEST_RUN, audio_tokens, encrypted_tokens, file_tokens, image_tokens, media_in_text

# The fields of a prompt by endpoint, and those whose strings are all shown to the model as definitions.
_PROMPTS: Mapping[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "completions": ("prompt", "suffix"),
    "embeddings": ("input",),
    "responses": ("input", "instructions"),
    "moderations": ("input",),
}
_ANY_PROMPT = ("messages", "prompt", "suffix", "input", "instructions")
_DEFINITIONS = ("tools", "functions")
_OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_WITHOUT_OUTPUT = frozenset({"embeddings", "moderations"})
_TEXT_ONLY = frozenset({"completions", "embeddings", "moderations"})
"""Endpoints whose texts are taken literally, so that base64 in them is text."""

# Names and links inside a message that the model does not read as text.
_STRUCTURE = frozenset(
    {
        "annotations", "call_id", "detail", "file_id", "filename", "format", "id", "logprobs", "media_type", "mimeType",
        "mime_type", "role", "status", "tool_call_id", "type",
    }
)  # fmt: skip

# Fields of media. The others are read as text, with whatever media is inside.
_MEDIA = frozenset(
    {
        "audio_url", "data", "encrypted_content", "file_data", "file_url", "image_url", "input_audio", "result",
        "video_url",
    }
)  # fmt: skip

# Beyond any real request, so that nonsense stays cheap to calculate with.
_MAX_TOKENS = 10**9


@dataclass(frozen=True, slots=True)
class RequestSize:
    """What the body of a request tells about its size.

    text: UTF-8 bytes of the prompt's text. counted: tokens of the rest of the prompt (token arrays, images, audio,
    files). limit: the most tokens of one answer, None if the request sets no limit. choices: the number of answers, 0
    if the endpoint makes none.
    """

    text: int
    counted: int
    limit: int | None
    choices: int

    def tokens(self, ratio: float = 1.0, expected_output: int = 0) -> int:
        """Return the tokens to reserve. ratio: tokens of the text, divided by its bytes / 4; the limit has none."""
        output = (expected_output if self.limit is None else self.limit) * self.choices
        return min(self.prompt_tokens(ratio) + output, _MAX_TOKENS)

    def prompt_tokens(self, ratio: float = 1.0) -> int:
        """Return the tokens of the prompt."""
        return min(math.ceil(self.text * ratio / 4) + self.counted, _MAX_TOKENS)


def request_size(endpoint: str, document: Mapping[str, Any]) -> RequestSize:
    """Return the size of a request. document: its parsed JSON body. Never raises.

    endpoint: chat, completions, embeddings, responses or moderations; for others every known field counts.
    """
    prompt = _Prompt(endpoint)
    for field in _PROMPTS.get(endpoint, _ANY_PROMPT):
        prompt.read(document.get(field))
    if endpoint in _WITHOUT_OUTPUT:
        return RequestSize(prompt.text_bytes, prompt.tokens, None, 0)
    for field in _DEFINITIONS:
        if field in document:
            prompt.read_definition(document[field])
    if "response_format" in document:
        prompt.read_definition(_inside(document, "response_format", "json_schema"))
    if "text" in document:
        prompt.read_definition(_inside(document, "text", "format", "schema"))
    limits = [number for field in _OUTPUT_LIMITS if (number := _number(document.get(field))) is not None]
    return RequestSize(prompt.text_bytes, prompt.tokens, max(limits) if limits else None, _choices(endpoint, document))


def estimate_tokens(endpoint: str, document: Mapping[str, Any], expected_output: int = 0) -> int:
    """Return the tokens, input and output, that a request will take. expected_output: if it sets no limit."""
    return request_size(endpoint, document).tokens(expected_output=_number(expected_output) or 0)


def _choices(endpoint: str, document: Mapping[str, Any]) -> int:
    """Return how many answers are made, each up to the output limit: n; on completions n or best_of a prompt."""
    if endpoint == "responses":
        return 1
    choices = max(_number(document.get("n")) or 1, 1)
    if endpoint == "completions":
        choices = max(choices, _number(document.get("best_of")) or 1)
        prompts = document.get("prompt")
        if isinstance(prompts, list) and prompts and type(prompts[0]) is not int:
            choices *= len(prompts)
    return choices


def _number(value: object) -> int | None:
    """Return a count, clamped to 0 … 10⁹; None if it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    return int(min(max(value, 0), _MAX_TOKENS))


def _inside(value: object, *path: str) -> object:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class _Prompt:
    """Adds up a prompt. It does not recurse: a body nested a million deep must not overflow the stack."""

    def __init__(self, endpoint: str) -> None:
        self.text_bytes = 0
        self.tokens = 0
        self._counts_media = endpoint != "moderations"
        self._text_only = endpoint in _TEXT_ONLY

    def read(self, prompt: object) -> None:
        """Add messages, input items, texts or token arrays."""
        left = [prompt]
        while left:
            item = left.pop()
            if isinstance(item, str):
                self._add_text(item, literally=self._text_only)
            elif isinstance(item, list):
                if item and type(item[0]) is int:
                    self.tokens += len(item)
                else:
                    left.extend(item)
            elif isinstance(item, dict):
                left.extend(self._read_part(item))

    def read_definition(self, definition: object) -> None:
        """Add tools and schemas: their strings and the names of their properties."""
        left = [definition]
        while left:
            item = left.pop()
            if isinstance(item, str):
                self._add_text(item, literally=True)
            elif isinstance(item, list):
                left.extend(item)
            elif isinstance(item, dict):
                left.extend(item.values())
                if isinstance(properties := item.get("properties"), dict):
                    left.extend(properties)

    def _add_text(self, text: str, *, literally: bool) -> None:
        self.text_bytes += _utf8_length(text)
        if not literally and (len(text) >= SHORTEST_RUN or ";base64," in text):
            characters, tokens = media_in_text(text)
            self.text_bytes -= characters
            self.tokens += tokens

    def _read_part(self, part: dict[Any, Any]) -> list[object]:
        """Count the texts and media of one object; return what is still to be read."""
        inner: list[object] = []
        for key, value in part.items():
            if key in _STRUCTURE:
                continue
            if key in _MEDIA and (tokens := self._media_tokens(part, key, value)) is not None:
                self.tokens += tokens if self._counts_media else 0
            elif isinstance(value, str):
                self._add_text(value, literally=not self._counts_media)
            else:
                inner.append(value)
        if part.get("type") in ("input_image", "computer_screenshot") and "image_url" not in part:
            self.tokens += image_tokens(None, part.get("detail")) if self._counts_media else 0
        return inner

    def _media_tokens(self, part: dict[Any, Any], key: str, value: object) -> int | None:
        """Return the tokens of a field of `_MEDIA`; None if it is to be read like any other."""
        if key == "image_url":
            # chat: {"url", "detail"}; responses: the URL itself, with "detail" beside it
            nested = value if isinstance(value, dict) else {"url": value}
            return image_tokens(nested.get("url"), nested.get("detail") or part.get("detail"))
        if key == "input_audio":
            return audio_tokens(_inside(value, "data"), _inside(value, "format"))
        if key == "encrypted_content":
            return encrypted_tokens(value)
        if key in ("audio_url", "file_url", "video_url"):
            return file_tokens(_inside(value, "url") if isinstance(value, dict) else value)
        if key == "file_data":
            return file_tokens(value)
        if key == "result":
            return image_tokens(None, None) if part.get("type") == "image_generation_call" else None
        if not isinstance(value, str):
            return None
        if isinstance(part.get("format"), str):  # audio that a model has made
            return audio_tokens(value, part["format"])
        mime = next((part[name] for name in ("media_type", "mime_type", "mimeType") if name in part), None)
        return file_tokens(value, mime) if isinstance(mime, str) else None
