"""`python -m tests.lines`: code lines of the package, without blank lines, comments and docstrings."""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "proxy"
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """Return how many lines of Python source hold code. Raises SyntaxError where the source is not Python."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def count(package: Path = PACKAGE) -> Counter[str]:
    """Return the code lines by the package, or loose file, directly below `package`."""
    counts: Counter[str] = Counter()
    for path in package.rglob("*.py"):
        counts[path.relative_to(package).parts[0]] += code_lines(path.read_text("utf-8"))
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.lines", description=__doc__)
    parser.add_argument("package", type=Path, nargs="?", default=PACKAGE, help="a package's folder (default: proxy)")
    counts = count(parser.parse_args(argv).package.resolve())
    for name, lines in sorted(counts.items()):
        print(f"{lines:7,}  {name}")
    print(f"{counts.total():7,}  together")
    return 0


if __name__ == "__main__":
    sys.exit(main())
