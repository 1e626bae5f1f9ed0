"""A change of state is counted and logged once, and what repeats is told apart by the thing and its state."""

from __future__ import annotations

import io
import json
import logging

import pytest

from proxy.observability.logs import JsonFormatter, RepeatFilter, TextFormatter
from proxy.protocol.masking import SecretMasker
from proxy.system import state_changes
from proxy.system.state_changes import STATE_CHANGES, Change, state_changed


@pytest.fixture
def log() -> io.StringIO:
    """Return what is logged, as text and with repeated lines left out."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(TextFormatter(SecretMasker([])))
    handler.addFilter(RepeatFilter())
    logging.getLogger("proxy").addHandler(handler)
    return text


def test_keys_whose_names_differ_by_a_number_have_a_line_each(log: io.StringIO) -> None:
    STATE_CHANGES.clear()
    for name in ("openai-1", "openai-2", "openai-1"):
        state_changed(Change("key", name, "rejected", f"key {name}: rejected"))
    lines = log.getvalue().splitlines()
    assert [line.split("key ")[1] for line in lines] == ["openai-1: rejected", "openai-2: rejected"]
    assert STATE_CHANGES == {("key", "openai-1", "rejected"): 2, ("key", "openai-2", "rejected"): 1}


def test_models_of_a_key_have_a_line_each(log: io.StringIO) -> None:
    for model in ("gpt-4o", "gpt-4.1"):
        state_changed(Change("key", "k1", "missing", f"key k1 for {model}: missing", about=model))
    assert len(log.getvalue().splitlines()) == 2


def test_what_another_process_noticed_is_logged_and_not_counted(log: io.StringIO) -> None:
    STATE_CHANGES.clear()
    state_changed(Change("key", "k1", "rejected", "key k1: rejected"), noticed_here=False)
    assert ("key k1: rejected" in log.getvalue(), dict(STATE_CHANGES)) == (True, {})


def test_json_line_names_kind_state_and_end(caplog: pytest.LogCaptureFixture) -> None:
    state_changed(Change("breaker", "openai", "open", "breaker of openai: open", until=1_800_000_000.5))
    line = json.loads(JsonFormatter(SecretMasker([])).format(caplog.records[-1]))
    assert (line["kind"], line["name"], line["state"]) == ("breaker", "openai", "open")
    assert line["until"].startswith("2027-01-1")


def test_a_worker_sends_its_changes_to_the_supervisor(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Change] = []
    monkeypatch.setattr(state_changes, "forward", sent.append)
    change = Change("store", "redis cache", "down", "redis cache: gone")
    state_changed(change)
    assert (sent, log.getvalue()) == ([change], "")
