"""Compressed bodies: every encoding, cut at every byte, and bombs (docs/security.md)."""

from __future__ import annotations

import gzip
import random
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Mapping

import brotli
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.protocol.decompress import ACCEPTED, RESPONSE_BOUNDS, Bounds, DecodingError, Decompressor

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1024 * 1024
TEXT = b'{"choices": [{"message": {"content": "' + b"Hello, world! " * 50 + b'"}}]}'
NOISE = random.Random(1).randbytes(3000)


CHECKSUM: Mapping[int, int] = {zstd.CompressionParameter.checksum_flag: 1}


def raw_deflate(data: bytes, level: int = 9) -> bytes:
    return zlib.compress(data, level, wbits=-15)


FORMS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "zlib": ("deflate", zlib.compress),
    "zlib, fast": ("deflate", lambda data: zlib.compress(data, 1)),
    "zlib, small window": ("deflate", lambda data: zlib.compress(data, 9, wbits=9)),
    "raw": ("deflate", raw_deflate),
    "raw, stored": ("deflate", lambda data: raw_deflate(data, 0)),
    "brotli": ("br", brotli.compress),
    "brotli, fast": ("br", lambda data: brotli.compress(data, quality=1)),
    "zstd": ("zstd", zstd.compress),
    "zstd, with checksum": ("zstd", lambda data: zstd.compress(data, options=CHECKSUM)),
}


def inflated(encoding: str, pieces: Iterable[bytes], bounds: Bounds = RESPONSE_BOUNDS) -> bytes:
    inflater = Decompressor(encoding, bounds)
    out = b"".join([inflater.feed(piece) for piece in pieces])
    inflater.finish()
    return out


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "body", [b"", b"x", TEXT, NOISE, b"\0" * 100_000], ids=["empty", "x", "text", "noise", "zeros"]
)
def test_every_coding_is_decoded_whole_and_byte_by_byte(form: str, body: bytes) -> None:
    encoding, compress = FORMS[form]
    data = compress(body)
    assert inflated(encoding, [data]) == body
    assert inflated(encoding, bytewise(data)) == body
    assert inflated(encoding, [b"", data, b""]) == body


@given(st.binary(max_size=300), st.sampled_from(list(FORMS)), st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_any_body_is_decoded_in_any_pieces(body: bytes, form: str, sizes: list[int]) -> None:
    encoding, compress = FORMS[form]
    data = compress(body)
    pieces: list[bytes] = []
    at = 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
    assert inflated(encoding, pieces) == body


@pytest.mark.parametrize("form", FORMS)
def test_a_body_cut_anywhere_is_an_error(form: str) -> None:
    encoding, compress = FORMS[form]
    data = compress(TEXT)
    for cut in range(1, len(data)):
        for pieces in ([data[:cut]], bytewise(data[:cut])):
            with pytest.raises(DecodingError) as caught:
                inflated(encoding, pieces)
            assert not caught.value.too_large


def test_raw_deflate_that_resembles_zlib_is_decoded() -> None:
    """Two bytes that pass zlib's check sum, or that name its method: both are needed."""
    bodies = [raw_deflate(str(number).encode()) for number in range(2000)]
    alike = [data for data in bodies if int.from_bytes(data[:2], "big") % 31 == 0]
    assert len(alike) > 10
    for data in alike:
        assert inflated("deflate", bytewise(data)).isdigit()


def test_an_empty_body_is_empty() -> None:
    for encoding in ACCEPTED.split(", "):
        assert inflated(encoding, []) == b""


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
@pytest.mark.parametrize("data", [b"{}", b'{"error": "plain text"}', b"<html>", b"\xff" * 50, b"\x1f\x8b\x08"])
def test_an_uncompressed_body_is_an_error(encoding: str, data: bytes) -> None:
    for pieces in ([data], bytewise(data)):
        with pytest.raises(DecodingError) as caught:
            inflated(encoding, pieces)
        assert not caught.value.too_large


@given(st.sampled_from(list(FORMS)), st.data())
def test_a_flipped_bit_never_gives_another_error(form: str, data: st.DataObject) -> None:
    encoding, compress = FORMS[form]
    body = bytearray(compress(TEXT))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        inflated(encoding, [bytes(body)])
    except DecodingError:
        pass


@pytest.mark.parametrize("spoilt", [-1, -5])
def test_a_wrong_checksum_or_length_is_an_error(spoilt: int) -> None:
    data = bytearray(gzip.compress(TEXT))
    data[spoilt] ^= 1
    with pytest.raises(DecodingError):
        inflated("gzip", [bytes(data)])


# --- several members --------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=6), st.integers(1, 60))
def test_several_gzip_members_are_decoded(bodies: list[bytes], size: int) -> None:
    data = b"".join(gzip.compress(body) for body in bodies)
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert inflated("gzip", pieces) == b"".join(bodies)
    assert inflated("gzip", [data]) == b"".join(bodies)


def test_a_cut_second_gzip_member_is_an_error() -> None:
    data = gzip.compress(b"one") + gzip.compress(TEXT)
    for cut in range(len(gzip.compress(b"one")) + 1, len(data)):
        with pytest.raises(DecodingError):
            inflated("gzip", [data[:cut]])


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=6), st.integers(1, 60))
def test_several_zstd_frames_are_decoded(bodies: list[bytes], size: int) -> None:
    data = b"".join(zstd.compress(body) for body in bodies)
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert inflated("zstd", pieces) == b"".join(bodies)
    assert inflated("zstd", [data]) == b"".join(bodies)


@pytest.mark.parametrize("form", ["gzip", "brotli", "zstd"])
def test_trailing_bytes_are_an_error(form: str) -> None:
    encoding, compress = FORMS[form]
    with pytest.raises(DecodingError):
        inflated(encoding, [compress(b"one") + b"rubbish"])


def test_trailing_bytes_after_a_deflate_stream_are_dropped() -> None:
    """The stream says itself where it ends: what follows is no part of the answer, and must not be held."""
    for compress in (zlib.compress, raw_deflate):
        inflater = Decompressor("deflate")
        assert inflater.feed(compress(b"body") + b"x" * 100) == b"body"
        tracemalloc.start()
        for _ in range(64):
            assert inflater.feed(b"x" * 65536) == b""
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        inflater.finish()
        assert peak < MIB


# --- bombs ------------------------------------------------------------------------------------------------------------


def test_the_limits_of_decompression() -> None:
    assert [RESPONSE_BOUNDS.of(size) for size in (1, MIB, MIB + 1, 3 * MIB)] == [
        8 * MIB,
        100 * MIB,
        100 * MIB + 100,
        256 * MIB,
    ]


@pytest.mark.parametrize("form", ["gzip", "zlib", "raw", "brotli", "zstd"])
def test_any_ratio_is_allowed_for_small_bodies(form: str) -> None:
    encoding, compress = FORMS[form]
    data = compress(b"\0" * (8 * MIB))
    assert len(data) * 100 < 8 * MIB
    assert len(inflated(encoding, [data])) == 8 * MIB


@pytest.mark.parametrize("form", ["gzip", "zlib", "raw", "brotli", "zstd"])
@pytest.mark.parametrize("extra", [1, 24 * MIB])
def test_a_decompression_bomb_is_refused_without_unpacking(form: str, extra: int) -> None:
    encoding, compress = FORMS[form]
    data = compress(b"\0" * (8 * MIB + extra))
    for size in (len(data), 1000):
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        tracemalloc.start()
        with pytest.raises(DecodingError) as caught:
            inflated(encoding, pieces)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert caught.value.too_large
        assert peak < 24 * MIB


def test_a_decompression_bomb_of_many_members_is_refused() -> None:
    data = gzip.compress(b"\0" * MIB) * 9
    with pytest.raises(DecodingError, match="too much"):
        inflated("gzip", [data])
    assert len(inflated("gzip", [gzip.compress(b"\0" * MIB) * 8])) == 8 * MIB


def test_a_modest_ratio_is_allowed_for_large_bodies() -> None:
    pattern = random.Random(2).randbytes(1024)
    body = (pattern + b"\0" * 40_000) * 250
    data = gzip.compress(body)
    assert len(body) > 8 * MIB
    assert len(data) * 100 > len(body) > len(data) * 20
    assert inflated("gzip", [data[at : at + 4096] for at in range(0, len(data), 4096)]) == body


def test_the_total_size_is_limited_at_any_ratio() -> None:
    bounds = Bounds(5000, 5000)
    noise = random.Random(3).randbytes(5001)
    assert inflated("gzip", [gzip.compress(noise[:5000])], bounds) == noise[:5000]
    for pieces in ([gzip.compress(noise)], bytewise(gzip.compress(noise))):
        with pytest.raises(DecodingError, match="too much"):
            inflated("gzip", pieces, bounds)


@settings(max_examples=60)
@given(st.integers(0, 400), st.integers(1, 50), st.sampled_from(["zlib", "gzip", "brotli", "zstd"]))
def test_the_size_limit_is_exact(length: int, size: int, form: str) -> None:
    encoding, compress = FORMS[form]
    data = compress((bytes(range(200)) * 2)[:length])
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    if length <= 200:
        assert len(inflated(encoding, pieces, Bounds(200, 200))) == length
    else:
        with pytest.raises(DecodingError):
            inflated(encoding, pieces, Bounds(200, 200))


def test_a_zstd_window_beyond_8_mib_is_refused() -> None:
    """It would cost its size in memory, whatever the body holds (RFC 9659)."""
    data = zstd.compress(b"x" * 100, options={zstd.CompressionParameter.window_log: 24})
    with_size = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 24})
    streamed = with_size.compress(b"x" * 100) + with_size.flush()
    assert inflated("zstd", [data]) == b"x" * 100  # a frame that names its size needs no window
    with pytest.raises(DecodingError):
        inflated("zstd", [streamed])


# --- which --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["x-gzip", *ACCEPTED.split(", ")])
def test_supported_codings(encoding: str) -> None:
    assert Decompressor.knows(encoding)


@pytest.mark.parametrize("encoding", ["", "identity", "compress", "gzip, gzip", "GZIP"])
def test_unsupported_codings(encoding: str) -> None:
    assert not Decompressor.knows(encoding)
