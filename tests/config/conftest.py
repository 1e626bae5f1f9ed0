from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from proxy.config.loader import LoadedSettings, load
from tests.config.kit import Load, write


@pytest.fixture(name="load")
def _load(tmp_path: Path) -> Load:
    def run(
        text: str | None = None,
        environ: Mapping[str, str] | None = None,
        *,
        automatic: bool = False,
        use_upstreams: bool = True,
        in_force: LoadedSettings | None = None,
        **flags: object,
    ) -> LoadedSettings:
        name = "config.yaml" if automatic else "settings.yaml"
        if text is not None:
            write(tmp_path / name, text)
        config = None if automatic or text is None else Path(name)
        dotted = {flag.replace("__", "."): value for flag, value in flags.items()}
        return load(config, dotted, environ or {}, tmp_path, use_upstreams=use_upstreams, in_force=in_force)

    return run
