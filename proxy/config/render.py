"""Settings as text or plain data, with secrets masked and where each value comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from .description import Kind, Leaf, ListOf, MapOf, OneOf, Section
from .key_tables import CLIENT_KEYS, KEYS, LIMITS_BY_GLOB
from .schema import SETTINGS
from .settings import UPSTREAM, UPSTREAMS, ClientKeySettings, KeySettings, Settings, UpstreamSettings
from .values import MONEY

if TYPE_CHECKING:
    from .loader import LoadedSettings

_COLUMN = 48


def show(kind: Kind, value: Any) -> Any:
    """Return a value as text, list or dict, as it could stand in a file. Secrets are masked.

    A table inside a list or a table holds only what is not the default.
    """
    if kind in _SHORT:
        return [_SHORT[kind](item) for item in value]
    if isinstance(kind, Leaf):
        return kind.show(value)
    if isinstance(kind, ListOf):
        return [show(kind.item, item) for item in value]
    if isinstance(kind, MapOf):
        return {name: show(kind.value, item) for name, item in value.items()}
    if isinstance(kind, OneOf):
        return show(kind.kinds[-1], value) if isinstance(value, Mapping) else "" if value is None else str(value)
    return {
        name: show(setting.kind, getattr(value, name))
        for name, setting in kind.settings.items()
        if getattr(value, name) != setting.default
    }


def plain(settings: Settings) -> dict[str, object]:
    """Return every setting as `show` gives it. Holds no secret."""
    return _plain(SETTINGS, settings)


def _plain(section: Section, values: object) -> dict[str, object]:
    shown: dict[str, object] = {}
    for name, setting in section.settings.items():
        kind, value = setting.kind, getattr(values, name)
        shown[name] = _plain(kind, value) if isinstance(kind, Section) else show(kind, value)
    return shown


def _client(client: ClientKeySettings) -> dict[str, object]:
    limits = _given(**asdict(client.limits))
    if client.usd_per_day is not None:
        limits["usd_per_day"] = MONEY.show(client.usd_per_day)
    return _given(name=client.name, key="***", namespace=client.namespace, models=list(client.models), limits=limits)


def _key(key: KeySettings) -> dict[str, object]:
    quota = key.quota if key.quota != key.label else None
    shown = _given(name=key.label, key=str(key.secret), organization=key.organization, project=key.project)
    shown |= {"weight": key.weight} if key.weight != 1.0 else {}
    return shown | _given(quota=quota, limits=show(LIMITS_BY_GLOB, key.limits))


def _given(**shown: object) -> dict[str, object]:
    return {name: value for name, value in shown.items() if value}


def _upstream(upstream: UpstreamSettings) -> dict[str, object]:
    """Return what is in force, short: what is the default of its kind is left out."""
    shown: dict[str, object] = {}
    for name, setting in UPSTREAM.settings.items():
        value = getattr(upstream, name)
        if name == "api_version" and upstream.kind == "azure":
            shown[name] = value or "v1"
        elif value or name == "priority":
            shown[name] = show(setting.kind, value)
    return shown | {"keys": shown.pop("keys", [])}


_SHORT: Final[Mapping[Kind, Callable[[Any], dict[str, object]]]] = {
    CLIENT_KEYS: _client,
    KEYS: _key,
    UPSTREAMS: _upstream,
}
"""Lists of tables whose values in force are not of the form in which they are written."""


def lines(loaded: LoadedSettings) -> Iterator[str]:
    """Yield YAML lines, each with the source of its value as a comment."""
    return lines_of(plain(loaded.settings), "", loaded.sources)


def lines_of(shown: Mapping[str, object], path: str, comments: Mapping[str, str]) -> Iterator[str]:
    """Yield the YAML lines of a section. `path`: that of the section, with a point at its end; `comments`: by path."""
    indent = "  " * path.count(".")
    for name, value in shown.items():
        inner = f"{path}{name}"
        if _blocks(value):
            yield f"{indent}{name}:"
            yield from _items(value, inner, comments)
        elif isinstance(value, dict) and inner not in comments:  # a section: its settings have the comments
            yield f"{indent}{name}:"
            yield from lines_of(value, f"{inner}.", comments)
        else:
            yield _line(f"{indent}{name}: {flow(value)}", comments[inner])


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
                yield _line(f"{indent}{lead}{name}: {flow(value)}", source)
            lead = "  "


def _line(text: str, source: str) -> str:
    return f"{text.rstrip():<{_COLUMN}}  # {source}"


def flow(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(flow, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{flow(name)}: {flow(item)}' for name, item in value.items())}}}"
    text = str(value)
    return f'"{text}"' if text[:1] in tuple("*&%@`[{!|>'#") and text else text
