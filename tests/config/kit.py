"""Loading settings from texts, for the tests of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from proxy.config.loader import LoadedSettings
from proxy.config.problems import SettingsError


class Load(Protocol):
    def __call__(
        self,
        text: str | None = None,
        environ: Mapping[str, str] | None = None,
        *,
        automatic: bool = False,
        use_upstreams: bool = True,
        in_force: LoadedSettings | None = None,
        **flags: object,
    ) -> LoadedSettings:
        """Settings of `settings.yaml` with this text (`automatic`: of a `config.yaml` that is found, not named)."""


def problems(
    load: Load, text: str | None = None, environ: Mapping[str, str] | None = None, **rest: object
) -> list[str]:
    """Every problem of settings that cannot be used."""
    try:
        load(text, environ, **rest)  # type: ignore[arg-type]
    except SettingsError as error:
        return [str(problem) for problem in error.problems]
    return []


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path
