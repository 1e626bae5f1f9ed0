"""Keys from outside the settings: key files and key commands."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .problems import Invalid
from .secret import LONGEST_KEY

COMMAND_TIME: Final = 10.0
"""Seconds that a `key_command` has."""


def read_key_file(path: Path) -> tuple[str, str | None]:
    """Return the key in a file, without white space around it, and a warning if other users may read the file.

    Symbolic links are followed: secret mounts are made of them. Raises Invalid, with the path but no content.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Invalid(f"expected a file, found something else at {path}")
        with path.open("rb") as file:
            key = _key_in(file.read(4 * LONGEST_KEY), f"in {path}", f"nothing in {path}")
    except OSError as error:
        raise Invalid(f"expected a readable file, found at {path}: {error.strerror}") from None
    mode = stat.S_IMODE(status.st_mode)
    warning = f"{path} may be read by other users (mode {mode:04o}); 0600 would be right"
    return key, warning if mode & 0o077 else None


def run_key_command(argv: Sequence[str], folder: Path) -> str:
    """Return the key that a command prints, without white space around it. No shell is used.

    `folder`: the command's working directory. Raises Invalid for a command that cannot be run, fails, prints nothing or
    takes longer than `COMMAND_TIME`. No message holds what it prints; its standard error is the proxy's.
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
    return _key_in(done.stdout[: 4 * LONGEST_KEY], f"from {name}", f"that {name} prints nothing")


def _key_in(raw: bytes, source: str, nothing: str) -> str:
    try:
        key = raw.decode().strip()
    except UnicodeDecodeError:
        raise Invalid(f"expected a key in ASCII, found other bytes {source}") from None
    if not key:
        raise Invalid(f"expected a key, found {nothing}")
    return key
