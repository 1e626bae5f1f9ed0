"""What the body of an error says, in the words of any provider that speaks OpenAI's API.

The error object stands under `error` (OpenAI), in a list (Gemini), in `detail` (FastAPI), or there is none and the
document is the error itself (vLLM, Mistral). Some servers answer in plain text, and firewalls in HTML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import orjson

Dimension = Literal["requests", "tokens"]
Subject = Literal["", "account", "scope", "model", "content", "object", "key"]

_SAID: Final = 1024


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """The parts of an error that decide: `code` and `type` as strings, "" if absent.

    limit: the dimension that a rate limit names. too_large: the request alone is more than that limit.
    message: its beginning. html: the body is a page, as firewalls and login portals send.
    """

    code: str = ""
    type: str = ""
    limit: Dimension | None = None
    too_large: bool = False
    message: str = field(default="", compare=False)
    html: bool = field(default=False, compare=False)

    @property
    def names(self) -> tuple[str, str]:
        return self.code, self.type

    @property
    def name(self) -> str:
        """The upstream's own code, or else its type; "" if it says neither."""
        return self.code or self.type

    @property
    def subject(self) -> Subject:
        """What the error is about, as far as its words tell.

        account: it is closed or has no money. scope: the key lacks a right that this route needs. model: it is not
        there, or not for this key. content: the request was flagged. object: a stored object is not there. key: the
        key itself.
        """
        for subject, names, words in _SUBJECTS:
            if not names.isdisjoint(self.names) or (self.message and words.search(self.message)):
                return subject
        return ""


NO_ERROR_INFO: Final = ErrorInfo()


def masked(info: ErrorInfo, mask: Callable[[str], str]) -> ErrorInfo:
    """Return the same with the pool's keys taken out of what is copied into the log and receipts."""
    return replace(info, code=mask(info.code), type=mask(info.type)) if info.name else info


_SUBJECTS: Final[tuple[tuple[Subject, frozenset[str], re.Pattern[str]], ...]] = (
    (
        "account",
        frozenset(
            {
                "insufficient_quota",
                "billing_hard_limit_reached",
                "billing_not_active",
                "billing_error",
                "access_terminated",
                "account_deactivated",
                "account_suspended",
                "account_terminated",
                "organization_deactivated",
                "organization_restricted",
                "insufficient_balance",
                "exceeded_current_quota_error",
            }
        ),
        re.compile(
            r"\b(?:account|organi[sz]ation)\b.{0,60}\b(?:deactivated|suspended|terminated|is not active)\b"
            r"|\baccess (?:was|has been) terminated\b|\b(?:credit )?balance is too low\b"
            r"|\binsufficient (?:account )?(?:balance|credits?|funds)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "scope",
        frozenset({"missing_scope", "missing_scopes", "insufficient_permissions"}),
        re.compile(r"\bmissing scopes?\b|\binsufficient permissions?\b|\black(?:s|ing)? the required\b", re.IGNORECASE),
    ),
    (
        "model",
        frozenset({"model_not_found", "model_not_available", "invalid_model", "DeploymentNotFound"}),
        re.compile(
            r"\bmodel\b.{0,160}?\b(?:does(?: not|n['’]t) exist|not exist|(?:was |is )?not found|is not available)\b"
            r"|\b(?:invalid|unknown) model\b(?! (?:output|parameter|argument))|\bis not a valid model\b"
            r"|\bmodel identifier is invalid\b|\bmodels/\S{1,120} is not found\b|\bunable to access model\b"
            r"|\bnot have access to (?:the )?model\b|\bno endpoints found for \S+$"
            r"|\bnot allowed to \w+.{0,40} this model\b",
            re.IGNORECASE,
        ),
    ),
    (
        "content",
        frozenset({"content_filter", "content_policy_violation", "moderation_blocked", "ResponsibleAIPolicyViolation"}),
        re.compile(
            r"\bcontent\b|\bmoderation\b|\bflagged\b|\bpolic(?:y|ies)\b|\bsafety\b|\bguardrails?\b|\bjailbreak"
            r"|\bfirewall\b|\bWAF\b|\bmalicious\b|\berror code: 10(?:09|10|12|20)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "object",
        frozenset({"previous_response_not_found", "file_not_found"}),
        re.compile(
            r"\b(?:response|conversation|item|prompt|file|vector ?store|container|batch|thread|assistant|run|message"
            r"|completion|object)s?\b.{0,120}\b(?:not found|not exist|no longer)\b|\bno such (?!model|deployment)\w+"
            r"|\b(?:resp|conv|msg|rs|fc|file|vs|pmpt|cntr|item|chatcmpl|batch|asst|thread|run)[_-]\w{6,}",
            re.IGNORECASE,
        ),
    ),
    (
        "key",
        frozenset({"invalid_api_key", "unsupported_country_region_territory"}),
        re.compile(
            r"\b(?:api|access)[ _-]?key\b|\bcredentials?\b|\bpermissions?\b|\bcountry\b|\btoken\b", re.IGNORECASE
        ),
    ),
)

_DIMENSION: Final = re.compile(
    r"\b(?:requests|tokens) per (?:min|day)|\b(?:call|request|token) rate limit", re.IGNORECASE
)
"""OpenAI's words, and Azure's."""
_REQUESTED: Final = re.compile(r"\bLimit:? (\d{1,15}),.{0,64}?\bRequested:? (\d{1,15})\b", re.ASCII)


def error_info(body: bytes) -> ErrorInfo:
    """Return what a body says of its error. A body that is not JSON is the message."""
    try:
        document = orjson.loads(body.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError:
        start = body[:_SAID].decode("utf-8", "replace").strip()
        html = start[:1] == "<"
        return ErrorInfo(message="" if html else start, html=html)
    return _info(_error_in(document))


def _error_in(document: object) -> object:
    """Return the error object or text of a document."""
    if isinstance(document, list):
        document = document[0] if document else None
    if not isinstance(document, dict):
        return document
    for name in ("error", "errors", "detail"):
        error = document.get(name)
        if error:
            return _error_in(error) if isinstance(error, list) else error
    return document


def _info(error: object) -> ErrorInfo:
    if isinstance(error, str):
        return ErrorInfo(message=error[:_SAID])
    if not isinstance(error, dict):
        return NO_ERROR_INFO
    code, type_ = _word(error.get("code")), _word(error.get("type"))
    message = next((text for name in ("message", "msg", "error") if isinstance(text := error.get(name), str)), "")
    said = message[:_SAID]
    found = _DIMENSION.search(said)
    limit: Dimension | None = None
    if type_ in ("requests", "tokens"):
        limit = "requests" if type_ == "requests" else "tokens"
    elif found is not None:
        limit = "tokens" if found[0].lower().startswith("token") else "requests"
    return ErrorInfo(code, type_, limit, _beyond(said), said)


def _beyond(message: str) -> bool:
    """Whether a rate limit's message says that the request alone is more than the limit: `Request too large for …`,
    `Limit 30000, Requested 40000`, `can only afford …`.
    """
    numbers = _REQUESTED.search(message)
    if numbers is not None:
        return int(numbers[2]) > int(numbers[1])
    return message.startswith("Request too large for ") or "can only afford" in message


def _word(value: object) -> str:
    return value[:128] if isinstance(value, str) else str(value) if isinstance(value, int) else ""


def stream_error(data: bytes) -> tuple[int, ErrorInfo] | None:
    """Return the status to act on and the error, if the data of a stream's first event is one; else None."""
    if b'"error"' not in data:
        return None
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    # The Responses API has an error event of its own, and vLLM an error object without a wrapper.
    if error is None and "error" in (document.get("type"), document.get("object")):
        error = document
    if not error:
        return None
    info = _info(error)
    return _status_of(info, error), info


def _status_of(info: ErrorInfo, error: object) -> int:
    if "insufficient_quota" in info.names or info.code in ("429", "rate_limit_exceeded"):
        return 429
    numbers = [info.code]
    if isinstance(error, Mapping):
        numbers.append(_word(error.get("status")))
    for number in numbers:
        if number.isascii() and number.isdigit() and 400 <= int(number) < 600:
            return int(number)
    return 400 if info.type == "invalid_request_error" else 500
