"""`openai-proxy check`: validates the settings and prints those in force; `--online` asks whether the keys work."""

from __future__ import annotations

import argparse
import asyncio
import ssl
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from ..config.render import lines
from ..cost.pricing import PriceTable
from .common import add_config_arguments, load_from_args

if TYPE_CHECKING:
    import aiohttp

    from ..config.settings import KeySettings, Settings, UpstreamSettings

_TIMEOUT: Final = 10.0
"""Seconds that a key's upstream has to respond."""

_MEANINGS: Final = {
    200: "ok",
    401: "the key is not accepted",
    403: "the key may not do this",
    404: "nothing is there: is the base URL right?",
    429: "the key works, but has reached a limit",
}
_WORKING: Final = frozenset({200, 429})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--online", action="store_true", help="ask each key GET /models, which is free")


def run(args: argparse.Namespace) -> int:
    """Return 0; 1 if a key failed online. Raises SystemExit(2) for settings that cannot be used."""
    loaded = load_from_args(args)
    print(f"# settings file: {loaded.file or 'none'}")
    for line in lines(loaded):
        print(line)
    count = sum(len(upstream.keys) or upstream.entra_id for upstream in loaded.settings.upstreams)
    print(f"# keys: {count or 'none (pass-through)'}")
    prices = PriceTable()
    print(f"# prices: of {prices.as_of}, {prices.age(datetime.now(UTC).date())} days old")
    for line in limit_lines(loaded.settings):
        print(f"# {line}")
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not args.online:
        return 0
    return 0 if asyncio.run(_online(loaded.settings)) else 1


def limit_lines(settings: Settings) -> Iterator[str]:
    """Yield the limits that hold at each key, if `throttle.tier` adds to those of the settings."""
    if settings.throttle.tier is None:
        return
    for upstream in settings.upstreams:
        named: list[tuple[str, KeySettings | None]] = [(key.label, key) for key in upstream.keys]
        for label, key in named or [(upstream.name, None)]:
            for glob, limits in settings.limits_of(upstream, key).items():
                text = ", ".join(f"{name} {limit}" for name, limit in asdict(limits).items() if limit is not None)
                yield f"limits of {label} for {glob}: {text}"


async def _online(settings: Settings) -> bool:
    """Print one line for each key. Return whether all keys work."""
    import aiohttp  # only here: a check without --online starts without it

    pairs = [(upstream, key) for upstream in settings.upstreams for key in upstream.keys]
    if not pairs:
        print("no keys to ask")
        return True
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        results = await asyncio.gather(*(_ask(session, upstream, key) for upstream, key in pairs))
    width = max(len(key.label) for _, key in pairs)
    for (upstream, key), (_, text) in zip(pairs, results, strict=True):
        print(f"{key.label:<{width}}  {upstream.name}  {text}")
    return all(works for works, _ in results)


async def _ask(session: aiohttp.ClientSession, upstream: UpstreamSettings, key: KeySettings) -> tuple[bool, str]:
    """Return whether a key works at its upstream, and what to print. Nothing that the upstream sends is printed."""
    import aiohttp

    try:
        url, headers = models_url(upstream), credentials(upstream, key)
        proxy = upstream.proxy.reveal() if upstream.proxy is not None else None
        trust = ssl.create_default_context(cafile=upstream.ca_file) if upstream.ca_file is not None else True
        async with session.get(url, headers=headers, allow_redirects=False, proxy=proxy, ssl=trust) as response:
            status = response.status
    except TimeoutError:
        return False, f"no answer within {_TIMEOUT:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return False, f"not reached: {type(error).__name__}"
    redirect = "a redirect, which is not followed" if 300 <= status < 400 else "unexpected"
    return status in _WORKING, f"{status} {_MEANINGS.get(status, redirect)}"


def models_url(upstream: UpstreamSettings) -> str:
    """Return the URL at which an upstream lists its models."""
    if upstream.kind != "azure":
        return f"{upstream.base_url}/models"
    if upstream.api_version is None:
        return f"{upstream.base_url}/openai/v1/models"
    return f"{upstream.base_url}/openai/models?api-version={upstream.api_version}"


def credentials(upstream: UpstreamSettings, key: KeySettings) -> dict[str, str]:
    if upstream.kind == "azure":
        return {"api-key": key.secret.reveal()}
    headers = {"Authorization": f"Bearer {key.secret.reveal()}"}
    if key.organization:
        headers["OpenAI-Organization"] = key.organization
    if key.project:
        headers["OpenAI-Project"] = key.project
    return headers
