"""`openai-proxy cache explain REQUEST.json`: the key of a request, whether it would be cached, and how it differs from
the nearest stored one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from ...config.settings import Settings
from ...pipeline.explain import explain, request_of
from ...protocol.errors import ProxyError
from ...protocol.headers import Raw
from ...protocol.routes import ENDPOINTS
from ...services import build_services
from ...system.clock import SYSTEM_CLOCK
from ..common import load_from_args
from .interface import CommandError, UsageError
from .local import CacheCommand
from .text import ProgressLine, cut, duration, say

_TARGETS: Final = {endpoint: f"/v1{path}" for path, endpoint in ENDPOINTS.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="REQUEST.json", type=Path, help="the body of the request; - for standard input")
    parser.add_argument("--endpoint", choices=tuple(_TARGETS), default="chat", help="where it goes (default: chat)")
    parser.add_argument("--target", help="the same as a path, options and query included: /_/namespace=ci/v1/…")
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        type=_header,
        metavar="NAME: VALUE",
        help="a header of the request, such as 'X-Proxy-Cache-Namespace: ci'; repeatable",
    )
    parser.add_argument(
        "--client", metavar="NAME", help="whose request it is (default: the only client's, or nobody's)"
    )


async def run(args: argparse.Namespace, session: CacheCommand) -> int:
    """0; also where nothing like it is stored. Raises UsageError for what is no request."""
    try:
        body = sys.stdin.buffer.read() if str(args.file) == "-" else args.file.read_bytes()
    except OSError as error:
        raise CommandError(f"{args.file}: {error.strerror or error}") from None
    target: str = args.target or _TARGETS[args.endpoint]
    if session.url is not None:
        found = await _asked(session, session.url, target, args, body)
    else:
        found = await _worked_out(session, load_from_args(args).settings, target, args, body)
    say(args, found, _lines(found))
    return 0


async def _asked(session: CacheCommand, url: str, target: str, args: argparse.Namespace, body: bytes) -> dict[str, Any]:
    """By the running proxy."""
    from .remote import asking

    headers = {name.decode(): value.decode() for name, value in args.header}
    async with asking(url, session.settings.server.admin_key) as remote:
        return await remote.explain(
            {"target": target} | ({"client": args.client} if args.client else {}), headers, body
        )


async def _worked_out(
    session: CacheCommand, settings: Settings, target: str, args: argparse.Namespace, body: bytes
) -> dict[str, Any]:
    """Here, by the settings that a proxy would have. (`session` knows no upstreams, which are part of the key.)"""
    from ...server.access import client_named  # which loads the HTTP library

    services = build_services(settings, SYSTEM_CLOCK)
    try:
        client = client_named(settings, args.client)
        call = request_of(services.addresses, target, args.header, body, client)
    except ProxyError as refusal:
        raise UsageError(refusal.message) from None
    async with session.client() as cabinet:
        total = int((await cabinet.facts()).get("entries", 0))
        with ProgressLine("comparing", total) as progress:
            pages = cabinet.list({"endpoint": call.endpoint})
            found = await explain(services.planner, settings.cache, call, pages, progress.step)
    return {"client": client.name or None} | found


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [f"cacheable: {'yes' if found['cacheable'] else 'no'}", f"now: {found['reason']}"]
    if found["key"]:
        lines.append(f"key: {found['key']}")
    lines += ["", f"made of (for {'client ' + found['client'] if found['client'] else 'no client in particular'}):"]
    lines.append(_line("endpoint", found["endpoint"]))
    for name, value in (found["parts"] or {}).items():
        text = ", ".join(value) if isinstance(value, list) else value
        if text:
            lines.append(_line(name, text))
    if found["fields"]:
        lines.append(_line("digests of", ", ".join(found["fields"])))
    if found["left_out"]:
        lines.append(_line("left out", ", ".join(found["left_out"])))
    for card in found["stored"]:
        left = card["ttl_left_s"]
        state = f"{duration(left)} left" if left >= 0 else "over"
        lines += ["", f"stored as {card['form']}, {duration(card['age_s'])} ago, lifetime: {state}"]
    if not found["cacheable"]:
        return lines
    nearest = found["nearest"]
    lines.append("")
    if nearest is None:
        lines.append(f"nothing else to compare with is stored (of {found['compared']:,} answers looked at)")
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
