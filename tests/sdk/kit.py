"""The official SDKs as programs of their own: installed, started once, asked for one call after the other."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# What pip and npm say when there is no registry; anything else they fail with is worth a failed test.
NO_REGISTRY = re.compile(
    r"^.*(?:connection broken by|ConnectionError|Timeout|NameResolutionError|No matching distribution found for openai"
    r"|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENOTCACHED|ERR_SOCKET_TIMEOUT).*$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One SDK in one version. `requirements` empty: the one that the tests themselves are installed with."""

    name: str
    language: str
    requirements: tuple[str, ...] = ()
    helpers: bool = True
    """Whether it has `chat.completions.parse` and `.stream`."""


# 1.0.0 works too, but 1.3.0 is the first minor release that has `tools` and whose exceptions carry the `code`. Before
# 1.55.3 the SDK hands httpx an argument that httpx 0.28 no longer has: its users have to hold httpx back as well.
# npm chooses the newest version that says it runs on the Node at hand.
KINDS = (
    Kind("python-1.3.0", "python", ("openai==1.3.0", "httpx<0.28"), helpers=False),
    Kind("python-2.54.0", "python", ("openai==2.54.0",)),
    Kind("python-newest", "python"),
    Kind("node-newest", "node", ("openai",)),
)


@dataclass(frozen=True, slots=True)
class Job:
    """One call, as the drivers read it."""

    address: str
    method: str
    """Below the client: `chat.completions.create`."""
    fields: Mapping[str, Any]
    raw: bool = False
    """With the headers: `with_raw_response`, `withResponse()`."""
    azure: bool = False
    asynchronous: bool = False
    max_retries: int | None = None
    """None: the SDK's own default, 2."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the caller saw: the answer (a list of chunks for a stream, as far as it came), or the exception too."""

    answer: Any
    headers: Mapping[str, str]
    error: Mapping[str, Any]

    @property
    def value(self) -> Any:
        """The answer of a call that did not fail."""
        assert not self.error, self.error
        return self.answer

    @property
    def message(self) -> Any:
        return self.value["choices"][0]["message"]

    @property
    def deltas(self) -> list[Any]:
        """Of a stream of one choice, the chunks without a choice left out."""
        return [chunk["choices"][0]["delta"] for chunk in self.answer if chunk["choices"]]

    @property
    def text(self) -> str:
        """What a stream said."""
        return "".join(delta.get("content") or "" for delta in self.deltas)

    @property
    def cache(self) -> str:
        return self.headers["x-proxy-cache"]

    @property
    def cost(self) -> str:
        return self.headers["x-proxy-cost-usd"]


class Sdk:
    """A running driver. Its stderr is for whoever debugs a failed test."""

    def __init__(self, kind: Kind, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.kind = kind
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=log.parent
            )
        self.version: str = self._read()["version"]

    def ask(self, job: Job) -> Outcome:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        self._process.stdin.flush()
        seen = self._read()
        return Outcome(seen["value"], seen["headers"] or {}, seen["error"] or {})

    def _read(self, seconds: float = 60.0) -> Any:
        """The next line; only ever one is on its way, so that none hides in the reader's buffer."""
        stdout = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], seconds)
        line = stdout.readline() if ready else b""
        assert line, f"{self.kind.name} said nothing:\n{self._log.read_text()[-4000:]}"
        return json.loads(line)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def start(kind: Kind, shared: Path, own: Path) -> Sdk:
    """A driver for this SDK, installed below `shared` by whichever test process comes first.

    Skips the test where the SDK cannot be had: no registry, no Node.
    """
    env = {"PATH": os.environ.get("PATH", ""), "HOME": str(own), "LANG": "C.UTF-8"}
    log = own / f"{kind.name}.log"
    if kind.language == "node":
        node, npm = _node()
        options = ("--no-audit", "--no-fund", "--no-save", "--fetch-retries=1", "--fetch-timeout=20000")
        place = _installed(
            shared / kind.name, lambda target: [npm, "install", *options, "--prefix", str(target), *kind.requirements]
        )
        driver = place / "driver.mjs"
        return Sdk(kind, [node, str(driver)], env, log)
    if not kind.requirements:
        return Sdk(kind, [sys.executable, str(HERE / "driver.py")], env, log)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check")
    limits = ("--retries", "1", "--timeout", "20")
    place = _installed(shared / kind.name, lambda target: [*pip, *limits, "--target", str(target), *kind.requirements])
    # -S: without the site-packages of the tests, whose newer SDK and libraries would fill gaps unnoticed.
    return Sdk(kind, [sys.executable, "-S", str(HERE / "driver.py")], env | {"PYTHONPATH": str(place)}, log)


def _node() -> tuple[str, str]:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < 18:
        pytest.skip(f"node {version} is older than 18")
    return node, npm


def _installed(place: Path, command: Callable[[Path], Sequence[str]]) -> Path:
    """The directory, filled once by `command`, whatever the number of test processes."""
    partial, failure, lock_file = (place.parent / f"{place.name}-{end}" for end in ("partial", "failure", "lock"))
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists() and not failure.exists():
            partial.mkdir()
            done = subprocess.run(
                command(partial), cwd=partial, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
            )
            if done.returncode == 0:
                shutil.copy(HERE / "driver.mjs", partial)  # a module's imports are looked for from where it lies
                partial.rename(place)
            else:
                failure.write_text(done.stdout + done.stderr)
    if failure.exists():
        said = failure.read_text()
        reason = NO_REGISTRY.search(said)
        assert reason is not None, f"{place.name} cannot be installed:\n{said}"
        pytest.skip(f"{place.name} cannot be installed: {reason[0][:200]}")
    return place
