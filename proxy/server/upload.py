"""`Upload`: the body of a request that is passed through. Before it is sent, only what may name a model is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import orjson
from aiohttp.web import BaseRequest

from ..protocol.decompress import Decompressor
from ..protocol.errors import ProxyError
from ..protocol.form import FormModel, LaterModel, boundary_of, find_model, with_model
from ..protocol.json_edit import is_ambiguous, set_field
from ..protocol.json_parse import parse_leniently
from ..protocol.passed_model import model_in_session
from ..protocol.routes import Route
from ..system.threads import in_thread_if_large
from ..upstream.request import Body
from ..upstream.target import Upstream
from .request_body import decoded, next_piece, send_continue, too_large

MAX_JSON: Final = 1024 * 1024
"""A JSON body of up to this many bytes is read before it is sent."""

MAX_FORM: Final = 256 * 1024
"""At most this many bytes of a form are read before it is sent, to find the fields before its first file."""

_JSON: Final = frozenset({"application/json", "application/x-www-form-urlencoded", "text/plain", ""})
"""Types of bodies that may be JSON: some upstreams read them as such, whatever they are called."""

_NO_SPANS: Final = FormModel((), False)


class Upload:
    """The body on its way up, counted and timed. limit: bytes that it may have at most.

    document: a JSON body that was read, parsed; None for any other. raw: the same as bytes.
    packed: what a compressed JSON body holds. models: those that the body names.
    """

    def __init__(self, request: BaseRequest, limit: int) -> None:
        self._request = request
        self._limit = limit
        self._exists = request.body_exists
        self._head = b""
        self._size = 0
        self._began: float | None = None
        self._whole = False
        self._boundary = b""
        self._form = _NO_SPANS
        self._renames: tuple[Route, str] | None = None
        self._one_model = False
        self._announced = request.content_length if self._exists else None
        self.length = self._announced
        self.error: ProxyError | None = None
        self.document: Mapping[str, Any] | None = None
        self.packed: object = None
        self.models: tuple[str, ...] = ()

    @property
    def raw(self) -> bytes:
        return self._head if self.document is not None else b""

    @property
    def is_ambiguous(self) -> bool:
        """Whether an upstream might read another model than the proxy."""
        if self.document is not None:
            return is_ambiguous(self._head, "model")
        return len(self._form.spans) > 1 or LaterModel().found_in(self._after_model)

    @property
    def _after_model(self) -> bytes:
        """What was read of a form after its model."""
        return self._head[self._form.spans[-1][1] :] if self._form.spans else self._head

    async def read_json(self, most: int = MAX_JSON) -> None:
        """Read a JSON body of at most `most` bytes before it is sent. Raises ProxyError, ConnectionResetError."""
        request = self._request
        kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        is_json = kind in _JSON or (kind.startswith("application/") and kind.endswith("+json"))
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if not self._exists or not is_json or not (encoding == "identity" or Decompressor.knows(encoding)):
            return
        if self._announced is not None and self._announced > min(most, self._limit):
            return
        while len(self._head) <= most and await self._read_more():
            pass
        if not self._whole:
            return
        try:
            body = self._head
            if encoding != "identity":
                body = await in_thread_if_large(len(body), decoded, body, encoding, most)
            document = await in_thread_if_large(len(body), parse_leniently, body)
        except (ValueError, ProxyError):
            return  # the upstream says what is wrong
        if encoding != "identity":
            self.packed = document
        elif isinstance(document, dict):
            self.document = document
            model = document.get("model")
            found = model if isinstance(model, str) else model_in_session(document)
            self.models = (found,) if found else ()

    async def read_form(self) -> None:
        """Read the fields of a form that stand before its first file. Raises ProxyError, ConnectionResetError."""
        if not self._exists or "Content-Encoding" in self._request.headers:
            return
        self._boundary = boundary_of(self._request.headers.get("Content-Type", ""))
        while self._boundary and not self._form.done and len(self._head) <= MAX_FORM and await self._read_more():
            self._form = find_model(self._head, self._boundary)
        self.models = tuple([self._head[start:end].decode("utf-8", "replace") for start, end in self._form.spans])

    def rename(self, route: Route, model: str) -> None:
        """Let each upstream have its own name of the model in the body, if the body or a deployment names one."""
        top = self.document is not None and isinstance(self.document.get("model"), str)
        if top or self._form.spans or (route.deployment is not None and (self.document is not None or self._boundary)):
            self._renames = route, model

    def allow_one_model(self) -> None:
        """Refuse the rest of a form if it names another model."""
        self._one_model = bool(self._boundary) and not self._whole

    def for_upstream(self, upstream: Upstream) -> tuple[Body, bool]:
        if not self._exists:
            return None, False
        head = self._head_for(upstream)
        if self._whole:
            self.length = None  # bytes tell their own length
            return head, False
        self.length = None if self._announced is None else self._announced + len(head) - len(self._head)
        return self._pieces(head), False

    def without_usage(self, upstream: Upstream) -> None:
        raise AssertionError("nothing is added to this body")

    def _head_for(self, upstream: Upstream) -> bytes:
        """Return what was read of the body, with the model's name at this upstream."""
        if self._renames is None:
            return self._head
        route, model = self._renames
        named = upstream.provider.body_model(upstream.address, route, model, self.models[-1] if self.models else None)
        if named is None:
            return self._head
        if self.document is not None:
            return set_field(self._head, "model", orjson.dumps(named))
        return with_model(self._head, self._boundary, self._form.spans, named.encode("utf-8", "replace"))

    async def _read_more(self) -> bool:
        """Read the next piece into the head; False at the end."""
        piece = await self._next()
        self._head += piece
        self._whole = not piece
        return bool(piece)

    async def _next(self) -> bytes:
        """Return the next piece. Raises ProxyError(request_too_large), ConnectionResetError."""
        if self._began is None:
            self._began = asyncio.get_running_loop().time()
            await send_continue(self._request)
        piece = await next_piece(self._request, self._began, self._size)
        self._size += len(piece)
        if self._size > self._limit:
            raise too_large(self._limit, "max_upload")
        return piece

    async def _pieces(self, head: bytes) -> AsyncIterator[bytes]:
        later = LaterModel() if self._one_model else None
        try:
            if head:
                yield head
            if later is not None:
                later.found_in(self._after_model)
            while piece := await self._next():
                if later is not None and later.found_in(piece):
                    message = "this client may use some models only, and the form names another model after a file"
                    raise ProxyError("model_not_allowed", message, param="model")
                yield piece
        except ProxyError as error:
            self.error = error
            raise ValueError(error.code) from None
