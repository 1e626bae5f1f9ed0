"""The log: one line for each record, keys masked, and no exception if it cannot be written."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from typing import Any

import pytest

import proxy.observability.logs
from proxy.observability.logs import FLUSH, JsonFormatter, RepeatFilter, TextFormatter, configure
from proxy.protocol.masking import SecretMasker

MASKER = SecretMasker(["pool-key-one", "sk-pool-key-two"])
NASTY = "a\nb\rc\x00d\x1b[31me\x85f\u2028g\ud800h"


def record(message: str, *args: object, level: int = logging.INFO, fields: Any = None, error: bool = False) -> Any:
    info = None
    if error:
        try:
            raise ValueError("pool-key-one\nsecond line")
        except ValueError:
            info = sys.exc_info()
    made = logging.LogRecord("proxy", level, __file__, 1, message, args, info)
    if fields is not None:
        made.fields = fields
    return made


def test_text_line() -> None:
    text = TextFormatter(MASKER).format(record("%s -> %d", "chat", 200, fields={"id": "x", "cost_usd": "0.1"}))
    assert text[2] == text[5] == ":"
    assert text[8:] == " info    chat -> 200  id=x cost_usd=0.1"


def test_json_line() -> None:
    line = json.loads(JsonFormatter(MASKER).format(record("%s", "ä“\n", fields={"id": "x", "attempts": 2})))
    assert {name: line[name] for name in ("level", "logger", "message", "id", "attempts")} == {
        "level": "info",
        "logger": "proxy",
        "message": "ä“\n",
        "id": "x",
        "attempts": 2,
    }
    assert len(line["time"]) == 24


@pytest.mark.parametrize("formatter", [TextFormatter(MASKER), JsonFormatter(MASKER)], ids=["text", "json"])
@pytest.mark.parametrize("text", ["pool-key-one", "sk-pool-key-two", "sk-" + "x" * 20, "Bearer abc.def"])
def test_keys_are_masked(formatter: logging.Formatter, text: str) -> None:
    secret = text.removeprefix("Bearer ")
    for made in (
        record(f"this is {text}!"),
        record("this is %s", text),
        record("x", fields={"key": f"- {text}"}),
        record("x", error=True),
    ):
        line = formatter.format(made)
        assert secret not in line
        assert "pool-key-one" not in line
    assert "***" in formatter.format(record(f"this is {text}"))


@pytest.mark.parametrize("formatter", [TextFormatter(MASKER), JsonFormatter(MASKER)], ids=["text", "json"])
def test_record_is_one_line_without_control_characters(formatter: logging.Formatter) -> None:
    for made in (record(NASTY), record("%s", NASTY), record("x", fields={"model": NASTY})):
        line = formatter.format(made)
        assert len(line.splitlines()) == 1
        assert line.isprintable()
        assert "a" in line
        assert "h" in line
        line.encode()


def test_traceback_lines_are_cleaned() -> None:
    """A traceback is the only text of several lines; no line of it can pass for a log line."""
    lines = TextFormatter(MASKER).format(record("it failed", error=True)).split("\n")
    assert lines[0].endswith("it failed")
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-2:] == ["ValueError: ***", "second line"]
    assert all(line.isprintable() for line in lines)
    assert "ValueError: ***" in json.loads(JsonFormatter(MASKER).format(record("x", error=True)))["exception"]


def test_values_that_json_lacks_are_logged_as_text() -> None:
    line = json.loads(JsonFormatter(MASKER).format(record("x", fields={"where": {1, 2}, "big": 2**70})))
    assert line["where"] == "{1, 2}"


def test_time_follows_the_record() -> None:
    formatter = TextFormatter(MASKER)
    made = [record("x") for _ in range(3)]
    for each, second in zip(made, (1_790_000_000.1, 1_790_000_000.9, 1_790_000_001.0), strict=True):
        each.created = second
    first, same, next_ = (formatter.format(each)[:8] for each in made)
    assert (first == same, same == next_) == (True, False)


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("logging_as_it_was")
@pytest.mark.parametrize("format_", ["text", "json"])
def test_levels_and_formats(capsys: pytest.CaptureFixture[str], format_: str) -> None:
    configure("info", format_, MASKER)
    logging.getLogger("proxy").debug("hidden")
    logging.getLogger("proxy").info("shown")
    logging.getLogger("proxy.request").info("shown, too")
    logging.getLogger("aiohttp.access").info("hidden")
    logging.getLogger("aiohttp").warning("shown as well")
    logging.getLogger("asyncio").warning("hidden")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all("shown" in line for line in lines)
    assert all(line.startswith("{") is (format_ == "json") for line in lines)


@pytest.mark.usefixtures("logging_as_it_was")
def test_debug_level_masks_keys(capsys: pytest.CaptureFixture[str]) -> None:
    configure("debug", "text", MASKER)
    logging.getLogger("proxy").debug("with pool-key-one")
    assert capsys.readouterr().err.endswith("debug   with ***\n")


@pytest.mark.usefixtures("logging_as_it_was")
async def test_lines_are_buffered_and_written_in_order(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy.observability.logs, "FLUSH", 0.02)
    configure("info", "text", MASKER)
    log = logging.getLogger("proxy")
    log.info("one")
    log.info("two")
    assert capsys.readouterr().err == ""
    await asyncio.sleep(0.05)
    assert [line[-3:] for line in capsys.readouterr().err.splitlines()] == ["one", "two"]
    log.info("three")
    log.warning("four")  # at once, and what was gathered goes before it
    assert [line.rsplit(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == ["three", "four"]
    await asyncio.sleep(0.05)
    assert capsys.readouterr().err == ""
    assert FLUSH < 1


@pytest.mark.usefixtures("logging_as_it_was")
def test_unformattable_record_is_skipped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    configure("info", "text", MASKER)
    log = logging.getLogger("proxy")
    log.info("%d", "no number")
    log.info("next")
    assert capsys.readouterr().err.endswith("next\n")


@pytest.mark.usefixtures("logging_as_it_was")
@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file")])
def test_closed_standard_error_raises_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(sys, "stderr", Broken())
    configure("info", "text", MASKER)
    logging.getLogger("proxy").warning("into the void")


# --- what repeats -----------------------------------------------------------------------------------------------------


def logged(text: str, created: float, level: int = logging.WARNING, name: str = "proxy") -> logging.LogRecord:
    made = logging.LogRecord(name, level, "", 0, text, None, None)
    made.created = created
    return made


def test_a_warning_that_repeats_is_logged_once_in_10_s_with_the_number_left_out() -> None:
    filter_ = RepeatFilter()
    assert filter_.filter(logged("connection 1 failed", 100.0))
    assert not any(filter_.filter(logged(f"connection {number} failed", 100.5)) for number in range(2, 50))
    assert filter_.filter(logged("another thing failed", 100.5))
    assert filter_.filter(logged("connection 7 failed", 100.6, name="proxy.cache"))
    late = logged("connection 60 failed", 110.0)
    assert filter_.filter(late)
    assert late.getMessage() == "connection 60 failed (and 48 more like it)"
    later = logged("connection 61 failed", 120.0)
    assert filter_.filter(later)
    assert later.getMessage() == "connection 61 failed"


def test_lines_of_requests_and_information_are_never_left_out() -> None:
    filter_ = RepeatFilter()
    assert all(filter_.filter(logged("chat m -> 502", 1.0, name="proxy.request")) for _ in range(3))
    assert all(filter_.filter(logged("the old ones stay", 1.0, name="proxy.reload")) for _ in range(3))
    assert all(filter_.filter(logged("reload", 1.0, logging.INFO)) for _ in range(3))


def test_a_clock_that_is_set_back_does_not_silence_the_log() -> None:
    filter_ = RepeatFilter()
    assert filter_.filter(logged("x", 1000.0))
    assert filter_.filter(logged("x", 10.0))


def test_repeats_are_remembered_within_bounds() -> None:
    filter_ = RepeatFilter()
    for number in range(5000):
        filter_.filter(logged("".join(chr(97 + int(digit)) for digit in str(number)), 1.0))
    assert len(filter_._seen) <= 1000
