"""Ids of stored objects: those that requests name, and those that responses bring."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.keys import stored_objects as objects
from proxy.upstream.keys.stored_objects import MAX_IDS, brought_by, looks_like_id, names_in, sealed


def certain(document: Any) -> list[str]:
    return sorted(names_in(document).certain)


@pytest.mark.parametrize(
    ("document", "ids"),
    [
        ({"previous_response_id": "resp_1", "input": "x"}, ["resp_1"]),
        ({"previous_response_id": "of-another-kind", "input": "x"}, ["of-another-kind"]),
        ({"conversation": "conv_1"}, ["conv_1"]),
        ({"conversation": {"id": "conv_1"}}, ["conv_1"]),
        ({"prompt": {"id": "pmpt_1", "version": "2", "variables": {"x": "y"}}}, ["pmpt_1"]),
        ({"prompt": {"id": "named-otherwise"}}, ["named-otherwise"]),
        ({"prompt": "a text"}, []),
        ({"input": [{"type": "item_reference", "id": "x1"}]}, ["x1"]),
        ({"input": [{"id": "msg_1"}]}, ["msg_1"]),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, ["rs_1"]),
        ({"input": [{"type": "function_call_output", "call_id": "call_1", "output": "x"}]}, []),
        ({"input": [{"type": "mcp_approval_response", "approval_request_id": "mcpr_1"}]}, ["mcpr_1"]),
        ({"tools": [{"type": "file_search", "vector_store_ids": ["vs_1", "vs_2"]}]}, ["vs_1", "vs_2"]),
        ({"tools": [{"type": "code_interpreter", "container": "cntr_1"}]}, ["cntr_1"]),
        ({"tools": [{"type": "code_interpreter", "container": {"type": "auto", "file_ids": ["file-1"]}}]}, ["file-1"]),
        ({"input": [{"content": [{"type": "input_file", "file_id": "file-1"}]}]}, ["file-1"]),
        ({"messages": [{"content": [{"type": "file", "file": {"file_id": "file-1"}}]}]}, ["file-1"]),
        ({"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]}, ["audio_1"]),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "call_1"}]}]}, []),
        ({"messages": [{"role": "tool", "tool_call_id": "call_1"}]}, []),
        ({"messages": [{"role": "assistant", "id": "chatcmpl-1", "content": "x"}]}, []),
        ({"audio": {"voice": "ash", "format": "mp3"}, "messages": []}, []),
        ({"audio": {"voice": {"id": "voice_1"}}}, ["voice_1"]),
        ({"input_file_id": "file-1", "endpoint": "/v1/chat/completions"}, ["file-1"]),
        ({"training_file": "file-1", "validation_file": "file-2"}, ["file-1", "file-2"]),
        ({"some_new_thing_id": "resp_1"}, ["resp_1"]),
        ({"previous_response_id": None, "conversation": 7, "file_id": "", "file_ids": [None, 1]}, []),
        ({"file_id": "x" * 1025}, []),
        ({"previous_response_id": "resp_" + "bGl0ZQ==" * 100}, ["resp_" + "bGl0ZQ==" * 100]),
        ({"metadata": {"file_id": "file-1", "id": "resp_1"}}, []),
        ({"tools": [{"parameters": {"properties": {"file_id": {"default": "file-1", "id": "file-1"}}}}]}, []),
        ({"messages": [{"role": "user", "content": 'the "file_id" of "previous_response_id": "x"'}]}, []),
        ({"model": "gpt-4o", "messages": []}, []),
        ([], []),
    ],
)
def test_ids_in_requests(document: Any, ids: list[str]) -> None:
    assert certain(document) == ids


def test_sealed_content_is_named_by_its_digest() -> None:
    document = {"input": [{"type": "reasoning", "encrypted_content": "gAAAA", "summary": []}]}
    assert certain(document) == [sealed("gAAAA")]
    assert "gAAAA" not in sealed("gAAAA")
    assert sealed("gAAAA") != sealed("gAAAB")
    assert certain({"input": [{"encrypted_content": None}, {"encrypted_content": ""}]}) == []


@pytest.mark.parametrize(
    ("document", "ids"),
    [
        ({"connector_id": "connector_drive"}, ("connector_drive",)),
        ({"input": [{"type": "message", "id": "4f2a"}]}, ("4f2a",)),
        ({"user_id": "u1", "session_id": "s1", "custom_id": "c1"}, ()),
        ({"x_id": "file-1", "y_id": "file-1"}, ()),
    ],
)
def test_texts_that_may_be_ids(document: Any, ids: tuple[str, ...]) -> None:
    assert names_in(document).possible == ids


def test_ids_in_every_field_are_found() -> None:
    for name in objects._FIELDS:
        assert certain({name: "x"}) == ["x"]


def test_ids_are_found_at_any_depth() -> None:
    document: Any = {"file_id": "file-1"}
    for _ in range(5000):
        document = {"x": [document]}
    assert names_in(document).certain == ("file-1",)


def test_the_outermost_names_come_first() -> None:
    document = {"input": [{"content": [{"file_id": "file-1"}]}], "previous_response_id": "resp_1"}
    assert names_in(document).certain == ("resp_1", "file-1")


@pytest.mark.parametrize(
    ("path", "ids", "maybe"),
    [
        ("/files", (), ()),
        ("/files/file-1/content", ("file-1",), ()),
        ("/threads/thread_1/runs/run_1", ("thread_1", "run_1"), ()),
        ("/responses/resp_a/input_items", ("resp_a",), ()),
        ("/chat/completions/chatcmpl-1/messages", ("chatcmpl-1",), ()),
        ("/files/a%20b", (), ("a b",)),
        ("/files/", (), ()),
    ],
)
def test_ids_in_paths(path: str, ids: tuple[str, ...], maybe: tuple[str, ...]) -> None:
    named = names_in(None, path)
    assert (named.certain, named.possible) == (ids, maybe)


@pytest.mark.parametrize(
    ("query", "ids"),
    [("after=file-1&limit=2", ("file-1",)), ("file_id=x&b", ("x",)), ("after=x", ()), ("a=%66ile-1", ("file-1",))],
)
def test_ids_in_queries(query: str, ids: tuple[str, ...]) -> None:
    assert names_in(None, query=query).certain == ids


@pytest.mark.parametrize("text", ["resp_1", "file-AbC", "file_1", "ftjob-1", "chatcmpl-x", "evalrun_1", "rtc_1"])
def test_texts_that_look_like_ids(text: str) -> None:
    assert looks_like_id(text)


@pytest.mark.parametrize("text", ["call_1", "file", "resp_", "xresp_1", "file-a b", "rs_" + "x" * 1024, 7, None])
def test_texts_that_do_not_look_like_ids(text: object) -> None:
    assert not looks_like_id(text)


REASONING = {"id": "rs_1", "type": "reasoning", "encrypted_content": "gAAAA"}
MESSAGE = {"id": "msg_1", "type": "message", "content": [{"type": "output_text", "text": "x"}]}
CALL = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "arguments": "{}"}
FOUND = {"type": "file_citation", "file_id": "file-9"}
WRITTEN = {"type": "container_file_citation", "file_id": "cfile_1", "container_id": "cntr_1"}


@pytest.mark.parametrize(
    ("document", "made", "seen"),
    [
        ({"id": "resp_1", "object": "response", "output": []}, ["resp_1"], []),
        ({"id": "of-another-kind", "object": "response"}, ["of-another-kind"], []),
        (
            {"id": "resp_1", "output": [REASONING, MESSAGE, CALL, {"id": "7", "type": "new"}]},
            ["7", "fc_1", "msg_1", "resp_1", "rs_1"],
            [],
        ),
        ({"output": [{"content": [{"annotations": [FOUND, WRITTEN]}]}]}, ["cfile_1", "cntr_1"], ["file-9"]),
        ({"output": [{"id": "fs_1", "results": [{"file_id": "file-9"}]}]}, ["fs_1"], ["file-9"]),
        ({"object": "list", "data": [{"id": "file-1", "object": "file"}, {"id": "x"}, 7]}, ["file-1", "x"], []),
        ({"id": "batch_1", "object": "batch", "output_file_id": "file-1"}, ["batch_1", "file-1"], []),
        ({"id": "ftjob-1", "result_files": ["file-1"]}, ["file-1", "ftjob-1"], []),
        ({"id": "run_1", "object": "thread.run", "thread_id": "thread_1"}, ["run_1", "thread_1"], []),
        ({"choices": [{"message": {"audio": {"id": "audio_1"}, "tool_calls": [{"id": "call_1"}]}}]}, ["audio_1"], []),
        ({"id": "resp_1", "tools": [{"vector_store_ids": ["vs_1"]}], "metadata": {"id": "file-1"}}, ["resp_1"], []),
        ({"id": 7, "object": "file"}, [], []),
        ({"object": "list", "data": "x"}, [], []),
        ([], [], []),
        (None, [], []),
    ],
)
def test_ids_in_responses(document: Any, made: list[str], seen: list[str]) -> None:
    brought = brought_by(document)
    assert (sorted(brought.made), sorted(brought.seen)) == (made, seen)


def test_sealed_content_in_responses() -> None:
    assert brought_by({"output": [REASONING, {"encrypted_content": None}]}).sealed == (sealed("gAAAA"),)


def test_the_number_of_ids_is_bounded() -> None:
    many = [{"id": f"file-{number}"} for number in range(5 * MAX_IDS)]
    assert MAX_IDS <= len(brought_by({"data": many}).made) <= MAX_IDS + 1
    assert MAX_IDS <= len(certain({"x": many})) <= MAX_IDS + 1


@given(st.recursive(st.none() | st.text(max_size=4), lambda x: st.lists(x) | st.dictionaries(st.text(max_size=4), x)))
def test_no_value_raises(value: Any) -> None:
    document = {"conversation": value, "file_ids": value, "id": value, "object": "x", "data": value, "output": value}
    document |= {"audio": value, "encrypted_content": value, "prompt": value, "type": value}
    names_in(document)
    brought_by(document)
