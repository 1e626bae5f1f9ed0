"""The settings in force as text or plain data, with secrets masked and where each value comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from .loader import LoadedSettings
from .reading import Section
from .schema import SCHEMA
from .settings import Settings

_COLUMN = 48


def plain(settings: Settings, section: Section[Any] = SCHEMA) -> dict[str, object]:
    """Every setting as text, list or dict, as it could stand in a file. Holds no secret."""
    shown: dict[str, object] = {}
    for name, reader in section.readers.items():
        value = getattr(settings, name)
        shown[name] = plain(value, reader) if isinstance(reader, Section) else reader.show(value)
    return shown


def lines(loaded: LoadedSettings) -> Iterator[str]:
    """YAML lines, each with the source of its value as a comment."""
    yield from _section(plain(loaded.settings), "", loaded.sources)


def _section(shown: Mapping[str, object], path: str, sources: Mapping[str, str]) -> Iterator[str]:
    indent = "  " * path.count(".")
    for name, value in shown.items():
        inner = f"{path}{name}"
        if _blocks(value):
            yield f"{indent}{name}:"
            yield from _items(value, inner, sources)
        elif isinstance(value, dict) and inner not in sources:  # a section: its settings have the sources
            yield f"{indent}{name}:"
            yield from _section(value, f"{inner}.", sources)
        else:
            yield _line(f"{indent}{name}: {_flow(value)}", sources[inner])


def _blocks(value: object) -> TypeGuard[list[dict[str, object]]]:
    """Whether a value is a list of tables, which is written item by item."""
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _items(items: list[dict[str, object]], path: str, sources: Mapping[str, str]) -> Iterator[str]:
    indent = "  " * (path.count(".") + 1)
    for i, item in enumerate(items):
        lead = "- "
        for name, value in item.items():
            inner = f"{path}.{i}.{name}"
            # A key may be one of several in a single text, so its parts have the place of the whole.
            place = f"{path}.{i}" if path.endswith("keys") else inner
            source = sources.get(place) or sources.get(f"{path}.{i}", "default")
            if _blocks(value):
                yield f"{indent}{lead}{name}:"
                yield from _items(value, inner, sources)
            else:
                yield _line(f"{indent}{lead}{name}: {_flow(value)}", source)
            lead = "  "


def _line(text: str, source: str) -> str:
    return f"{text.rstrip():<{_COLUMN}}  # {source}"


def _flow(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_flow(name)}: {_flow(item)}' for name, item in value.items())}}}"
    text = str(value)
    return f'"{text}"' if text[:1] in tuple("*&%@`[{!|>'#") and text else text
