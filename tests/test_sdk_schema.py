"""tests.sdk_schema: the check of the newest SDK names what the table lacks, and never fails."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from proxy.cache.fields import FIELDS
from tests import sdk_schema


def test_complete_table_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert sdk_schema.main([]) == 0
    assert capsys.readouterr().out == f"openai {openai.__version__}: proxy/cache/fields.py names every field and tool\n"


def test_missing_lines_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chat = {name: verdict for name, verdict in FIELDS["chat"].items() if name != "seed"}
    monkeypatch.setattr(sdk_schema, "FIELDS", {**FIELDS, "chat": chat})
    monkeypatch.setattr(sdk_schema, "CLIENT_RUN", sdk_schema.CLIENT_RUN - {"apply_patch"})
    assert sdk_schema.main([]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"WARNING: openai {openai.__version__} has fields or tools")
    assert out[2:] == ["  chat: field seed", "  responses: tool apply_patch"]


@pytest.mark.slow
def test_without_a_registry_the_newest_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert sdk_schema.main(["--newest"]) == 0
    assert capsys.readouterr().out.startswith("SKIPPED: the newest openai could not be installed: ERROR: ")


@pytest.mark.slow
def test_unreadable_sdk_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = sdk_schema._run

    def broken(command: list[str], **environ: str) -> str:
        """Installs an SDK whose modules have moved."""
        if "pip" in command:
            (Path(command[command.index("--target") + 1]) / "openai.py").write_text("__version__ = '99'\n")
            return ""
        return run(command, **environ)

    monkeypatch.setattr(sdk_schema, "_run", broken)
    assert sdk_schema.main(["--newest"]) == 0
    assert capsys.readouterr().out.startswith("SKIPPED: the newest openai could not be read: ModuleNotFoundError: ")
