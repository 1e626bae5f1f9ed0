"""Upstreams: from what was written to the values in force."""

from __future__ import annotations

import importlib.util
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from .description import Kind
from .key_tables import ADMIN_KEY, CLIENT_KEYS, KEY_LIMITS, KEYS
from .keys import labelled, read_admin_key, read_client_keys, read_key_limits, read_keys
from .problems import Invalid
from .reading import Reading, items_of, read, read_items
from .settings import DEFAULT_API_VERSION, UPSTREAM, UPSTREAM_PRICES, UPSTREAMS, KeySettings, UpstreamSettings
from .tree import Node, Table
from .urls import Url, azure_url, openai_url
from .values import DEPLOYMENT


def read_upstreams(node: Node, path: str, reading: Reading) -> tuple[UpstreamSettings, ...]:
    """Return the upstreams. Their names are unique, and so are the labels of all their keys."""
    upstreams: list[UpstreamSettings] = []

    def add(item: Node, inner: str) -> tuple[()]:
        if not isinstance(item, Table):
            raise Invalid("expected a table with base_url and keys, found something else")
        upstreams.append(_finished(read(UPSTREAM, item, inner, reading), inner, upstreams, reading))
        return ()

    read_items(items_of(node, "a list of upstreams"), path, reading, add)
    _check_pool(upstreams, path, reading)
    return tuple(upstreams)


def read_upstream_prices(node: Node, path: str, reading: Reading) -> Any:
    """Return the prices of an upstream: a table, or the name of the built-in list that applies."""
    name, table = UPSTREAM_PRICES.kinds
    return read(table if isinstance(node, Table) else name, node, path, reading)


READERS: Final[Mapping[Kind, Callable[[Node, str, Reading], Any]]] = {
    UPSTREAMS: read_upstreams,
    UPSTREAM_PRICES: read_upstream_prices,
    KEYS: read_keys,
    KEY_LIMITS: read_key_limits,
    CLIENT_KEYS: read_client_keys,
    ADMIN_KEY: read_admin_key,
}
"""The settings that `reading.read` does not read by their description alone."""


def _finished(
    given: Mapping[str, Any], path: str, others: Sequence[UpstreamSettings], reading: Reading
) -> UpstreamSettings:
    """Return the upstream that these settings make. `given`: only what was written."""
    url: Url | None = given.get("base_url")
    azure = given.get("kind") == "azure" or (given.get("kind") is None and url is not None and url.azure)
    kind = "azure" if azure else "openai"
    same_kind = sum(other.kind == kind for other in others)
    name = given.get("name") or (f"{kind}-{same_kind + 1}" if same_kind else kind)
    if any(other.name == name for other in others):
        reading.fail_at(f"{path}.name", f"expected a name of its own, found {name} again")
    values = {**given, "name": name, "kind": kind, "base_url": UpstreamSettings().base_url}
    with reading.recording(reading.place(f"{path}.base_url"), f"{path}.base_url"):
        values |= _azure(given, path, reading) if azure else _openai(url)
    if given.get("entra_id"):
        _check_entra_id(given, f"{path}.entra_id", reading)
    if not azure and reading.sound(f"{path}.base_url"):
        for setting in ("api_version", "deployments", "entra_id"):
            if given.get(setting):
                reading.fail_at(f"{path}.{setting}", "expected kind: azure beside this setting, found kind: openai")
    values["keys"] = labelled(name, f"{path}.keys", given.get("keys", ()), reading)
    values["ca_file"] = _ca_file(given.get("ca_file"), f"{path}.ca_file", reading)
    return UpstreamSettings(**values)


def _openai(url: Url | None) -> dict[str, Any]:
    if url is None:
        return {}
    if url.azure and not url.path.startswith("/openai/v1"):
        raise Invalid("expected an OpenAI base URL, found Azure's (kind: azure is for those)")
    return {"base_url": openai_url(url)}


def _azure(given: Mapping[str, Any], path: str, reading: Reading) -> dict[str, Any]:
    """Return the resource's root, api-version and deployments. What is written overrides what the URL says."""
    if given.get("base_url") is None:
        if not reading.sound(f"{path}.base_url"):
            return {"base_url": ""}
        raise Invalid("expected https://NAME.openai.azure.com, found nothing")
    url = azure_url(given["base_url"])
    api_version = given.get("api_version") or ("v1" if url.v1 else DEFAULT_API_VERSION)
    values = {"base_url": url.root, "api_version": None if api_version == "v1" else api_version}
    if url.deployment is not None and not given.get("deployments"):
        try:
            values["deployments"] = {"*": DEPLOYMENT.convert(url.deployment)}
        except ValueError:
            raise Invalid(f"expected {DEPLOYMENT.expected} in the path, found something else") from None
    return values


def _check_entra_id(given: Mapping[str, Any], path: str, reading: Reading) -> None:
    if given.get("keys"):
        reading.fail_at(path, "expected keys or entra_id: true, found both")
    try:
        found = importlib.util.find_spec("azure.identity") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        message = "expected azure-identity to go with it (pip install 'openai-caching-proxy[azure]'), found none"
        reading.fail_at(path, message)


def _ca_file(written: str | None, path: str, reading: Reading) -> str | None:
    """Return the path of the certificates. They must be readable, or every call would fail."""
    if written is None:
        return None
    file = reading.watch(reading.place(path), written)
    try:
        ssl.create_default_context(cafile=str(file))
    except OSError as error:  # ssl.SSLError is one, too
        found = "no certificates" if isinstance(error, ssl.SSLError) else error.strerror
        reading.fail_at(path, f"expected a file with certificates in PEM form, found at {file}: {found}")
    return str(file)


def _check_pool(upstreams: Sequence[UpstreamSettings], path: str, reading: Reading) -> None:
    """Check that labels are unique over all upstreams (a keyless one has its name), and that a quota's limits agree."""
    labels = {upstream.name for upstream in upstreams if not upstream.keys}
    quotas: dict[str, KeySettings] = {}
    for i, upstream in enumerate(upstreams):
        for j, key in enumerate(upstream.keys):
            place = f"{path}.{i}.keys.{j}"
            if key.label in labels:
                reading.fail_at(place, f"expected a key's name of its own, found {key.label} again")
            labels.add(key.label)
            if not key.limits:
                continue
            first = quotas.setdefault(key.quota, key)
            if first.limits != key.limits:
                message = f"expected the limits of {first.label}, which has the same quota, found others"
                reading.fail_at(f"{place}.limits", message)
