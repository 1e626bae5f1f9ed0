"""The description of the settings as rows for the manual, as a JSON Schema for editors, and as a `config.yaml`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

from .description import Kind, Leaf, ListOf, MapOf, OneOf, Section, Setting
from .render import flow, lines_of, plain, show
from .schema import SETTINGS, leaves, variable
from .settings import UPSTREAMS, Settings


class Row(NamedTuple):
    """A setting as the manual shows it. `path`: `[]` stands for an item of a list, `*` for a name of a table.

    `variable`: the environment variable that sets it; empty within a list or a table, which is set as a whole.
    """

    path: str
    type: str
    default: str
    about: str
    variable: str


def rows(section: Section = SETTINGS, prefix: str = "", within: bool = False) -> Iterator[Row]:
    """Yield every setting, a section before what it holds. `within`: the section stands in a list or a table."""
    for name, setting in section.settings.items():
        kind, path = setting.kind, f"{prefix}{name}"
        whole = isinstance(kind, Section) or kind is UPSTREAMS
        default = "" if whole else flow(show(kind, setting.default))
        yield Row(path, kind.expected, default, setting.about, "" if within else variable(path))
        while not isinstance(kind, Leaf | Section):
            if isinstance(kind, OneOf):
                kind = kind.kinds[-1]  # it holds what the others hold
            else:
                kind, path = (kind.item, f"{path}[]") if isinstance(kind, ListOf) else (kind.value, f"{path}.*")
        if isinstance(kind, Section):
            yield from rows(kind, f"{path}.", within or kind is not setting.kind)


def json_schema() -> dict[str, object]:
    """Return a JSON Schema (draft 2020-12) of the settings file. It accepts `${NAME}` for every single value."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of openai-proxy",
        **_schema(SETTINGS),
        "$defs": {"variable": {"type": "string", "pattern": r"\$\{"}},
    }


def _schema(kind: Kind) -> dict[str, Any]:
    if isinstance(kind, Leaf):
        nothing = [{"type": "null"}] if kind.empty else []
        return {"anyOf": [dict(kind.schema), {"$ref": "#/$defs/variable"}, *nothing]}
    if isinstance(kind, ListOf):
        bound = {"type": "array", "minItems": kind.at_least} if kind.at_least else {"type": ["array", "null"]}
        return {**bound, "items": _schema(kind.item)}
    if isinstance(kind, MapOf):
        needed = {"type": "object", "required": [kind.needed]} if kind.needed else {"type": ["object", "null"]}
        return {**needed, "propertyNames": dict(kind.name.schema), "additionalProperties": _schema(kind.value)}
    if isinstance(kind, OneOf):
        return {"anyOf": [_schema(way) for way in kind.kinds]}
    properties = {}
    for name, setting in kind.settings.items():
        properties[name] = {"description": setting.about, **_schema(setting.kind)}
        if isinstance(setting.kind, Leaf) and setting.default is not None:
            plain = isinstance(setting.default, bool) or setting.kind.schema.get("type") in ("integer", "number")
            properties[name]["default"] = setting.default if plain else setting.kind.show(setting.default)
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}


def config_yaml() -> str:
    """Return a `config.yaml` with every setting at its default, and what it means beside it."""
    examples = resources.files(__package__).joinpath("template.yaml").read_text("utf-8")
    shown = plain(Settings())
    del shown["upstreams"]  # those of the environment hold, until some are written
    shown["redis"] = {"url": "${REDIS_URL:-}", "prefix": Settings().redis.prefix}
    about = {path: _comment(setting) for path, setting in leaves()}
    parts = [examples.rstrip()]
    for name, value in shown.items():
        head = [] if name in about else [f"# {SETTINGS.settings[name].about}"]
        parts.append("\n".join([*head, *lines_of({name: value}, "", about)]))
    return "\n\n".join(parts) + "\n"


def _comment(setting: Setting) -> str:
    if not isinstance(setting.kind, Leaf) or isinstance(setting.default, bool):
        return setting.about
    words = " | ".join(word for word in setting.kind.schema.get("enum", ()) if isinstance(word, str))
    return f"{words}. {setting.about}" if words else setting.about
