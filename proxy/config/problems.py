"""Mistakes in the settings: where a value was written, what is wrong with it, and what of it may be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. `file`: the settings file as named, "environment" or "command line"; a file has lines."""

    file: str
    line: int | None
    path: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.path, self.message) if part)


class SettingsError(Exception):
    """The settings cannot be used. `problems` are all the reasons, in the order in which the values are written."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class Invalid(ValueError):
    """A value cannot be used. The message says what was expected and what was found, and holds no secret."""


@dataclass(frozen=True, slots=True)
class SourceLocation:
    """The place a value was written: a file's line, or the variable or flag `via` which it came."""

    file: str
    line: int | None = None
    via: str = ""

    @property
    def label(self) -> str:
        """Return it as `LoadedSettings.sources` has it: `config.yaml:3`, `env NAME`, `flag --port`."""
        if self.file == ENVIRONMENT:
            return f"env {self.via}"
        if self.file == COMMAND_LINE:
            return f"flag {self.via}"
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def problem(self, path: str, message: str) -> Problem:
        if self.via and path:
            path = f"{path} ({self.via})"
        return Problem(self.file, self.line, path or self.via, message)


ENVIRONMENT: Final = "environment"
COMMAND_LINE: Final = "command line"
DEFAULT: Final = SourceLocation("default")

_SECRET: Final = re.compile(
    r"""
    (?:.*[^A-Za-z0-9])?sk-                                              # OpenAI's, anywhere
    | sess- | eyJ | Bearer\s                                            # session keys, JWTs, a whole header
    | [0-9a-f]{8}(?:-[0-9a-f]{4}){3}-                                   # a UUID
    | (?=[A-Za-z_]*[0-9])(?=[0-9_]*[A-Za-z])[A-Za-z0-9_]{28,}\Z         # Azure's and most others'
    """,
    re.VERBOSE | re.DOTALL,
)
_LONGEST_SHOWN: Final = 60


def looks_secret(text: str) -> bool:
    """Return whether a text could be a credential in the wrong place, which no message may repeat."""
    return _SECRET.match(text) is not None


def shown(text: str) -> str:
    """Return a value as it may stand in a message: quoted, shortened, and never one that could be a secret."""
    if looks_secret(text):
        return "something that looks like a key (not shown)"
    return repr(text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…")


def shown_name(text: str) -> str:
    """Return a setting's name as it may stand in a path."""
    if looks_secret(text) or len(text) > _LONGEST_SHOWN or not text.isprintable():
        return "(not shown)"
    return text
