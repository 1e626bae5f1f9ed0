"""Every field of OpenAI's requests and how the cache treats it: the one table behind the key and the bypasses.

| word     | meaning                                                                                                |
|----------|--------------------------------------------------------------------------------------------------------|
| `in`     | in the key: another value is another request. Every field that is not named here is in the key, too    |
| `form`   | not in the key: it chooses the form of the response, and an entry states its own form                  |
| `label`  | not in the key by default (`cache.ignore_fields`): bookkeeping of the provider, not part of the prompt |
| `echoed` | in the key, although it is a label: responses of this endpoint repeat it                               |
| `bypass` | some of its values make the response uncacheable (see below); others are in the key                    |

The names are those of OpenAI's API reference; a test reads the types of the official SDK and finds a line for each. A
field that is `in` needs no knowledge of its meaning, so a new field of the API is treated safely.

A request is not cached because of:

| field                                   | where | why                                                 |
|-----------------------------------------|-------|-----------------------------------------------------|
| `store: true`                           | chat  | the call also creates an object; on responses that  |
|                                         |       | is the default, and the answer holds everything     |
| `background: true`                      | all   | the answer is only a promise of one                 |
| `conversation`                          | all   | the answer depends on, and changes, stored state    |
| `web_search_options`, even empty        | all   | the web changes                                     |
| `tools` whose type is in HOSTED_TOOLS,  | all   | the provider runs them: files, containers, the web; |
| a `shell` in a container                |       | also in namespaces, and among the input's items     |
| `audio`, or "audio" among `modalities`  | all   | large, and refers to audio stored for an hour only  |
| a `model` that searches the web by      | all   | the web changes                                     |
| itself (`_SEARCHING`)                   |       |                                                     |
| fields of other providers that make     | all   | the web changes                                     |
| them search (`_searches`)               |       |                                                     |

Everything else is cached, also requests with `previous_response_id` or file ids: what these name never changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal

Verdict = Literal["in", "form", "label", "echoed", "bypass"]

_FORM: Final[Mapping[str, Verdict]] = {"stream": "form", "stream_options": "form"}
_SAMPLING: Final = "frequency_penalty logit_bias logprobs n presence_penalty seed stop temperature top_p"
_MODEL: Final = (
    "moderation parallel_tool_calls prompt_cache_options service_tier temperature tool_choice top_logprobs top_p"
)


def _in(*names: str) -> dict[str, Verdict]:
    return {name: "in" for text in names for name in text.split()}


def _labels(names: str, verdict: Verdict = "label") -> dict[str, Verdict]:
    return dict.fromkeys(names.split(), verdict)


FIELDS: Final[Mapping[str, Mapping[str, Verdict]]] = {
    "chat": {
        **_in("messages model", _SAMPLING, _MODEL),
        **_in("function_call functions max_completion_tokens max_tokens prediction reasoning_effort response_format"),
        **_in("verbosity"),
        **_FORM,
        **_labels("metadata prompt_cache_key prompt_cache_retention safety_identifier user"),
        "store": "bypass",  # true: the call also creates an object
        "tools": "bypass",  # some are run by the provider
        "audio": "bypass",  # large, and refers to audio that is kept for an hour
        "modalities": "bypass",  # with "audio"
        "web_search_options": "bypass",  # the web changes
    },
    "completions": {
        **_in("model prompt", _SAMPLING, "best_of echo max_tokens suffix"),
        **_FORM,
        **_labels("user"),
    },
    "embeddings": {
        **_in("dimensions encoding_format input model"),
        **_labels("user"),
    },
    "moderations": _in("input model"),
    "responses": {
        **_in("input instructions model", _MODEL, "access_programs context_management image include"),
        **_in("background_options"),  # has no effect without `background`, which bypasses
        # What these two name is fixed, or changes like the model behind an alias; the lifetime bounds that.
        **_in("previous_response_id prompt"),
        **_in("max_output_tokens max_tool_calls reasoning text truncation"),
        **_FORM,
        **_labels("metadata prompt_cache_key prompt_cache_retention safety_identifier user", "echoed"),
        "store": "in",  # true by default here, and the answer holds all there is
        "tools": "bypass",  # some are run by the provider
        "background": "bypass",  # the answer is only a promise of one
        "conversation": "bypass",  # the answer depends on stored state, and changes it
    },
}

HOSTED_TOOLS: Final = (
    "web_search",
    "file_search",
    "code_interpreter",
    "computer",
    "mcp",
    "image_generation",
    "programmatic_tool_calling",
)
"""Beginnings of the types of tools that the provider runs (`web_search_preview_2025_03_11`, …)."""

_SEARCHING: Final = re.compile(
    r"(?:.*/)?(?:.*-search-(?:preview|api)|.*deep-research|sonar|compound)|.*:online\Z", re.DOTALL
)
"""Models that search the web in each call: OpenAI's search and deep research models, Perplexity's Sonar, Groq's
Compound, and any model on OpenRouter with `:online`."""

LABELS: Final = frozenset(name for fields in FIELDS.values() for name, verdict in fields.items() if verdict == "label")
"""The default of `cache.ignore_fields`."""

_MAX_NAME: Final = 256
_ECHOING: Final = frozenset(endpoint for endpoint, fields in FIELDS.items() if "echoed" in fields.values())


def dropped_fields(endpoint: str, ignored: Iterable[str]) -> frozenset[str]:
    """Return the top-level fields that the key of `endpoint` leaves out. ignored: `cache.ignore_fields`."""
    form = frozenset(_FORM)
    return form if endpoint in _ECHOING else form.union(ignored)


def request_bypass(endpoint: str, document: Mapping[str, Any]) -> str | None:
    """Return why the response to this request is not cached, as a short reason for a header; None if it may be."""
    if endpoint == "chat" and document.get("store"):
        return "uncacheable: store=true"
    if document.get("background"):
        return "uncacheable: background=true"
    for field in ("conversation", "web_search_options"):
        if document.get(field) is not None:
            return f"uncacheable: {field}"
    model = document.get("model")
    if isinstance(model, str) and len(model) <= _MAX_NAME and _SEARCHING.match(model):
        return "uncacheable: search model"
    for field in _searches(document):
        return f"uncacheable: {field}"
    modalities = document.get("modalities")
    if document.get("audio") is not None or (isinstance(modalities, list) and "audio" in modalities):
        return "uncacheable: audio"
    for kind in _hosted(document):
        return f"uncacheable: tool {kind}"
    if endpoint == "responses" and isinstance(items := document.get("input"), list):
        for item in items:  # `additional_tools`, `tool_search_output`
            for kind in _hosted(item):
                return f"uncacheable: tool {kind}"
    return None


def _searches(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the fields that make other providers search the web: xAI, Qwen, OpenRouter."""
    search = document.get("search_parameters")
    if isinstance(search, dict) and search.get("mode") != "off":
        yield "search_parameters"
    if document.get("enable_search") is True:
        yield "enable_search"
    plugins = document.get("plugins")
    if isinstance(plugins, list) and any(isinstance(one, dict) and one.get("id") == "web" for one in plugins):
        yield "plugins"


def _hosted(holder: object, nested: bool = True) -> Iterator[str]:
    """Yield the kinds of hosted tools among the `tools` of an object. nested: also those in namespaces."""
    tools = holder.get("tools") if isinstance(holder, dict) else None
    for tool in tools if isinstance(tools, list) else ():
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str):
            continue
        yield from (hosted for hosted in HOSTED_TOOLS if kind.startswith(hosted))
        where = tool.get("environment")
        if kind == "shell" and isinstance(where, dict) and where.get("type") != "local":
            yield kind
        if kind == "namespace" and nested:
            yield from _hosted(tool, nested=False)
