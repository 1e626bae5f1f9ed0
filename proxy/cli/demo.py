"""`openai-proxy demo`: the proxy before a simulated OpenAI, in one process: no key, no network, no cost."""

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
    """Serves until stopped; the exit status. Raises SystemExit(2) for settings that cannot be used."""
    # Upstreams and keys of the user's are not even read; `simulated` puts the address of the real one in.
    return asyncio.run(_demo(load_from_args(args, upstream=""), args))


async def _demo(loaded: LoadedSettings, args: argparse.Namespace) -> int:
    from ..lifecycle import serve
    from ..simulator.server import SPECIAL_PROMPTS, running_simulator

    async with running_simulator() as base_url:
        guarded = bool(loaded.settings.server.client_keys)

        def before_it(loaded: LoadedSettings) -> LoadedSettings:
            return replace(loaded, settings=simulated(loaded.settings, base_url))

        return await serve(
            before_it(loaded),
            lambda in_force: before_it(read_from_args(args, upstream="", in_force=in_force)),
            extra_lines=lambda address: introduction(address, guarded, SPECIAL_PROMPTS),
        )


def simulated(settings: Settings, base_url: str) -> Settings:
    """The same settings with one upstream, the simulated one, and one key that opens nothing; what is simulated goes
    into no ledger.
    """
    key = KeySettings(label="demo", secret=Secret("sk-demo-opens-nothing"), quota="demo")
    # Its port is another each time: by name what was stored or recorded is found again.
    upstream = UpstreamSettings(name="simulated", base_url=base_url, cache_as="simulated", keys=(key,))
    return replace(settings, upstreams=(upstream,), ledger=replace(settings.ledger, enabled=False))


def introduction(address: str, guarded: bool, prompts: Mapping[str, str]) -> list[str]:
    """What to try, ready to paste. `guarded`: the proxy wants one of its client keys."""
    key = "A-CLIENT-KEY" if guarded else "unused"
    credential = [f"    -H 'Authorization: Bearer {key}' \\"] if guarded else []
    width = max(map(len, prompts))
    return [
        "",
        "demo: the upstream is a simulation in this process; the costs shown are what OpenAI would charge.",
        "",
        "This asks the same twice: the first answer is a miss, the second a hit that costs 0.",
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
        "Prompts that begin with these words do something else:",
        "",
        *(f"  {start.ljust(width)}  {what}" for start, what in prompts.items()),
        "",
    ]
