"""The documents of this repository, as the tests read them: pages, sections, fenced blocks, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
MANUAL: Final = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES: Final = {"README.md": README, **{f"docs/{name}": text for name, text in MANUAL.items()}}
"""What users read, by path."""

OTHERS: Final = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "llms.txt")
}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its page, its language ('' if none is named), its text."""

    page: str
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0]}"


def blocks(pages: dict[str, str], *languages: str) -> Iterator[Block]:
    """Yield every fenced block in one of these languages."""
    for page, text in pages.items():
        for language, inner in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            if language in languages:
                yield Block(page, language, inner)


def block(language: str, *words: str) -> str:
    """Return the one block of the user's pages in this language that holds all these words."""
    found = [each.text for each in blocks(PAGES, language) if all(word in each.text for word in words)]
    assert len(found) == 1, f"{len(found)} {language} blocks with {words}"
    return found[0]


def section(page: str, title: str) -> str:
    """Return the section of a page of the manual, with the sections below it."""
    found = re.search(rf"^(#+) {re.escape(title)}\n", MANUAL[page], re.MULTILINE)
    assert found is not None, f"{page} has no section {title!r}"
    rest = MANUAL[page][found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", without_code(rest), re.MULTILINE)
    return rest[: end.start()] if end is not None else rest


def without_code(text: str) -> str:
    """Return the text with every fenced block blanked out, at the same length."""
    return re.sub(r"^```.*?^```$", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def first_cells(text: str) -> list[str]:
    """Return the first cell of every row of the tables in a text, less the head."""
    rows = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return [row for row in rows if row.startswith("`")]
