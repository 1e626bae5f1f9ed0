"""README and docs/ are held to the code: settings, variables, flags, headers, errors, metrics, commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from proxy.cache.fields import HOSTED_TOOLS, LABELS
from proxy.cache.stores.build import BACKENDS
from proxy.cli import COMMANDS
from proxy.cli import config as config_command
from proxy.cli.cache import SUBCOMMANDS
from proxy.config.loader import FLAGS, load
from proxy.config.schema import leaves
from proxy.config.settings import Settings
from proxy.observability.metrics import Metrics
from proxy.protocol.errors import CODES
from proxy.protocol.headers import EXPOSED
from proxy.protocol.options import NO_OPTIONS, Options, from_headers, from_segment
from proxy.upstream.keys.selection import STRATEGIES
from tests.launch import environment
from tests.pages import MANUAL, PAGES, README, ROOT, block, blocks, first_cells, section

LISTS = [
    (ROOT / "config.yaml").read_text(encoding="utf-8"),
    *(each.text for each in blocks(PAGES, "yaml") if "\nlog: " in each.text),
]
"""Where every setting stands with its default."""


def paths_of(node: yaml.Node | None, path: str = "") -> set[str]:
    """Every setting, by dotted path."""
    found = set()
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{path}.{key.value}".lstrip(".")
            found |= {inner, *paths_of(value, inner)}
    return found


@pytest.mark.parametrize("text", LISTS, ids=lambda text: text[:16])
def test_lists_of_settings_have_every_setting(text: str) -> None:
    ours, theirs = paths_of(yaml.compose(text)), {path for path, _ in leaves()} - {"upstreams"}
    missing = {path for path in theirs - ours if path.rpartition(".")[0] != "cost.budget"}
    unknown = {path for path in ours if not any(f"{other}.".startswith(f"{path}.") for other in theirs)}
    assert (missing, unknown) == (set(), set())


@pytest.mark.parametrize("text", LISTS, ids=lambda text: text[:16])
def test_lists_of_settings_are_valid_and_say_the_defaults(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    loaded = load(file, {}, {}, tmp_path)
    assert loaded.settings == load(None, {}, {}, tmp_path / "nowhere").settings
    assert loaded.warnings == ()


@pytest.mark.parametrize("text", LISTS, ids=lambda text: text[:16])
def test_example_upstreams_are_valid(tmp_path: Path, text: str) -> None:
    example = re.search(r"(?<=\n)# upstreams:.*\n(?:#   .*\n)+", text)
    assert example is not None
    written = re.sub("^# ", "", example[0].replace("/run/secrets", str(tmp_path)).replace("…", "x"), flags=re.MULTILINE)
    for name in re.findall(rf"{tmp_path}/([\w-]+)", written):
        (tmp_path / name).write_text(f"sk-{name}")
        (tmp_path / name).chmod(0o600)
    file = tmp_path / "settings.yaml"
    file.write_text(written)
    environ = {"OPENAI_API_KEY": "sk-1,sk-2", "AZURE_OPENAI_API_KEY": "azure-1"}
    settings = load(file, {}, environ, tmp_path).settings
    assert [(u.kind, len(u.keys)) for u in settings.upstreams] == [("openai", 3), ("azure", 1)]


@pytest.mark.slow
def test_commands_and_flags_are_those_of_the_program(tmp_path: Path) -> None:
    def usage(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "proxy", *args, "--help"],
            cwd=tmp_path,
            env=environment(tmp_path, {"COLUMNS": "200"}),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = MANUAL["commands.md"]
    assert set(re.findall(r"`openai-proxy ([a-z]+)", "".join(first_cells(text)))) == set(COMMANDS)
    for command in [command for command in COMMANDS if command not in ("cache", "config")]:
        assert f"`openai-proxy {command}`" in text
        assert command in usage()
        shown = set(re.findall(r"(?<![\w-])--[a-z-]+", usage(command))) - {"--help"}
        assert {"--config", *FLAGS.values()} <= shown
        assert {flag for flag in shown if f"`{flag}" not in text and f" {flag} " not in text} == set()
    for subcommand in config_command.SUBCOMMANDS:
        assert f"`openai-proxy config {subcommand}" in text
        shown = set(re.findall(r"(?<![\w-])--[a-z-]+", usage("config", subcommand))) - {"--help"}
        assert {flag for flag in shown if f"`{flag}" not in text} == set()
    assert "`openai-proxy cache …`" in text
    assert "cache" in usage()
    text += section("caching.md", "The stored responses")
    for subcommand in SUBCOMMANDS:
        assert f"`{subcommand}`" in text
        shown = set(re.findall(r"(?<![\w-])--[a-z-]+", usage("cache", subcommand))) - {"--help"}
        assert {"--config", *FLAGS.values()} <= shown
        assert {flag for flag in shown if f"`{flag}" not in text and f" {flag} " not in text} == set()


def test_every_variable_is_there() -> None:
    text = section("settings.md", "Environment")
    source = (ROOT / "proxy/config/environment.py").read_text(encoding="utf-8")
    read = set(re.findall(r'"((?:OPENAI|AZURE|PROXY|REDIS)_[A-Z_]*[A-Z])"', source))
    assert len(read) > 10
    assert {name for name in read if f"`{name}`" not in text} == set()


def test_every_error_has_its_status() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", section("routes-and-errors.md", "Errors"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == {(str(kind.status), code) for code, kind in CODES.items()}


def test_every_metric_is_there() -> None:
    names = set(re.findall(r"`(openai_proxy_\w+)`", section("metrics-and-logs.md", "Metrics")))
    mine = {m.name + ("_total" if m.type == "counter" else "") for m in Metrics().registry.collect()}
    assert names == mine
    everywhere = {name for text in PAGES.values() for name in re.findall(r"`(openai_proxy_\w+)`", text)}
    assert everywhere == mine


VALUES = {
    "ttl": "1h",
    "namespace": "ci",
    "sample": "1",
    "tag": "team:search",
    "max-wait": "5s",
    "timeout": "1m",
    "retries": "2",
    "stream-cost": "comment",
    "run": "eval-7",
    "max-cost": "2.50",
}


def test_options_mean_the_same_in_a_header_and_in_the_base_url() -> None:
    text = section("headers.md", "Request options")
    rows = re.findall(r"^\| `([\w-]+)(?:: (\S+))?` \| `(.+?)` \|", text, re.MULTILINE)
    seen = set()
    for header, given, option in rows:
        name, _, shown = option.partition("=")
        value = "60" if given == "max-age=N" else VALUES.get(name, given)
        if header == "Cache-Control":
            by_header = from_headers(NO_OPTIONS, [(header, given.replace("N", "60"))])
            by_url = from_segment(option.replace("N", "60"))
        else:
            by_header = from_headers(NO_OPTIONS, [(header, value)])
            by_url = from_segment(f"{name}={shown or value}")
        assert by_header == by_url != NO_OPTIONS, (header, option)
        seen |= {f for f in Options.__dataclass_fields__ if getattr(by_url, f) != getattr(NO_OPTIONS, f)}
    assert seen == set(Options.__dataclass_fields__)


def test_every_header_that_the_code_adds_is_there() -> None:
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "proxy").rglob("*.py")]
    used = {h.lower() for s in sources for h in re.findall(r"X-Proxy-[A-Za-z-]*[a-z]", s, re.IGNORECASE)}

    def documented(text: str) -> set[str]:
        return {h.lower() for h in re.findall(r"X-Proxy-[A-Za-z-]*[A-Za-z]", text)}

    in_comments = {"x-proxy-cost-usd", "x-proxy-prompt-tokens", "x-proxy-completion-tokens"}
    assert used - documented(MANUAL["headers.md"]) == set()
    assert documented("\n".join(PAGES.values())) - used - in_comments == set()


def test_headers_that_a_browser_may_read_are_those_of_the_code() -> None:
    rows = section("headers.md", "Response headers").splitlines()
    added = {name for row in rows if row.startswith("| `") for name in re.findall(r"`(.+?)`", row.split(" | ")[0])}
    named = set(re.findall(r"`([A-Za-z][\w-]+)`", section("headers.md", "Headers that a browser may read")))
    ours = {name for name in added if name.startswith("X-Proxy-")}
    assert named - {"Access-Control-Expose-Headers"} | ours == set(EXPOSED)


def test_tables_of_the_code_are_those_of_the_manual() -> None:
    assert [cell.strip("`") for cell in first_cells(section("keys-and-limits.md", "Which key serves"))[1:]] == list(
        STRATEGIES
    )
    stores = first_cells(section("caching.md", "Where entries are kept, and how long"))[1:]
    assert [cell.strip("`") for cell in stores] == [*BACKENDS, "off"]
    never = section("caching.md", "What is never cached")
    assert {kind for kind in HOSTED_TOOLS if not re.search(rf"`{kind}…?`", never)} == set()
    ignored = next(row for row in MANUAL["caching.md"].splitlines() if "`cache.ignore_fields`:" in row)
    assert {name for name in LABELS if f"`{name}`" not in ignored} == set()


def test_every_route_of_the_operator_is_there() -> None:
    source = (ROOT / "proxy/server/admin.py").read_text(encoding="utf-8")
    paths = set(re.findall(r'"(/_proxy/[\w/]*|/metrics)"', source))
    assert len(paths) > 10
    text = section("routes-and-errors.md", "Routes")
    assert {path for path in paths if path not in text} == set()


def test_ci_runs_the_readmes_test_command() -> None:
    command = block("sh", "pytest").strip().rpartition(".venv/bin/python ")[2]
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert command == "-m pytest --cov -n auto"
    assert f'"$venv/bin/python" {command}\n' in script


def test_the_examples_for_containers_are_sound(tmp_path: Path) -> None:
    compose = yaml.safe_load(block("yaml", "services:"))["services"]
    given = {
        name: re.sub(r"\$\{\w+:\?\}", "a-long-secret-text", str(value))
        for name, value in compose["openai-proxy"]["environment"].items()
    }
    server = load(None, {}, given | {"PROXY__SERVER__HOST": "0.0.0.0"}, tmp_path).settings.server
    assert server.allowed_hosts == ("openai-proxy",)
    assert len(server.client_keys) == 1
    pod = yaml.safe_load(block("yaml", "kind: Pod"))["spec"]["initContainers"][0]
    given = {item["name"]: item.get("value", "sk-something") for item in pod["env"]}
    server = load(None, {}, given, tmp_path).settings.server
    assert (server.host, server.ops) == ("127.0.0.1", ("0.0.0.0", 8485))
    assert pod["livenessProbe"]["httpGet"]["port"] == 8485


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_default_settings_are_the_defaults_of_the_code(tmp_path: Path) -> None:
    assert load(None, {}, {}, tmp_path).settings == Settings()
