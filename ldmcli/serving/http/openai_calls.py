"""OpenAI's calls about pictures: images/generations, images/edits, models."""

import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ldmcli import __version__
from ldmcli.errors import LdmError
from ldmcli.serving.http.asked import Asked
from ldmcli.serving.http.calls import Call, Calls, Drawn
from ldmcli.serving.http.front import FORM, JSON, Front, as_json
from ldmcli.serving.http.limits import Refused, read_json
from ldmcli.serving.http.multipart import read_form
from ldmcli.serving.http.openai_fields import read_edit, read_generation

_NO_TOKENS = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0} | {
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}
}


class OpenAI:
    """The calls, by the paths that `routes` gives."""

    def __init__(self, calls: Calls, front: Front) -> None:
        self._calls, self._front = calls, front
        self._since = int(time.time())
        front.add("/v1/images/generations", self.generations, "POST", worded)
        front.add("/v1/images/edits", self.edits, "POST", worded)
        front.add("/v1/models", self.models, "GET", worded)
        front.add("/v1/models/{name:path}", self.model, "GET", worded)

    async def generations(self, request: Request) -> Response:
        async with self._front.body(request, JSON) as body:
            asked, stream = await self._calls.read(lambda: read_generation(read_json(body)))
            return await self._answer(request, asked, "image_generation", stream=stream)

    async def edits(self, request: Request) -> Response:
        async with self._front.body(request, FORM) as body:
            kind = request.headers["content-type"]
            asked, stream = await self._calls.read(lambda: read_edit(*read_form(body, kind)))
            return await self._answer(request, asked, "image_edit", stream=stream)

    async def models(self, request: Request) -> Response:
        return as_json({"object": "list", "data": list(map(self._described, self._calls.models))})

    async def model(self, request: Request) -> Response:
        return as_json(self._described(self._calls.named(request.path_params["name"])))

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._since, "owned_by": f"ldmcli {__version__}"}

    async def _answer(self, request: Request, asked: Asked, kind: str, *, stream: bool) -> Response:
        call = await self._calls.begin(asked)
        if stream:
            end = BackgroundTask(call.cancel)  # of what nobody began to hear
            return StreamingResponse(_events(call, kind), media_type="text/event-stream", background=end)
        pictures = await self._calls.all_pictures(call, request)
        answer = {"created": int(time.time()), "data": [_picture(drawn) for drawn in pictures]}
        warnings = {"warnings": call.warnings} if call.warnings else {}
        return as_json(answer | _facts(call, pictures[0]) | warnings)


def worded(refused: Refused) -> Response:
    """A refusal as OpenAI words it."""
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    error = {"message": str(refused), "type": kind, "param": refused.field, "code": refused.code}
    return as_json({"error": error}, refused.status, refused.headers)


async def _events(call: Call, kind: str) -> AsyncIterator[str]:
    """Each picture as it is done, and as often before as was asked for, unless it was faster than that."""
    try:
        async with contextlib.aclosing(call.pictures()) as pictures:
            async for drawn in pictures:
                said = _picture(drawn) | _facts(call, drawn) | {"created_at": int(time.time()), "quality": "auto"}
                if drawn.view is not None:
                    yield _event(said | {"type": f"{kind}.partial_image", "partial_image_index": drawn.view})
                    continue
                warnings = {"warnings": call.warnings} if call.warnings else {}
                yield _event(said | {"type": f"{kind}.completed", "usage": _NO_TOKENS} | warnings)
    except LdmError as error:
        yield _event({"type": "error", "error": {"message": str(error), "type": "server_error", "param": None}})


def _event(fields: dict[str, Any]) -> str:
    return f"event: {fields['type']}\ndata: {json.dumps(fields)}\n\n"


def _picture(drawn: Drawn) -> dict[str, Any]:
    return {"b64_json": drawn.base64, "seed": drawn.request.seed}


def _facts(call: Call, drawn: Drawn) -> dict[str, Any]:
    size = f"{drawn.size[0]}x{drawn.size[1]}"
    return {"output_format": call.asked.encoding.format, "size": size, "background": "opaque"}
