"""What a request's own headers say of its body and of how long its sender waits."""

from __future__ import annotations

from aiohttp.web import BaseRequest

from ..core.errors import Refusal


def check_media_type(content_type: str, encoding: str | None) -> None:
    """Raises Refusal(unsupported_media_type) for anything but plain JSON: it also keeps browsers' simple requests
    out.
    """
    essence = content_type.partition(";")[0].strip().lower()
    if essence != "application/json" and not (essence.startswith("application/") and essence.endswith("+json")):
        raise Refusal("unsupported_media_type", "Content-Type must be application/json", param="Content-Type")
    if encoding is not None and encoding.strip().lower() != "identity":
        raise Refusal("unsupported_media_type", "request bodies must not be compressed", param="Content-Encoding")


def client_timeout(request: BaseRequest) -> float | None:
    """Seconds after which the SDK gives up, as it says itself."""
    found = []
    for name in ("X-Stainless-Read-Timeout", "X-Stainless-Timeout"):
        text = request.headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text)
        except ValueError:
            continue
        if 0 < seconds < 1e6:
            found.append(seconds)
    return min(found) if found else None
