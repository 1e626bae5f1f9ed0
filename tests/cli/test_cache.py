"""`openai-proxy cache`, the parts that need no store: tables, sizes, times, progress, keys, the exported file."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from proxy.cache.entry import Entry
from proxy.cache.listing import timestamp
from proxy.cache.stores.intake import ImportResult
from proxy.cache.stores.interface import EntryName
from proxy.cli.cache import SUBCOMMANDS
from proxy.cli.cache.export import replacing
from proxy.cli.cache.interface import CommandError, EntrySummary, FilterArguments, find_key
from proxy.cli.cache.text import ProgressLine, cut, duration, size, table


def test_subcommands() -> None:
    assert {"stats", "list", "show", "purge", "export", "import"} <= set(SUBCOMMANDS)


def test_table() -> None:
    assert table(("NAME", "COUNT"), [("a", "1,000"), ("long name", "2")], right=("COUNT",)) == [
        "NAME       COUNT",
        "a          1,000",
        "long name      2",
    ]
    assert table(("A", "B"), []) == ["A  B"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**43, "8192.0 GiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "expired"), (0, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (86400, "24h"), (172800, "2d")],
)
def test_durations(seconds: int, text: str) -> None:
    assert duration(seconds) == text


def test_control_characters_are_escaped() -> None:
    assert cut("\x1b[2Jü", 80) == "\\x1b[2J\\xfc"
    assert cut("a" * 30, 10) == "a" * 9 + "…"


@pytest.mark.parametrize(("wall", "text"), [(0.0, "1970-01-01T00:00:00Z"), (1e300, "1e+300"), (-1e20, "-1e+20")])
def test_timestamps(wall: float, text: str) -> None:
    assert timestamp(wall) == text


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((_Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with ProgressLine("exporting", 1000) as progress:
            progress.step(500)
        assert (stream.getvalue() == "") is not shown
        assert not shown or stream.getvalue().endswith("\r\x1b[K")


def test_progress_line() -> None:
    progress = ProgressLine("exporting", 1000)
    progress.step(500)
    assert progress.line() == "exporting [############............]  50% of 1,000"
    progress.step(600)
    assert progress.line() == "exporting [########################] 100% of 1,000"
    progress = ProgressLine("checking", 0)
    progress.step(1234)
    assert progress.line() == "checking 1,234"


class _KeysOnly:
    """A cache of which only the keys are known."""

    def __init__(self, *keys: str) -> None:
        self._keys = keys

    async def list(self, filters: FilterArguments) -> AsyncIterator[Sequence[EntrySummary]]:
        for key in self._keys:
            yield [{"key": key}] if key.startswith(str(filters["prefix"])) else []

    async def facts(self) -> dict[str, Any]:
        raise NotImplementedError

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        raise NotImplementedError

    async def purge(self, filters: FilterArguments, dry_run: bool) -> int:
        raise NotImplementedError

    async def add(self, entries: Iterable[Entry], on_progress: Callable[[], object]) -> ImportResult:
        raise NotImplementedError


async def test_key_may_be_given_by_an_unambiguous_prefix() -> None:
    keys = _KeysOnly("abc", "abcd", "abcd", "b1", "b2")
    assert await find_key(keys, "abc") == "abc"
    assert await find_key(keys, "abcd") == "abcd"
    with pytest.raises(CommandError, match="2 keys begin with 'ab', such as abc…, abcd…"):
        await find_key(keys, "ab")
    with pytest.raises(CommandError, match="no stored response has a key that begins with 'c'"):
        await find_key(keys, "c")


def test_file_is_replaced_only_when_complete(tmp_path: Path) -> None:
    target, link = tmp_path / "answers", tmp_path / "link"
    target.write_bytes(b"before")
    link.symlink_to(target)

    def write_half_and_fail() -> None:
        with replacing(link) as file:
            file.write(b"write_half_and_fail")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half_and_fail()
    assert target.read_bytes() == b"before"
    with replacing(link) as file:
        file.write(b"after")
        assert target.read_bytes() == b"before"
    assert (target.read_bytes(), link.is_symlink()) == (b"after", True)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["answers", "link"]
