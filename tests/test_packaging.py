"""What is installed: the locked requirements hold what pyproject.toml asks for, and the wheel what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GROUPS = PYPROJECT["dependency-groups"]
DIRECT = PYPROJECT["project"]["dependencies"]
EXTRAS = [text for extra in PYPROJECT["project"]["optional-dependencies"].values() for text in extra]
TEST = [text for text in GROUPS["test"] if isinstance(text, str)]
LOCKS = {
    "requirements.txt": DIRECT,
    "requirements-build.txt": [*PYPROJECT["build-system"]["requires"], *GROUPS["build"]],
    "requirements-test.txt": [*DIRECT, *EXTRAS, *TEST, *GROUPS["build"]],
}


def pins(name: str) -> dict[str, Requirement]:
    """Every pinned requirement of a lock, by its canonical name. Fails for a line that is not pinned and hashed."""
    text = re.sub(r"(?m)^\s*#.*\n?", "", (ROOT / name).read_text(encoding="utf-8")).replace("\\\n", " ")
    found: dict[str, Requirement] = {}
    for line in text.splitlines():
        written, *hashes = re.split(r"\s+--hash=", line.strip())
        assert hashes, line
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), line
        requirement = Requirement(written)
        assert [s.operator for s in requirement.specifier] == ["=="], line
        found[canonicalize_name(requirement.name)] = requirement
    return found


def version(pin: Requirement) -> str:
    return next(iter(pin.specifier)).version


def unmet(asked: Iterable[str], locked: dict[str, Requirement]) -> list[str]:
    """What pyproject.toml asks for and the lock does not hold in a version that fits."""
    wanted = [Requirement(text) for text in asked]
    return [
        str(want)
        for want in wanted
        if (pin := locked.get(canonicalize_name(want.name))) is None or version(pin) not in want.specifier
    ]


@pytest.mark.parametrize("name", LOCKS)
def test_lock_holds_what_pyproject_asks_for(name: str) -> None:
    assert unmet(LOCKS[name], pins(name)) == [], "renew the locks: .ci/lock"


@pytest.mark.parametrize("name", LOCKS)
def test_lock_pins_what_the_tests_ran_with(name: str) -> None:
    tested = pins("requirements-test.txt")
    assert {key: str(pin.specifier) for key, pin in pins(name).items()}.items() <= {
        key: str(pin.specifier) for key, pin in tested.items()
    }.items()


@pytest.mark.parametrize("name", LOCKS)
def test_lock_names_no_registry_and_no_path(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "/" in line or "-index" in line] == ["#    .ci/lock"]


@pytest.mark.slow
def test_wheel_holds_the_data_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "proxy").rglob("*") if p.suffix in {".json", ".typed", ".lua"}}
    assert {"proxy/py.typed", "proxy/cost/prices.json"} <= data <= names
