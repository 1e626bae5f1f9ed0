"""The request fields and tools of the official SDK, and which of them the table of fields does not name.

    python -m tests.sdk_schema             # of the installed SDK
    python -m tests.sdk_schema --newest    # of the newest one, installed into a temporary directory

Prints what it finds. Exits with 0 also when the table lacks a line: a field without a line is part of the key.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
from openai.types import completion_create_params, embedding_create_params, moderation_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params, tool_param

from proxy.cache.fields import FIELDS, HOSTED_TOOLS

ROOT = Path(__file__).resolve().parent.parent
SDK: dict[str, tuple[Any, ...]] = {
    "chat": (
        chat_create_params.CompletionCreateParamsNonStreaming,
        chat_create_params.CompletionCreateParamsStreaming,
    ),
    "completions": (
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    ),
    "embeddings": (embedding_create_params.EmbeddingCreateParams,),
    "moderations": (moderation_create_params.ModerationCreateParams,),
    "responses": (
        response_create_params.ResponseCreateParamsNonStreaming,
        response_create_params.ResponseCreateParamsStreaming,
    ),
}
CLIENT_RUN = {"function", "custom", "local_shell", "shell", "namespace", "tool_search", "apply_patch"}
"""Types of tools that the client runs, or that only point at others."""

INSTALL_SECONDS = 180


def fields_of(endpoint: str) -> set[str]:
    """The names of the top-level request fields that the installed SDK knows."""
    return {name for params in SDK[endpoint] for name in typing.get_type_hints(params)}


def tool_types() -> set[str]:
    """The types of tools that the installed SDK knows for responses."""
    return {
        kind
        for tool in typing.get_args(tool_param.ToolParam)
        for kind in typing.get_args(_bare(typing.get_type_hints(tool)["type"]))
    }


def _bare(hint: Any) -> Any:
    """`Literal[…]` without `Required[…]` around it."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is not typing.Literal else hint


def undecided() -> list[str]:
    """What the installed SDK has and the table of fields does not name, one line each."""
    fields = {endpoint: sorted(fields_of(endpoint) - FIELDS[endpoint].keys()) for endpoint in SDK}
    tools = {kind for kind in tool_types() - CLIENT_RUN if not kind.startswith(HOSTED_TOOLS)}
    lines = [f"{endpoint}: field {name}" for endpoint, names in fields.items() for name in names]
    return lines + [f"responses: tool {kind}" for kind in sorted(tools)]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, always 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.sdk_schema", description=__doc__)
    parser.add_argument("--newest", action="store_true", help="look at the newest SDK instead of the installed one")
    if parser.parse_args(argv).newest:
        print(_newest())
        return 0
    missing = undecided()
    if missing:
        print(f"WARNING: openai {openai.__version__} has fields or tools that proxy/cache/fields.py does not name.")
        print("Until it does, such a field is part of the key, and such a tool counts as run by the client:")
        print("\n".join(f"  {line}" for line in missing))
    else:
        print(f"openai {openai.__version__}: proxy/cache/fields.py names every field and tool")
    return 0


def _newest() -> str:
    """What this module prints of the newest SDK, or why it could not be looked at."""
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        path = os.pathsep.join([place, str(ROOT)])
        try:
            _run([*pip, "--retries=1", "--timeout=15", "--target", place, "openai"])
            return _run([sys.executable, "-m", "tests.sdk_schema"], PYTHONPATH=path)
        except subprocess.TimeoutExpired:
            return f"SKIPPED: the newest openai was not installed within {INSTALL_SECONDS} s"
        except subprocess.CalledProcessError as error:
            step = "installed" if "pip" in error.cmd else "read"
            last = str(error.stderr).strip().rpartition("\n")[2]
            return f"SKIPPED: the newest openai could not be {step}: {last}"


def _run(command: list[str], **environ: str) -> str:
    """The output of a command. Raises CalledProcessError and TimeoutExpired."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
        check=True,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
