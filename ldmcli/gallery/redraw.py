"""The command that draws a picture again, as its record says."""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from ldmcli.conditions import CONDITION_FIELDS
from ldmcli.errors import LdmError
from ldmcli.spec import PICTURES, STEERING, STEERING_PICTURES, GenerationRequest

_STDIN = "-"  # in place of a picture that was given as data
_OWN = {"prompt", "negative_prompt", "seed", "width", "height", "loras", "embeddings", "canny"}
# What `ldm sample` has no option for, or takes as a file, and rows may say.
_NOT_SAMPLED = ("layout", "image", "loras", "embeddings", "prompt_syntax", "on_long_prompt", "clip_skip", *STEERING)
_FLAGS = {"invert_mask": "--invert-mask", "paste_back": "--no-paste-back"}  # where they are not as usual
# Of a model's identity: options by their names there.
_WEIGHTS = {
    "path": "--model", "vae": "--vae", "refiner": "--refiner", "prediction_type": "--prediction-type",
    "upscaler": "--upscale", "image_encoder": "--image-encoder",
}  # fmt: skip


def command(request: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """What to type to draw `request` with `model`, a record's; "" where a request is none that can be typed."""
    try:
        asked = GenerationRequest.from_dict(request)
    except (LdmError, TypeError, OverflowError):
        return ""
    if _STDIN in (asked.prompt, *(getattr(asked, name) for name in PICTURES)):
        return ""
    if any(_STDIN in getattr(asked, name) for name in STEERING_PICTURES):
        return ""
    samples = any(getattr(asked, name) is not None for name in CONDITION_FIELDS)
    if samples and any(getattr(asked, name) != getattr(GenerationRequest, name) for name in _NOT_SAMPLED):
        return ""
    words = ["ldm", "sample" if samples else "txt2img" if asked.image is None else "img2img"]
    if samples:
        words += ["--prompt", asked.prompt] if asked.prompt else []
    else:
        words += ["--prompt", asked.prompt] if asked.prompt.startswith("-") else [asked.prompt]
    for name, option in _WEIGHTS.items():
        if isinstance(model.get(name), str) and model[name]:
            words += [option, model[name]]
    return shlex.join([*words, *_options(asked)])


def _options(asked: GenerationRequest) -> Iterator[str]:
    yield from ("--seed", str(asked.seed))
    if asked.negative_prompt:
        yield from ("--negative-prompt", asked.negative_prompt)
    if asked.width and asked.height:
        yield from ("--size", f"{asked.width}x{asked.height}")
    for lora in asked.loras:
        if not lora.in_prompt:
            yield from ("--lora", f"{lora.name}:{lora.weight!r}:{lora.text_weight!r}")
    for embedding in asked.embeddings:
        yield from ("--embedding", embedding)
    for thresholds in asked.canny:
        yield f"--canny={thresholds}"
    for field in dataclasses.fields(asked):
        value, option = getattr(asked, field.name), f"--{field.name.replace('_', '-')}"
        if field.name in _OWN or value == field.default:
            continue
        if field.name in _FLAGS:
            yield _FLAGS[field.name]
        elif field.name == "guidance_interval":
            yield from (option, "{!r}:{!r}".format(*value))
        else:
            for one in value if isinstance(value, tuple) else (value,):
                yield from (option, str(one))
