"""How much a request over HTTP may ask for and take, and how one that goes further is refused."""

import asyncio
import json
import math
from typing import Any

from starlette.requests import ClientDisconnect, Request

from ldmcli.errors import printable

MAX_BODY = 32 << 20  # bytes
MAX_HELD = 128 << 20  # bytes of the bodies of all requests at work, which take several times that of memory
MAX_MARKS = 10_000  # commas, colons and opening brackets in JSON, which base64 has none of
MAX_PIXELS = 1 << 22  # of a picture to draw
MAX_ALL_PIXELS = 1 << 25  # of all pictures of a call
MAX_UPLOAD_PIXELS = 1 << 24  # of a picture that is sent
MAX_PICTURES = 32
MAX_STEPS = 200
MAX_PROMPT = 32_000  # characters
BODY_S = 60.0  # in which a body must be there


class Refused(Exception):
    """A request that is not met: one sentence, an HTTP status, the field at fault. `code` is OpenAI's word for it,
    `retry_after` how many seconds to wait before the next try."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        field: str | None = None,
        *,
        code: str | None = None,
        retry_after: int = 0,
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.code, self.retry_after = status, field, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the answer."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(self.retry_after)} if self.retry_after else {}


class Held:
    """The bytes of the bodies that are at work."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, size: int) -> None:
        """Raises Refused where there are too many."""
        if self.bytes + size > MAX_HELD:
            raise Refused("the server holds as many bytes of requests as it may; try again.", 503, retry_after=5)
        self.bytes += size

    def give(self, size: int) -> None:
        self.bytes -= size


async def read_body(request: Request, held: Held) -> bytes:
    """The body, whose size stays in `held`. What is too large is thrown away until it ends, for most clients read no
    answer before. Raises Refused."""
    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY:
                    held.give(sum(map(len, parts)))
                    parts.clear()
                elif part:
                    held.take(len(part))
                    parts.append(part)
    except TimeoutError:
        held.give(sum(map(len, parts)))
        raise Refused(f"the body was not there in {BODY_S:g} s.", 408) from None
    except (Refused, ClientDisconnect):
        held.give(sum(map(len, parts)))
        raise
    if size > MAX_BODY:
        raise Refused(f"the body is {size >> 20} MiB; at most {MAX_BODY >> 20} are accepted.", 413)
    return b"".join(parts)


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises Refused."""
    marks = sum(map(body.count, (b",", b":", b"{", b"[")))
    if marks > MAX_MARKS:
        raise Refused(f"the body has {marks} commas, colons and brackets; at most {MAX_MARKS} are accepted.", 413)
    try:
        value = json.loads(body, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise Refused("the body is nested too deeply.") from None
    except ValueError as error:
        raise Refused(f"the body is no JSON: {printable(str(error))}.") from None
    if not isinstance(value, dict):
        raise Refused(f"the body is a JSON {type(value).__name__}, and an object is expected.")
    return value


def check_size(width: int, height: int, count: int) -> None:
    """Raises Refused for pictures to draw that are too large."""
    if width * height > MAX_PIXELS or width * height * count > MAX_ALL_PIXELS:
        most = f"{MAX_PIXELS} pixels a picture and {MAX_ALL_PIXELS} in all"
        raise Refused(f"{count} of {width}×{height} are too much: {most} are drawn for a call.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no number")
    return number
