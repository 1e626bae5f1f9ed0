"""Secrets: values that do not show themselves, and the rules a key must meet."""

from __future__ import annotations

import re
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .problems import Invalid

LONGEST_KEY: Final = 4096

COMMAND_TIME: Final = 10.0
"""Seconds a `key_command` has."""

_PLACEHOLDER: Final = re.compile(
    r"""
    (sk-)?(proj-)?your          # sk-your-key, your-api-key, your_key_here, YOUR_API_KEY
    | .*[-_](key|token|secret)[-_](goes[-_])?here
    | <                         # <your key>, <OPENAI_API_KEY>
    | [$%{]                     # $OPENAI_API_KEY, {{ key }}, %KEY%: a template nobody filled in
    | \[.*\]\Z
    | (sk-)?(proj-)?change[-_]?me
    | (sk-)?(proj-)?replace[-_]?me
    | (sk-)?(proj-)?(insert|put|paste|enter)[-_]
    | (sk-)?(proj-)?placeholder
    | (sk-)?(proj-)?x{3,}([-x.*…]*\Z|x{3})
    | (sk-)?(proj-)?[.*…]+\Z
    | (sk-|sk-proj-|key|api[-_]?key|apikey|openai[-_]api[-_]key)\Z
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


class Secret:
    """A text that is given only to who asks for it by `reveal()`; it shows itself as `***`."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash((Secret, self._value))


def unusable_key(key: str) -> str | None:
    """Why a text cannot be a key, in words that do not hold it; None if it can."""
    if not key:
        return "is empty"
    if not key.isascii():
        return "contains a character that is not ASCII"
    if _PLACEHOLDER.match(key):
        return "is a placeholder"
    if re.search(r"\s", key):
        return "contains white space"
    if _CONTROL.search(key):
        return "contains a control character"
    if re.search(r"[\"'`]", key):
        return "contains a quote"
    if len(key) > LONGEST_KEY:
        return f"is longer than {LONGEST_KEY} characters"
    return None


def read_key_file(path: Path) -> tuple[str, str | None]:
    """The key in a file (white space round it dropped), and a warning if others may read that file.

    Symbolic links are followed: secret mounts are made of them. Raises Invalid, with the path but no content.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Invalid(f"expected a file, found something else at {path}")
        with path.open("rb") as file:
            raw = file.read(4 * LONGEST_KEY)
    except OSError as error:
        raise Invalid(f"expected a readable file, found at {path}: {error.strerror}") from None
    try:
        key = raw.decode().strip()
    except UnicodeDecodeError:
        raise Invalid(f"expected a key in ASCII, found other bytes in {path}") from None
    if not key:
        raise Invalid(f"expected a key, found nothing in {path}")
    loose = stat.S_IMODE(status.st_mode) & 0o077
    warning = f"{path} may be read by other users (mode {stat.S_IMODE(status.st_mode):04o}); 0600 would be right"
    return key, warning if loose else None


def run_key_command(argv: Sequence[str], folder: Path) -> str:
    """The key a command prints, white space round it dropped. No shell; `folder`: where it runs.

    Raises Invalid for a command that cannot be run, fails, prints nothing or takes longer than `COMMAND_TIME`. What it
    prints is in no message; its own complaints go where ours go, to stderr.
    """
    name = Path(argv[0]).name
    try:
        done = subprocess.run(
            argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=COMMAND_TIME, check=False
        )
    except subprocess.TimeoutExpired:
        raise Invalid(f"expected a key from {name}, found none after {COMMAND_TIME:g} s") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "an argument with a null character"
        raise Invalid(f"expected a command that can be run, found {name}: {why}") from None
    if done.returncode:
        raise Invalid(f"expected a key from {name}, found that it failed (exit status {done.returncode})")
    try:
        key = done.stdout[: 4 * LONGEST_KEY].decode().strip()
    except UnicodeDecodeError:
        raise Invalid(f"expected a key in ASCII from {name}, found other bytes") from None
    if not key:
        raise Invalid(f"expected a key from {name}, found that it prints nothing")
    return key
