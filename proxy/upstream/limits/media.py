"""How many tokens images, audio, video and files in a request take, as far as that is known; never as text.

The figures are in `docs/keys-and-limits.md`. Media come as base64: in fields of their own, in `data:` URLs, and in the
middle of texts, such as the outputs of tools.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from typing import Final, Literal

Kind = Literal["image", "audio", "video", "text", "file"]

# OpenAI, "Images and vision": 85 tokens, and in high detail 170 more a tile of 512 px, once the image is scaled to fit
# a square of 2,048 px and to a shorter side of at most 768 px. An image of unknown size counts as six tiles.
_IMAGE, _TILE, _IMAGE_OF_UNKNOWN_SIZE = 85, 170, 1105

# OpenAI, "Audio": 10 tokens a second. A WAV file says in its header how many bytes a second has.
_AUDIO_TOKENS_A_SECOND: Final = 10
_BYTES_A_SECOND: Final = {"wav": 32_000, "pcm16": 48_000}  # 16 bit: 16 kHz; 24 kHz as in OpenAI's Realtime API
_COMPRESSED_BYTES_A_SECOND: Final = 8_000  # 64 kbit/s

# Google, "Token counting": some 260 tokens a second of video; a second has some 250 KB at 2 Mbit/s.
_VIDEO_CHARACTERS: Final = 1_300
# There is no published rule. A PDF page of some 100 KB takes its text and perhaps an image.
_FILE_CHARACTERS: Final = 128

# Base64 characters that are read to find an image's size: a JPEG may have an EXIF block of 64 KiB first.
_HEAD: Final = 64
_JPEG_HEAD: Final = 128 * 1024
_MAX_PREFIX: Final = 200  # of a `data:` URL

_BLOCK: Final = 512
SHORTEST_RUN: Final = 2 * _BLOCK
"""Characters of base64 that are always found in a text without being marked; shorter runs may stay text."""

_NOT_BASE64: Final = re.compile(r"[^A-Za-z0-9+/=_-]")
_NOT_WRAPPED_BASE64: Final = re.compile(r"[^A-Za-z0-9+/=_\r\n-]")
_MIN_LINE: Final = 60
_SAMPLE: Final = 4096
_MIN_DISTINCT: Final = 40
_URL_SAFE: Final = str.maketrans("-_", "+/")
_NOT_IN_TEXT: Final = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")

_SIGNATURES: Final[tuple[tuple[int, bytes, Kind], ...]] = (
    (0, b"\x89PNG\r\n\x1a\n", "image"),
    (0, b"\xff\xd8\xff", "image"),
    (0, b"GIF8", "image"),
    (8, b"WEBP", "image"),
    (4, b"ftypavif", "image"),
    (4, b"ftyphei", "image"),
    (8, b"WAVE", "audio"),
    (0, b"ID3", "audio"),
    (0, b"\xff\xfb", "audio"),
    (0, b"\xff\xf3", "audio"),
    (0, b"OggS", "audio"),
    (0, b"fLaC", "audio"),
    (4, b"ftypM4A", "audio"),
    (4, b"ftyp", "video"),
    (0, b"\x1aE\xdf\xa3", "video"),
    (8, b"AVI ", "video"),
    (0, b"%PDF-", "file"),
    (0, b"PK\x03\x04", "file"),
)
"""(offset, bytes there, what it is), the more special one first."""


def image_tokens(source: object, detail: object) -> int:
    """Return the tokens of an image. source: its URL or base64; anything else has no known size."""
    if detail == "low":
        return _IMAGE
    size = None
    if isinstance(source, str):
        data = _data_of_url(source)
        size = _size(source, 0 if data is None else data) if data is not None or not _is_reference(source) else None
    if size is None:
        return _IMAGE_OF_UNKNOWN_SIZE
    width, height = size
    for pick, most in ((max, 2048), (min, 768)):
        side = pick(width, height)
        if side > most:
            width, height = max(width * most // side, 1), max(height * most // side, 1)
    return _IMAGE + _TILE * -(-width // 512) * -(-height // 512)


def audio_tokens(data: object, format_: object) -> int:
    """Return the tokens of audio in base64; 0 for anything else. format_: `wav`, `mp3`, `pcm16` …"""
    return _audio(data, _data_of_url(data) or 0, format_) if isinstance(data, str) else 0


def file_tokens(data: object, mime: object = None) -> int:
    """Return the tokens of a file in base64, with or without a `data:` URL's prefix; 0 for anything else."""
    if not isinstance(data, str):
        return 0
    start = _data_of_url(data)
    if start is not None:
        return _tokens(data, start, len(data), _kind_of_mime(data[5:start]))
    return 0 if _is_reference(data) else _tokens(data, 0, len(data), _kind_of_mime(mime))


def encrypted_tokens(data: object) -> int:
    """Return the tokens of text that the provider has encrypted, such as reasoning items."""
    return _text_tokens(len(data)) if isinstance(data, str) else 0


def media_in_text(text: str) -> tuple[int, int]:
    """Return (characters, tokens) of the media inside a text: `data:` URLs, and long runs of base64."""
    characters = tokens = 0
    for start, data, end, kind in _spans(text):
        characters += end - start
        tokens += _tokens(text, data, end, kind)
    return characters, tokens


# -- finding ----------------------------------------------------------------------------------------------------------


def _spans(text: str) -> Iterator[tuple[int, int, int, Kind | None]]:
    """Yield (start, where its base64 begins, end, kind if known) of each medium in a text."""
    done = 0
    at = text.find(";base64,")
    while at >= 0:
        start, data = text.rfind("data:", max(done, at - _MAX_PREFIX), at), at + len(";base64,")
        if start >= 0:
            found = _NOT_BASE64.search(text, data)
            end = len(text) if found is None else found.start()
            yield from _runs(text, done, start)
            yield start, data, end, _kind_of_mime(text[start + 5 : at])
            data = done = end
        at = text.find(";base64,", data)
    yield from _runs(text, done, len(text))


def _runs(text: str, start: int, stop: int) -> Iterator[tuple[int, int, int, None]]:
    """Yield the runs of base64 of at least `SHORTEST_RUN` characters, in one line or wrapped.

    Such a run holds a whole block, so most of a text is passed by blocks, of which a few characters are read.
    """
    block = start
    while block + _BLOCK <= stop:
        if _NOT_WRAPPED_BASE64.search(text, block, block + _BLOCK) is not None:
            block += _BLOCK
            continue
        found = _NOT_WRAPPED_BASE64.search(text, block, stop)
        end = stop if found is None else found.start()
        begin = block
        while begin > start and _NOT_WRAPPED_BASE64.match(text, begin - 1) is None:
            begin -= 1
        if _is_base64(text, begin, end):
            yield begin, begin, end, None
        block = max(end, block + _BLOCK)


def _is_base64(text: str, start: int, end: int) -> bool:
    """Return whether a run of base64's characters is base64: not one long word, a hex number, or a list of words."""
    sample = text[start : min(end, start + _SAMPLE)].lstrip("\r\n")
    lines = sample.split("\n", 2)
    if len(lines) > 1 and (len(lines[0]) < _MIN_LINE or (len(lines) > 2 and len(lines[0]) != len(lines[1]))):
        return False
    if _kind_of_data(sample, 0) is not None:
        return True
    distinct = set(sample)
    return (
        len(distinct) >= _MIN_DISTINCT
        and any("A" <= c <= "Z" for c in distinct)
        and any("a" <= c <= "z" for c in distinct)
        and any("0" <= c <= "9" for c in distinct)
    )


def _data_of_url(url: str) -> int | None:
    """Return where the base64 of a `data:` URL begins; None if it is no such URL."""
    comma = url.find(",", 0, _MAX_PREFIX)
    if comma < 0 or url[:5].lower() != "data:" or not url[:comma].lower().endswith(";base64"):
        return None
    return comma + 1


def _is_reference(text: str) -> bool:
    """Return whether it is a URL, or an id, rather than data."""
    return ":" in text[:16] or len(text) < _HEAD


# -- counting ---------------------------------------------------------------------------------------------------------


def _tokens(text: str, start: int, end: int, kind: Kind | None) -> int:
    """Return the tokens of base64 between two places in a text. kind: as far as it is known."""
    if kind in (None, "file"):
        kind = _kind_of_data(text, start) or kind
    if kind == "image":
        return image_tokens(text[start : min(end, start + _JPEG_HEAD)], None)
    if kind == "audio":
        return _audio(text[start:end], 0, None)
    if kind == "text":
        return _text_tokens(end - start)
    return -(-(end - start) // (_VIDEO_CHARACTERS if kind == "video" else _FILE_CHARACTERS))


def _text_tokens(characters: int) -> int:
    """Return the tokens of text in base64: three bytes in four characters, four bytes a token."""
    return -(-characters * 3 // 16)


def _audio(text: str, start: int, format_: object) -> int:
    head = _decoded(text, start, _HEAD)
    rate = _BYTES_A_SECOND.get(format_ if isinstance(format_, str) else "", _COMPRESSED_BYTES_A_SECOND)
    if head[8:16] == b"WAVEfmt " and int.from_bytes(head[28:32], "little"):
        rate = int.from_bytes(head[28:32], "little")
    characters_a_token = -(-rate * 4 // (3 * _AUDIO_TOKENS_A_SECOND))
    return -(-(len(text) - start) // characters_a_token)


def _kind_of_mime(mime: object) -> Kind | None:
    if not isinstance(mime, str):
        return None
    whole = mime.partition(";")[0].strip().lower()
    main = whole.partition("/")[0]
    if main in ("image", "audio", "video", "text"):
        return main  # type: ignore[return-value]
    return "text" if whole.endswith(("json", "xml", "csv", "yaml", "javascript")) else None


def _kind_of_data(text: str, start: int) -> Kind | None:
    """Return what base64 holds, by its first bytes."""
    head = _decoded(text, start, _HEAD)
    for offset, signature, kind in _SIGNATURES:
        if head.startswith(signature, offset):
            return kind
    if len(head) >= 24 and _NOT_IN_TEXT.search(head) is None:
        try:
            head[:-3].decode()
        except UnicodeDecodeError:
            return None
        return "text"
    return None


def _decoded(text: str, start: int, characters: int) -> bytes:
    piece = text[start : start + characters].translate(_URL_SAFE)
    try:
        return binascii.a2b_base64(piece[: len(piece) // 4 * 4])
    except ValueError:
        return b""


def _size(text: str, start: int) -> tuple[int, int] | None:
    """Return the pixels of an image in base64; None if its first bytes do not tell."""
    size = _size_in_header(_decoded(text, start, _HEAD))
    if size is None and text.startswith("/9j/", start):  # FF D8 FF
        size = _size_of_jpeg(_decoded(text, start, _JPEG_HEAD))
    return size if size and min(size) > 0 else None


def _size_in_header(head: bytes) -> tuple[int, int] | None:
    """Return width and height in a PNG, GIF or WebP header (PNG 3rd ed. 11.2.1, GIF89a 18, RFC 9649 2.5 to 2.7)."""
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
    """Return width and height in the frame header, found behind the segments before it (ITU-T T.81, annex B)."""
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
