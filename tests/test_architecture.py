"""The house rules, held against the code (`proxy/__init__.py`): who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "proxy"
FILES = sorted(PACKAGE.rglob("*.py"))

LONG = 400
LONGER: dict[str, str] = {}
"""Files of more than `LONG` lines, each with its reason."""

PURE = {"__future__", "base64", "binascii", "bisect", "collections", "collections.abc", "contextlib", "dataclasses"}
PURE |= {"datetime", "decimal", "email.utils", "enum", "fnmatch", "functools", "hashlib", "itertools", "json", "math"}
PURE |= {"operator", "re", "string", "struct", "sys", "types", "typing", "urllib.parse", "zlib", "msgspec", "orjson"}
"""What the core may import beside itself: nothing that waits, reads a clock, draws a number or opens anything."""

READS = {
    "proxy.core.pricing": {"importlib.resources", "importlib"},  # the price list: package data, the same for everybody
    "proxy.core.envelope": {"compression", "backports"},  # zstd: bytes to bytes
}
"""What single rooms of the core may import beyond that, and why."""

DRIVERS = (
    "redis",
    "redis_lease",
    "redis_link",
    "redis_objects",
    "redis_runs",
    "sqlite",
    "sqlite_file",
    "sqlite_writer",
)
"""Rooms of `stores` that are edges of their own: they speak to a store, wait for it and time it. Loaded when named."""

LIMITERS = ("proxy.limiters.redis", "proxy.limiters.redis_budgets", "proxy.limiters.redis_states")
"""The same among the limiters."""

REDIS_LINK = {"limiters": "proxy.stores.redis_link"}
"""What one kind of plugin may use of another: there is one way to Redis."""

CLOCKS_ALLOWED = {"proxy.edge.logs": "writes down the time that a log record brings with it"}
CLOCKS_ALLOWED["proxy.ledger.writer"] = "its own pauses between two attempts"
CLOCKS_ALLOWED |= {f"proxy.stores.{name}": "its own deadlines, breaker and probes" for name in DRIVERS}

IMPURE_CALLS = {"open", "print", "input", "eval", "exec", "__import__", "breakpoint"}
CLOCKS = {"now", "utcnow", "today", "localtime", "formatdate", "time_ns", "perf_counter"}

HTTP_AND_STORES = {"aiohttp", "redis", "sqlite3", "multidict", "yarl", "socket"}
PLUGINS = ("providers", "selection", "stores", "endpoints", "limiters")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, typed: bool = True) -> Iterator[tuple[str, int]]:
    """(absolute module, line) of every import in a file, those in functions too. typed: and those for type checkers."""
    package = list(path.relative_to(ROOT).parent.parts)
    tree = ast.parse(path.read_text("utf-8"))
    if not typed:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for name in node.names:
                whole = f"{stem}.{name.name}"
                yield (whole if is_module(whole) else stem), node.lineno


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


IMPORTS = {module_of(path): sorted(set(imports_of(path))) for path in FILES}


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def rooms(*packages: str) -> list[str]:
    """The modules of some packages."""
    return [module for module in IMPORTS if within(module, *packages)]


def rest(*packages: str) -> list[str]:
    """All other modules."""
    return [module for module in IMPORTS if not within(module, *packages)]


def offences(modules: Iterable[str], forbidden: Iterable[str], but: Iterable[str] = ()) -> list[str]:
    """Imports of `forbidden` (less `but`) in these very modules, as readable lines."""
    return [
        f"{module}:{line} imports {name}"
        for module in modules
        for name, line in IMPORTS[module]
        if within(name, *forbidden) and not within(name, *but)
    ]


def test_the_scan_sees_what_there_is() -> None:
    """Else every rule below would hold for want of imports."""
    assert len(FILES) > 40
    for module, name in (
        ("proxy.core.options", "proxy.core.errors"),
        ("proxy.edge.upstream", "aiohttp"),
        ("proxy.cli.serve", "proxy.app"),  # within a function
        ("proxy.app", "proxy.edge.logs"),  # `from .edge import logs`
        ("proxy.providers.azure", "proxy.providers"),  # for type checkers only
    ):
        assert len(offences([module], [name])) > 0, (module, name)


# --- the core ---------------------------------------------------------------------------------------------------------

CORE = sorted((PACKAGE / "core").glob("*.py"))


@pytest.mark.parametrize("path", CORE, ids=[path.stem for path in CORE])
def test_the_core_imports_only_itself_and_what_is_pure(path: Path) -> None:
    for name, line in imports_of(path):
        if within(name, "proxy"):
            assert within(name, "proxy.core"), f"line {line}: {name}"
            continue
        assert name in PURE | READS.get(module_of(path), set()), f"line {line}: {name}"


@pytest.mark.parametrize("path", CORE, ids=[path.stem for path in CORE])
def test_the_core_reads_no_clock_and_opens_nothing(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        assert (
            not isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith)
            or path.stem == "ports"
        )
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name):
                assert called.id not in IMPURE_CALLS, f"line {node.lineno}: {called.id}()"
            elif isinstance(called, ast.Attribute):
                assert called.attr not in CLOCKS, f"line {node.lineno}: .{called.attr}()"
                assert (
                    not (isinstance(called.value, ast.Name) and called.value.id == "sys") or called.attr == "getsizeof"
                )


def loaded_by(module: str) -> set[str]:
    """What importing a module brings into a fresh interpreter, beside what coverage may have put there before."""
    code = f"import sys; before = set(sys.modules); import {module}; print('\\n'.join(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_the_whole_core_loads_without_an_event_loop() -> None:
    loaded = loaded_by(", ".join(module_of(path) for path in CORE))
    assert not loaded & {"asyncio", "aiohttp", "yarl", "multidict", "redis", "sqlite3", "yaml", "prometheus_client"}
    assert {name for name in loaded if within(name, "proxy")} == {"proxy", "proxy.core"} | {
        module_of(path) for path in CORE
    }


# --- who may import whom ----------------------------------------------------------------------------------------------

STORY = rest(
    "proxy.app",
    "proxy.edge",
    "proxy.cli",
    "proxy.simulator",
    "proxy.config",
    "proxy.__main__",
    "proxy.workers",
    "proxy.ledger",
    *(f"proxy.stores.{name}" for name in DRIVERS),
    *LIMITERS,
)


def test_the_story_knows_no_http_library_and_no_database() -> None:
    assert {"proxy.journey", "proxy.exchange", "proxy.relay", "proxy.gate", "proxy.world"} <= set(STORY)
    assert offences(STORY, HTTP_AND_STORES) == []
    assert offences(STORY, ["proxy.edge", "proxy.app", "proxy.cli"]) == []
    assert not loaded_by("proxy.journey") & (HTTP_AND_STORES - {"socket"})  # asyncio brings that one


def test_plugins_never_import_each_other() -> None:
    """Nor anything but the core: a new one is one file and one line in the table of its package."""
    for kind in PLUGINS:
        package = f"proxy.{kind}"
        files = rooms(package)
        own_rooms = ["proxy.core", "proxy.seams", package, REDIS_LINK.get(kind, package)]
        assert offences(files, ["proxy"], but=own_rooms) == []
        for file in files:
            if file != package:
                # `sqlite_writer` is part of `sqlite`; `tiered` joins memory to the others and is none of them.
                stem = file.rpartition(".")[2].partition("_")[0]
                own = [other for other in files if other.rpartition(".")[2].partition("_")[0] == stem]
                own += ["proxy.stores.memory"] if stem == "tiered" else []
                assert offences([file], [other for other in files if other not in (*own, package)]) == []


def test_only_the_composition_root_knows_everybody() -> None:
    """Nobody imports the root but the commands, and nobody the commands but `python -m proxy`."""
    assert offences(rest("proxy.app", "proxy.cli"), ["proxy.app"]) == []
    assert offences(rest("proxy.cli", "proxy.__main__"), ["proxy.cli"]) == []


def test_the_edges_are_reached_from_the_root_and_from_each_other_only() -> None:
    assert offences(rest("proxy.app", "proxy.edge"), ["proxy.edge"]) == []


def test_the_simulator_belongs_to_the_demo_alone() -> None:
    assert offences(rest("proxy.cli.demo", "proxy.simulator"), ["proxy.simulator"]) == []
    assert offences(rooms("proxy.simulator"), ["proxy"], but=["proxy.simulator", "proxy.core"]) == []


def test_the_settings_know_the_core_only() -> None:
    assert offences(rooms("proxy.config"), ["proxy"], but=["proxy.config", "proxy.core"]) == []


def test_one_room_reads_clocks_and_rolls_dice() -> None:
    others = rest("proxy.seams", "proxy.simulator", *CLOCKS_ALLOWED)
    assert offences(others, ["time", "random", "secrets", "uuid"]) == []


def test_http_is_spoken_at_the_edges() -> None:
    drivers = ["proxy.ledger", *(f"proxy.stores.{name}" for name in DRIVERS), *LIMITERS]
    others = rest("proxy.app", "proxy.edge", "proxy.simulator", "proxy.cli", "proxy.workers", *drivers)
    assert offences(others, HTTP_AND_STORES) == []
    assert offences(rooms("proxy.workers"), HTTP_AND_STORES - {"socket"}) == []  # a pair of them is their wire


def test_the_workers_are_known_to_the_root_and_the_edges() -> None:
    assert offences(rest("proxy.workers", "proxy.app", "proxy.edge"), ["proxy.workers"]) == []
    assert offences(rooms("proxy.workers"), ["proxy.app", "proxy.edge", "proxy.cli", "proxy.journey"]) == []


def test_no_module_leads_back_to_itself() -> None:
    """What only type checkers read does not count."""
    graph = {module_of(path): {name for name, _ in imports_of(path, typed=False)} for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for name in graph.get(module, set()):
                if not module.startswith(name + "."):  # a package is there before its modules
                    visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


# --- size -------------------------------------------------------------------------------------------------------------


def test_long_files_have_a_reason() -> None:
    long = {str(path.relative_to(ROOT)) for path in FILES if len(path.read_text("utf-8").splitlines()) > LONG}
    assert long <= set(LONGER), "split it, or say why not"
    assert set(LONGER) <= long, "no longer long: take it off the list"


def test_every_module_says_what_it_is_for() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path
