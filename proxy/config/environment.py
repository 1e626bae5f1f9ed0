"""What the environment says (`docs/settings.md`), as trees like the file's. An empty variable is an unset one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

from .description import Kind, Leaf, Section
from .key_tables import ADMIN_KEY
from .problems import ENVIRONMENT, Invalid, SourceLocation, shown_name
from .reading import Reading, unknown
from .schema import PREFIX, SETTINGS
from .secret import Secret
from .tree import Listing, Node, Scalar, Table, nested, parse
from .urls import parse_url

CLIENT_KEYS: Final = "PROXY_CLIENT_KEYS"


def _literal(environ: Mapping[str, str], *names: str) -> Scalar | None:
    """Return the first of these variables that is set, taken as it is."""
    for name in names:
        if value := environ.get(name, "").strip():
            return Scalar(value, SourceLocation(ENVIRONMENT, via=name), literal=True)
    return None


def _table(where: SourceLocation, **entries: Node | str | None) -> Table:
    """Return a table of what is not None; a text is taken as it is."""
    nodes = {n: Scalar(e, where, literal=True) if isinstance(e, str) else e for n, e in entries.items()}
    return Table(tuple((name, node) for name, node in nodes.items() if node is not None), where)


def settings_layers(environ: Mapping[str, str], reading: Reading) -> list[Node]:
    """Return `PROXY_CLIENT_KEYS` and every `PROXY__SECTION__KEY` as trees, the more precise name the stronger."""
    layers = []
    if (client_keys := _literal(environ, CLIENT_KEYS)) is not None:
        layers.append(nested(["server", "client_keys"], _client_keys(client_keys, reading)))
    for name in sorted(environ, key=lambda name: (name.count("__"), name)):
        if not name.startswith(PREFIX) or not (text := environ[name].strip()):
            continue
        where = SourceLocation(ENVIRONMENT, via=name)
        try:
            path, kind = _setting(name)
        except Invalid as error:
            reading.problems.append(where.problem("", str(error)))
            continue
        # `::` is a table to YAML, and `#` begins a comment: where one text is expected it is taken whole.
        single = isinstance(kind, Leaf) or (kind is ADMIN_KEY and not text.startswith("{"))
        whole = single and text[0] not in "'\""
        node = Scalar(text, where) if whole else parse(text, where, reading.problems, ".".join(path))
        if node is not None:
            layers.append(nested(path, node))
    return layers


def _setting(name: str) -> tuple[list[str], Kind]:
    """Return the path and the kind of the setting that a variable names. Raises Invalid if there is none."""
    path = [shown_name(part) for part in name.removeprefix(PREFIX).lower().split("__")]
    kind: Kind = SETTINGS
    for i, part in enumerate(path):
        if not isinstance(kind, Section):
            setting = "__".join(path[:i]).upper()
            raise Invalid(f"expected {PREFIX}{setting} with a YAML value, found a name that goes further")
        if part not in kind.settings:
            raise Invalid(unknown(part, kind.settings))
        kind = kind.settings[part].kind
    return path, kind


def _client_keys(written: Scalar, reading: Reading) -> Listing:
    """Return `name:key,…` as a list of client keys."""
    items: list[Node] = []
    entries = [part.strip() for part in written.text.split(",") if part.strip()]
    for i, entry in enumerate(entries or [""], 1):
        name, _, key = (part.strip() for part in entry.partition(":"))
        if name and key:
            items.append(_table(written.where, name=name, key=key))
        else:
            message = f"expected name:key as entry {i}, found no such pair"
            reading.fail(written.where, "server.client_keys", message)
    return Listing(tuple(items), written.where)


def upstreams(environ: Mapping[str, str], reading: Reading) -> Listing:
    """Return the upstreams that `OPENAI_*` and `AZURE_*` make, OpenAI's first; it alone if they say nothing."""
    azure = _azure(environ)
    openai = _openai(environ)
    if azure is None and (stray := _literal(environ, "AZURE_OPENAI_API_KEY")):
        reading.warn(f"{stray.where.via} is set without AZURE_OPENAI_ENDPOINT, and so is not used")
    where = SourceLocation("default")
    return Listing(tuple(table for table in (openai, azure) if table is not None) or (Table((), where),), where)


def upstream_at(url: str, where: SourceLocation, environ: Mapping[str, str]) -> Table:
    """Return the one upstream that `--upstream URL` names, with the environment's keys of its kind."""
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
    version = _literal(environ, "OPENAI_API_VERSION") if base_url and is_azure(base_url.text) else None
    organization = _literal(environ, "OPENAI_ORG_ID", "OPENAI_ORGANIZATION")
    keys = _keys(key, organization, _literal(environ, "OPENAI_PROJECT_ID"))
    if first := key or base_url:
        return _table(first.where, name="openai", base_url=base_url, api_version=version, keys=keys)
    return None


def _azure(environ: Mapping[str, str], needs_endpoint: bool = True) -> Table | None:
    endpoint = _literal(environ, "AZURE_OPENAI_ENDPOINT")
    key = _literal(environ, "AZURE_OPENAI_API_KEY")
    version = _literal(environ, "OPENAI_API_VERSION")
    if first := endpoint or (None if needs_endpoint else key):
        return _table(first.where, name="azure", kind="azure", base_url=endpoint, api_version=version, keys=_keys(key))
    return None


def _keys(key: Scalar | None, organization: Scalar | None = None, project: Scalar | None = None) -> Listing | None:
    if key is None:
        return None
    return Listing((_table(key.where, key=key, organization=organization, project=project),), key.where)


def defaults(environ: Mapping[str, str]) -> dict[str, tuple[object, SourceLocation]]:
    """Return defaults that the environment gives to settings the file may leave out."""
    if url := _literal(environ, "REDIS_URL"):
        return {"redis.url": (Secret(url.text), url.where)}
    if host := _literal(environ, "REDIS_HOST"):
        port = environ.get("REDIS_PORT", "").strip() or "6379"
        password = environ.get("REDIS_PASSWORD", "")
        credential = f":{quote(password, safe='')}@" if password else ""
        return {"redis.url": (Secret(f"redis://{credential}{host.text}:{port}"), host.where)}
    return {}


def warn_unread(environ: Mapping[str, str], reading: Reading) -> None:
    """Warn of `HTTPS_PROXY`: it is for other programs, an upstream says by itself how it is reached."""
    if found := _literal(environ, "HTTPS_PROXY", "https_proxy"):
        reading.warn(f"{found.where.via} is set, but not read: upstreams are called directly")
