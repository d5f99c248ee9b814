"""All calls as one ASGI application."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ldmcli.serving.http.a1111_calls import A1111
from ldmcli.serving.http.calls import Calls
from ldmcli.serving.http.front import Front, plainly
from ldmcli.serving.http.gate import Gate
from ldmcli.serving.http.limits import Refused
from ldmcli.serving.http.metrics import CONTENT_TYPE
from ldmcli.serving.http.openai_calls import OpenAI, worded


def make_app(calls: Calls, gate: Gate) -> Starlette:
    """The application: OpenAI's and AUTOMATIC1111's calls, /healthz and /metrics."""
    front = Front(gate)
    OpenAI(calls, front)
    A1111(calls, front)

    async def health(_request: Request) -> Response:
        if calls.work.failure is not None:
            raise Refused(str(calls.work.failure), 503)
        return PlainTextResponse("ok\n")

    async def metrics(_request: Request) -> Response:
        return PlainTextResponse(front.metrics.text(calls.work, front.held.bytes), media_type=CONTENT_TYPE)

    async def unknown(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        try:
            gate.check(request)
        except Refused as refused:
            return worded(refused)
        return worded(Refused(f"there is no {request.method} of this path.", status))

    front.add("/healthz", health, "GET", plainly, open_to_all=True)
    front.add("/metrics", metrics, "GET", plainly)
    return Starlette(routes=front.routes, exception_handlers={404: unknown, 405: unknown})
