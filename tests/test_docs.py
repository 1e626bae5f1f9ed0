"""The documents hold together: links, paths and citations lead somewhere, and every example that can be run is run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import yaml

from proxy.config.loader import load
from proxy.config.settings import Settings
from tests.launch import Launch, ProxyProcess, environment, secret, settings
from tests.pages import MANUAL, OTHERS, PAGES, README, ROOT, Block, anchors, block, blocks, section, without_code
from tests.rooms import walks
from tests.scripted_upstream import ScriptedUpstream

ALL = PAGES | OTHERS
CODE = [
    path
    for place in ("proxy", "tests", ".ci")
    for path in sorted((ROOT / place).rglob("*"))
    if path.suffix in {"", ".py", ".lua", ".sh"} and path.is_file()
] + [ROOT / name for name in ("config.yaml", "Dockerfile", "pyproject.toml", ".pre-commit-config.yaml")]


# --- links, paths, citations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(ALL[page])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("index", ["README.md", "llms.txt"])
def test_every_page_is_in_the_index(index: str) -> None:
    assert {name for name in MANUAL if f"](docs/{name})" not in ALL[index]} == set()


@pytest.mark.parametrize("page", ALL)
def test_paths_in_this_repository_exist(page: str) -> None:
    named = set(re.findall(r"(?<![\w/.-])((?:proxy|tests|\.ci|docs)/[\w/.-]*[\w/])", ALL[page]))
    named |= {module.replace(".", "/") for module in re.findall(r"-m (tests[\w.]*)", ALL[page])}
    of_users = {"tests/cassette.jsonl"}
    existing = {path for path in named if (ROOT / path).exists() or (ROOT / f"{path}.py").exists()}
    assert named - of_users - existing == set()


def test_every_file_below_docs_is_a_page() -> None:
    assert {path.name for path in (ROOT / "docs").iterdir()} == set(MANUAL)


PAPERS = re.compile(r"\b[Cc]ontract\b|CONTRACT|RELIABILITY|SDK_FACTS|FIELD_REPORTS|\bissue \d|LAYOUT(?:\.md| section)")
"""Papers that are not in this repository."""


def test_code_cites_only_what_readers_have() -> None:
    cited, missing = {}, {}
    for path in CODE:
        name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        if path != Path(__file__):
            cited[name] = PAPERS.findall(text)
        missing[name] = {page for page in re.findall(r"\bdocs/([\w-]+\.md)", text) if page not in MANUAL}
    assert {name: found for name, found in cited.items() if found} == {}
    assert {name: found for name, found in missing.items() if found} == {}


@pytest.mark.parametrize("page", ALL)
def test_documents_cite_only_what_readers_have(page: str) -> None:
    assert PAPERS.findall(ALL[page]) == []


def test_every_package_is_in_the_picture() -> None:
    text = section("architecture.md", "The layers")
    places = [path for path in (ROOT / "proxy").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    names = {path.name if path.is_file() else f"{path.name}/" for path in places} - {"__init__.py", "__main__.py"}
    assert set(re.findall(r"`([\w/.]+)`", "".join(re.findall(r"^\| (.*?) \|", text, re.MULTILINE)))) == names


@pytest.mark.slow
async def test_a_request_goes_the_way_that_is_described() -> None:
    """The first file of each step is passed in this order; tests/test_rooms.py limits the number of rooms."""
    text = MANUAL["architecture.md"].split("## One request's way")[1].split("\n## ")[0]
    steps = re.findall(r"^\d+\. .*?`proxy/([\w/]+\.py)`", text, re.MULTILINE)
    assert len(steps) > 10
    left = iter((await walks(["plain miss"]))["plain miss"].files)
    assert [step for step in steps if step not in left] == []


# --- examples ---------------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "README.md: python3 -m venv": "test_install_commands_are_well_formed",
    "docs/deployment.md: docker build": "needs Docker; tests/test_dockerfile.py reads the Dockerfile",
    "docs/deployment.md: services:": "test_readme.py",
    "docs/deployment.md: apiVersion: v1": "test_readme.py",
    "CONTRIBUTING.md: .venv/bin/python -m pytest": ".ci/run runs the same tools",
    "CONTRIBUTING.md: .ci/lock": "needs the package index",
    "CONTRIBUTING.md: .venv/bin/python .ci/update_settings.py": "tests/config/test_settings_page.py",
    "CONTRIBUTING.md: .venv/bin/python -m tests.sdk_schema": ".ci/run runs it",
}
"""Examples that are not run below, by the beginning of their name, and where or why not."""

SERVERS = ("export OPENAI_API_KEY=sk-...", "openai-proxy --cassette", "openai-proxy --mode replay")
RUN_BELOW = (
    *SERVERS,
    "export OPENAI_BASE_URL",
    "curl ",
    "openai-proxy cache stats",
    "openai-proxy config init",
    "raw = client.",
    "$ openai-proxy",
    "cost: {",
)
EXAMPLES = list(blocks(ALL, "sh", "python", "console", "yaml"))


def test_every_example_is_run_or_has_a_reason() -> None:
    for example in EXAMPLES:
        assert example.name.startswith(tuple(ELSEWHERE)) != example.text.startswith(RUN_BELOW), example.name


def test_no_example_is_missed() -> None:
    assert {start for start in ELSEWHERE if not any(one.name.startswith(start) for one in EXAMPLES)} == set()
    assert {start for start in RUN_BELOW if not any(one.text.startswith(start) for one in EXAMPLES)} == set()
    fences = sum(len(re.findall(r"^```\w+$", text, re.MULTILINE)) for text in ALL.values())
    plain = sum(1 for _ in blocks(ALL, "text"))
    assert fences - plain == len(EXAMPLES)


def examples(*starts: str) -> list[Block]:
    return [one for one in EXAMPLES if one.text.startswith(starts)]


def page_of(example: Block) -> str:
    return example.page


@pytest.fixture
def shell(tmp_path: Path) -> Path:
    """A directory in which `openai-proxy` and `.venv/bin/openai-proxy` are this program, and notes its process id."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    program = tmp_path / ".venv/bin/openai-proxy"
    program.write_text(f'#!/bin/sh\necho $$ >"{tmp_path}/pid"\nexec "{sys.executable}" -m proxy "$@"\n')
    program.chmod(0o755)
    return tmp_path


def in_shell(directory: Path, env: Mapping[str, str] | None = None) -> dict[str, str]:
    found = environment(directory, env or {})
    return found | {"PATH": f"{directory}/.venv/bin:{os.environ['PATH']}"}


def run(directory: Path, script: str, env: Mapping[str, str] | None = None) -> str:
    """Run a script to its end, and return what it printed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=directory,
        env=in_shell(directory, env),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, (script, done.stdout, done.stderr)
    return done.stdout


def at(proxy: ProxyProcess, text: str) -> str:
    """Return an example as it is for this proxy."""
    return text.replace("127.0.0.1:8484", f"127.0.0.1:{proxy.port}")


@contextmanager
def started(directory: Path, script: str, env: Mapping[str, str]) -> Iterator[str]:
    """Start a script whose last command is a proxy, on a free port; yield its base URL; stop it."""
    log = directory / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-eu", "-c", script],
            cwd=directory,
            env=in_shell(directory, {"PROXY__SERVER__PORT": "0", **env}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 30
        while (found := re.search(r"clients: OPENAI_BASE_URL=(\S+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
        yield found[1]
        os.kill(int((directory / "pid").read_text()), signal.SIGTERM)
        assert process.wait(10) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "Traceback" not in log.read_text()


def cache_status(base_url: str, prompt: str) -> str | None:
    with openai.OpenAI(base_url=base_url, api_key="unused") as client:
        raw = client.chat.completions.with_raw_response.create(
            model="gpt-4o", messages=[{"role": "user", "content": prompt}]
        )
        return raw.headers["X-Proxy-Cache"]


def test_the_proxy_starts_with_a_key_of_the_users_own(shell: Path, upstream: ScriptedUpstream) -> None:
    (example,) = examples("export OPENAI_API_KEY=sk-...")
    with started(shell, example.text.replace("sk-...", secret("mine")), {"OPENAI_API_BASE": url(upstream)}) as base_url:
        assert cache_status(base_url, "A key of my own") == "miss"
    assert upstream.keys == [secret("mine")]


def test_what_is_recorded_is_replayed_without_a_key(shell: Path, upstream: ScriptedUpstream) -> None:
    (shell / "tests").mkdir()
    record, replay = examples("openai-proxy --cassette", "openai-proxy --mode replay")
    with started(shell, record.text, {"OPENAI_API_BASE": url(upstream), "OPENAI_API_KEY": secret("k1")}) as base_url:
        assert cache_status(base_url, "To be recorded") == "miss"
    assert (shell / "tests/cassette.jsonl").read_text().count("\n") == 1
    with started(shell, replay.text, {"OPENAI_API_BASE": url(upstream)}) as base_url:
        assert cache_status(base_url, "To be recorded") == "hit"
    assert upstream.count == 1


def url(upstream: ScriptedUpstream) -> str:
    return f"http://127.0.0.1:{upstream.port}/v1"


ASK = """
import openai
client = openai.OpenAI()
for number in range(2):
    raw = client.chat.completions.with_raw_response.create(
        model="gpt-4o", messages=[{"role": "user", "content": "An example of the manual"}], temperature=1)
    print(raw.headers["X-Proxy-Cache"], raw.headers.get("X-Proxy-Run-Cost-USD"))
"""


@pytest.mark.parametrize("example", examples("export OPENAI_BASE_URL"), ids=page_of)
def test_variables_point_the_sdk_here(shell: Path, launch: Launch, upstream: ScriptedUpstream, example: Block) -> None:
    proxy = launch(settings(upstream.port))
    (shell / "ask.py").write_text(ASK)
    script = f'{at(proxy, example.text)}\n"{sys.executable}" ask.py'
    lines = [line.split() for line in run(shell, script, {"OPENAI_API_KEY": "unused"}).splitlines()]
    in_run = "run=" in example.text
    assert [cache for cache, _ in lines] == (["miss", "miss"] if in_run else ["miss", "hit"])
    assert all((cost != "None") == in_run for _, cost in lines)


@pytest.mark.slow
def test_commands_of_the_settings_page_work(shell: Path) -> None:
    (example,) = examples("openai-proxy config init")
    printed = run(shell, example.text)
    assert "# settings file: config.yaml" in printed
    assert "server" in json.loads((shell / "settings.json").read_text())["properties"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("example", examples("curl "), ids=page_of)
def test_curl_commands_work(shell: Path, launch: Launch, upstream: ScriptedUpstream, example: Block) -> None:
    printed = run(shell, at(launch(settings(upstream.port)), example.text))
    assert "X-Proxy-Cache: miss" in printed if "-i" in example.text.split() else '"dry_run":true' in printed


def test_the_python_snippet_prints_the_cost(
    launch: Launch, upstream: ScriptedUpstream, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = launch(settings(upstream.port))
    (example,) = examples("raw = client.")
    messages = [{"role": "user", "content": "What does this cost?"}]
    with openai.OpenAI(base_url=proxy.base_url, api_key="unused") as client:
        exec(example.text, {"client": client, "messages": messages})
    cost, cache = capsys.readouterr().out.split()
    assert float(cost) > 0
    assert cache == "miss"


def constructed() -> Iterator[str]:
    """Yield the Python expressions of the tables of clients that make a client of OpenAI's SDK."""
    for text in (README, MANUAL["clients.md"]):
        yield from re.findall(r"^\| (?:openai|AzureOpenAI) \(Python\) \|.*\| `(.*)` \|$", text, re.MULTILINE)


def test_sdk_clients_of_the_tables_work(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy = launch(settings(upstream.port))
    expressions = list(constructed())
    assert len(expressions) == 4
    for expression in expressions:
        with eval(at(proxy, expression), {"OpenAI": openai.OpenAI, "AzureOpenAI": openai.AzureOpenAI}) as client:
            made = client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": expression}])
            assert made.choices[0].message.content


def test_cache_commands_and_the_report_work(shell: Path, launch: Launch, upstream: ScriptedUpstream) -> None:
    config = settings(upstream.port, cache={"backend": "sqlite", "path": str(shell / "cache.db")})
    config |= {"ledger": {"path": str(shell / "usage.db")}}
    proxy = launch(config)
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "An entry"}]}
    with openai.OpenAI(base_url=proxy.base_url, api_key="unused") as client:
        raw = client.chat.completions.with_raw_response.create(**body, extra_headers={"X-Proxy-Tag": "team:search"})  # type: ignore[call-overload]
    key = raw.headers["X-Proxy-Cache-Key"]
    assert proxy.finish() == []
    (shell / "config.yaml").write_text(yaml.safe_dump(config))
    (shell / "request.json").write_text(json.dumps(body))
    (example,) = examples("openai-proxy cache stats")
    printed = {}
    for line in example.text.replace("3f9a", key[:12]).splitlines():
        command, _, comment = line.partition("#")
        printed[command.split()[2]] = run(shell, command)
        if "and: " in comment:
            printed["import"] = run(shell, comment.partition("and: ")[2])
    assert set(printed) == {"stats", "list", "show", "purge", "export", "explain", "import"}
    assert "gpt-4o" in printed["stats"]
    assert "gpt-4o" in printed["list"]
    assert key in printed["show"]
    assert "hit" in printed["explain"]
    assert (shell / "answers.jsonl").read_text().count("\n") == 1
    (report,) = examples("$ openai-proxy")
    command, head, *_ = report.text.removeprefix("$ ").splitlines()
    shown = run(shell, command).splitlines()
    assert shown[0].split() == head.split()
    assert [line.split() for line in shown if line.startswith("MODEL")] == [
        line.split() for line in report.text.splitlines() if line.startswith("MODEL")
    ]
    for what in re.findall(r"`openai-proxy (report --what-if \S+)`", MANUAL["costs-and-budgets.md"]):
        assert run(shell, f"openai-proxy {what}")


def test_the_budget_example_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(block("yaml", "usd_per_month:"))
    loaded = load(file, {}, {"ALICE_KEY": "a-long-secret-text"}, tmp_path).settings
    assert [loaded.cost.budget.usd_per_day, loaded.cost.budget.usd_per_month] == [20, 300]
    assert loaded.server.client_keys[0].usd_per_day == 5


def test_settings_that_the_readme_names_are_valid(tmp_path: Path) -> None:
    named = re.findall(r"^\| `([a-z]+)\.([a-z_]+): (.+?)` \|", README, re.MULTILINE)
    assert len(named) == 2
    for table, setting, value in named:
        loaded = load(None, {}, {f"PROXY__{table}__{setting}".upper(): value}, tmp_path)
        assert getattr(getattr(loaded.settings, table), setting) != getattr(getattr(Settings(), table), setting)


@pytest.mark.slow
def test_install_commands_are_well_formed(shell: Path) -> None:
    """With a `python3` that makes the environment and only notes what pip would install."""
    outer, noted = shell / "bin/python3", shell / "pip"
    outer.parent.mkdir()
    inner = shell / ".venv/bin/python"
    for program in (outer, inner):
        program.write_text(f'#!/bin/sh\n[ "$2" = venv ] || [ "$2" = pytest ] || echo "$@" >>"{noted}"\n')
        program.chmod(0o755)
    (shell / ".venv/bin/openai-proxy").write_text("#!/bin/sh\n[ $1 = demo ]\n")
    for example in examples("python3 -m venv"):
        run(shell, f'PATH="{outer.parent}:$PATH"\n{example.text}')
    assert noted.read_text().splitlines() == [
        "-m pip --python .venv/bin/python install .",
        "-m pip --python .venv/bin/python install --require-hashes -r requirements-test.txt",
        "-m pip install --no-deps --no-build-isolation -e .",
    ]


def test_hooks_run_the_locked_tools() -> None:
    """A local hook uses what is installed in `.venv`, so its version is that of the lock."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements-test.txt").read_text(encoding="utf-8"), re.MULTILINE)
    for hook in config["repos"][0]["hooks"]:
        tool = hook["entry"].split()[0]
        assert hook["language"] == "system"
        assert tool.removeprefix(".venv/bin/") in locked
