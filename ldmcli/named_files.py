"""The files that a request names, whichever of its fields do: one place to add to with each that does."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from ldmcli.control import EMBEDDED_CONTROL
from ldmcli.disk.opening import without_home
from ldmcli.fitting import FittedRequest
from ldmcli.hires import UPSCALERS
from ldmcli.image_prompt import NO_MASK
from ldmcli.spec import ALPHA, INPUT_FILES, STEERING_FILES, GenerationRequest


def named_files(request: GenerationRequest) -> list[str]:
    """Every path that it names, or name of the hub, as it is typed."""
    given = [*(getattr(request, name) for name in INPUT_FILES)]
    given += [one for name in STEERING_FILES for one in getattr(request, name)]
    words = (ALPHA, EMBEDDED_CONTROL, NO_MASK)
    found = [name for name in given if isinstance(name, str) and name not in words]
    if request.hires_upscaler is not None and request.hires_upscaler not in UPSCALERS:
        found.append(request.hires_upscaler)
    return [*found, *(lora.path or lora.name for lora in request.loras), *request.embeddings]


def with_files(request: FittedRequest, change: Callable[[str], str]) -> FittedRequest:
    """The same request with each path that it names changed; what is recorded of it stays."""

    def there(name: Any) -> Any:
        return change(name) if isinstance(name, str) else name

    found: dict[str, Any] = {name: there(getattr(request, name)) for name in INPUT_FILES if name != "mask"}
    found["mask"] = request.mask if request.mask == ALPHA else there(request.mask)
    if request.hires and request.hires_upscaler not in UPSCALERS:
        found["hires_upscaler"] = there(request.hires_upscaler)
    found["loras"] = tuple(dataclasses.replace(lora, path=there(lora.path or lora.name)) for lora in request.loras)
    found["controls"] = tuple(
        dataclasses.replace(control, image=there(control.image), net=_network(control.net, change))
        for control in request.controls
    )
    found["image_prompts"] = tuple(
        dataclasses.replace(prompt, adapter=there(prompt.adapter), image=there(prompt.image), mask=there(prompt.mask))
        for prompt in request.image_prompts
    )
    if request.embeddings:
        from ldmcli.adapters.embedding_words import split_name

        names = map(split_name, request.embeddings)
        found["embeddings"] = tuple(there(file) + ("" if word is None else f":{word}") for file, word in names)
    return dataclasses.replace(request, **found)


def absolute(path: str) -> str:
    """A path as it is found from any folder."""
    return os.path.abspath(os.path.expanduser(path))


def if_there(path: str) -> str:
    """The same, where there is something; else the name, which may be of the hub."""
    return absolute(path) if os.path.lexists(os.path.expanduser(path)) else path


def _network(name: str, change: Callable[[str], str]) -> str:
    """A network's path; the word for this program's own is none, unless there is a file of that name."""
    return name if name == EMBEDDED_CONTROL and not os.path.lexists(name) else change(name)


def shareable(request: GenerationRequest) -> GenerationRequest:
    """The request as it may stand in a picture that is given away."""
    paths = {name: getattr(request, name) for name in (*INPUT_FILES, "hires_upscaler")}
    shown: dict[str, Any] = {name: without_home(path) for name, path in paths.items() if isinstance(path, str)}
    for name in STEERING_FILES:
        if values := getattr(request, name):
            shown[name] = tuple(without_home(value) if isinstance(value, str) else value for value in values)
    return dataclasses.replace(request, **shown) if shown else request
