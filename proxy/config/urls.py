"""Base URLs: parsed, checked, and brought to one spelling. No message repeats what may be a password in a URL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urlsplit

from .problems import Invalid
from .values import host_name, show_host

_CHARACTERS: Final = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+\Z", re.ASCII)
_PORTS: Final = {"http": 80, "https": 443}
_AZURE_HOSTS: Final = (".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com")
_AZURE_PATH: Final = re.compile(
    r"(?P<prefix>.*?)/openai(?:/(?P<v1>v1)(?:/.*)?|/deployments(?:/(?P<deployment>[^/]+)(?:/.*)?)?)?\Z"
)
_ENDPOINT: Final = re.compile(r".*?/(chat/completions|completions|embeddings|responses|moderations)\Z")


@dataclass(frozen=True, slots=True)
class Url:
    """A base URL in parts: host in lower case, IPv6 without brackets; path without a trailing slash."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{show_host(self.host)}{port}"

    @property
    def azure(self) -> bool:
        """Return whether the host is one of Azure's own."""
        return self.host.endswith(_AZURE_HOSTS)

    def __str__(self) -> str:
        return self.origin + self.path


@dataclass(frozen=True, slots=True)
class AzureUrl:
    """What an Azure base URL says: the resource's root, the `/openai/v1` surface or not, and a deployment."""

    root: str
    v1: bool
    deployment: str | None


def parse_url(text: str) -> Url:
    """Return a base URL in parts. Raises Invalid for what is not an http or https base URL."""
    expected = "expected a base URL such as https://api.openai.com/v1"
    if not _CHARACTERS.match(text):
        raise Invalid(f"{expected}, found characters that do not belong in one")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise Invalid(f"{expected}, found a malformed address") from None
    if parts.scheme not in _PORTS:
        raise Invalid(f"{expected}, found no http:// or https:// at its beginning")
    _refuse_extras(parts, text)
    try:
        host = host_name(parts.netloc.rpartition("]")[0][1:] if "]" in parts.netloc else parts.hostname or "")
    except ValueError:
        raise Invalid(f"{expected}, found no usable host") from None
    if port == 0:
        raise Invalid(f"{expected}, found the port 0")
    path = parts.path.rstrip("/")
    if "//" in path or "%" in path or {".", ".."} & set(path.split("/")):
        raise Invalid(f"{expected}, found a path with '//', '%', '.' or '..'")
    return Url(parts.scheme, host, port or _PORTS[parts.scheme], path)


def _refuse_extras(parts: SplitResult, text: str) -> None:
    if "@" in parts.netloc:
        raise Invalid("expected a base URL without user and password, found one (keys go under keys:)")
    if "?" in text:
        raise Invalid("expected a base URL without a query, found one (Azure's api-version goes into api_version:)")
    if "#" in text:
        raise Invalid("expected a base URL without a fragment, found one")


def proxy_url(text: str) -> str:
    """Return an HTTP proxy's address, perhaps with user and password. Raises ValueError for anything else."""
    parts = urlsplit(text)
    if parts.scheme not in _PORTS or not parts.hostname or not parts.port or parts.path.strip("/"):
        raise ValueError("not a proxy's address")
    if parts.query or parts.fragment or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("not a proxy's address")
    return text.rstrip("/")


def openai_url(url: Url) -> str:
    """Return the URL without a trailing slash; OpenAI's own host gets its `/v1`. Raises Invalid for an endpoint."""
    if match := _ENDPOINT.match(url.path):
        raise Invalid(f"expected a base URL, found that of an endpoint (drop /{match[1]})")
    if not url.path and (url.host == "api.openai.com" or url.host.endswith(".api.openai.com")):
        return f"{url.origin}/v1"
    return str(url)


def azure_url(url: Url) -> AzureUrl:
    """Return the one root that every spelling of a resource has. A gateway's own prefix before `/openai` stays.

    Raises Invalid for a path that Azure's own hosts do not serve.
    """
    match = _AZURE_PATH.match(url.path)
    prefix = match["prefix"] if match else url.path
    if prefix and url.azure:
        raise Invalid("expected https://NAME.openai.azure.com, found a path that is not /openai…")
    if match is None:
        return AzureUrl(url.origin + prefix, False, None)
    return AzureUrl(url.origin + prefix, match["v1"] is not None, match["deployment"])
