"""The route of a raw request target (`docs/routes-and-errors.md`). The raw path decides: nothing is normalised."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import parse_qsl, quote, unquote, unquote_plus

from .errors import ProxyError
from .options import NO_OPTIONS, Options, from_segment

Shape = Literal["openai", "azure", "azure-v1"]
Kind = Literal["endpoint", "passthrough", "own"]

ENDPOINTS: Final = {
    "/chat/completions": "chat",
    "/embeddings": "embeddings",
    "/completions": "completions",
    "/responses": "responses",
    "/moderations": "moderations",
}
"""Path below `/v1` -> the endpoint's name in settings, keys and metrics."""

SEGMENTS: Final = frozenset(
    "assistants audio batches chat chatkit completions containers conversations embeddings evals files fine_tuning "  # noqa: SIM905 (a list of 23 is harder to read)
    "images models moderations organization realtime responses skills threads uploads vector_stores videos".split()
)
"""First path segments of OpenAI's API, which are accepted without `/v1`."""

STATELESS: Final = frozenset({"audio", "images", "models"})
"""Segments of the pass-through that name no stored object, so any key may serve them."""

REALTIME: Final = "/realtime"
"""The path of the Realtime API's WebSockets, whose query names the model."""

_FORBIDDEN: Final = re.compile(r"%2e|%2f|%5c|//|\\|\.\.|/\.(?=/|\Z)|[\x00-\x20\x7f]", re.IGNORECASE)
_OTHER_SPELLING: Final = re.compile(r"%(?:2d|3\d|4[1-9a-f]|5[\daf]|6[1-9a-f]|7[\dae])|;", re.IGNORECASE)
"""A percent-encoded unreserved character (RFC 3986 section 6.2.2.2) and path parameters: other servers take such a path
for one that is spelled without them."""

_PARAMETERS: Final = re.compile(r";[^/]*")

_INVALID_IN_TARGET: Final = re.compile(r"[#\ud800-\udfff]")
"""A fragment, which is no part of a target (RFC 9112 section 3.2), and bytes that are not UTF-8."""

_DEPLOYMENT: Final = re.compile(r"/openai/deployments/([^/]{1,256})(/.*)\Z", re.DOTALL)
_OWN_PATHS: Final = frozenset({"/healthz", "/readyz", "/metrics"})


@dataclass(frozen=True, slots=True)
class Route:
    """The route of a request.

    path: below `/v1` (`/chat/completions`), or whole for `own`. query: raw, without `?`. deployment: the Azure
    deployment in the path. options: those inside the base URL.
    """

    kind: Kind
    path: str
    query: str
    endpoint: str = ""
    shape: Shape = "openai"
    deployment: str | None = None
    options: Options = NO_OPTIONS

    @property
    def segment(self) -> str:
        return self.path.split("/", 2)[1]

    @property
    def stateful(self) -> bool:
        return self.kind != "own" and self.segment not in STATELESS


def query_values(query: str, name: str) -> list[str]:
    """Return the values of a parameter of a raw query, decoded."""
    return [value for key, value in parse_qsl(query, keep_blank_values=True) if key == name]


def replaced_query(query: str, dropped: Collection[str], *added: tuple[str, str]) -> str:
    """Return a raw query without the parameters in `dropped`, with those in `added` at its end; the rest as it was."""
    kept = [part for part in query.split("&") if part and unquote_plus(part.partition("=")[0]) not in dropped]
    return "&".join([*kept, *(f"{name}={quote(value, safe='', errors='replace')}" for name, value in added)])


def unknown_route(path: str, right: str = "") -> ProxyError:
    """Return the error for a path that is not served. right: the path that it should be, if that is known."""
    hint = f"did you mean {printable(right)}?" if right else "the API is below /v1"
    return ProxyError("unknown_route", f"no such route: {printable(path)}; {hint}")


def printable(text: str, limit: int = 120) -> str:
    """Return `text` for a message or a log line: ASCII, without control characters, at most `limit` characters."""
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text
    shown = text[:limit].encode("ascii", "backslashreplace").decode()
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)


def parse_target(target: str) -> Route:
    """Return the route of a raw request target. Raises ProxyError(unknown_route, invalid_option, bad_request)."""
    if _INVALID_IN_TARGET.search(target):
        raise ProxyError("bad_request", "the request target holds a fragment or bytes that are not UTF-8")
    path, _, query = target.partition("?")
    if not path.startswith("/") or _FORBIDDEN.search(path):
        raise unknown_route(path)
    if path in _OWN_PATHS or path.startswith("/_proxy/"):
        return Route("own", path, query)
    options = NO_OPTIONS
    if path.startswith("/_/"):
        segment, slash, rest = path[3:].partition("/")
        if not slash:
            raise unknown_route(path)
        options, path = from_segment(segment), "/" + rest
    shape: Shape = "openai"
    deployment = None
    if path.startswith("/openai/"):
        match = _DEPLOYMENT.match(path)
        if match is not None:
            shape, deployment, below = "azure", unquote(match[1]), match[2]
        elif path.startswith("/openai/v1/"):
            shape, below = "azure-v1", path[len("/openai/v1") :]
        else:
            shape, below = "azure", path[len("/openai") :]
            if below.split("/", 2)[1] not in SEGMENTS:
                raise unknown_route(path)
    elif path.startswith("/v1/"):
        below = path[3:]
    elif path.split("/", 2)[1] in SEGMENTS:
        below = path
    else:
        raise unknown_route(path)
    if below == "/":
        raise unknown_route(path)
    _check_spelling(path, below)
    endpoint = ENDPOINTS.get(below, "")
    return Route("endpoint" if endpoint else "passthrough", below, query, endpoint, shape, deployment, options)


def _check_spelling(path: str, below: str) -> None:
    """Raise ProxyError(unknown_route) for a path that a server may take for another one, so that no rule is escaped.

    below: the path below `/v1`, which is the end of `path`.
    """
    root, right = path[: len(path) - len(below)], below.rstrip("/")
    if _OTHER_SPELLING.search(path):
        root, right = _plain(root), _plain(right)
    lower = right.lower()
    segment = lower.split("/", 2)[1]
    if lower in ENDPOINTS:
        right = lower
    elif segment in SEGMENTS:
        right = f"/{segment}{right[len(segment) + 1 :]}"
    if root + right != path:
        raise unknown_route(path, root + right)


def _plain(path: str) -> str:
    """Return a path without path parameters, its unreserved characters decoded."""
    return _OTHER_SPELLING.sub(lambda found: unquote(found[0]), _PARAMETERS.sub("", path))
