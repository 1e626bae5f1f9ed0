"""The start-up text."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from . import __version__
from .config.loader import LoadedSettings
from .config.settings import Settings


def banner_lines(loaded: LoadedSettings, address: str, ops_address: str | None, recorded: int = 0) -> list[str]:
    """Return the lines of the start-up text. recorded: the number of responses in the cassette."""
    settings = loaded.settings
    count = sum(len(upstream.keys) or upstream.entra_id for upstream in settings.upstreams)
    keys = str(count) if count else "none (pass-through)"
    replays = settings.cache.mode == "replay"
    if replays:
        keys = "none needed (replay: nothing is sent upstream)"
    lines = [
        f"openai-proxy {__version__}",
        f"listening on {address}",
        *([f"workers: {settings.server.workers}"] if settings.server.workers > 1 else []),
        *([f"probes and metrics on {ops_address}"] if ops_address else []),
        f"config file: {loaded.file or 'none'}",
        *(
            f"upstream {upstream.name}: {upstream.kind} {upstream.base_url}"
            + (f" (priority {upstream.priority})" if upstream.priority else "")
            for upstream in settings.upstreams
        ),
        f"keys: {keys}",
        *([] if replays and settings.cache.cassette else [_cache_line(settings)]),
        *_mode_lines(settings, recorded),
        f"ledger: {os.path.expanduser(settings.ledger.path) if settings.ledger.enabled else 'off'}",
    ]
    if not address.startswith("unix:"):
        lines.append(f"clients: OPENAI_BASE_URL={address}/v1")
    return lines + [f"warning: {warning}" for warning in loaded.warnings]


def _mode_lines(settings: Settings, recorded: int) -> list[str]:
    mode, cassette = settings.cache.mode, settings.cache.cassette
    lines = []
    if mode != "normal":
        lines.append(f"mode: {mode}" + (" (every answer is bought anew)" if mode == "refresh" else ""))
    if cassette is not None:
        verb = "replaying from" if mode == "replay" else "recording into"
        lines.append(f"cassette: {verb} {cassette} ({recorded} answers there)")
    return lines


def _cache_line(settings: Settings) -> str:
    cache = settings.cache
    size = f"{cache.memory_size // (1024 * 1024)} MiB"
    match cache.backend:
        case "off":
            return "cache: off"
        case "sqlite":
            return f"cache: sqlite {os.path.expanduser(cache.path)}, {size} of it in memory"
        case "redis":
            return f"cache: redis {urlsplit(settings.redis.url.reveal()).hostname if settings.redis.url else ''}"
        case _:
            return f"cache: memory ({size}); answers do not survive a restart, --cache sqlite keeps them"
