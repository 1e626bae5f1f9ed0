"""Who may come in: Host, Origin, client keys and the admin key (contract 7, Browsers and Secrets; contract 5)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from fnmatch import fnmatchcase
from typing import Final

from aiohttp.web import BaseRequest

from ..config.settings import Settings
from ..protocol.errors import ProxyError
from ..protocol.request import Client
from ..protocol.routes import printable

_ALWAYS: Final = ("localhost", "127.0.0.1", "[::1]")
_KEEP: Final = 1024
ANONYMOUS: Final = Client()


class AccessControl:
    """Checks requests against the settings. Raises ProxyError with the contract's codes."""

    def __init__(self, settings: Settings) -> None:
        server = settings.server
        host = f"[{server.host}]" if ":" in server.host else server.host
        self._hosts = {name.lower() for name in (*_ALWAYS, host, *server.allowed_hosts)}
        self._globs = tuple(name.lower() for name in server.allowed_hosts if "*" in name)
        self._known_hosts: set[str] = set()
        self._origins = frozenset(origin.rstrip("/").lower() for origin in server.allowed_origins)
        self._keys = server.client_keys
        self._passthrough = settings.passthrough
        self._admin = hashlib.sha256(server.admin_key.reveal().encode()).digest() if server.admin_key else None
        self._single = configured_clients(settings)

    # -- browsers -----------------------------------------------------------------------------------------------------

    def check_host(self, request: BaseRequest) -> None:
        """A Host that is not ours is a rebound name or a misdirected request: 421."""
        hosts = request.headers.getall("Host", ())
        if len(hosts) == 1 and hosts[0] in self._known_hosts:
            return
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            shown = hosts[0][:80] if hosts else ""
            message = f"Host {shown!r} is not served here; server.allowed_hosts lists further names"
            raise ProxyError("host_not_allowed", message)
        if len(self._known_hosts) < _KEEP:
            self._known_hosts.add(hosts[0])

    def _is_ours(self, host: str) -> bool:
        name = host.lower()
        stem, colon, port = name.rpartition(":")
        if colon and port.isascii() and port.isdigit():
            name = stem
        return name in self._hosts or any(fnmatchcase(name, glob) for glob in self._globs)

    def check_origin(self, request: BaseRequest) -> str | None:
        """The browser origin that may call, None where no browser is at work. 403 for any other."""
        headers = request.headers
        origin = headers.get("Origin")
        if origin is not None:
            if origin.rstrip("/").lower() in self._origins:
                return origin
            raise ProxyError("origin_not_allowed", f"origin {origin[:80]!r} is not in server.allowed_origins")
        site = headers.get("Sec-Fetch-Site")
        if site is not None and site.lower() not in ("none", "same-origin"):
            raise ProxyError("origin_not_allowed", "browsers may call from server.allowed_origins only")
        return None

    # -- clients ------------------------------------------------------------------------------------------------------

    def client(self, request: BaseRequest) -> Client:
        """Who calls. Raises ProxyError(invalid_client_key), with one body for every way of having no good key."""
        if not self._keys and not self._passthrough:
            return ANONYMOUS
        credential = _credential(request)
        if not self._keys:
            return self._own_credential(request, credential)
        if credential is not None:
            digest = hashlib.sha256(credential[1].encode("utf-8", "surrogateescape")).digest()
            found = None
            for index, key in enumerate(self._keys):  # all of them: time does not tell which one fits
                if hmac.compare_digest(digest, key.digest):
                    found = index
            if found is not None:
                return self._single[found]
        raise ProxyError(
            "invalid_client_key",
            "a client key of this proxy is needed, as `Authorization: Bearer …` or `api-key: …`",
            headers=(("WWW-Authenticate", "Bearer"),),
        )

    def _own_credential(self, request: BaseRequest, credential: tuple[str, str] | None) -> Client:
        headers = request.headers
        organization, project = headers.get("OpenAI-Organization", ""), headers.get("OpenAI-Project", "")
        scheme, token = credential or ("none", "")
        try:
            scope = partition_of_credential(scheme, token, organization, project)
        except UnicodeEncodeError:  # nor could it go up as it came
            raise ProxyError("invalid_client_key", "the credential holds bytes that are not UTF-8") from None
        return Client("", scope, credential)

    # -- operators ----------------------------------------------------------------------------------------------------

    def is_admin(self, request: BaseRequest) -> bool:
        """Holds the admin key (bearer, or password of HTTP Basic); without one configured: comes from this machine."""
        if self._admin is None:
            return is_loopback(request)
        for candidate in _admin_candidates(request):
            if hmac.compare_digest(hashlib.sha256(candidate).digest(), self._admin):
                return True
        return False

    def check_admin(self, request: BaseRequest) -> None:
        if not self.is_admin(request):
            raise ProxyError(
                "invalid_client_key",
                "this route needs server.admin_key"
                if self._admin is not None
                else "without server.admin_key this route answers to this machine only",
                headers=(("WWW-Authenticate", 'Basic realm="openai-proxy"'),),
            )


def partition_of_credential(scheme: str, token: str, *parts: str) -> str:
    """Return the cache partition of a pass-through client: a digest of its credential.

    parts: what else decides for whom the upstream answers.
    """
    return "credential " + hashlib.sha256("\0".join((scheme, token, *parts)).encode()).hexdigest()


def configured_clients(settings: Settings) -> tuple[Client, ...]:
    """Return one client for each of `server.client_keys`, in their order."""
    shared = settings.cache.shared
    return tuple(
        Client(
            key.name,
            "" if shared else f"namespace {key.namespace}" if key.namespace else f"name {key.name}",
            models=key.models,
        )
        for key in settings.server.client_keys
    )


def client_named(settings: Settings, name: str | None) -> Client:
    """Return the client of that name; for None the only one there is, or an anonymous one. Raises ProxyError."""
    clients = configured_clients(settings)
    for client in clients:
        if client.name == name:
            return client
    if name is not None:
        raise ProxyError("invalid_option", f"no client key has the name {printable(name)!r}", param="client")
    return clients[0] if len(clients) == 1 else Client()


def _credential(request: BaseRequest) -> tuple[str, str] | None:
    """(`bearer` or `api-key`, token); None where there is none or it is not single."""
    headers = request.headers
    values = headers.getall("Authorization", ())
    if len(values) > 1:
        return None
    if values:
        scheme, _, token = values[0].partition(" ")
        token = token.strip()
        if scheme.lower() == "bearer" and token:
            return "bearer", token
    keys = headers.getall("api-key", ())
    if len(keys) == 1 and keys[0].strip():
        return "api-key", keys[0].strip()
    return None


def _admin_candidates(request: BaseRequest) -> list[bytes]:
    candidates = []
    for value in request.headers.getall("Authorization", ()):
        scheme, _, rest = value.partition(" ")
        if scheme.lower() == "bearer":
            candidates.append(rest.strip().encode("utf-8", "surrogateescape"))
        elif scheme.lower() == "basic":
            try:
                candidates.append(base64.b64decode(rest.strip(), validate=True).partition(b":")[2])
            except (binascii.Error, ValueError):
                continue
    return candidates


def is_loopback(request: BaseRequest) -> bool:
    """The peer is on this machine: loopback, or a unix socket."""
    transport = request.transport
    peer = transport.get_extra_info("peername") if transport is not None else None
    if not isinstance(peer, tuple):
        return isinstance(peer, str | bytes)  # of a unix socket; None: gone before it could be asked
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
