"""Messages between client and server: JSON, and beside it the bytes of pictures. Nothing is unpickled."""

import dataclasses
import json
import socket
import struct
from typing import Any

from ldmcli import errors
from ldmcli.control import Control
from ldmcli.errors import LdmError
from ldmcli.fitting import FittedRequest
from ldmcli.image_prompt import ImagePrompt
from ldmcli.spec import GenerationRequest, LoRA

MAX_TEXT = 1 << 26  # bytes of a message's JSON
MAX_BYTES = 1 << 31  # … and of what comes with it
_BYTES = "\0"  # the key of what stands for bytes
_HEAD = struct.Struct("!IQ")


class WireError(ConnectionError):
    """The other end is gone, or what it sends is no message."""


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a message of plain values, dataclasses and bytes. Raises OSError where nobody takes it."""
    blobs: list[bytes] = []

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            blobs.append(value)
            return {_BYTES: len(value)}
        if dataclasses.is_dataclass(value):
            return vars(value)
        raise TypeError(f"{type(value).__name__} cannot be sent")

    text = json.dumps(message, default=plain).encode("ascii")
    size = sum(map(len, blobs))
    if len(text) > MAX_TEXT or size > MAX_BYTES:
        raise WireError("the message is too long")
    connection.sendall(b"".join([_HEAD.pack(len(text), size), text, *blobs]))


def receive(connection: socket.socket) -> dict[str, Any]:
    """The next message. Raises WireError, also at the end, and OSError."""
    length, size = _HEAD.unpack(_exactly(connection, _HEAD.size))
    if length > MAX_TEXT or size > MAX_BYTES:
        raise WireError("the message is too long")
    text, blobs, at = _exactly(connection, length), _exactly(connection, size), 0

    def whole(value: dict[str, Any]) -> Any:
        nonlocal at
        if _BYTES not in value:
            return value
        at += value[_BYTES]
        return blobs[at - value[_BYTES] : at]

    try:
        message = json.loads(text, object_hook=whole)
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError("what came is no message") from error
    if not isinstance(message, dict):
        raise WireError("what came is no message")
    return message


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, have = memoryview(data), 0
    while have < size:
        count = connection.recv_into(view[have:])
        if not count:
            raise WireError("the other end is gone")
        have += count
    return bytes(data)


def error_to_dict(error: BaseException, message: str) -> dict[str, str]:
    """An error as it is sent."""
    return {"class": type(error).__name__, "message": message}


def error_from_dict(sent: dict[str, str]) -> LdmError:
    """The error that was sent, of the same class where that is one of this program's, and so with its exit code."""
    kind = getattr(errors, str(sent["class"]), LdmError)
    known = isinstance(kind, type) and issubclass(kind, LdmError)
    return (kind if known else LdmError)(sent["message"])


def fitted_from_dict(sent: dict[str, Any]) -> FittedRequest:
    """A fitted request that was sent. Raises UsageError, TypeError or KeyError where it is none."""
    lists = {name: tuple(sent[name]) for name in ("guidance_interval", "embeddings")}
    lists["loras"] = tuple(LoRA(**lora) for lora in sent["loras"])
    lists["image_prompts"] = tuple(ImagePrompt(**each) for each in sent["image_prompts"])
    lists["layout"] = sent["layout"] and tuple(map(tuple, sent["layout"]))
    lists["inputs"] = tuple((name, sha256) for name, sha256 in sent["inputs"])
    lists["controls"] = tuple(_control_from_dict(control) for control in sent["controls"])
    return FittedRequest(**(sent | lists | {"recorded": GenerationRequest(**sent["recorded"])}))


def _control_from_dict(sent: dict[str, Any]) -> Control:
    canny = sent["canny"]
    return Control(**(sent | {"canny": canny and tuple(canny)}))
