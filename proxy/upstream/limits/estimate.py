"""Estimates the tokens of a request before it is sent, without a tokenizer, for the reservation only.

The rules are in `docs/keys-and-limits.md`. The usage of the response corrects what is wrong here. A tokenizer would
download its tables at run time and block the event loop for a long prompt.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Prompt fields an endpoint reads, and those whose every string is a definition shown to the model.
_PROMPTS: Mapping[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "completions": ("prompt", "suffix"),
    "embeddings": ("input",),
    "responses": ("input", "instructions"),
    "moderations": ("input",),
}
_ANY_PROMPT = ("messages", "prompt", "suffix", "input", "instructions")
# What is not simply read on.
_MEDIA = frozenset({"image_url", "input_audio", "file_data", "result"})
_DEFINITIONS = ("tools", "functions")
_OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_WITHOUT_OUTPUT = frozenset({"embeddings", "moderations"})

# Names and links inside a message that the model does not read as text.
_STRUCTURE = frozenset(
    {
        "annotations", "call_id", "detail", "file_id", "file_url", "filename", "id", "logprobs", "role",
        "status", "tool_call_id", "type",
    }
)  # fmt: skip

# OpenAI, "Images and vision": 85 tokens, and in high detail 170 more a tile of 512 px, once the image is
# scaled to fit a square of 2,048 px and to a shorter side of at most 768 px. Six tiles where the size is
# unknown.
_IMAGE, _TILE, _IMAGE_OF_UNKNOWN_SIZE = 85, 170, 1105
# OpenAI, "Audio": a token a 100 ms. Characters of base64 in that time: of 16-bit 16 kHz PCM in `wav`, else of
# 64 kbit/s.
_WAV_CHARACTERS, _AUDIO_CHARACTERS = 4267, 1067
# No published rule: a PDF page of some 100 KB takes its text and perhaps an image, far from its characters
# / 4.
_FILE_CHARACTERS = 128

# Beyond any real request, so that nonsense stays cheap to calculate with.
_MOST = 10**9

# Base64 characters read to find an image's size: a JPEG may put an EXIF block of 64 KiB first.
_HEADER_CHARACTERS = 64
_JPEG_HEADER_CHARACTERS = 128 * 1024


@dataclass(frozen=True, slots=True)
class RequestSize:
    """What a request's body tells of its size. text: UTF-8 bytes of its prompt; counted: tokens of the prompt that are
    no text (token arrays, images, audio, files); limit: most tokens of one answer, None where the request sets none;
    choices: answers asked for, 0 where the endpoint makes none.
    """

    text: int
    counted: int
    limit: int | None
    choices: int

    def tokens(self, ratio: float = 1.0, expected_output: int = 0) -> int:
        """Tokens to reserve. ratio: of the text's tokens to its bytes / 4, learned; the limit is never scaled by it."""
        output = (expected_output if self.limit is None else self.limit) * self.choices
        return min(self.prompt_tokens(ratio) + output, _MOST)

    def prompt_tokens(self, ratio: float = 1.0) -> int:
        return min(math.ceil(self.text * ratio / 4) + self.counted, _MOST)


def request_size(endpoint: str, document: Mapping[str, Any]) -> RequestSize:
    """Reads `document` (a request's parsed JSON body). Never raises.

    `endpoint`: chat, completions, embeddings, responses or moderations; of another every known field counts.
    """
    prompt = _Prompt(media=endpoint != "moderations")
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
    """Tokens, input and output, that `document` will take, with nothing learned but, perhaps, what one answer takes
    where the request sets no limit to it.
    """
    return request_size(endpoint, document).tokens(expected_output=_number(expected_output) or 0)


def _choices(endpoint: str, document: Mapping[str, Any]) -> int:
    """How many answers are made, each up to the output limit: n; on completions, n or best_of a prompt."""
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
    """A count, clamped to 0 … 10⁹; None where it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    return int(min(max(value, 0), _MOST))


def _inside(value: object, *path: str) -> object:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class _Prompt:
    """Adds up a prompt. Iterative: a body nested a million deep must not overflow the stack."""

    def __init__(self, media: bool) -> None:
        self.text_bytes = 0
        self.tokens = 0
        self._media = media

    def read(self, prompt: object) -> None:
        """Messages, input items, texts or token arrays."""
        left = [prompt]
        while left:
            item = left.pop()
            if isinstance(item, str):
                self.text_bytes += _utf8_length(item)
            elif isinstance(item, list):
                if item and type(item[0]) is int:
                    self.tokens += len(item)
                else:
                    left.extend(item)
            elif isinstance(item, dict):
                left.extend(self._read_part(item))

    def read_definition(self, definition: object) -> None:
        """Tools and schemas: their strings and the names of their properties."""
        left = [definition]
        while left:
            item = left.pop()
            if isinstance(item, str):
                self.text_bytes += _utf8_length(item)
            elif isinstance(item, list):
                left.extend(item)
            elif isinstance(item, dict):
                left.extend(item.values())
                if isinstance(properties := item.get("properties"), dict):
                    left.extend(properties)

    def _read_part(self, part: dict[Any, Any]) -> list[object]:
        """Count the media of one object; answers what of it is still to be read."""
        kind = part.get("type")
        inner: list[object] = []
        for key, value in part.items():
            if key in _STRUCTURE:
                continue
            if key not in _MEDIA:
                inner.append(value)
            elif key == "image_url":
                # chat: {"url", "detail"}; responses: the URL itself, with "detail" beside it
                nested = value if isinstance(value, dict) else {"url": value}
                self._count_image(nested.get("url"), nested.get("detail") or part.get("detail"))
            elif key == "input_audio":
                rate = _WAV_CHARACTERS if _inside(value, "format") == "wav" else _AUDIO_CHARACTERS
                self._count_data(_inside(value, "data"), rate)
            elif key == "file_data":
                self._count_data(value, _FILE_CHARACTERS)
            elif kind == "image_generation_call":
                self._count_image(None, None)
            else:
                inner.append(value)
        if kind == "input_image" and "image_url" not in part:
            self._count_image(None, part.get("detail"))
        return inner

    def _count_image(self, url: object, detail: object) -> None:
        if self._media:
            self.tokens += _IMAGE if detail == "low" else _image_tokens(url)

    def _count_data(self, data: object, characters_a_token: int) -> None:
        if self._media and isinstance(data, str):
            self.tokens += -(-len(data) // characters_a_token)


def _image_tokens(url: object) -> int:
    size = _size_in_url(url) if isinstance(url, str) else None
    if size is None:
        return _IMAGE_OF_UNKNOWN_SIZE
    width, height = size
    for pick, most in ((max, 2048), (min, 768)):
        side = pick(width, height)
        if side > most:
            width, height = max(width * most // side, 1), max(height * most // side, 1)
    return _IMAGE + _TILE * -(-width // 512) * -(-height // 512)


def _size_in_url(url: str) -> tuple[int, int] | None:
    """Pixels of the image in a base64 `data:` URL; None where they cannot be told from its first bytes."""
    comma = url.find(",", 0, 200)
    if comma < 0 or url[:5].lower() != "data:" or not url[:comma].lower().endswith(";base64"):
        return None
    try:
        size = _size(_decoded(url, comma + 1, _HEADER_CHARACTERS))
        if size is None and url.startswith("/9j/", comma + 1):  # FF D8 FF
            size = _size_of_jpeg(_decoded(url, comma + 1, _JPEG_HEADER_CHARACTERS))
    except ValueError:
        return None
    return size if size and min(size) > 0 else None


def _decoded(url: str, start: int, characters: int) -> bytes:
    return binascii.a2b_base64(url[start : start + characters])


def _size(head: bytes) -> tuple[int, int] | None:
    """Width and height in a PNG, GIF or WebP header (PNG 3rd ed. 11.2.1, GIF89a 18, RFC 9649 2.5 to 2.7)."""
    if len(head) < 30:
        return None
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if head.startswith((b"GIF87a", b"GIF89a")):
        return int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        if head[12:16] == b"VP8X":
            return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
        if head[12:16] == b"VP8L":
            bits = int.from_bytes(head[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if head[12:16] == b"VP8 ":
            width, height = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
            return width & 0x3FFF, height & 0x3FFF
    return None


def _size_of_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height in the frame header, found by hopping over the segments before it (ITU-T T.81, B)."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
