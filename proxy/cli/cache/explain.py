"""`openai-proxy cache explain REQUEST.json`: the cache key of a request, whether it is cacheable, and how it differs
from the nearest stored request.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from ...pipeline.explain import explain, request_of
from ...protocol.errors import ProxyError
from ...protocol.headers import Raw
from ...protocol.routes import ENDPOINTS
from ...services import build_services
from ...system.clock import SYSTEM_CLOCK
from ..common import load_from_args
from .interface import CommandError, UsageError
from .local import CacheCommand
from .text import ProgressLine, cut, duration, print_result

_TARGETS: Final = {endpoint: f"/v1{path}" for path, endpoint in ENDPOINTS.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="REQUEST.json", type=Path, help="body of the request; - for standard input")
    parser.add_argument(
        "--endpoint",
        choices=tuple(_TARGETS),
        default="chat",
        metavar="NAME",
        help=f"{', '.join(_TARGETS)} (default: chat)",
    )
    parser.add_argument("--target", metavar="PATH", help="path with options and query: /_/namespace=ci/v1/…")
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        type=_header,
        metavar="NAME: VALUE",
        help="a header of the request, such as 'X-Proxy-Cache-Namespace: ci'; may be repeated",
    )
    parser.add_argument("--client", metavar="NAME", help="name of the client key (default: the only one, or none)")


async def run(args: argparse.Namespace, command: CacheCommand) -> int:
    """Print the explanation, also if nothing similar is stored. Raises UsageError if the file is not a request."""
    try:
        body = sys.stdin.buffer.read() if str(args.file) == "-" else args.file.read_bytes()
    except OSError as error:
        raise CommandError(f"{args.file}: {error.strerror or error}") from None
    target: str = args.target or _TARGETS[args.endpoint]
    if command.url is not None:
        found = await _ask_proxy(command, command.url, target, args, body)
    else:
        found = await _explain_here(command, target, args, body)
    print_result(args, found, _lines(found))
    return 0


async def _ask_proxy(
    command: CacheCommand, url: str, target: str, args: argparse.Namespace, body: bytes
) -> dict[str, Any]:
    """Have the running proxy explain the request."""
    from .remote import connect

    headers = {name.decode(): value.decode() for name, value in args.header}
    async with connect(url, command.settings.server.admin_key) as remote:
        return await remote.explain(
            {"target": target} | ({"client": args.client} if args.client else {}), headers, body
        )


async def _explain_here(command: CacheCommand, target: str, args: argparse.Namespace, body: bytes) -> dict[str, Any]:
    """Explain the request by the settings, upstreams included: they are part of the cache key."""
    from ...server.access import client_named  # not earlier: it loads the HTTP library

    settings = load_from_args(args).settings
    services = build_services(settings, SYSTEM_CLOCK)
    try:
        client = client_named(settings, args.client)
        request = request_of(services.addresses, target, args.header, body, client)
    except ProxyError as error:
        raise UsageError(error.message) from None
    async with command.client() as cache:
        total = int((await cache.facts()).get("entries", 0))
        with ProgressLine("comparing", total) as progress:
            pages = cache.list({"endpoint": request.endpoint})
            found = await explain(services.planner, settings.cache, request, pages, progress.step)
    return {"client": client.name or None} | found


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [f"cacheable: {'yes' if found['cacheable'] else 'no'}", f"now: {found['reason']}"]
    if found["key"]:
        lines.append(f"key: {found['key']}")
    lines += ["", f"made of (for {'client ' + found['client'] if found['client'] else 'anonymous clients'}):"]
    lines.append(_line("endpoint", found["endpoint"]))
    for name, value in (found["parts"] or {}).items():
        text = ", ".join(value) if isinstance(value, list) else value
        if text:
            lines.append(_line(name, text))
    if found["fields"]:
        lines.append(_line("digests of", ", ".join(found["fields"])))
    if found["left_out"]:
        lines.append(_line("left out", ", ".join(found["left_out"])))
    for entry in found["stored"]:
        left = entry["ttl_left_s"]
        state = f"{duration(left)} left" if left >= 0 else "expired"
        lines += ["", f"stored as {entry['form']}, {duration(entry['age_s'])} ago, lifetime: {state}"]
    if not found["cacheable"]:
        return lines
    nearest = found["nearest"]
    lines.append("")
    if nearest is None:
        lines.append(f"no other request to compare with is stored ({found['compared']:,} entries examined)")
    else:
        lines.append(f"nearest of {found['compared']:,}: {nearest['key'][:12]}, {duration(nearest['age_s'])} old")
        lines.append(_line("model", nearest["model"]))
        lines.append(_line("differs", ", ".join(found["differs"])))
    return lines


def _line(name: str, text: str) -> str:
    return f"  {name + ':':<13}{cut(text, 200)}"


def _header(text: str) -> Raw:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or not text.isascii() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"expected NAME: VALUE, found {text!r}")
    return name.strip().encode(), value.strip().encode()
