"""docs/settings.md and config.yaml are what `.ci/update_settings.py` writes from the description of the settings."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from proxy.config.manual import config_yaml, rows
from proxy.config.schema import leaves
from tests.config.kit import Load

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "settings.md").read_text("utf-8")


@pytest.fixture(name="tool")
def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_settings", ROOT / ".ci" / "update_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_those_of_the_code(tool: ModuleType) -> None:
    assert tool.page(PAGE) == PAGE, "run: python .ci/update_settings.py"


def test_the_repositorys_config_yaml_is_that_of_the_code() -> None:
    assert (ROOT / "config.yaml").read_text("utf-8") == config_yaml(), "run: python .ci/update_settings.py"


def test_the_page_has_every_setting_once() -> None:
    shown = re.findall(r"^\| `([^`]+)`", PAGE.split("## Every setting")[1], re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert {path for path, _ in leaves()} <= set(shown)
    assert {"upstreams[].keys[].weight", "server.client_keys[].limits.usd_per_day", "throttle.limits.*.tpm"} <= set(
        shown
    )


def test_every_variable_of_the_page_sets_its_setting(load: Load) -> None:
    named = {row.path: row.variable for row in rows() if row.variable}
    assert len(named) > 80
    for path, variable in named.items():
        assert f"`{variable}`" in PAGE or path in ("server", "cache") or row_is_section(path), path
        default = next(row.default for row in rows() if row.path == path)
        loaded = load(None, {variable: default or "null"})
        assert path not in loaded.sources or loaded.sources[path] in (f"env {variable}", "default"), path


def row_is_section(path: str) -> bool:
    return any(other.startswith(f"{path}.") for other, _ in leaves())


def test_every_variable_that_is_read_is_on_the_page() -> None:
    source = (ROOT / "proxy" / "config" / "environment.py").read_text("utf-8")
    read = set(re.findall(r'"((?:OPENAI|AZURE|PROXY|REDIS)_[A-Z_]*[A-Z])"', source))
    assert len(read) > 8
    assert {name for name in read if f"`{name}`" not in PAGE} == set()
