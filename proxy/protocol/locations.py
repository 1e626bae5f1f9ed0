"""Headers that name a URL of the upstream, as a client of the proxy may see them (`docs/headers.md`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

from .headers import Raw

_PORTS: Final = {"http": 80, "https": 443}


def own_locations(headers: Sequence[Raw], asked: str, target: str, path: str) -> list[Raw]:
    """Return those of the headers in `LOCATIONS` that name a URL below the upstream's base URL, as a path of the proxy.

    asked: the URL asked of the upstream. target: the client's request target. path: what both end with, without query.
    """
    found = []
    for name, value in headers:
        own = own_location(value.decode("latin-1"), asked, target, path)
        if own is not None:
            found.append((name, own.encode("latin-1", "replace")))
    return found


def own_location(location: str, asked: str, target: str, path: str) -> str | None:
    """Return the proxy's own path for a URL; None if it lies elsewhere. asked, target, path: as in `own_locations`."""
    try:
        base, there = urlsplit(asked), urlsplit(urljoin(asked, location))
        if not _same_host(base, there):
            return None
    except ValueError:
        return None
    upstream_prefix = base.path.removesuffix(path)
    own_prefix = target.partition("?")[0].removesuffix(path)
    rest = _below(there.path, upstream_prefix)
    if rest is None:  # of the same API, but no path of its `/openai/v1` or of the deployment that was asked
        root, own_root = (prefix.partition("/openai")[0] + "/openai" for prefix in (upstream_prefix, own_prefix))
        rest = _below(there.path, root) if "/openai" in upstream_prefix and "/openai" in own_prefix else None
        own_prefix = own_root
    if rest is None or ".." in rest:
        return None
    return own_prefix + rest + (f"?{there.query}" if there.query else "")


def _below(path: str, prefix: str) -> str | None:
    return path[len(prefix) :] if path.startswith(prefix + "/") else None


def _same_host(one: SplitResult, other: SplitResult) -> bool:
    """Whether both are of one host. TLS may end in front of an upstream, so that it names itself with plain http."""
    if other.scheme not in _PORTS or other.username is not None or one.hostname != other.hostname:
        return False
    ports = [url.port or _PORTS[url.scheme] for url in (one, other)]
    return ports[0] == ports[1] or all(url.port in (None, _PORTS[url.scheme]) for url in (one, other))
