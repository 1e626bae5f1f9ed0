"""What every command has in common: names that are nearly right, help, closed pipes and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxy.cli import COMMANDS, main
from proxy.cli.cache import SUBCOMMANDS
from tests.launch import environment, run_command

EVERY_COMMAND = [[], *([name] for name in COMMANDS), *(["cache", name] for name in SUBCOMMANDS)]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["chek"], "'chek' is not a command; did you mean check?"),
        (["Report"], "did you mean report?"),
        (["xyzzy"], "'xyzzy' is not a command\n"),
        (["--prot", "9"], "unknown argument --prot; did you mean --port?"),
        (["serve", "--Workers=2"], "did you mean --workers?"),
        (["serve", "now"], "unknown argument now\n"),
        (["cache", "list", "--lmit", "3"], "unknown argument --lmit; did you mean --limit?"),
        (["cache", "lits"], "invalid choice: 'lits'"),
    ],
)
def test_unknown_name_is_answered_with_the_nearest(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_unknown_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["chek"])
    error = capsys.readouterr().err
    assert all(name in error for name in COMMANDS)


@pytest.mark.parametrize("argv", EVERY_COMMAND, ids=" ".join)
def test_help_fits_80_columns(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["--help"], ["check"], ["cache", "import", "--help"]], ids=" ".join)
def test_closed_pipe_prints_no_traceback(argv: list[str], tmp_path: Path) -> None:
    """As with `| head`: the reader has gone when the command writes."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "proxy", *argv],
        cwd=tmp_path,
        env=environment(tmp_path, {}),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_closed_pipe_while_answers_are_imported_is_no_failure_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").touch()
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "cache", "import", "answers.jsonl", "--cache", "sqlite"],
        cwd=tmp_path,
        env=environment(tmp_path, {}),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_closed_standard_output_is_no_error(tmp_path: Path) -> None:
    done = run_command(tmp_path, ["--version"])
    assert done.stdout.startswith("openai-proxy ")
    shell = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m proxy check >&-"],
        cwd=tmp_path,
        env=environment(tmp_path, {}),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (shell.returncode, shell.stderr) == (0, "")


@pytest.mark.slow
def test_ctrl_c_during_start_prints_no_traceback(tmp_path: Path) -> None:
    """The settings wait for a key command when the signal comes. The command ignores it, so it does not end first."""
    started = tmp_path / "started"
    config = tmp_path / "settings.yaml"
    command = f"[sh, -c, 'trap \"\" INT; touch {started}; exec sleep 9']"
    config.write_text(f"upstreams:\n  - keys:\n      - key_command: {command}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "proxy", "serve", "--port", "0", "--config", str(config)],
        cwd=tmp_path,
        env=environment(tmp_path, {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 20
        while not started.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=10)
    finally:
        process.kill()
    assert (process.returncode, out, error) == (130, "", "")
