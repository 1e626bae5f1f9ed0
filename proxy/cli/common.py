"""Flags and loading of the settings, common to all commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from ..config.loader import FLAGS, LoadedSettings, load
from ..config.problems import SettingsError
from ..config.settings import UpstreamSettings

USAGE_ERROR: Final = 2

_HELP: Final[Mapping[str, tuple[str, str]]] = {
    "server.host": ("ADDRESS", "address to listen on (default: 127.0.0.1)"),
    "server.port": ("PORT", "port to listen on, 0 for any free one (default: 8484)"),
    "server.workers": ("N", "processes sharing the port (default: 1)"),
    "cache.backend": ("memory|sqlite|redis|off", "where responses are stored (default: memory)"),
    "cache.mode": ("normal|replay|refresh", "how the cache is used (default: normal)"),
    "cache.cassette": ("FILE", "file of recorded responses"),
    "upstream": ("URL", "base URL of the upstream (default: https://api.openai.com/v1)"),
    "log.level": ("LEVEL", "debug, info, warning or error (default: info)"),
    "log.format": ("text|json", "format of log lines (default: text)"),
}


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and the flags of `serve`. Their values are validated later, with all other settings."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings file (default: ./config.yaml)")
    for path, flag in FLAGS.items():
        metavar, text = _HELP[path]
        parser.add_argument(flag, dest=path, metavar=metavar, help=text)


def load_from_args(
    args: argparse.Namespace,
    environ: Mapping[str, str] | None = None,
    *,
    cwd: Path | None = None,
    upstream: str | None = None,
) -> LoadedSettings:
    """Return `read_from_args`. If the settings are unusable, print each problem and raise SystemExit(2)."""
    try:
        return read_from_args(args, environ, cwd=cwd, upstream=upstream)
    except SettingsError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None


def read_from_args(
    args: argparse.Namespace,
    environ: Mapping[str, str] | None = None,
    *,
    cwd: Path | None = None,
    upstream: str | None = None,
    in_force: LoadedSettings | None = None,
) -> LoadedSettings:
    """Read the settings from flags, environment and file.

    upstream: a base URL in place of all configured upstreams and their keys. in_force: as in `load`.
    Raises SettingsError if they are unusable.
    """
    loaded = load(
        getattr(args, "config", None),
        {path: getattr(args, path, None) for path in FLAGS},
        os.environ if environ is None else environ,
        Path.cwd() if cwd is None else cwd,
        use_upstreams=upstream is None,
        in_force=in_force,
    )
    if upstream is None:
        return loaded
    return replace(loaded, settings=replace(loaded.settings, upstreams=(UpstreamSettings(base_url=upstream),)))
