"""Writes what is generated from the description of the settings: config.yaml, and the tables of docs/settings.md.

python .ci/update_settings.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from proxy.config.description import Section  # noqa: E402
from proxy.config.manual import config_yaml, rows  # noqa: E402
from proxy.config.schema import FIXED, SETTINGS  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"
FILE = ROOT / "config.yaml"
BEGIN, END = "<!-- begin: .ci/update_settings.py -->\n", "<!-- end -->\n"


def page(text: str) -> str:
    """Return the page with its tables as the code has them. Raises ValueError if the marks are not there."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n".join(tables()) + "\n\n" + END + after


def tables() -> Iterator[str]:
    """Yield a heading and a table for each section."""
    for row in rows():
        if row.path in SETTINGS.settings:
            yield from (
                "",
                f"### {row.path}",
                "",
                row.about,
                "",
                "| setting | value | default | meaning |",
                "|---|---|---|---|",
            )
            if isinstance(SETTINGS.settings[row.path].kind, Section):
                continue
        setting = f"`{row.path}`" + (f"<br>`{row.variable}`" if row.variable else "")
        about = row.about + (" Changes at a start only." if row.path in FIXED else "")
        yield f"| {setting} | {row.type} | {row.default and f'`{row.default}`'} | {about} |"


def main() -> None:
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
    FILE.write_text(config_yaml(), "utf-8")


if __name__ == "__main__":
    main()
