"""The rules of the layout, held against the code (`proxy/__init__.py`): imports go one way, decisions are pure."""

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

LAYERS = (
    ("__main__",),
    ("cli",),
    ("simulator",),
    ("lifecycle",),
    ("app",),
    ("server",),
    ("workers",),
    ("reload", "banner"),
    ("services",),
    ("coordination",),
    ("observability",),
    ("pipeline",),
    ("upstream",),
    ("accounting",),
    ("cache",),
    ("config",),
    ("protocol", "cost", "system"),
)
"""The packages and loose files of `proxy`, from the command line down. An import goes down or stays in its package."""

MAX_LINES = 400
LONGER: dict[str, str] = {}
"""Files of more than `MAX_LINES` lines, each with its reason."""

MAX_FUNCTION_LINES = 60
LONGER_FUNCTIONS: dict[str, str] = {}
"""Functions of more than `MAX_FUNCTION_LINES` lines, each with its reason. They go; none comes."""

MAX_PARAMETERS = 6
MORE_PARAMETERS: dict[str, str] = {
    "proxy.protocol.request.ProxyRequest.from_body": "one for each field that the body does not say",
    "proxy.pipeline.coalescing.coalescer.Coalescer.__init__": "what `app` builds for it",
    "proxy.pipeline.fetch.Fetcher.__init__": "what `app` builds for it",
    "proxy.pipeline.handler.RequestHandler.__init__": "what `app` builds for it",
    "proxy.pipeline.stream_replies.StreamReplies.__init__": "what `app` builds for it",
    "proxy.server.api.ApiHandler.__init__": "what `app` builds for it",
    "proxy.upstream.keys.pool.KeyPool.__init__": "what `services` builds for it",
}
"""Functions of more than `MAX_PARAMETERS` parameters beside `self` and `cls`, each with its reason."""

PURE = {"__future__", "base64", "binascii", "bisect", "collections", "collections.abc", "contextlib", "dataclasses"}
PURE |= {"datetime", "decimal", "email.utils", "enum", "fnmatch", "functools", "hashlib", "heapq", "itertools", "json"}
PURE |= {"math", "operator", "re", "string", "struct", "sys", "types", "typing", "urllib.parse", "zlib"}
PURE |= {"msgspec", "msgspec.structs", "orjson", "importlib.resources", "importlib", "compression", "backports"}
PURE |= {"ipaddress", "brotli"}
"""What a pure file may import beside other pure files: nothing that waits, reads a clock or draws a number.

`importlib.resources` reads data that is part of the package, the same for everybody; `compression`, `backports` (zstd)
and `brotli` are bytes to bytes.
"""

IMPURE = {
    "proxy.__main__": "starts the command",
    "proxy.accounting.budgets.budgets": "waits for shared budgets",
    "proxy.accounting.budgets.redis": "speaks to Redis",
    "proxy.accounting.ledger.file": "opens SQLite",
    "proxy.accounting.ledger.ledger": "a background task and a thread",
    "proxy.accounting.ledger.reader": "reads SQLite",
    "proxy.accounting.ledger.writer": "a thread that writes SQLite",
    "proxy.accounting.runs.redis": "speaks to Redis",
    "proxy.accounting.runs.registry": "waits for shared runs",
    "proxy.app": "builds everything",
    "proxy.banner": "reads the environment",
    "proxy.cache.lookup": "waits for stores",
    "proxy.cache.planner": "digests large bodies in a thread",
    "proxy.cache.stores.build": "builds what waits",
    "proxy.cache.stores.cassette": "reads and writes the file",
    "proxy.cache.stores.intake": "waits for stores",
    "proxy.cache.stores.redis": "speaks to Redis",
    "proxy.cache.stores.sqlite": "reads SQLite",
    "proxy.cache.stores.sqlite_file": "tables as `system.sqlite` describes them",
    "proxy.cache.stores.sqlite_writer": "a thread that writes SQLite",
    "proxy.cache.stores.tiered": "waits for stores",
    "proxy.cli": "prints, reads arguments",
    "proxy.coordination": "builds what waits",
    "proxy.config.environment": "makes trees, which YAML is parsed into",
    "proxy.config.key_sources": "reads key files, runs key commands",
    "proxy.config.keys": "reads key files",
    "proxy.config.loader": "reads files",
    "proxy.config.reading": "resolves paths, runs key commands",
    "proxy.config.tree": "parses YAML",
    "proxy.config.upstreams": "reads certificate files",
    "proxy.config.validate": "expands paths",
    "proxy.lifecycle": "signals, listeners",
    "proxy.observability.budget_gauges": "Prometheus' library",
    "proxy.observability.logs": "writes the log",
    "proxy.observability.event_counters": "reads what this process has counted",
    "proxy.observability.metrics": "Prometheus' library",
    "proxy.pipeline.coalescing.broadcast": "one stream, many readers that wait",
    "proxy.pipeline.coalescing.coalescer": "waits for the leader",
    "proxy.pipeline.coalescing.cross_process": "waits for other processes",
    "proxy.pipeline.coalescing.redis_lock": "speaks to Redis",
    "proxy.pipeline.coalescing.reply": "carries a stream",
    "proxy.pipeline.coalescing.single_flight": "a task for each flight",
    "proxy.pipeline.embeddings": "sends",
    "proxy.pipeline.explain": "waits for stores",
    "proxy.pipeline.fetch": "sends",
    "proxy.pipeline.handler": "the story: it waits",
    "proxy.pipeline.recorder": "logs",
    "proxy.pipeline.relay": "relays a stream",
    "proxy.pipeline.stale": "background tasks",
    "proxy.pipeline.stream_replies": "relays streams",
    "proxy.reload": "reads files, waits",
    "proxy.server": "speaks HTTP",
    "proxy.services": "builds what waits",
    "proxy.simulator": "speaks HTTP",
    "proxy.system.clock": "the clock",
    "proxy.system.redis": "speaks to Redis",
    "proxy.system.state_changes": "writes to the log",
    "proxy.system.sockets": "sets up sockets",
    "proxy.system.sqlite": "opens SQLite",
    "proxy.system.sqlite_writer": "a thread that writes SQLite",
    "proxy.system.tasks": "background tasks",
    "proxy.system.threads": "calls functions in threads",
    "proxy.upstream.attempt": "sends",
    "proxy.upstream.client": "speaks HTTP",
    "proxy.upstream.client_errors": "knows aiohttp's exceptions",
    "proxy.upstream.deadline": "a timeout that can move",
    "proxy.upstream.endpoint_sender": "sends",
    "proxy.upstream.entra": "a background task",
    "proxy.upstream.key_lease": "waits for a key",
    "proxy.upstream.keys.object_owners": "waits for shared owners",
    "proxy.upstream.keys.redis_owners": "speaks to Redis",
    "proxy.upstream.keys.sqlite_owners": "reads and writes SQLite",
    "proxy.upstream.limits.queue": "requests wait in it",
    "proxy.upstream.limits.redis": "speaks to Redis",
    "proxy.upstream.limits.redis_key_states": "speaks to Redis",
    "proxy.upstream.limits.redis_limiter": "waits for Redis",
    "proxy.upstream.limits.redis_loss": "a timer",
    "proxy.upstream.limits.redis_snapshot": "speaks to Redis",
    "proxy.upstream.progress": "carries the deadline",
    "proxy.upstream.read_ahead": "reads a response",
    "proxy.upstream.reader": "reads a response",
    "proxy.upstream.response": "reads a response",
    "proxy.upstream.result": "carries a response",
    "proxy.upstream.request": "carries the deadline",
    "proxy.upstream.reservations": "waits for shared limits and budgets",
    "proxy.upstream.sender": "sends and waits",
    "proxy.upstream.outgoing": "writes as fast as the upstream takes it",
    "proxy.upstream.websocket": "carries bytes and waits for both sides",
    "proxy.workers": "processes and sockets",
}
"""Files and packages that do more than decide, each with the reason. Whatever is not listed is pure."""

IMPURE_CALLS = {"open", "print", "input", "eval", "exec", "__import__", "breakpoint"}
CLOCKS = {"now", "utcnow", "today", "localtime", "formatdate", "time_ns", "perf_counter"}
TIME_AND_CHANCE = ("time", "random", "secrets", "uuid")
CLOCKS_ALLOWED = {
    "proxy.simulator": "an API of its own",
    "proxy.system": "the clock, and the drivers' own deadlines",
    "proxy.observability.logs": "writes down the time that a log record brings with it",
    "proxy.cache.stores.redis": "its own deadlines",
    "proxy.cache.stores.sqlite": "its own deadlines",
    "proxy.cache.stores.sqlite_writer": "when to sweep",
    "proxy.pipeline.coalescing.redis_lock": "its own deadline",
    "proxy.upstream.keys.redis_owners": "its own deadline",
    "proxy.accounting.runs.redis": "its own deadline",
}
"""Who may read a clock or draw a number, each with the reason."""

DRIVERS = {"aiohttp", "multidict", "yarl", "redis", "sqlite3", "socket"}
SIBLINGS = (
    "proxy.cache.stores",
    "proxy.upstream.keys.selection",
    "proxy.upstream.providers",
)
"""Packages whose files stand for alternatives: none imports another."""


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


def modules_in(*packages: str) -> list[str]:
    return [module for module in IMPORTS if within(module, *packages)]


def modules_outside(*packages: str) -> list[str]:
    return [module for module in IMPORTS if not within(module, *packages)]


def offences(modules: Iterable[str], forbidden: Iterable[str], but: Iterable[str] = ()) -> list[str]:
    """Imports of `forbidden` (less `but`) in these very modules, as readable lines."""
    return [
        f"{module}:{line} imports {name}"
        for module in modules
        for name, line in IMPORTS[module]
        if within(name, *forbidden) and not within(name, *but)
    ]


def place_of(module: str) -> str:
    """The package or loose file directly below `proxy`."""
    return module.split(".")[1]


def test_the_scan_finds_imports() -> None:
    """Otherwise every rule below would hold for lack of imports."""
    assert len(FILES) > 40
    for module, name in (
        ("proxy.protocol.options", "proxy.protocol.errors"),
        ("proxy.upstream.client", "aiohttp"),
        ("proxy.cli.serve", "proxy.lifecycle"),  # within a function
        ("proxy.app", "proxy.observability.logs"),
        ("proxy.upstream.providers.azure", "proxy.upstream.providers.interface"),  # for type checkers only
    ):
        assert len(offences([module], [name])) > 0, (module, name)


# --- one way down -----------------------------------------------------------------------------------------------------


def test_every_package_has_a_layer() -> None:
    listed = [name for layer in LAYERS for name in layer]
    assert len(listed) == len(set(listed))
    assert {place_of(module) for module in IMPORTS if module != "proxy"} == set(listed)


def test_imports_go_down() -> None:
    rank = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    against = {
        (module, name)
        for module in IMPORTS
        for name, _ in IMPORTS[module]
        if module != "proxy" and name.startswith("proxy.") and place_of(name) != place_of(module)
        if rank[place_of(name)] <= rank[place_of(module)]
    }
    assert against == set()


def test_there_is_no_import_cycle() -> None:
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


def test_a_package_holds_a_docstring_and_at_most_a_table() -> None:
    """Importing a pure file loads its packages, so these load nothing more."""
    allowed = {"proxy.upstream.keys.selection", "proxy.cli", "proxy.cli.cache", "proxy"}
    for path in FILES:
        if path.name == "__init__.py" and module_of(path) not in allowed:
            assert len(ast.parse(path.read_text("utf-8")).body) == 1, path


def test_alternatives_do_not_import_each_other() -> None:
    """Nor anything of their package but what its name says is common to all. A new one is one file and one line."""
    common = {"interface", "build", "registry", "intake", "tiered"}
    for package in SIBLINGS:
        files = [module for module in modules_in(package) if module != package]
        for file in files:
            stem = file.rpartition(".")[2]
            if stem in common - {"tiered"}:
                continue
            family = stem.partition("_")[0]  # `sqlite_writer` is part of `sqlite`
            others = [
                other
                for other in files
                if other.rpartition(".")[2].partition("_")[0] != family and other.rpartition(".")[2] not in common
            ]
            allowed = [f"{package}.memory"] if stem in ("tiered", "cassette") else []  # memory stands in front
            assert offences([file], others, but=allowed) == []


# --- pure unless named impure -----------------------------------------------------------------------------------------


def is_impure(module: str) -> bool:
    return within(module, *IMPURE)


PURE_FILES = [path for path in FILES if not is_impure(module_of(path))]
PURE_IDS = [module_of(path) for path in PURE_FILES]


@pytest.mark.parametrize("path", PURE_FILES, ids=PURE_IDS)
def test_a_pure_file_imports_only_pure_files(path: Path) -> None:
    for name, line in imports_of(path, typed=False):
        if within(name, "proxy"):
            assert not is_impure(name), f"line {line}: {name} is impure"
        else:
            assert name in PURE, f"line {line}: {name}"


@pytest.mark.parametrize("path", PURE_FILES, ids=PURE_IDS)
def test_a_pure_file_reads_no_clock_and_opens_nothing(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    protocols = {
        id(inner)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.dump(base) for base in node.bases)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) not in protocols:
            assert not isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith), node.lineno
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name):
                assert called.id not in IMPURE_CALLS, f"line {node.lineno}: {called.id}()"
            elif isinstance(called, ast.Attribute):
                assert called.attr not in CLOCKS, f"line {node.lineno}: .{called.attr}()"
                if isinstance(called.value, ast.Name) and called.value.id == "sys":
                    assert called.attr in ("getsizeof", "intern"), f"line {node.lineno}: sys.{called.attr}()"


def test_files_named_impure_exist() -> None:
    assert [name for name in IMPURE if not modules_in(name)] == []


def loaded_by(module: str) -> set[str]:
    """What importing a module brings into a fresh interpreter, beside what coverage may have put there before."""
    code = f"import sys; before = set(sys.modules); import {module}; print('\\n'.join(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.slow
def test_the_pure_files_load_without_an_event_loop() -> None:
    loaded = loaded_by(", ".join(PURE_IDS))
    assert not loaded & {"asyncio", "aiohttp", "yarl", "multidict", "redis", "sqlite3", "yaml", "prometheus_client"}
    packages = {name for name in loaded if within(name, "proxy")} - set(PURE_IDS)
    assert all((ROOT.joinpath(*name.split(".")) / "__init__.py").is_file() for name in packages), packages


# --- who may use what -------------------------------------------------------------------------------------------------


def test_only_server_client_and_commands_import_aiohttp() -> None:
    speak = [
        "proxy.server",
        "proxy.upstream.client",
        "proxy.upstream.client_errors",
        "proxy.upstream.outgoing",
        "proxy.simulator",
        "proxy.app",
        "proxy.lifecycle",
        "proxy.cli",
    ]
    assert offences(modules_outside(*speak), ["aiohttp", "multidict", "yarl"]) == []


def test_drivers_are_imported_in_files_named_after_them() -> None:
    """And in the ledger, which is a SQLite file whatever the settings say."""
    named = [module for module in IMPORTS if {"redis", "sqlite"} & set(module.rpartition(".")[2].split("_"))]
    assert len(named) > 5
    assert offences(modules_outside(*named, "proxy.accounting.ledger"), ["redis", "sqlite3"]) == []


def test_only_named_files_read_clocks_and_draw_random_numbers() -> None:
    assert offences(modules_outside(*CLOCKS_ALLOWED), TIME_AND_CHANCE) == []


@pytest.mark.slow
def test_the_handler_imports_no_http_library_and_no_database() -> None:
    assert not loaded_by("proxy.pipeline.handler") & (DRIVERS - {"socket"})  # asyncio brings that one


def test_only_the_demo_imports_the_simulator() -> None:
    assert offences(modules_outside("proxy.cli.demo", "proxy.simulator"), ["proxy.simulator"]) == []
    assert offences(modules_in("proxy.simulator"), ["proxy"], but=["proxy.simulator", "proxy.protocol"]) == []


# --- size -------------------------------------------------------------------------------------------------------------


FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def functions_in(node: ast.AST, name: str) -> Iterator[tuple[str, FunctionNode]]:
    """Yield every function below `node`, methods and nested ones too, by its qualified name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode | ast.ClassDef):
            qualified = f"{name}.{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield qualified, child
            yield from functions_in(child, qualified)
        else:
            yield from functions_in(child, name)


FUNCTIONS = [pair for path in FILES for pair in functions_in(ast.parse(path.read_text("utf-8")), module_of(path))]


def parameters_of(function: FunctionNode) -> list[str]:
    """Return the names of all parameters but `self`, `cls`, `*args` and `**kwargs`."""
    args = function.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def check_listed(found: set[str], listed: dict[str, str]) -> None:
    assert found - set(listed) == set(), "split it, or say why not"
    assert set(listed) - found == set(), "no longer needed: take it off the list"
    assert all(listed.values()), "a reason is missing"


def test_long_files_have_a_reason() -> None:
    check_listed(
        {str(path.relative_to(ROOT)) for path in FILES if len(path.read_text("utf-8").splitlines()) > MAX_LINES},
        LONGER,
    )


def test_long_functions_have_a_reason() -> None:
    assert len(FUNCTIONS) > 1000
    check_listed(
        {name for name, node in FUNCTIONS if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES},
        LONGER_FUNCTIONS,
    )


def test_functions_of_many_parameters_have_a_reason() -> None:
    check_listed({name for name, node in FUNCTIONS if len(parameters_of(node)) > MAX_PARAMETERS}, MORE_PARAMETERS)


def test_every_module_has_a_docstring() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path
