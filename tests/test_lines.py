"""The count of code lines counts code alone."""

from __future__ import annotations

from pathlib import Path

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


def test_lines_are_counted_by_package_and_loose_file(tmp_path: Path) -> None:
    for name in ("loose.py", "package/one.py", "package/below/two.py", "package/table.json"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SOURCE, encoding="utf-8")
    assert count(tmp_path) == {"loose.py": 6, "package": 12}
