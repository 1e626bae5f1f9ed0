"""Keys as they may be written: upstream keys, client keys and the admin key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

from .description import optional
from .key_sources import read_key_file
from .key_tables import ADMIN_KEY, CLIENT, KEY, KEY_WAYS, LIMITS, LIMITS_BY_GLOB
from .limits import Limits
from .problems import Invalid, SourceLocation
from .reading import Reading, items_of, kind_of, read, read_items, scalar
from .secret import Secret, unusable_key
from .settings import ClientKeySettings, KeySettings
from .tree import Listing, Node, Scalar, Table
from .values import SECRET_TEXT

SHORT_CLIENT_KEY: Final = 16
"""Characters; shorter client keys are a warning."""


class WrittenKey(NamedTuple):
    """A key of the pool as it was written: its label may be empty. `path`, `where`: its place in the settings."""

    key: KeySettings
    path: str
    where: SourceLocation


def read_key(given: Mapping[str, Any], where: SourceLocation, reading: Reading) -> str:
    """Return the text of `key`, what `key_file` holds, or what `key_command` prints.

    `given`: the settings of a table that has these three. Raises Invalid unless exactly one is given.
    """
    ways = [way for way in KEY_WAYS if given.get(way)]
    if len(ways) != 1:
        raise Invalid(f"expected one of key, key_file and key_command, found {'several' if ways else 'none'}")
    if ways == ["key"]:
        return str(given["key"])
    if ways == ["key_command"]:
        return reading.command(where, given["key_command"])
    text, warning = read_key_file(reading.watch(where, given["key_file"]))
    if warning:
        reading.warn(warning)
    return text


def read_key_limits(node: Node, path: str, reading: Reading) -> dict[str, Limits]:
    """Return the limits of one key by model: plain ones hold for every model."""
    if isinstance(node, Table) and not any(isinstance(child, Table) for _, child in node.entries):
        limits: Limits = read(LIMITS, node, path, reading)
        return {} if limits == Limits() else {"*": limits}
    by_glob: dict[str, Limits] = read(LIMITS_BY_GLOB, node, path, reading)
    return by_glob


def read_keys(node: Node, path: str, reading: Reading) -> tuple[WrittenKey, ...]:
    """Return the keys of one upstream. A text with commas is several keys."""
    if isinstance(node, Scalar) and node.null:
        return ()
    items = node.items if isinstance(node, Listing) else (node,)
    return read_items(items, path, reading, lambda item, inner: _keys_of(item, inner, reading))


def _keys_of(node: Node, path: str, reading: Reading) -> list[WrittenKey]:
    given: dict[str, Any] = {}
    if isinstance(node, Scalar):
        text = scalar(node, SECRET_TEXT, reading)
        if not text and ":-" in node.text:
            return []  # ${NAME:-}: says itself that there may be none
    elif isinstance(node, Table):
        given = read(KEY, node, path, reading)
        if not reading.sound(path):
            return []
        text = read_key(given, node.where, reading)
    else:
        raise Invalid(f"expected a key, or a table with key, key_file or key_command; found {kind_of(node)}")
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise Invalid("expected a key, found an empty text")
    label = given.get("name") or ""
    rest = {name: value for name, value in given.items() if name not in KEY_WAYS and name != "name"}
    labels = [f"{label}-{i}" for i in range(1, len(parts) + 1)] if label and len(parts) > 1 else [label] * len(parts)
    return [
        WrittenKey(KeySettings(label, Secret(part), **rest), path, node.where)
        for label, part in zip(labels, parts, strict=True)
    ]


def labelled(upstream: str, path: str, written: tuple[WrittenKey, ...], reading: Reading) -> tuple[KeySettings, ...]:
    """Return the keys of an upstream with their labels. Records those that cannot be keys, or are there twice."""
    keys: dict[Secret, KeySettings] = {}
    for i, (key, place, where) in enumerate(written):
        label = key.label or f"{upstream}-{i + 1}"
        reading.places[f"{path}.{i}"] = where
        with reading.recording(where, place):
            usable(f"the key {label}", key.secret.reveal())
            if key.secret in keys:
                first = keys[key.secret].label
                raise Invalid(f"expected different keys, found that {label} is the same as {first}")
            keys[key.secret] = replace(key, label=label, quota=key.quota or label)
    return tuple(keys.values())


def read_client_keys(node: Node, path: str, reading: Reading) -> tuple[ClientKeySettings, ...]:
    """Return the clients that may call. Names and keys are each unique."""
    clients: list[ClientKeySettings] = []

    def add(item: Node, inner: str) -> tuple[()]:
        client = _client(item, inner, reading)
        if client is None:
            return ()
        if any(other.name == client.name for other in clients):
            raise Invalid(f"expected a name of its own, found {client.name} again")
        if any(other.digest == client.digest for other in clients):
            raise Invalid(f"expected a key of its own, found that {client.name} has another client's")
        clients.append(client)
        return ()

    read_items(items_of(node, "a list of client keys"), path, reading, add)
    return tuple(clients)


def _client(node: Node, path: str, reading: Reading) -> ClientKeySettings | None:
    """Return one client; None if a mistake in it is recorded. Raises Invalid."""
    if not isinstance(node, Table):
        raise Invalid(f"expected a table with name and key, found {kind_of(node)}")
    given = read(CLIENT, node, path, reading)
    if not reading.sound(path):
        return None
    name = given.get("name") or f"client-{int(path.rpartition('.')[2]) + 1}"
    digest = given.get("key_sha256")
    if digest is None:
        key = usable(f"the key of {name}", read_key(given, node.where, reading).strip())
        if len(key) < SHORT_CLIENT_KEY:
            reading.warn(f"the key of {name} is short: {SHORT_CLIENT_KEY} characters and more are hard to guess")
        digest = hashlib.sha256(key.encode()).digest()
    elif any(given.get(way) for way in KEY_WAYS):
        raise Invalid("expected one of key, key_file, key_command and key_sha256, found several")
    limits = dict(given.get("limits", {}))
    usd_per_day = limits.pop("usd_per_day", None)
    return ClientKeySettings(
        name, digest, given.get("namespace"), given.get("models", ()), Limits(**limits), usd_per_day
    )


def read_admin_key(node: Node, path: str, reading: Reading) -> Secret | None:
    """Return a key written as a text, or as a table with key, key_file or key_command; None for nothing."""
    if isinstance(node, Table):
        given = read(ADMIN_KEY.kinds[-1], node, path, reading)
        if not reading.sound(path):
            return None
        text = read_key(given, node.where, reading)
    else:
        text = scalar(node, optional(SECRET_TEXT), reading)
    return None if text is None else Secret(usable("the admin key", text.strip()))


def usable(name: str, key: str) -> str:
    """Return the key itself. Raises Invalid, which names it by its label, if it cannot be one."""
    if reason := unusable_key(key):
        raise Invalid(f"expected a key, found that {name} {reason}")
    return key
