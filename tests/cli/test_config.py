from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxy.cli import main
from proxy.config.loader import load
from proxy.config.manual import json_schema
from proxy.config.settings import Settings


def test_schema_prints_the_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_init_writes_the_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    assert main(["config", "init", str(file)]) == 0
    assert capsys.readouterr().out == f"wrote {file}\n"
    loaded = load(file, {}, {}, tmp_path)
    assert (loaded.settings, loaded.warnings) == (Settings(), ())


def test_init_writes_config_yaml_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["config", "init"]) == 0
    assert load(None, {}, {}, tmp_path).file == Path("config.yaml")


def test_init_replaces_no_file_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("mine")
    assert main(["config", "init", str(file)]) == 1
    assert capsys.readouterr().err == f"{file} exists: give another name, or --force to replace it\n"
    assert file.read_text() == "mine"
    assert main(["config", "init", "--force", str(file)]) == 0
    assert "server:" in file.read_text()


def test_init_says_why_a_file_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "init", str(tmp_path / "no" / "config.yaml")]) == 1
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_a_subcommand_is_needed() -> None:
    with pytest.raises(SystemExit) as error:
        main(["config"])
    assert error.value.code == 2
