"""The count of code lines counts code alone."""

from __future__ import annotations

from tests.lines import code_lines, count

SOURCE = '''"""A module's docstring,
of two lines."""

# A comment.
NAME = "a"  # with a comment beside it
"""What the name stands for."""


def function(
    argument: int,
) -> str:
    """A docstring."""
    return """a string
that is no docstring"""
'''


def test_blank_lines_comments_and_docstrings_do_not_count() -> None:
    assert code_lines(SOURCE) == 6


def test_every_package_is_counted() -> None:
    counts = count()
    assert counts["pipeline"] > 1000
    assert counts["app.py"] > 50
