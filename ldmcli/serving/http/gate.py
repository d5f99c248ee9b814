"""Who may come in: the token, and what browsers are kept from, which send what any page tells them to."""

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Collection

from starlette.requests import Request

from ldmcli.serving.http.limits import Refused

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether a host is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """Lets requests in that have the `token`, where there is one, and that no page of another site sends; on a loopback
    `host` only those that call it so, for names of other sites may lead there too (DNS rebinding)."""

    def __init__(self, host: str, token: str | None) -> None:
        self._token = None if token is None else token.encode()
        self._hosts: Collection[str] | None = {*_LOOPBACK, host} if is_loopback(host) else None

    def check(self, request: Request, *, open_to_all: bool = False) -> None:
        """Raises Refused; `open_to_all` needs no token."""
        host = request.headers.get("host", "")
        if self._hosts is not None and _name_of(host) not in self._hosts:
            raise Refused("the Host header names another machine.", 403)
        origin = request.headers.get("origin")
        if origin is not None and origin.lower() != f"{request.url.scheme}://{host.lower()}":
            raise Refused("pages of other sites may not ask for anything.", 403)
        if self._token is None or open_to_all:
            return
        if not hmac.compare_digest(_token_of(request.headers.get("authorization", "")), self._token):
            raise Refused("the token is missing or wrong.", 401, code="invalid_api_key")


def check_content_type(request: Request, wanted: str) -> None:
    """Raises Refused for a body of another type. That of forms is what pages may send anywhere."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != wanted:
        raise Refused(f"the body must be {wanted}, and Content-Type must say so.", 415)


def _name_of(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _token_of(authorization: str) -> bytes:
    """What a client gives as a token: `Bearer TOKEN`, or `Basic` with it as the password."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip().encode("latin-1", "replace")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
