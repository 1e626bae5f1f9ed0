"""WebSocket handshakes and frames as bytes (RFC 6455)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.websocket import (
    FrameBoundaries,
    close_frame,
    credential_in,
    handshake_headers,
    is_handshake,
    is_whole_handshake,
    without_credential,
)

WHOLE = {"Upgrade": "WebSocket", "Connection": "keep-alive, Upgrade", "Sec-WebSocket-Key": "x"}


@pytest.mark.parametrize(
    ("method", "headers", "handshake", "whole"),
    [
        ("GET", WHOLE, True, True),
        ("GET", {**WHOLE, "Connection": "close"}, True, False),
        ("GET", {"Sec-WebSocket-Key": "x"}, True, False),
        ("GET", {"Upgrade": "websocket"}, True, False),
        ("GET", {"Upgrade": "h2c", "Connection": "Upgrade"}, False, False),
        ("GET", {}, False, False),
        ("POST", WHOLE, False, True),
    ],
)
def test_a_handshake_is_recognised(method: str, headers: dict[str, str], handshake: bool, whole: bool) -> None:
    assert is_handshake(method, headers) is handshake
    assert is_whole_handshake(headers) is whole


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([], None),
        (["realtime, openai-insecure-api-key.sk-1, openai-beta.realtime-v1"], "sk-1"),
        (["realtime", "openai-insecure-api-key.sk-1"], "sk-1"),
        (["openai-insecure-api-key."], None),
        (["openai-insecure-api-key.a", "openai-insecure-api-key.b"], None),
    ],
)
def test_the_key_in_a_subprotocol(values: list[str], found: str | None) -> None:
    assert credential_in(values) == found


RAW = [
    (b"Sec-WebSocket-Key", b"abc=="),
    (b"sec-websocket-version", b"13"),
    (b"Sec-WebSocket-Extensions", b"permessage-deflate"),
    (b"Sec-WebSocket-Protocol", b"realtime, openai-insecure-api-key.sk-mine"),
    (b"Sec-WebSocket-Protocol", b"openai-organization.org-1,openai-project.p,openai-beta.realtime-v1"),
    (b"Sec-Fetch-Site", b"none"),
]
FIXED = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Key", "abc=="),
    ("sec-websocket-version", "13"),
    ("Sec-WebSocket-Extensions", "permessage-deflate"),
]


@pytest.mark.parametrize(
    ("credential", "subprotocols"),
    [
        ([("Authorization", "Bearer sk-pool"), ("OpenAI-Project", "q")], ["openai-insecure-api-key.sk-pool"]),
        ([("api-key", "azure")], ["openai-insecure-api-key.azure"]),
        ([], []),
    ],
)
def test_the_key_of_the_pool_replaces_that_of_the_client(
    credential: list[tuple[str, str]], subprotocols: list[str]
) -> None:
    offered = ", ".join(["realtime", "openai-beta.realtime-v1", *subprotocols])
    assert handshake_headers(RAW, credential) == [*FIXED, ("Sec-WebSocket-Protocol", offered)]


def test_a_client_that_sends_no_key_as_subprotocol_gets_none_added() -> None:
    raw = [(b"Sec-WebSocket-Protocol", b"realtime")]
    assert handshake_headers(raw, [("api-key", "k")])[2:] == [("Sec-WebSocket-Protocol", "realtime")]
    assert handshake_headers([], [("api-key", "k")]) == FIXED[:2]


def test_in_pass_through_the_subprotocols_stay() -> None:
    assert handshake_headers(RAW, None)[-1][1].split(", ") == [
        "realtime",
        "openai-insecure-api-key.sk-mine",
        "openai-organization.org-1",
        "openai-project.p",
        "openai-beta.realtime-v1",
    ]


def test_a_chosen_subprotocol_with_a_key_is_not_shown() -> None:
    kept = (b"Sec-WebSocket-Accept", b"y")
    assert without_credential([kept, (b"sec-websocket-protocol", b"openai-insecure-api-key.sk-pool")]) == [kept]
    assert without_credential([(b"Sec-WebSocket-Protocol", b"realtime")]) == [(b"Sec-WebSocket-Protocol", b"realtime")]


def test_close_frames() -> None:
    assert close_frame(1001, masked=False) == bytes([0x88, 2, 0x03, 0xE9])
    assert close_frame(1001, masked=True) == bytes([0x88, 0x82, 0, 0, 0, 0, 0x03, 0xE9])


def frame(size: int, masked: bool) -> bytes:
    bit = 0x80 if masked else 0
    if size < 126:
        head = bytes([0x82, bit | size])
    elif size < 1 << 16:
        head = bytes([0x82, bit | 126]) + size.to_bytes(2, "big")
    else:
        head = bytes([0x82, bit | 127]) + size.to_bytes(8, "big")
    return head + (b"mask" if masked else b"") + b"\x81" * size


SIZES = st.lists(st.sampled_from([0, 1, 125, 126, 300, 65535, 65536, 70000]), min_size=1, max_size=5)


@given(SIZES, st.booleans(), st.lists(st.integers(1, 200_000), max_size=20))
def test_the_end_of_each_frame_is_known_however_the_bytes_are_cut(
    sizes: list[int], masked: bool, cuts: list[int]
) -> None:
    frames = [frame(size, masked) for size in sizes]
    ends = {sum(map(len, frames[: count + 1])) for count in range(len(frames))} | {0}
    data = b"".join(frames)
    seen, at = FrameBoundaries(), 0
    for cut in sorted({*(cut % len(data) for cut in cuts), len(data)}):
        seen.feed(data[at:cut])
        at = cut
        assert seen.between_frames is (at in ends), (at, ends)
