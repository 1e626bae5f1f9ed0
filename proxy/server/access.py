"""Access control: Host, Origin, client keys and the admin key (docs/security.md)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from fnmatch import fnmatchcase
from typing import Final

from aiohttp.web import BaseRequest

from ..config.settings import Settings
from ..protocol.errors import ProxyError
from ..protocol.request import Client
from ..protocol.routes import printable
from ..protocol.websocket import credential_in

_LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "[::1]")
_MAX_MEMOIZED: Final = 1024
ANONYMOUS: Final = Client()


class AccessControl:
    """Checks requests against the settings."""

    def __init__(self, settings: Settings) -> None:
        server = settings.server
        host = f"[{server.host}]" if ":" in server.host else server.host
        self._hosts = {name.lower() for name in (*_LOCAL_HOSTS, host, *server.allowed_hosts)}
        self._host_globs = tuple(name.lower() for name in server.allowed_hosts if "*" in name)
        self._accepted_hosts: set[str] = set()
        self._origins = frozenset(origin.rstrip("/").lower() for origin in server.allowed_origins)
        self._origin_globs = tuple(_origin_glob(origin) for origin in self._origins if "*" in origin)
        self._keys = server.client_keys
        self._passthrough = settings.passthrough
        self._admin_digest = hashlib.sha256(server.admin_key.reveal().encode()).digest() if server.admin_key else None
        self._clients = configured_clients(settings)

    # -- browsers -----------------------------------------------------------------------------------------------------

    def check_host(self, request: BaseRequest) -> None:
        """Raise `host_not_allowed` for an unknown Host, which may come from DNS rebinding (RFC 9110 section 7.4)."""
        hosts = request.headers.getall("Host", ())
        if len(hosts) == 1 and hosts[0] in self._accepted_hosts:
            return
        if len(hosts) != 1 or not self._is_allowed_host(hosts[0]):
            shown = hosts[0][:80] if hosts else ""
            message = f"Host {shown!r} is not served here; add it to server.allowed_hosts"
            raise ProxyError("host_not_allowed", message)
        if len(self._accepted_hosts) < _MAX_MEMOIZED:
            self._accepted_hosts.add(hosts[0])

    def _is_allowed_host(self, host: str) -> bool:
        name = host.lower()
        without_port, colon, port = name.rpartition(":")
        if colon and port.isascii() and port.isdigit():
            name = without_port
        return name in self._hosts or any(fnmatchcase(name, glob) for glob in self._host_globs)

    def check_origin(self, request: BaseRequest) -> str | None:
        """Return the allowed origin of a browser's request, None for any other client.

        Raises `origin_not_allowed`.
        """
        headers = request.headers
        origins = headers.getall("Origin", ())
        if origins:
            origin = ", ".join(origins)
            if self._is_allowed_origin(origin.rstrip("/").lower()):
                return origin
            message = f"origin {origin[:80]!r} may not call the proxy; add it to server.allowed_origins"
            raise ProxyError("origin_not_allowed", message)
        site = headers.get("Sec-Fetch-Site")
        if site is not None and site.lower() not in ("none", "same-origin"):
            message = "a page of another site may not call the proxy; add its origin to server.allowed_origins"
            raise ProxyError("origin_not_allowed", message)
        return None

    def _is_allowed_origin(self, origin: str) -> bool:
        return origin in self._origins or any(glob.fullmatch(origin) for glob in self._origin_globs)

    # -- clients ------------------------------------------------------------------------------------------------------

    def client(self, request: BaseRequest) -> Client:
        """Return the sender of a request. Raises `invalid_client_key`, with the same message whatever is wrong."""
        if not self._keys and not self._passthrough:
            return ANONYMOUS
        credential = _credential(request)
        if not self._keys:
            return self._passthrough_client(request, credential)
        if credential is not None:
            digest = hashlib.sha256(credential[1].encode("utf-8", "surrogateescape")).digest()
            match = None
            for index, key in enumerate(self._keys):  # compare with all, so that the time says nothing
                if hmac.compare_digest(digest, key.digest):
                    match = index
            if match is not None:
                return self._clients[match]
        raise ProxyError(
            "invalid_client_key",
            "send a client key of this proxy as `Authorization: Bearer …` or `api-key: …`",
            headers=(("WWW-Authenticate", "Bearer"),),
        )

    def _passthrough_client(self, request: BaseRequest, credential: tuple[str, str] | None) -> Client:
        headers = request.headers
        organization, project = headers.get("OpenAI-Organization", ""), headers.get("OpenAI-Project", "")
        scheme, token = credential or ("none", "")
        try:
            partition = partition_of_credential(scheme, token, organization, project)
        except UnicodeEncodeError:  # it could not be sent upstream either
            raise ProxyError("invalid_client_key", "the credential is not valid UTF-8") from None
        return Client("", partition, credential)

    # -- operators ----------------------------------------------------------------------------------------------------

    def is_admin(self, request: BaseRequest) -> bool:
        """Return True if the request has the admin key, as bearer token or password of HTTP Basic.

        If no admin key is configured, it must come from this machine.
        """
        if self._admin_digest is None:
            return is_loopback(request)
        for candidate in _admin_candidates(request):
            if hmac.compare_digest(hashlib.sha256(candidate).digest(), self._admin_digest):
                return True
        return False

    def operator(self, request: BaseRequest) -> str:
        """Return who asks, for the log: with the admin key or without one, and from which address."""
        how = "the admin key" if self._admin_digest is not None else "no key"
        peer = request.remote
        return f"{peer or 'the Unix socket'} with {how}"

    def check_admin(self, request: BaseRequest) -> None:
        """Raise `invalid_client_key` unless `is_admin`."""
        if not self.is_admin(request):
            message = "this route needs the admin key (server.admin_key)"
            if self._admin_digest is None:
                message = "this route is served to this machine only; to reach it from elsewhere, set server.admin_key"
            headers = (("WWW-Authenticate", 'Basic realm="openai-proxy"'),)
            raise ProxyError("invalid_client_key", message, headers=headers)


def _origin_glob(origin: str) -> re.Pattern[str]:
    """Return a pattern for an origin with `*`: a part of a host's name, or at the end also a port."""
    *parts, last = [re.escape(part) for part in origin.split("*")]
    return re.compile("[a-z0-9._-]*".join(parts) + ("[a-z0-9._-]*" + last if last else r"[a-z0-9._:\[\]-]*"))


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
    """Return (`bearer` or `api-key`, token); None if there is no token, or more than one."""
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
    subprotocols = headers.getall("Sec-WebSocket-Protocol", ())
    key = credential_in(subprotocols) if subprotocols else None
    return ("bearer", key) if key is not None else None


def _admin_candidates(request: BaseRequest) -> list[bytes]:
    """Return the bearer tokens and the passwords of HTTP Basic."""
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
    """Return True if the client is on this machine: at a loopback address or a Unix socket."""
    transport = request.transport
    peer = transport.get_extra_info("peername") if transport is not None else None
    if not isinstance(peer, tuple):
        return isinstance(peer, str | bytes)  # of a Unix socket; None: the client has disconnected
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
