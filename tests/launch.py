"""The real process under test: `python -m proxy serve`, a clean environment, no mercy at the end."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import yaml

ROOT = Path(__file__).resolve().parent.parent
Config = dict[str, Any]

LISTENING = re.compile(r"listening on (http://(?:127\.0\.0\.1|0\.0\.0\.0):(\d+))")
# Signs that the program broke, whatever the client saw.
BROKEN = (
    "Traceback",
    "never retrieved",
    "never awaited",
    "Unclosed",
    "was destroyed but",
    "Exception ignored",
)
AT_ONCE: Final = 15.0
"""Seconds in which everything happens that waits for nothing, on a busy machine too; what a test must not see waits
longer.
"""
CANARY = re.compile(r"c0ffee[0-9a-f]{24}")


def secret(name: str) -> str:
    """A key that looks real and carries a canary, by which it is recognised wherever it turns up."""
    return f"sk-test-{name}-c0ffee{hashlib.sha256(name.encode()).hexdigest()[:24]}"


def settings(port: int, keys: Sequence[str] = ("k1",), /, **sections: Any) -> Config:
    """One upstream with `keys` on the loopback, short pauses, a patient breaker; `sections` are merged in by level."""
    base: Config = {
        "server": {"drain_timeout": "1s"},
        "upstreams": [
            {
                "name": "openai",
                "base_url": f"http://127.0.0.1:{port}/v1",
                "keys": [{"name": name, "key": secret(name)} for name in keys],
            }
        ],
        "retry": {"base_delay": "10ms", "jitter": "10ms"},
        "breaker": {"failures": 1000},
        "log": {"level": "debug"},
    }
    return merge(base, sections)


def merge(base: Config, over: Mapping[str, Any]) -> Config:
    result = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def environment(home: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Nothing of the tester's: no keys, no proxies, no settings."""
    kept = {k: v for k, v in os.environ.items() if k == "PATH" or k.startswith("COVERAGE_PROCESS")}
    return {**kept, "HOME": str(home), "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT), **env}


def write_config(directory: Path, config: str | Config, name: str = "settings.yaml") -> Path:
    path = directory / name
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    path.chmod(0o600)
    return path


def run_command(
    directory: Path,
    args: Sequence[str],
    config: str | Config | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 20.0,
) -> subprocess.CompletedProcess[str]:
    """One command to its end, e.g. `["serve", "--port", "0"]`; `--config` is appended for a `config`."""
    argv = [sys.executable, "-m", "proxy", *args]
    if config is not None:
        argv += ["--config", str(write_config(directory, config))]
    done = subprocess.run(
        argv,
        cwd=directory,
        env=environment(directory, env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


class ProxyProcess:
    """A running proxy. `start()` returns when it listens; `finish()` stops it and judges its log."""

    def __init__(self, argv: Sequence[str], directory: Path, env: Mapping[str, str]) -> None:
        self._log = directory / f"proxy-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "proxy", *argv],
                cwd=directory,
                env=environment(directory, env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.address = ""
        self.port = 0
        self._judged = 0

    def start(self, expect: re.Pattern[str] = LISTENING, seconds: float = 30.0) -> None:
        """Waits for the start-up line. Raises AssertionError when the process ends or stays silent."""
        end = time.monotonic() + seconds
        while (found := expect.search(self.stderr_so_far())) is None:
            assert self.process.poll() is None, f"exit {self.process.returncode}:\n{self.stderr_so_far()}"
            assert time.monotonic() < end, f"not listening after {seconds} s:\n{self.stderr_so_far()}"
            time.sleep(0.01)
        if expect is LISTENING:
            self.address, self.port = found.group(1), int(found.group(2))

    @property
    def base_url(self) -> str:
        """What a client sets as OPENAI_BASE_URL."""
        return f"{self.address}/v1"

    def stderr_so_far(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)

    def wait(self, seconds: float = 10.0) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        return self.process.wait(seconds)

    def alive(self) -> bool:
        return self.process.poll() is None

    def fds(self) -> int | None:
        """Open file descriptors; None where there is no /proc."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        return len(list(folder.iterdir())) if folder.exists() else None

    def rss(self) -> int | None:
        """Resident memory in bytes; None where there is no /proc."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return None
        found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
        return int(found.group(1)) * 1024 if found else None

    def problems(self) -> list[str]:
        """What the log shows to be wrong since this was last asked: a crash, or a key."""
        log = self.stderr_so_far()[self._judged :]
        self._judged += len(log)
        found = []
        for sign in [*(sign for sign in BROKEN if sign in log), *sorted(set(CANARY.findall(log)))]:
            at = log.index(sign)
            found.append(f"the log has {sign!r}:\n{log[max(0, at - 1000) : at + 4000]}")
        return found

    def finish(self) -> list[str]:
        """Stops the process, however it takes it, and says what was wrong with it."""
        for patience in (3, 3):
            if not self.alive():
                break
            self.terminate()
            try:
                self.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        stuck = ["did not stop on a second SIGTERM"] if self.alive() else []
        self.process.kill()
        self.process.wait()
        return stuck + self.problems()


class Launch(Protocol):
    """Starts a proxy. `config=None`: no file, the environment decides."""

    def __call__(
        self,
        config: str | Config | None = None,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
    ) -> ProxyProcess: ...
