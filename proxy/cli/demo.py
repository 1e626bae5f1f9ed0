"""`openai-proxy demo`: the proxy and a simulated OpenAI API in one process: no key, no network, no cost."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from dataclasses import replace

from ..config.loader import LoadedSettings
from ..config.secret import Secret
from ..config.settings import KeySettings, Settings, UpstreamSettings
from .common import add_config_arguments, load_from_args, read_from_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped. Raises SystemExit(2) if the settings are unusable."""
    # Configured upstreams and keys are not read; `with_simulator` adds the simulated one.
    return asyncio.run(_demo(load_from_args(args, upstream=""), args))


async def _demo(loaded: LoadedSettings, args: argparse.Namespace) -> int:
    from ..lifecycle import serve
    from ..simulator.server import SPECIAL_PROMPTS, running_simulator

    async with running_simulator() as base_url:
        needs_client_key = bool(loaded.settings.server.client_keys)

        def with_simulator(loaded: LoadedSettings) -> LoadedSettings:
            return replace(loaded, settings=simulated(loaded.settings, base_url))

        return await serve(
            with_simulator(loaded),
            lambda in_force: with_simulator(read_from_args(args, upstream="", in_force=in_force)),
            extra_lines=lambda address: introduction(address, needs_client_key, SPECIAL_PROMPTS),
        )


def simulated(settings: Settings, base_url: str) -> Settings:
    """Return `settings` with the simulated upstream as the only one, a key without use, and no ledger."""
    key = KeySettings(label="demo", secret=Secret("sk-demo-opens-nothing"), quota="demo")
    # The simulator's port changes with every start, so its name stands in the cache key.
    upstream = UpstreamSettings(name="simulated", base_url=base_url, cache_as="simulated", keys=(key,))
    return replace(settings, upstreams=(upstream,), ledger=replace(settings.ledger, enabled=False))


def introduction(address: str, needs_client_key: bool, prompts: Mapping[str, str]) -> list[str]:
    """Return the lines that say what to try, ready to paste. prompts: special prompts and their effects."""
    key = "A-CLIENT-KEY" if needs_client_key else "unused"
    credential = [f"    -H 'Authorization: Bearer {key}' \\"] if needs_client_key else []
    width = max(map(len, prompts))
    return [
        "",
        "demo: the upstream is simulated in this process. Costs shown are OpenAI's prices; nothing is charged.",
        "",
        "This sends the same request twice: the first is a cache miss, the second a hit that costs 0.",
        "",
        f"  curl -sS -i -w '\\n\\n' {address}/v1/chat/completions {address}/v1/chat/completions \\",
        *credential,
        "    -H 'Content-Type: application/json' \\",
        """    -d '{"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello from curl"}]}'""",
        "",
        "The same in Python (pip install openai):",
        "",
        "  from openai import OpenAI",
        "",
        f'  client = OpenAI(base_url="{address}/v1", api_key="{key}")',
        "  for _ in range(2):",
        "      raw = client.chat.completions.with_raw_response.create(",
        """          model="gpt-4o", messages=[{"role": "user", "content": "Hello from Python"}]""",
        "      )",
        '      print(raw.headers["X-Proxy-Cache"], raw.headers["X-Proxy-Cost-USD"], "USD")',
        "      print(raw.parse().choices[0].message.content)",
        "",
        "Prompts that begin with these words have an effect:",
        "",
        *(f"  {start.ljust(width)}  {effect}" for start, effect in prompts.items()),
        "",
    ]
