"""What all calls pass: the gate before, the form of an error after, and the counters."""

import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ldmcli.errors import LdmError
from ldmcli.serving.http.calls import status_of
from ldmcli.serving.http.gate import Gate, check_content_type
from ldmcli.serving.http.limits import Held, Refused, read_body
from ldmcli.serving.http.metrics import Metrics

JSON, FORM = "application/json", "multipart/form-data"
_CLIENT_GONE = 499  # of whom nobody hears
_log = logging.getLogger(__name__)
_Handle = Callable[[Request], Awaitable[Response]]
_Wording = Callable[[Refused], Response]


class Front:
    """The routes, and what they share."""

    def __init__(self, gate: Gate) -> None:
        self.held, self.metrics = Held(), Metrics()
        self.routes: list[Route] = []
        self._gate = gate

    def add(self, path: str, handle: _Handle, method: str, wording: _Wording, *, open_to_all: bool = False) -> None:
        """Answer calls of a path by `handle`, refusals by `wording`."""

        async def answer(request: Request) -> Response:
            started = time.perf_counter()
            response = await self._answered(request, handle, wording, open_to_all)
            self.metrics.answered(path, response.status_code, time.perf_counter() - started)
            return response

        self.routes.append(Route(path, answer, methods=[method]))

    async def _answered(self, request: Request, handle: _Handle, wording: _Wording, open_to_all: bool) -> Response:
        try:
            self._gate.check(request, open_to_all=open_to_all)
            return await handle(request)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        except Refused as refused:
            return wording(refused)
        except LdmError as error:
            return wording(Refused(str(error), status_of(error)))
        except Exception:
            _log.exception("a request over HTTP failed")
            return wording(Refused("the server failed; its log says more.", 500))

    @contextlib.asynccontextmanager
    async def body(self, request: Request, content_type: str) -> AsyncIterator[bytes]:
        """The body of a request; what it takes of the memory for bodies is given back at the end of the block. Raises
        Refused."""
        check_content_type(request, content_type)
        body = await read_body(request, self.held)
        try:
            yield body
        finally:
            self.held.give(len(body))


def as_json(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON, all of it ASCII: what clients sent and is repeated may hold any character."""
    return Response(json.dumps(content), status, headers, media_type=JSON)


def plainly(refused: Refused) -> Response:
    """A refusal of what is neither OpenAI's nor AUTOMATIC1111's."""
    return as_json({"error": str(refused)}, refused.status, refused.headers)
