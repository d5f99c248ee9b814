"""What a client asks for, in this program's words."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldmcli.conditions import read_label, read_layout
from ldmcli.config import ModelConfig
from ldmcli.errors import UsageError
from ldmcli.images.formats import Encoding
from ldmcli.serving.http.limits import Refused
from ldmcli.serving.http.uploads import picture_bytes
from ldmcli.serving.http.values import Values
from ldmcli.spec import MAX_SEED, GenerationRequest


@dataclasses.dataclass(frozen=True)
class Asked:
    """Pictures to draw: `model` as the client calls it, None for the usual one; `keeps_model`: it is the usual one from
    then on; `warnings` say what changes nothing, a sentence each; `adapted` gives a request as it is meant for a
    model; `views` is how often each picture is shown as it grows."""

    requests: Sequence[GenerationRequest]
    model: str | None = None
    encoding: Encoding = Encoding()
    warnings: Sequence[str] = ()
    keeps_model: bool = False
    adapted: Callable[[GenerationRequest, ModelConfig], GenerationRequest] = lambda request, config: request
    views: int = 0


def requests_of(settings: Mapping[str, Any], seed: int, count: int) -> list[GenerationRequest]:
    """A request for each of `count` pictures, whose seeds count up. Raises Refused."""
    if seed + count - 1 > MAX_SEED:
        raise Refused(f"seed {seed} with {count} pictures goes past {MAX_SEED}, the largest seed.", field="seed")
    try:
        first = GenerationRequest(**settings, seed=seed)
    except UsageError as error:
        raise Refused(str(error)) from None
    return [dataclasses.replace(first, seed=seed + i) for i in range(count)]


def conditions_of(values: Values) -> dict[str, Any]:
    """What is sent for models that read no prompts, in fields that neither OpenAI nor AUTOMATIC1111 has: a `label`, a
    class's number or name; a `layout`, a list or the JSON of one; a `map`, a picture in base64. Raises Refused."""
    readers = {"label": read_label, "layout": _read_layout, "map": lambda value: picture_bytes(value, "map")}
    found = {}
    for name, read in readers.items():
        if (value := values.raw(name)) is not None:
            try:
                found[name] = read(value)
            except UsageError as error:
                raise Refused(str(error), field=name) from None
    return found


def _read_layout(value: Any) -> Any:
    if isinstance(value, str):  # as forms have it
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UsageError("layout is no JSON.") from None
    return read_layout(value)
