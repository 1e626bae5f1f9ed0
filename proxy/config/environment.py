"""What the environment says (contract 2), as trees like the file's. An empty variable is an unset one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from .keys import AdminKey
from .problems import ENVIRONMENT, Invalid, Problem, SourceLocation, shown_name
from .reading import Reader, Reading, Section, Single, unknown
from .schema import SCHEMA
from .secret import Secret
from .tree import Listing, Node, Scalar, Table, parse
from .urls import parse_url

PREFIX: Final = "PROXY__"
CLIENT_KEYS: Final = "PROXY_CLIENT_KEYS"


def _where(name: str) -> SourceLocation:
    return SourceLocation(ENVIRONMENT, via=name)


def _literal(environ: Mapping[str, str], *names: str) -> Scalar | None:
    """The first of these variables that is set, taken as it is."""
    for name in names:
        if value := environ.get(name, "").strip():
            return Scalar(value, _where(name), literal=True)
    return None


def _table(where: SourceLocation, **entries: Node | None) -> Table:
    return Table(tuple((name, node) for name, node in entries.items() if node is not None), where)


def settings_layers(environ: Mapping[str, str], reading: Reading) -> list[Node]:
    """`PROXY_CLIENT_KEYS` and every `PROXY__SECTION__KEY` as trees, the more precise name the stronger."""
    client_keys = _client_keys(environ, reading)
    layers = [] if client_keys is None else [_nested(["server", "client_keys"], client_keys)]
    for name in sorted(environ, key=lambda name: (name.count("__"), name)):
        if not name.startswith(PREFIX) or not environ[name].strip():
            continue
        place = _where(name)
        try:
            path, reader = _setting(name, reading)
        except Invalid as error:
            reading.problems.append(place.problem("", str(error)))
            continue
        node = _value(environ[name].strip(), reader, place, ".".join(path), reading.problems)
        if node is not None:
            layers.append(_nested(path, node))
    return layers


def _nested(path: list[str], node: Node) -> Node:
    for name in reversed(path):
        node = Table(((name, node),), node.where)
    return node


def _setting(name: str, reading: Reading) -> tuple[list[str], Reader[Any]]:
    """The setting that a variable names. Raises Invalid if there is none."""
    path = [shown_name(part) for part in name.removeprefix(PREFIX).lower().split("__")]
    reader: Reader[Any] = SCHEMA
    for i, part in enumerate(path):
        if not isinstance(reader, Section):
            setting = "__".join(path[:i]).upper()
            raise Invalid(f"expected {PREFIX}{setting} with a YAML value, found a name that goes further")
        if part not in reader.readers:
            raise Invalid(unknown(part, reader.readers, reading))
        reader = reader.readers[part]
    return path, reader


def _value(text: str, reader: Reader[Any], where: SourceLocation, path: str, problems: list[Problem]) -> Node | None:
    # `::` is a table to YAML, and `#` begins a comment: where one text is expected it is taken whole.
    single = isinstance(reader, Single) or (isinstance(reader, AdminKey) and not text.startswith("{"))
    if single and text[0] not in "'\"":
        return Scalar(text, where)
    return parse(text, where, problems, path)


def _client_keys(environ: Mapping[str, str], reading: Reading) -> Listing | None:
    """`name:key,…` as a list of client keys."""
    where = _where(CLIENT_KEYS)
    text = environ.get(CLIENT_KEYS, "").strip()
    if not text:
        return None
    items: list[Node] = []
    entries = [part.strip() for part in text.split(",") if part.strip()]
    for i, entry in enumerate(entries or [""], 1):
        name, colon, key = (part.strip() for part in entry.partition(":"))
        if not colon or not name or not key:
            reading.fail(where, "server.client_keys", f"expected name:key as entry {i}, found no such pair")
            continue
        items.append(_table(where, name=Scalar(name, where, literal=True), key=Scalar(key, where, literal=True)))
    return Listing(tuple(items), where)


def upstreams(environ: Mapping[str, str], reading: Reading) -> Listing:
    """The upstreams that `OPENAI_*` and `AZURE_*` make, OpenAI's first; it alone where they say nothing."""
    azure = _azure(environ)
    openai = _openai(environ)
    if azure is None and (stray := _literal(environ, "AZURE_OPENAI_API_KEY")):
        reading.warn(f"{stray.where.via} is set without AZURE_OPENAI_ENDPOINT, and so is not used")
    listed = [table for table in (openai, azure) if table is not None]
    return Listing(tuple(listed) or (Table((), SourceLocation("default")),), SourceLocation("default"))


def upstream_at(url: str, where: SourceLocation, environ: Mapping[str, str]) -> Table:
    """The one upstream that `--upstream URL` names, with the environment's keys of its kind."""
    table = _azure(environ, needs_endpoint=False) if is_azure(url) else _openai(environ)
    return (table or Table((), where)).replaced("base_url", Scalar(url, where, literal=True))


def is_azure(url: str) -> bool:
    try:
        return parse_url(url).azure
    except Invalid:
        return False


def _openai(environ: Mapping[str, str]) -> Table | None:
    base_url = _literal(environ, "OPENAI_API_BASE")
    key = _literal(environ, "OPENAI_API_KEY")
    organization = _literal(environ, "OPENAI_ORG_ID", "OPENAI_ORGANIZATION")
    project = _literal(environ, "OPENAI_PROJECT_ID")
    first = key or base_url
    if first is None:
        return None
    version = _literal(environ, "OPENAI_API_VERSION") if base_url and is_azure(base_url.text) else None
    return _table(
        first.where,
        name=Scalar("openai", first.where, literal=True),
        base_url=base_url,
        api_version=version,
        keys=_keys(key, organization, project),
    )


def _azure(environ: Mapping[str, str], needs_endpoint: bool = True) -> Table | None:
    endpoint = _literal(environ, "AZURE_OPENAI_ENDPOINT")
    key = _literal(environ, "AZURE_OPENAI_API_KEY")
    first = endpoint or (None if needs_endpoint else key)
    if first is None:
        return None
    return _table(
        first.where,
        name=Scalar("azure", first.where, literal=True),
        kind=Scalar("azure", first.where, literal=True),
        base_url=endpoint,
        api_version=_literal(environ, "OPENAI_API_VERSION"),
        keys=_keys(key),
    )


def _keys(key: Scalar | None, organization: Scalar | None = None, project: Scalar | None = None) -> Listing | None:
    if key is None:
        return None
    table = _table(key.where, key=key, organization=organization, project=project)
    return Listing((table,), key.where)


def defaults(environ: Mapping[str, str]) -> dict[str, tuple[object, SourceLocation]]:
    """Defaults that the environment gives to settings the file may leave alone."""
    if url := _literal(environ, "REDIS_URL"):
        return {"redis.url": (Secret(url.text), url.where)}
    if host := _literal(environ, "REDIS_HOST"):
        port = environ.get("REDIS_PORT", "").strip() or "6379"
        password = environ.get("REDIS_PASSWORD", "")
        credential = f":{quote(password, safe='')}@" if password else ""
        return {"redis.url": (Secret(f"redis://{credential}{host.text}:{port}"), host.where)}
    return {}


def warn_unread(environ: Mapping[str, str], reading: Reading) -> None:
    """`HTTPS_PROXY` is for other programs: an upstream says by itself how it is reached."""
    for name in ("HTTPS_PROXY", "https_proxy"):
        if environ.get(name, "").strip():
            reading.warn(f"{name} is set, but not read: upstreams are called directly")
            return
