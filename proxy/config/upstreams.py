"""Upstreams: from what was written to the values in force."""

from __future__ import annotations

import importlib.util
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ..cost.pricing import Kind
from .keys import Keys, ParsedKey, usable
from .problems import Invalid
from .reading import ListOf, MapByGlob, Reading, Section, Single, items_of
from .secret import Secret
from .settings import DEFAULT_API_VERSION, KeySettings, Prices, UpstreamSettings
from .tree import Node, Table
from .urls import azure_url, openai_url, parse_url, proxy_url
from .values import BOOLEAN, DEPLOYMENT, GLOB, MONEY, NAME, PATH, VISIBLE, Leaf, choice, integer, optional, pattern

API_VERSION: Final = pattern(
    "an api-version such as 2024-10-21 or 2025-04-01-preview, or v1, preview or latest",
    r"20\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])(-preview)?|v1|preview|latest",
)
# The classic mistake is a key in this place, so what was found is not repeated.
_API_VERSION: Final = Leaf(API_VERSION.expected, API_VERSION.convert, secret=True)
_BASE_URL: Final = Leaf("a base URL", parse_url, secret=True)
_PROXY: Final = Leaf("a proxy such as http://proxy.example:3128", lambda text: Secret(proxy_url(text)), secret=True)

RATES: Final = ("input", "cached_input", "cache_write", "output")


class ModelPrices:
    """USD per million tokens of one model; `input` is needed."""

    def __init__(self) -> None:
        self._rates = MapByGlob(choice(*RATES), Single(MONEY))

    def read(self, node: Node, path: str, reading: Reading) -> dict[str, Any]:
        rates = self._rates.read(node, path, reading)
        if "input" not in rates and reading.sound(path):
            raise Invalid("expected at least an input price, found none")
        return rates

    def show(self, value: Any) -> object:
        return self._rates.show(value)


PRICES: Final = MapByGlob(GLOB, ModelPrices())


@dataclass(frozen=True, slots=True)
class _Written:
    """An upstream as the file has it. None: not said."""

    name: str | None = None
    kind: str | None = None
    base_url: Any = None
    models: tuple[str, ...] = ("*",)
    priority: int = 0
    cache_as: str | None = None
    keys: tuple[ParsedKey, ...] = ()
    api_version: str | None = None
    deployments: Mapping[str, str] = field(default_factory=dict)
    insecure: bool = False
    prices: Prices = field(default_factory=dict)
    entra_id: bool = False
    proxy: Secret | None = None
    ca_file: str | None = None


_KEYS: Final = Keys()
_WRITTEN: Final = Section(
    _Written,
    {
        "name": Single(optional(NAME)),
        "kind": Single(optional(choice("openai", "azure"))),
        "base_url": Single(optional(_BASE_URL)),
        "models": ListOf(GLOB, at_least=1),
        "priority": Single(integer(0, 1000)),
        "cache_as": Single(optional(VISIBLE)),
        "keys": _KEYS,
        "api_version": Single(optional(_API_VERSION)),
        "deployments": MapByGlob(GLOB, Single(DEPLOYMENT)),
        "insecure": Single(BOOLEAN),
        "prices": PRICES,
        "entra_id": Single(BOOLEAN),
        "proxy": Single(optional(_PROXY)),
        "ca_file": Single(optional(PATH)),
    },
)


class Upstreams:
    """The list of upstreams. Their names are unique, and so are the labels of all their keys."""

    def read(self, node: Node, path: str, reading: Reading) -> tuple[UpstreamSettings, ...]:
        upstreams: list[UpstreamSettings] = []
        for i, item in enumerate(items_of(node, "a list of upstreams")):
            inner = f"{path}.{i}"
            reading.places[inner] = item.where
            try:
                if not isinstance(item, Table):
                    raise Invalid("expected a table with base_url and keys, found something else")
                written = _WRITTEN.read(item, inner, reading)
                upstreams.append(_finished(written, inner, upstreams, reading))
            except Invalid as error:
                reading.fail(item.where, inner, str(error))
        _check_pool(upstreams, path, reading)
        return tuple(upstreams)

    def show(self, value: Any) -> object:
        return [show_upstream(upstream) for upstream in value]


def _finished(written: _Written, path: str, others: Sequence[UpstreamSettings], reading: Reading) -> UpstreamSettings:
    azure = written.kind == "azure" or (
        written.kind is None and written.base_url is not None and written.base_url.azure
    )
    kind: Kind = "azure" if azure else "openai"
    same_kind = sum(other.kind == kind for other in others)
    name = written.name or (f"{kind}-{same_kind + 1}" if same_kind else kind)
    if any(other.name == name for other in others):
        reading.fail_at(f"{path}.name", f"expected a name of its own, found {name} again")
    base_url, api_version, deployments = UpstreamSettings().base_url, written.api_version, written.deployments
    try:
        if azure:
            base_url, api_version, deployments = _azure(written, path, reading)
        elif written.base_url is not None:
            if written.base_url.azure and not written.base_url.path.startswith("/openai/v1"):
                raise Invalid("expected an OpenAI base URL, found Azure's (kind: azure is for those)")
            base_url = openai_url(written.base_url)
    except Invalid as error:
        reading.fail_at(f"{path}.base_url", str(error))
    if written.entra_id:
        _check_entra_id(written, f"{path}.entra_id", reading)
    if not azure and reading.sound(f"{path}.base_url"):
        for setting in ("api_version", "deployments", "entra_id"):
            if getattr(written, setting):
                reading.fail_at(f"{path}.{setting}", "expected kind: azure beside this setting, found kind: openai")
    return UpstreamSettings(
        name=name,
        kind=kind,
        base_url=base_url,
        models=written.models,
        priority=written.priority,
        cache_as=written.cache_as,
        keys=_labelled(name, written.keys, path, reading),
        api_version=api_version,
        deployments=deployments,
        insecure=written.insecure,
        prices=written.prices,
        entra_id=written.entra_id,
        proxy=written.proxy,
        ca_file=_ca_file(written, path, reading),
    )


def _check_entra_id(written: _Written, path: str, reading: Reading) -> None:
    if written.keys:
        reading.fail_at(path, "expected keys or entra_id: true, found both")
    try:
        found = importlib.util.find_spec("azure.identity") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        message = "expected azure-identity to go with it (pip install 'openai-caching-proxy[azure]'), found none"
        reading.fail_at(path, message)


def _ca_file(written: _Written, path: str, reading: Reading) -> str | None:
    """Where the certificates are, as they must be readable: else every call would fail."""
    if written.ca_file is None:
        return None
    place = f"{path}.ca_file"
    file = reading.watch(reading.place(place), written.ca_file)
    try:
        ssl.create_default_context(cafile=str(file))
    except OSError as error:  # ssl.SSLError is one, too
        found = "no certificates" if isinstance(error, ssl.SSLError) else error.strerror
        reading.fail_at(place, f"expected a file with certificates in PEM form, found at {file}: {found}")
    return str(file)


def _azure(written: _Written, path: str, reading: Reading) -> tuple[str, str | None, Mapping[str, str]]:
    """Root, api-version (None: the v1 surface), deployments. What is set counts before what the URL says."""
    if written.base_url is None:
        if not reading.sound(f"{path}.base_url"):
            return "", None, {}
        raise Invalid("expected https://NAME.openai.azure.com, found nothing")
    url = azure_url(written.base_url)
    api_version = written.api_version or ("v1" if url.v1 else DEFAULT_API_VERSION)
    deployments = written.deployments
    if url.deployment is not None and not deployments:
        try:
            deployments = {"*": DEPLOYMENT.convert(url.deployment)}
        except ValueError:
            raise Invalid(f"expected {DEPLOYMENT.expected} in the path, found something else") from None
    return url.root, None if api_version == "v1" else api_version, deployments


def _labelled(name: str, drafts: Sequence[ParsedKey], path: str, reading: Reading) -> tuple[KeySettings, ...]:
    keys: dict[Secret, KeySettings] = {}
    for i, draft in enumerate(drafts):
        label = draft.written.name or f"{name}-{i + 1}"
        reading.places[f"{path}.keys.{i}"] = draft.where
        try:
            secret = Secret(usable(f"the key {label}", draft.secret))
            if secret in keys:
                raise Invalid(f"expected different keys, found that {label} is the same as {keys[secret].label}")
        except Invalid as error:
            reading.fail(draft.where, draft.path, str(error))
            continue
        keys[secret] = KeySettings(
            label=label,
            secret=secret,
            organization=draft.written.organization,
            project=draft.written.project,
            weight=draft.written.weight,
            quota=draft.written.quota or label,
            limits=draft.written.limits,
        )
    return tuple(keys.values())


def _check_pool(upstreams: Sequence[UpstreamSettings], path: str, reading: Reading) -> None:
    """Labels are unique over all upstreams (a keyless one goes by its name), a quota's limits agree."""
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


def show_upstream(upstream: UpstreamSettings) -> dict[str, object]:
    """What is in force, short: what is the default of its kind is left out, and secrets are masked."""
    shown: dict[str, object] = {
        "name": upstream.name,
        "kind": upstream.kind,
        "base_url": upstream.base_url,
        "models": list(upstream.models),
        "priority": str(upstream.priority),
    }
    if upstream.kind == "azure":
        shown["api_version"] = upstream.api_version or "v1"
    for name in ("cache_as", "deployments", "insecure", "prices", "entra_id", "proxy", "ca_file"):
        value = getattr(upstream, name)
        if value:
            shown[name] = _WRITTEN.readers[name].show(value)
    shown["keys"] = _KEYS.show(upstream.keys)
    return shown
