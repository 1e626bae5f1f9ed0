from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from proxy.cli.common import add_config_arguments, load_from_args
from proxy.config.loader import FLAGS, LoadedSettings
from proxy.config.settings import UpstreamSettings


def load(argv: list[str], cwd: Path, upstream: str | None = None, **environ: str) -> LoadedSettings:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return load_from_args(parser.parse_args(argv), environ, cwd=cwd, upstream=upstream)


def test_every_flag_sets_its_setting(tmp_path: Path) -> None:
    argv = ["--host", "localhost", "--port", "9000", "--workers", "1", "--cache", "off", "--mode", "normal"]
    argv += ["--upstream", "http://127.0.0.1:9/v1", "--log-level", "debug", "--log-format", "json"]
    loaded = load(argv, tmp_path)
    settings = loaded.settings
    assert (settings.server.host, settings.server.port, settings.cache.backend) == ("localhost", 9000, "off")
    assert settings.upstreams[0].base_url == "http://127.0.0.1:9/v1"
    assert (settings.log.level, settings.log.format) == ("debug", "json")
    flags = {source.removeprefix("flag ") for source in loaded.sources.values() if source.startswith("flag ")}
    assert flags == set(FLAGS.values()) - {"--cassette"}


def test_config_file(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("server: {port: 9}")
    loaded = load(["--config", "s.yaml"], tmp_path, PROXY__LOG__LEVEL="error")
    assert (loaded.file, loaded.settings.server.port, loaded.settings.log.level) == (Path("s.yaml"), 9, "error")


def test_mistakes_are_printed_and_exit_status_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load(["--port", "x", "--cache", "tape"], tmp_path)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "command line: server.port (--port): expected a whole number from 0 to 65535, found 'x'",
        "command line: cache.backend (--cache): expected memory, sqlite, redis or off, found 'tape'",
    ]


def test_given_upstream_replaces_the_configured_ones(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("upstreams: [{keys: ['${NOPE}']}, {keys: [a]}]\nserver: {port: 9}")
    loaded = load([], tmp_path, upstream="http://127.0.0.1:9/v1", OPENAI_API_KEY="sk-your-key")
    assert loaded.settings.upstreams == (UpstreamSettings(base_url="http://127.0.0.1:9/v1"),)
    assert loaded.settings.server.port == 9


def test_environment_and_directory_are_those_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROXY__SERVER__PORT", "9123")
    (tmp_path / "config.yaml").write_text("log: {level: debug}")
    settings = load_from_args(argparse.Namespace()).settings
    assert (settings.server.port, settings.log.level) == (9123, "debug")
