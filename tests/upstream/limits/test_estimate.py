"""The documented estimate, case by case, and that nothing a client sends can break it."""

from __future__ import annotations

import base64
import json
import random
import struct
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.upstream.limits.estimate import estimate_tokens

ENDPOINTS = ("chat", "completions", "embeddings", "responses", "moderations", "other")


def asks(text: object, **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": text}], **fields}


def data_url(head: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(head + bytes(100)).decode()


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + b"\x08\x02\x00\x00\x00"


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height)


def webp(kind: bytes, width: int, height: int) -> bytes:
    head = b"RIFF\x00\x00\x00\x00WEBP" + kind + b"\x00\x00\x00\x00"
    if kind == b"VP8X":
        return head + bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    if kind == b"VP8L":
        return head + b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little")
    return head + b"\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", width, height)


def jpeg(width: int, height: int, before: int = 0) -> bytes:
    segments = b"\xff\xe1" + struct.pack(">H", before + 2) + bytes(before) if before else b""
    frame = b"\xff\xc2" + struct.pack(">HBHH", 17, 8, height, width)
    table = b"\xff\xc4" + struct.pack(">H", 4) + b"\x00\x00"
    return b"\xff\xd8" + segments + table + b"\xff" + frame


def image(url: str, detail: str | None = None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} | ({"detail": detail} if detail else {})}


@pytest.mark.parametrize(
    ("endpoint", "document", "tokens"),
    [
        ("chat", asks("x" * 400), 100),
        ("chat", asks("x" * 401), 101),
        ("chat", asks("é" * 200), 100),
        ("chat", asks("\ud800" * 4), 3),
        ("chat", asks([{"type": "text", "text": "x" * 40}, {"type": "text", "text": "y" * 40}]), 20),
        ("chat", asks(None), 0),
        ("chat", asks("x" * 400, max_tokens=50), 150),
        ("chat", asks("x" * 400, max_tokens=1, max_completion_tokens=10_000), 10_100),
        ("chat", asks("x" * 400, max_tokens=10_000, max_completion_tokens=1), 10_100),
        ("chat", asks("x" * 400, max_tokens=50, n=3), 250),
        ("chat", asks("x" * 400, max_tokens=0), 100),
        ("responses", {"input": "x" * 40, "instructions": "y" * 40, "max_output_tokens": 30, "n": 9}, 50),
        ("responses", {"input": [{"type": "message", "role": "user", "content": "x" * 40}]}, 10),
        (
            "responses",
            {"input": [{"type": "function_call_output", "call_id": "c" * 99, "output": "x" * 8}]},
            2,
        ),
        ("completions", {"prompt": "x" * 40, "suffix": "y" * 8, "max_tokens": 5}, 17),
        ("completions", {"prompt": [1, 2, 3], "max_tokens": 5}, 8),
        ("completions", {"prompt": ["x" * 4, "y" * 4], "max_tokens": 5}, 12),
        ("completions", {"prompt": [[1, 2], [3, 4, 5]], "max_tokens": 5, "n": 2}, 25),
        ("completions", {"prompt": "x" * 4, "max_tokens": 5, "n": 2, "best_of": 4}, 21),
        ("embeddings", {"input": ["x" * 40, "y" * 40], "max_tokens": 500}, 20),
        ("embeddings", {"input": [[1] * 10, [2] * 20]}, 30),
        ("embeddings", {"input": [1] * 10}, 10),
        ("moderations", {"input": "x" * 40}, 10),
        ("moderations", {"input": [{"type": "text", "text": "x" * 40}, image("https://e.org/a.png")]}, 10),
        ("other", {"prompt": "x" * 4, "input": "x" * 4, "max_tokens": 5}, 7),
    ],
)
def test_the_documented_formula(endpoint: str, document: dict[str, Any], tokens: int) -> None:
    assert estimate_tokens(endpoint, document) == tokens


def test_the_learned_output_is_used_only_without_max_tokens() -> None:
    assert estimate_tokens("chat", asks("x" * 4), expected_output=300) == 301
    assert estimate_tokens("chat", asks("x" * 4, n=2, max_tokens=None), expected_output=300) == 601
    assert estimate_tokens("chat", asks("x" * 4, max_tokens=5), expected_output=300) == 6
    assert estimate_tokens("embeddings", {"input": "x" * 4}, expected_output=300) == 1


def test_tools_and_schemas_are_prompt_text() -> None:
    schema = {"properties": {"a" * 40: {"description": "b" * 40}}, "required": ["c" * 40]}
    tool = {"function": {"name": "d" * 40, "parameters": schema}}
    assert estimate_tokens("chat", asks("", tools=[tool])) == 40
    assert estimate_tokens("chat", asks("", functions=[tool["function"]])) == 40
    assert estimate_tokens("chat", asks("", response_format={"json_schema": {"schema": schema}})) == 30
    assert estimate_tokens("chat", asks("", response_format={"type": "json_object"})) == 0
    assert estimate_tokens("responses", {"input": "", "text": {"format": {"schema": schema}}}) == 30


def test_a_schema_property_named_like_an_image_is_text() -> None:
    tool = {"parameters": {"properties": {"image_url": {"description": "x" * 4}}}}
    assert estimate_tokens("chat", asks("", tools=[tool])) == 4


def test_calls_of_functions_in_the_conversation_count() -> None:
    call = {"id": "x" * 99, "type": "function", "function": {"name": "f" * 4, "arguments": "a" * 40}}
    document = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert estimate_tokens("chat", document) == 11


@pytest.mark.parametrize(
    ("head", "kind", "tokens"),
    [
        (png(1024, 1024), "png", 765),  # OpenAI's own example: scaled to 768 x 768, four tiles
        (png(2048, 4096), "png", 1105),  # and its second: 1024 x 2048, 768 x 1536, six tiles
        (png(512, 512), "png", 255),
        (png(1, 1), "png", 255),
        (png(2**31, 1), "png", 85 + 170 * 4),
        (png(768, 2048), "png", 85 + 170 * 8),
        (png(0, 10), "png", 1105),
        (gif(513, 10), "gif", 425),
        (webp(b"VP8X", 513, 513), "webp", 765),
        (webp(b"VP8L", 513, 512), "webp", 425),
        (webp(b"VP8 ", 512, 513), "webp", 425),
        (webp(b"VP9 ", 512, 513), "webp", 1105),
        (jpeg(513, 10), "jpeg", 425),
        (jpeg(513, 10, before=60_000), "jpeg", 425),
        (b"\xff\xd8\xff\xe1\x00\x00" + bytes(20), "jpeg", 1105),
        (b"\xff\xd8\xff" + b"\xff" * 20, "jpeg", 1105),
        (b"<svg/>", "svg+xml", 1105),
        (b"BM" + bytes(60), "bmp", 1105),
    ],
)
def test_images_in_the_body_count_by_tiles(head: bytes, kind: str, tokens: int) -> None:
    url = data_url(head, kind)
    assert estimate_tokens("chat", asks([image(url)])) == tokens
    assert estimate_tokens("chat", asks([image(url, "high")])) == tokens
    assert estimate_tokens("chat", asks([image(url, "low")])) == 85
    part = {"type": "input_image", "image_url": url}
    assert estimate_tokens("responses", {"input": [{"role": "user", "content": [part]}]}) == tokens
    assert estimate_tokens("responses", {"input": [{"content": [part | {"detail": "low"}]}]}) == 85


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.png",
        "data:image/png,notbase64",
        "data:image/png;base64,",
        "data:image/png;base64,AAAA",
        "data:image/png;base64,é" + "A" * 100,
        "data:image/png;base64,/9j/é" + "A" * 100,
        "data:image/jpeg;base64,/9j/",
        "",
        None,
        7,
    ],
)
def test_an_image_of_unknown_size_has_a_default(url: Any) -> None:
    assert estimate_tokens("chat", asks([image(url)])) == 1105
    assert estimate_tokens("chat", asks([{"type": "image_url", "image_url": url}])) == 1105


def test_images_by_reference_and_made_by_the_model() -> None:
    by_id = {"type": "input_image", "file_id": "file-" + "x" * 99}
    assert estimate_tokens("responses", {"input": [{"content": [by_id]}]}) == 1105
    assert estimate_tokens("responses", {"input": [{"content": [by_id | {"detail": "low"}]}]}) == 85
    made = {"type": "image_generation_call", "id": "x" * 99, "result": "A" * 4_000_000}
    assert estimate_tokens("responses", {"input": [made]}) == 1105


def test_audio_and_files_are_not_characters() -> None:
    def with_audio(kind: str) -> dict[str, Any]:
        return asks([{"type": "input_audio", "input_audio": {"data": "A" * 426_700, "format": kind}}])

    assert estimate_tokens("chat", with_audio("wav")) == 100  # ten seconds
    assert estimate_tokens("chat", with_audio("mp3")) == 400
    file = {
        "type": "file",
        "file": {"filename": "a" * 99, "file_data": "data:application/pdf;base64," + "A" * 100},
    }
    assert estimate_tokens("chat", asks([file])) == 1
    assert estimate_tokens("chat", asks([{"type": "input_audio", "input_audio": "nonsense"}])) == 0


@pytest.mark.parametrize(
    "value", [True, "50", [50], {}, None, float("nan"), -5, -(10**400), float("-inf"), "9" * 99, 0.5]
)
def test_an_invalid_output_limit_is_ignored(value: Any) -> None:
    assert estimate_tokens("chat", asks("x" * 4, max_tokens=value)) == 1


@pytest.mark.parametrize("value", [10**9, 10**400, float("inf"), 1e300])
def test_huge_numbers_are_clamped(value: Any) -> None:
    assert estimate_tokens("chat", asks("x", max_tokens=value, n=value)) == 10**9
    assert estimate_tokens("chat", asks("x", max_tokens=100.0, n=-3)) == 101


names = st.sampled_from(
    [
        "type",
        "image_url",
        "url",
        "detail",
        "input_audio",
        "data",
        "format",
        "file_data",
        "result",
        "properties",
        "content",
        "text",
        "json_schema",
        "schema",
        "image_generation_call",
        "input_image",
    ]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)
fields = st.sampled_from(
    [
        "messages",
        "prompt",
        "suffix",
        "input",
        "instructions",
        "tools",
        "functions",
        "response_format",
        "text",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "n",
        "best_of",
    ]
)


@given(
    endpoint=st.sampled_from(ENDPOINTS),
    document=st.dictionaries(fields, json_values, max_size=8),
    expected=st.integers(),
)
@settings(max_examples=400, deadline=None)
def test_nonsense_never_raises(endpoint: str, document: dict[str, Any], expected: int) -> None:
    assert 0 <= estimate_tokens(endpoint, document, expected) <= 10**9


@given(
    head=st.binary(max_size=80),
    magic=st.sampled_from([b"", b"\xff\xd8\xff", png(1, 1)[:12], b"GIF87a", b"RIFF"]),
)
@settings(deadline=None)
def test_a_broken_image_never_raises(head: bytes, magic: bytes) -> None:
    tokens = estimate_tokens("chat", asks([image(data_url(magic + head))]))
    assert 255 <= tokens <= 85 + 170 * 8


def test_a_body_nested_very_deep_is_read() -> None:
    nested: Any = "x" * 4
    for _ in range(100_000):
        nested = [{"content": nested}]
    assert estimate_tokens("chat", {"messages": nested, "tools": nested}) == 2


def test_a_long_prompt_takes_no_time() -> None:
    document = asks(["x" * 20_000_000, "é" * 1_000_000], tools=["y" * 1_000_000])
    document["messages"].append({"content": [image(data_url(jpeg(9, 9, before=60_000)) + "A" * 20_000_000)]})
    began = time.process_time()
    estimate_tokens("chat", document)
    estimate_tokens("embeddings", {"input": [[1] * 5_000_000]})
    assert time.process_time() - began < 2.0  # a loop over characters in Python takes longer


# Media inside texts, and in the shapes of other providers.


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def tokens_of(content: object, endpoint: str = "chat") -> int:
    return estimate_tokens(endpoint, asks(content))


NOISE = bytes(random.Random(5).randbytes(300_000))
PICTURE = base64_of(png(1024, 1024) + NOISE)
"""765 tokens."""


@pytest.mark.parametrize(
    "text",
    [
        PICTURE,
        f"data:image/png;base64,{PICTURE}",
        json.dumps({"screenshot": PICTURE}),
        json.dumps({"content": [{"type": "image", "mimeType": "image/png", "data": PICTURE}]}),
        f"![plot](data:image/png;base64,{PICTURE})",
        base64.encodebytes(png(1024, 1024) + NOISE).decode(),
        PICTURE.translate(str.maketrans("+/", "-_")),
    ],
    ids=["bare", "data url", "json", "mcp", "markdown", "wrapped", "url safe"],
)
def test_base64_in_the_output_of_a_tool_is_no_text(text: str) -> None:
    call = {"role": "tool", "tool_call_id": "call_1", "content": text}
    assert 765 <= estimate_tokens("chat", {"messages": [call]}) <= 765 + 20
    output = {"type": "function_call_output", "call_id": "call_1", "output": text}
    assert 765 <= estimate_tokens("responses", {"input": [output]}) <= 765 + 20
    assert 765 <= estimate_tokens("chat", {"messages": [{"role": "assistant", "content": text}]}) <= 765 + 20


def test_several_media_in_one_text() -> None:
    small = base64_of(gif(1, 1) + bytes(50))
    text = "a" * 400 + f" data:image/png;base64,{PICTURE} " + "b" * 400 + f" data:image/gif;base64,{small} "
    assert tokens_of(text + PICTURE) == 201 + 765 + 255 + 765


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        ([{"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + "A" * 1_300_000}}], 1000),
        ([{"type": "video_url", "video_url": {"url": "https://e.org/a.mp4"}}], 0),
        ([{"type": "audio_url", "audio_url": {"url": "data:audio/mp3;base64," + "A" * 106_700}}], 100),
        ([{"type": "input_audio", "input_audio": {"data": "A" * 64_000, "format": "pcm16"}}], 10),
        ([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}}], 765),
        ([{"inline_data": {"mime_type": "image/jpeg", "data": "A" * 4_000_000}}], 1105),
        ([{"type": "image", "image": PICTURE}], 765),
        ([{"type": "file", "file": {"file_data": "data:text/csv;base64," + "A" * 1600}}], 300),
        ([{"type": "file", "file": {"filename": "a.csv", "file_data": base64_of(b"name,value\n" * 120)}}], 330),
        ([{"type": "input_file", "file_url": "https://e.org/a.pdf"}], 0),
        ([{"type": "input_file", "file_id": "file-1"}], 0),
        ([{"type": "text", "text": "x" * 4}], 1),
    ],
)
def test_media_of_other_shapes(content: list[dict[str, Any]], tokens: int) -> None:
    assert tokens_of(content) == tokens
    assert estimate_tokens("responses", {"input": [{"role": "user", "content": content}]}) == tokens


def test_images_in_the_history() -> None:
    made = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}
    assert estimate_tokens("chat", {"messages": [{"role": "assistant", "content": "", "images": [made]}]}) == 765
    assert estimate_tokens("chat", {"messages": [{"role": "user", "content": "", "images": [PICTURE]}]}) == 765
    screenshot = {"type": "computer_screenshot", "image_url": f"data:image/png;base64,{PICTURE}"}
    assert estimate_tokens("responses", {"input": [{"type": "computer_call_output", "output": screenshot}]}) == 765
    by_id = {"type": "computer_screenshot", "file_id": "file-1"}
    assert estimate_tokens("responses", {"input": [{"type": "computer_call_output", "output": by_id}]}) == 1105
    plot = {"type": "code_interpreter_call", "outputs": [{"type": "image", "url": f"data:image/png;base64,{PICTURE}"}]}
    assert estimate_tokens("responses", {"input": [plot]}) == 765


def test_audio_in_the_history() -> None:
    audio = {"id": "audio_1", "data": "A" * 64_000, "format": "pcm16", "transcript": "x" * 40}
    assert estimate_tokens("chat", {"messages": [{"role": "assistant", "audio": audio}]}) == 20


def test_encrypted_reasoning_counts_as_the_text_it_holds() -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "A" * 16_000}
    assert estimate_tokens("responses", {"input": [item]}) == 3000


def wav(bytes_a_second: int) -> bytes:
    head = b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 44_100, bytes_a_second, 2, 16)
    return head + b"data\0\0\0\0" + NOISE


@pytest.mark.parametrize("rate", [88_200, 16_000])
def test_a_wav_file_says_how_long_it_is(rate: int) -> None:
    data = base64_of(wav(rate))
    expected = pytest.approx(300_000 / rate * 10, abs=2)
    assert tokens_of([{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]) == expected
    assert tokens_of(data) == expected
    assert tokens_of(f"data:audio/wav;base64,{data}") == expected


@pytest.mark.parametrize(
    "head",
    [b"\xff\xd8\xff", b"%PDF-1.7", b"PK\x03\x04", b"\0\0\0\x20ftypisom", b"OggS", b"ID3", b"\x1aE\xdf\xa3", b""],
)
def test_any_other_base64_is_far_from_text(head: bytes) -> None:
    assert tokens_of("See: " + base64_of(head + NOISE)) < 5_000


@pytest.mark.parametrize(
    "text",
    [
        "x" * 40_000,
        "lorem ipsum dolor " * 2000,
        "".join(random.Random(1).choices("0123456789abcdef", k=40_000)),
        "".join(random.Random(1).choices("ACGT", k=40_000)),
        "\n".join("Word" + str(number) for number in range(5000)),
        "漢字" * 10_000,
        "data:image/png;base64 is a prefix; " * 1000,
        ";base64," * 1000,
        ("A" * 200 + " ") * 200,
    ],
)
def test_text_stays_text(text: str) -> None:
    assert tokens_of(text) == -(-len(text.encode()) // 4)


def test_base64_is_text_where_texts_are_taken_literally() -> None:
    assert estimate_tokens("embeddings", {"input": PICTURE}) == -(-len(PICTURE) // 4)
    assert estimate_tokens("completions", {"prompt": PICTURE, "max_tokens": 0}) == -(-len(PICTURE) // 4)
    assert estimate_tokens("embeddings", {"input": [{"image": f"data:image/png;base64,{PICTURE}"}]}) == 765


@given(st.text(alphabet="dataimg:/;base64,+= \nAZaz09", max_size=3000))
def test_any_text_has_as_many_bytes_as_it_has(text: str) -> None:
    assert 0 <= tokens_of(text) <= 1105 * (1 + text.count(";base64,")) + len(text)


def test_media_in_long_texts_are_found_in_linear_time() -> None:
    texts = ("word " * 2_000_000, "A" * 10_000_000, (PICTURE + " ") * 20, "data:" * 2_000_000, ";base64," * 1_000_000)
    for text in texts:
        began = time.process_time()
        tokens_of(text)
        assert time.process_time() - began < 5.0
