"""proxy.protocol.sse: event boundaries under every re-chunking, payloads by the standard, the usage chunk taken
out.
"""

from __future__ import annotations

import itertools
import time

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.protocol.sse import Splitter, UsageFilter, data_of, is_usage_chunk, is_usage_event, name_of

USAGE = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}\n\n'
DELTA = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}],"usage":null}\n\n'
AZURE_FIRST = b'data: {"choices":[],"id":"","model":"","prompt_filter_results":[{"prompt_index":0}]}\n\n'
USAGE_WITH_CHOICE = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"total_tokens":1}}\n\n'
SAYS_USAGE = b'data: {"choices":[{"index":0,"delta":{"content":"\\"choices\\":[], \\"usage\\":{"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"message":"no"},"choices":[],"usage":{"total_tokens":1}}\n\n'


def chunked(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def split(chunks: list[bytes]) -> tuple[list[bytes], bytes]:
    splitter = Splitter()
    events = [event for chunk in chunks for event in splitter.feed(chunk)]
    return events, splitter.rest


cuts = st.lists(st.integers(0, 10**6), max_size=12)
soup = st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"data: x", b":", b"a"]), max_size=30).map(b"".join)


class TestSplitter:
    @pytest.mark.parametrize("end", [b"\n", b"\r\n"])
    def test_events_end_with_a_blank_line(self, end: bytes) -> None:
        stream = b"data: 1" + end + end + b": c" + end + b"data: 2" + end + end + b"data: 3" + end
        events, rest = split([stream])
        assert events == [b"data: 1" + end + end, b": c" + end + b"data: 2" + end + end]
        assert rest == b"data: 3" + end

    def test_mixed_line_ends(self) -> None:
        events, rest = split([b"data: 1\r\n\ndata: 2\n\r\ndata: 3\r\rdata: 4\r\r\nx"])
        assert events == [b"data: 1\r\n\n", b"data: 2\n\r\n", b"data: 3\r\r", b"data: 4\r\r\n"]
        assert rest == b"x"

    def test_one_crlf_is_one_line_end(self) -> None:
        assert split([b"data: 1\r\ndata: 2\r\n"]) == ([], b"data: 1\r\ndata: 2\r\n")

    def test_unicode_line_separators_are_text(self) -> None:
        event = 'data: {"a":"x\u2028\u2028y\u0085\u0085\x0b\x0c"}\n\n'.encode()
        assert split([event]) == ([event], b"")

    def test_blank_lines_between_events_lead_the_next(self) -> None:
        assert split([b"data: 1\n\n\ndata: 2\n\n\n"]) == ([b"data: 1\n\n", b"\ndata: 2\n\n"], b"\n")

    def test_final_cr_waits_for_a_possible_lf(self) -> None:
        splitter = Splitter()
        assert splitter.feed(b"data: 1\r\r") == []
        assert splitter.feed(b"\ndata: 2\r\r") == [b"data: 1\r\r\n"]
        assert splitter.finish() == [b"data: 2\r\r"]
        assert splitter.rest == b""
        assert splitter.finish() == []

    @pytest.mark.parametrize(
        ("stream", "boundary"),
        [
            (b"", True),
            (b"data: 1\n\n", True),
            (b"data: 1\n\n\n", True),
            (b"data: 1\r\n\r\n\r", True),
            (b"data: 1\r\r", False),
            (b"data: 1\n\n:", False),
            (b"data: 1\n", False),
            (b"data: 1\n\ndata: 2", False),
        ],
    )
    def test_at_boundary(self, stream: bytes, boundary: bool) -> None:
        splitter = Splitter()
        splitter.feed(stream)
        assert splitter.at_boundary is boundary

    def test_finish_completes_nothing_else(self) -> None:
        for stream in (b"", b"data: 1", b"data: 1\n", b"data: 1\r", b"data: 1\n\n"):
            splitter = Splitter()
            splitter.feed(stream)
            assert splitter.finish() == []

    @given(soup, cuts)
    @example(b"data: 1\r\n\r\ndata: 2\r\n\r\n", [7, 8, 9, 10, 11, 12])
    def test_any_rechunking_gives_the_same_events(self, stream: bytes, places: list[int]) -> None:
        whole = split([stream])
        assert split(chunked(stream, places)) == whole
        assert split([stream[i : i + 1] for i in range(len(stream))]) == whole
        assert b"".join(whole[0]) + whole[1] == stream

    @given(soup)
    def test_boundaries_are_those_of_the_line_rules(self, stream: bytes) -> None:
        for event in split([stream])[0]:
            normal = event.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            assert normal.endswith(b"\n\n")
            assert b"\n\n" not in normal[:-1]

    def test_a_long_line_in_tiny_pieces_takes_linear_time(self) -> None:
        def seconds(size: int) -> float:
            line = b"data: " + b"a" * size + b"\n\n"
            start = time.process_time()
            events, _ = split([line[i : i + 3] for i in range(0, len(line), 3)])
            assert events == [line]
            return time.process_time() - start

        small = seconds(250_000)
        assert seconds(2_000_000) < max(small, 0.01) * 40  # 8 times the work; quadratic would be 64 times


class TestFields:
    @pytest.mark.parametrize(
        ("event", "data"),
        [
            (b"data: {}\n\n", b"{}"),
            (b"data:{}\n\n", b"{}"),
            (b"data:  {}\n\n", b" {}"),
            (b"data: {}\r\n\r\n", b"{}"),
            (b"data: {}\r\r", b"{}"),
            (b"data: a\ndata: b\n\n", b"a\nb"),
            (b"data: a\r: b\n\n", b"a"),
            (b"data\n\n", b""),
            (b"data:\n\n", b""),
            (b"data: \n\n", b""),
            (b"\ndata: a\n\n", b"a"),
            (b"\xef\xbb\xbfdata: a\n\n", b"a"),
            (b"id: 1\nevent: x\ndata: a\nretry: 5\n\n", b"a"),
            ("data: x\u2028y\u0085z\n\n".encode(), "x\u2028y\u0085z".encode()),
            (b": ping\n\n", None),
            (b"\n\n", None),
            (b"database: x\n\n", None),
            (b" data: x\n\n", None),
        ],
    )
    def test_data(self, event: bytes, data: bytes | None) -> None:
        assert data_of(event) == data

    @pytest.mark.parametrize(
        ("event", "name"),
        [
            (b"data: {}\n\n", b""),
            (b"data: a\ndata: event: error\n\n", b""),
            (b"event: error\ndata: {}\n\n", b"error"),
            (b"data: {}\nevent:error\n\n", b"error"),
            (b"event: a\nevent: b\ndata: {}\n\n", b"b"),
            (b"data: {}\r\nevent: error\r\n\r\n", b"error"),
            (b"data: {}\revent: error\n\n", b"error"),
        ],
    )
    def test_name(self, event: bytes, name: bytes) -> None:
        assert name_of(event) == name


class TestUsageEvent:
    @pytest.mark.parametrize(
        ("event", "expected"),
        [
            (USAGE, True),
            (USAGE.replace(b":", b" : ").replace(b"data : ", b"data: ").replace(b"[]", b"[ ]"), True),
            (b'data: {"usage":{},\ndata: "choices":\ndata: []}\n\n', True),
            (DELTA, False),
            (AZURE_FIRST, False),
            (USAGE_WITH_CHOICE, False),
            (SAYS_USAGE, False),
            (ERROR, False),
            (DONE, False),
            (b'data: {"choices":[],"usage":null}\n\n', False),
            (b'data: {"choices":[],"usage":[1]}\n\n', False),
            (b'data: {"choices":null,"usage":{}}\n\n', True),
            (b'data: {"usage":{"total_tokens":1}}\n\n', True),
            (b'data: {"choices":null,"usage":null}\n\n', False),
            (b'data: [{"choices":[],"usage":{}}]\n\n', False),
            (b'data: {"x":{"choices":[],"usage":{}}}\n\n', False),
            (b'data: {"choices":[],"usage":{}\n\n', False),
            (b': {"choices":[],"usage":{}}\n\n', False),
        ],
    )
    def test_which_event_it_is(self, event: bytes, expected: bool) -> None:
        assert is_usage_event(event) is expected

    def test_only_an_object_is_a_chunk(self) -> None:
        assert not is_usage_chunk([])
        assert not is_usage_chunk(None)


def filtered(chunks: list[bytes]) -> tuple[bytes, bytes]:
    usage_filter = UsageFilter()
    out = b"".join([usage_filter.feed(chunk) for chunk in chunks])
    return out + usage_filter.finish(), usage_filter.removed


OTHERS = [
    DELTA,
    AZURE_FIRST,
    USAGE_WITH_CHOICE,
    SAYS_USAGE,
    ERROR,
    DONE,
    b": ping\n\n",
    b": ping\n",
    b"\n",
    b'event: x\ndata: {"a": "\xe2\x80\xa8"}\n\n',
    b'data: {"meta":{"choices":[{"a":1}]},"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"' + b"long " * 300 + b'"}}]}\n\n',
]


def with_line_end(event: bytes, end: bytes) -> bytes:
    return event.replace(b"\n", end)


class TestUsageFilter:
    @given(
        st.lists(st.sampled_from(OTHERS), max_size=8),
        st.lists(st.sampled_from(OTHERS), max_size=4),
        st.booleans(),
        st.sampled_from([b"\n", b"\r\n", b"\r"]),
        cuts,
    )
    def test_exactly_the_usage_event_goes(
        self, before: list[bytes], after: list[bytes], present: bool, end: bytes, places: list[int]
    ) -> None:
        head = with_line_end(b"".join(before), end)
        # Without this the comment line before would be part of the usage event.
        head += end if before and before[-1] == b": ping\n" else b""
        usage = with_line_end(USAGE, end) if present else b""
        tail = with_line_end(b"".join(after), end)
        if split([head])[1].strip(b"\r\n") and present:
            return
        out, removed = filtered(chunked(head + usage + tail, places))
        assert removed.strip(b"\r\n") == usage.strip(b"\r\n")
        lead = len(removed) - len(usage)  # blank lines before an event are part of it
        assert out == head[: len(head) - max(lead, 0)] + tail[max(-lead, 0) :]

    @given(st.lists(st.sampled_from([*OTHERS, USAGE]), max_size=8).map(b"".join), cuts)
    def test_chunking_changes_nothing_but_the_time(self, stream: bytes, places: list[int]) -> None:
        assert filtered(chunked(stream, places)) == filtered([stream])

    @given(soup, cuts)
    def test_what_has_no_usage_passes_unchanged(self, stream: bytes, places: list[int]) -> None:
        assert filtered(chunked(stream, places)) == (stream, b"")

    def test_bytewise(self) -> None:
        stream = AZURE_FIRST + DELTA + SAYS_USAGE + USAGE_WITH_CHOICE + USAGE + DONE
        pieces = [stream[i : i + 1] for i in range(len(stream))]
        assert filtered(pieces) == (stream.replace(USAGE, b""), USAGE)

    def test_complete_events_are_forwarded_at_once(self) -> None:
        usage_filter = UsageFilter()
        for event in (AZURE_FIRST, DELTA, SAYS_USAGE, USAGE_WITH_CHOICE, b": ping\n\n"):
            assert usage_filter.feed(event) == event
            assert usage_filter.at_boundary
        assert usage_filter.feed(USAGE) == b""
        assert usage_filter.removed == USAGE
        assert usage_filter.feed(DONE) == DONE

    def test_an_event_with_a_choice_is_not_held(self) -> None:
        usage_filter = UsageFilter()
        cut = DELTA.index(b"[{") + 2
        steps = [
            (DELTA[: cut - 1], b"", True),
            (DELTA[cut - 1 : cut], DELTA[:cut], False),
            (DELTA[cut : cut + 5], DELTA[cut : cut + 5], False),
            (DELTA[cut + 5 : -1], DELTA[cut + 5 : -1], False),
            (b"\n" + USAGE[:10], b"\n", True),
            (USAGE[10:], b"", True),
        ]
        for chunk, forwarded, boundary in steps:
            assert usage_filter.feed(chunk) == forwarded
            assert usage_filter.at_boundary is boundary
        assert usage_filter.removed == USAGE

    @pytest.mark.parametrize("piece", [3, 1000, 65536, 10**7])
    @pytest.mark.parametrize(
        "event",
        [
            b'data: {"choices":[{"index":0,"delta":{"content":"' + b"a" * 2_000_000 + b'"}}]}\n\n',
            b'data: {"logo":"' + b"{" * 2_000_000 + b'","choices":[{"index":0}]}\n\n',
        ],
        ids=["choice first", "choice last"],
    )
    def test_a_two_megabyte_line_is_held_in_part_only(self, event: bytes, piece: int) -> None:
        usage_filter = UsageFilter()
        fed = got = most = 0
        for start in range(0, len(event), piece):
            chunk = event[start : start + piece]
            fed += len(chunk)
            got += len(usage_filter.feed(chunk))
            most = max(most, fed - got)
        assert got == len(event)
        assert most <= 64 * 1024
        assert usage_filter.at_boundary

    def test_names_inside_other_names_and_objects_rule_nothing_out(self) -> None:
        for start in (b'data: {"x":{"choices":[{"a":1}]},', b'data: {"x\\"choices":[{"a":1}],'):
            event = start + b'"choices":[],"usage":{"total_tokens":1}}\n\n'
            pieces = [event[i : i + 1] for i in range(len(event))]
            assert filtered(pieces) == (b"", event)

    def test_crlf_split_between_reads_after_a_forwarded_event(self) -> None:
        event = DELTA.replace(b"\n", b"\r\n")
        usage = USAGE.replace(b"\n", b"\r\n")
        usage_filter = UsageFilter()
        assert usage_filter.feed(event[:-10]) == event[:-10]
        assert usage_filter.feed(event[-10:-1]) == event[-10:-1]
        assert not usage_filter.at_boundary
        assert usage_filter.feed(event[-1:] + usage) == event[-1:]
        assert usage_filter.removed == usage

    def test_cr_only_usage_at_the_end(self) -> None:
        assert filtered([USAGE.replace(b"\n", b"\r")]) == (b"", USAGE.replace(b"\n", b"\r"))
        assert filtered([DELTA.replace(b"\n", b"\r")]) == (DELTA.replace(b"\n", b"\r"), b"")

    @pytest.mark.parametrize(
        ("rest", "boundary"), [(USAGE[:-1], False), (USAGE[:20], False), (b"\n", True), (b"", True)]
    )
    def test_a_cut_event_is_forwarded_at_the_end(self, rest: bytes, boundary: bool) -> None:
        usage_filter = UsageFilter()
        assert usage_filter.feed(DELTA + rest) == DELTA
        assert usage_filter.finish() == rest
        assert usage_filter.at_boundary is boundary

    def test_cut_while_passing(self) -> None:
        usage_filter = UsageFilter()
        usage_filter.feed(DELTA[:-1])
        assert usage_filter.finish() == b""
        assert not usage_filter.at_boundary


def test_examples_are_json() -> None:
    for event in (USAGE, DELTA, AZURE_FIRST, USAGE_WITH_CHOICE, SAYS_USAGE, ERROR):
        orjson.loads(data_of(event) or b"")
