"""`Secret`, a text that does not show itself, and the rules a key must meet."""

from __future__ import annotations

import re
from typing import Final

LONGEST_KEY: Final = 4096

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


class Secret:
    """A text that only `reveal()` gives; it shows itself as `***`."""

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
    """Return why a text cannot be a key, in words that do not hold it; None if it can."""
    reasons = (
        (not key, "is empty"),
        (not key.isascii(), "contains a character that is not ASCII"),
        (_PLACEHOLDER.match(key), "is a placeholder"),
        (re.search(r"\s", key), "contains white space"),
        (re.search(r"[\x00-\x1f\x7f]", key), "contains a control character"),
        (re.search(r"[\"'`]", key), "contains a quote"),
        (len(key) > LONGEST_KEY, f"is longer than {LONGEST_KEY} characters"),
    )
    return next((reason for found, reason in reasons if found), None)
