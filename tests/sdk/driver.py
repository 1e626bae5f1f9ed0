"""One Python SDK at the end of a pipe: reads calls, a line of JSON each, and writes what their caller saw.

It runs under whatever `openai` PYTHONPATH names, 1.3 included, and imports nothing else that is not in the standard
library; hence `Any`. `driver.mjs` is the same for Node. The fields of a call are those of `tests.sdk.kit.Job`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from typing import Any

import openai
from pydantic import BaseModel


class City(BaseModel):
    """What `.parse` is asked for."""

    name: str
    people: int


def connect(job: Any) -> Any:
    options: dict[str, Any] = {"api_key": "sk-unused", "timeout": 20.0}
    if job["max_retries"] is not None:
        options["max_retries"] = job["max_retries"]
    if job["azure"]:
        options |= {"azure_endpoint": job["address"], "api_version": "2024-06-01"}
    else:
        options["base_url"] = job["address"] + "/v1"
    name = ("Async" if job["asynchronous"] else "") + ("AzureOpenAI" if job["azure"] else "OpenAI")
    return getattr(openai, name)(**options)


async def settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def arguments(method: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A field that the SDK is too old to know goes into `extra_body`, as its user would write it."""
    known = inspect.signature(method).parameters
    fields = {name: value for name, value in given.items() if name in known}
    unknown = {name: value for name, value in given.items() if name not in known}
    return fields | ({"extra_body": unknown} if unknown else {})


async def helped(manager: Any) -> Any:
    """The end of `chat.completions.stream`, the helper."""
    if hasattr(manager, "__aenter__"):
        async with manager as stream:
            return await stream.get_final_completion()
    with manager as stream:
        return stream.get_final_completion()


async def collect(stream: Any, into: list[Any]) -> None:
    if hasattr(stream, "__aiter__"):
        async for item in stream:
            into.append(item.model_dump(mode="json"))
    else:
        into.extend(item.model_dump(mode="json") for item in stream)


async def call(client: Any, job: Any, seen: dict[str, Any]) -> None:
    """Makes the call and notes in `seen` what comes, as it comes."""
    *path, name = job["method"].split(".")
    resource = client
    for step in [*path, *(["with_raw_response"] if job["raw"] else [])]:
        resource = getattr(resource, step)
    method = getattr(resource, name)
    fields = dict(job["fields"])
    if name in ("parse", "stream") and "response_format" in fields:
        fields["response_format"] = City
    result = await settled(method(**arguments(method, fields)))
    if name == "stream":
        result = await helped(result)
    if job["raw"]:
        seen["headers"] = {key.lower(): value for key, value in result.headers.items()}
        result = await settled(result.parse())
    if fields.get("stream"):
        seen["value"] = []
        await collect(result, seen["value"])
    else:
        seen["value"] = result.model_dump(mode="json")


async def answer(job: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {"value": None, "headers": None, "error": None}
    client = connect(job)
    try:
        await call(client, job, seen)
    except Exception as error:
        status, code = getattr(error, "status_code", None), getattr(error, "code", None)
        seen["error"] = {"type": type(error).__name__, "status": status, "code": code, "message": str(error)}
    finally:
        await settled(client.close())
    return seen


if __name__ == "__main__":
    print(json.dumps({"version": openai.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(asyncio.run(answer(json.loads(line)))), flush=True)
