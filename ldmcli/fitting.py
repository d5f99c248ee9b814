"""Requests fitted to a model: what they leave open is filled in, what the model cannot draw is refused."""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ldmcli import hires
from ldmcli.condition_config import ImageEmbeddingConfig
from ldmcli.conditions import CONDITION_FIELDS, Box, Label
from ldmcli.control import Control, controls_of
from ldmcli.errors import UsageError
from ldmcli.frozen import frozen
from ldmcli.image_prompt import ImagePrompt, image_prompts_of
from ldmcli.reads import check_condition, check_inputs
from ldmcli.sampling.catalogue import check_fit, sampler_named
from ldmcli.spec import (
    HIRES_FIELDS,
    IMAGE_GUIDANCE,
    MASK_FIELDS,
    NOISE_LEVEL,
    PATCH,
    PICTURES,
    STEERING,
    STRENGTH,
    GenerationRequest,
    LoRA,
)

if TYPE_CHECKING:
    from ldmcli.config import ModelConfig

_USUAL = {field.name: field.default for field in dataclasses.fields(GenerationRequest)}


@frozen
class FittedRequest:
    """A request fitted to a model by `fit_to_model`: every field has a value, in the words of GenerationRequest.

    `schedule` is the spacing of the steps that is used, `guidance_interval` (0, inf) where all steps are guided,
    `refiner_start` 1 where no refiner takes over. `loras` are all that are merged, those that the prompt names too,
    and `prompt` is without them. `recorded` is what pictures and manifests keep: the request with the model's own size,
    sampler, steps and guidance, where its LoRAs were found, and nothing else filled in. `steps_taken`
    is how many of the steps are taken: the last ones, which begin at the noise that `strength` asks for. `model_reads`
    is what the model reads beside the latents, as in UNetConfig, and `image_guidance_scale` 1 where that is no picture.
    `enlarges`: how many times as large as the image each side of the result is, where the model makes it so, else 1.
    `controls` are the networks that steer and `image_prompts` the pictures that are prompts, those of strength 0 left
    out. `inputs` are the SHA-256 of the pictures, the upscaler and the networks that it names, by field; by
    field:NUMBER where there may be several.
    """

    recorded: GenerationRequest
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    width: int
    height: int
    sampler: str
    eta: float
    schedule: str
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    clip_skip: int
    prompt_syntax: str
    on_long_prompt: str
    original_width: int
    original_height: int
    crop_left: int
    crop_top: int
    refiner_start: float
    loras: tuple[LoRA, ...]
    embeddings: tuple[str, ...]
    label: Label | None
    layout: tuple[Box, ...] | None
    map: str | bytes | None
    image_embedding: str | None
    embedding_row: int
    image: str | bytes | None
    strength: float
    resize: str
    image_guidance_scale: float
    noise_level: int
    patch: int
    depth: str | bytes | None
    mask: str | bytes | None
    invert_mask: bool
    mask_blur: float
    masked_content: str
    inpaint_area: str
    mask_padding: int
    paste_back: bool
    hires: str | None
    hires_strength: float
    hires_steps: int
    hires_upscaler: str
    steps_taken: int
    model_reads: str
    enlarges: int
    controls: tuple[Control, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()
    inputs: tuple[tuple[str, str], ...] = ()

    @property
    def settings(self) -> tuple[object, ...]:
        """What pictures that are drawn together must agree in: all but prompts, seed and pictures."""
        own = {"recorded", "prompt", "negative_prompt", "seed", "inputs", "controls", "image_prompts"}
        own |= {*PICTURES, *CONDITION_FIELDS, "embedding_row"}
        steered = [each.settings for each in self.controls] + [each.settings for each in self.image_prompts]
        given = (self.image is None, self.mask is None, *steered)
        return (*given, *(value for name, value in vars(self).items() if name not in own))

    @property
    def reads_image(self) -> bool:
        """Whether the picture bears on the result; with strength 1, of a model that reads no more than latents, and
        without a mask it does not."""
        read = self.strength < 1 or self.mask is not None or self.model_reads in ("image", "depth", "low_res")
        return self.image is not None and read

    @property
    def passes(self) -> "tuple[FittedRequest, ...]":
        """The request itself; or, where `hires` is asked for, what is drawn at first, of which a refiner sees nothing,
        and what is drawn of that in its final size."""
        if self.hires is None:
            return (self,)
        width, height = self.final_size
        second: dict[str, Any] = {
            "width": width,
            "height": height,
            "original_width": self.recorded.original_width or width,
            "original_height": self.recorded.original_height or height,
            "steps": hires.run_in_full(self.hires_steps, self.hires_strength),
            "steps_taken": self.hires_steps if self.hires_strength else 0,
            "image": None,
            "strength": self.hires_strength,
            "masked_content": "original",
            "hires": None,
        }
        return dataclasses.replace(self, refiner_start=1.0, hires=None), dataclasses.replace(self, **second)

    @property
    def final_size(self) -> tuple[int, int]:
        """Width and height of what is drawn in the end."""
        return hires.hires_size(self.hires, self.width, self.height) if self.hires else (self.width, self.height)

    @property
    def encodes(self) -> bool:
        """Whether the autoencoder reads pictures for it, be they its own."""
        return (self.reads_image and self.enlarges == 1) or (
            self.hires is not None and self.hires_upscaler != hires.LATENT
        )

    @property
    def is_steered(self) -> bool:
        """Whether networks are needed beside the model's own."""
        return bool(self.controls or self.image_prompts)

    @property
    def files(self) -> dict[str, str]:
        """The SHA-256 of what it names, by path."""
        found = {}
        for name, sha256 in self.inputs:
            field, _, number = name.partition(":")
            value = getattr(self.recorded, field, name)
            found[str(value[int(number)] if number and value != name else value)] = sha256
        return found

    def with_seed(self, seed: int) -> "FittedRequest":
        """The same picture of another seed."""
        return dataclasses.replace(self, seed=seed, recorded=dataclasses.replace(self.recorded, seed=seed))

    def to_dict(self) -> dict[str, Any]:
        """What is recorded of it, as plain JSON values."""
        return self.recorded.to_dict()


def fit_to_model(
    request: GenerationRequest, config: "ModelConfig", picture: tuple[int, int] | None = None
) -> FittedRequest:
    """The request with the model's own in place of what it leaves open; `picture` is the width and height of its image.
    Raises UsageError where the model cannot draw it: a size that is no whole number of latents, or more steps than its
    schedule has."""
    width, height = _size(request, config, picture)
    check_inputs(request, config)
    check_condition(request, config)
    own = _choices(request, config) | {"width": width, "height": height}
    recorded = dataclasses.replace(request, **own)
    sampler = sampler_named(own["sampler"])
    check_fit(sampler, config.schedule, own["steps"], request.schedule)
    if request.hires:
        _check_second_pass(request.hires, own, config, request.schedule)
    shallowest = min((text.layers - text.skipped_layers for text in config.text_encoders), default=1)
    if request.clip_skip > shallowest:
        raise UsageError(
            f"clip_skip {request.clip_skip} does not fit the model, whose text encoder has {shallowest} layers for it."
        )
    strength = 1.0 if recorded.strength is None else recorded.strength
    filled = own | {
        "schedule": sampler.spacing(config.schedule, request.schedule),
        "guidance_interval": request.guidance_interval or (0.0, math.inf),
        "original_width": request.original_width or width,
        "original_height": request.original_height or height,
        "refiner_start": 1.0 if request.refiner_start is None else request.refiner_start,
        "strength": strength,
        "steps_taken": int(own["steps"] * strength),
        "image_guidance_scale": 1.0 if recorded.image_guidance_scale is None else recorded.image_guidance_scale,
        "noise_level": recorded.noise_level or 0,
        "patch": recorded.patch or 0,
        "embedding_row": recorded.embedding_row or 0,
        "model_reads": config.unet.reads,
        "enlarges": config.enlarges,
        "hires_strength": own.get("hires_strength", 0.0),
        "hires_steps": own.get("hires_steps", 0),
        "hires_upscaler": own.get("hires_upscaler", ""),
        "controls": controls_of(vars(request)),
        "image_prompts": image_prompts_of(vars(request)),
    }
    said = {name: value for name, value in vars(recorded).items() if name not in STEERING}
    return FittedRequest(recorded=recorded, **(said | filled))


def idle_settings(request: FittedRequest) -> Iterator[str]:
    """What of the settings of a picture that is drawn on changes nothing, a sentence each."""
    if request.image is None:
        return
    asked = [name for name in ("resize", *MASK_FIELDS) if getattr(request, name) != _USUAL[name]]
    if request.mask is None:
        if idle := [name for name in asked if name != "resize"]:
            yield f"{idle[0]} is for a picture with a mask, and changes nothing without one"
        return
    if request.inpaint_area == "whole" and "mask_padding" in asked:
        yield "mask_padding is for an inpaint_area of masked, and changes nothing in the whole picture"
    if request.inpaint_area == "masked" and "resize" in asked:
        yield "resize changes nothing where the inpaint_area is masked"
    if request.strength == 1 and request.masked_content in ("noise", "zero"):
        yield "masked_content changes nothing where strength is 1, which draws all of it anew"


def _size(request: GenerationRequest, config: "ModelConfig", picture: tuple[int, int] | None) -> tuple[int, int]:
    """Width and height; `picture` as for `fit_to_model`. Raises UsageError."""
    multiple = config.size_multiple
    usual = (config.default_size, config.default_size)
    if picture and (request.inpaint_area == "whole" or request.mask is None):
        across, down = (side * config.enlarges for side in picture)
        usual = max(1, across // multiple) * multiple, max(1, down // multiple) * multiple
    width = usual[0] if request.width is None else request.width
    height = usual[1] if request.height is None else request.height
    _check_size("size", width, height, multiple)
    return width, height


def _choices(request: GenerationRequest, config: "ModelConfig") -> dict[str, Any]:
    """What is drawn with where the request leaves it open, but for the size."""
    defaults = config.defaults
    usual_guidance = defaults.guidance_scale if config.guidable else 1.0
    own: dict[str, Any] = {
        "sampler": defaults.sampler if request.sampler is None else request.sampler,
        "steps": defaults.steps if request.steps is None else request.steps,
        "guidance_scale": usual_guidance if request.guidance_scale is None else request.guidance_scale,
    }
    if ImageEmbeddingConfig.kind in config.conditions:
        own |= {"embedding_row": request.embedding_row or 0, "noise_level": request.noise_level or 0}
    if config.unet.reads == "low_res":
        own |= _enlarging(request, config)
    elif config.unet.reads == "image":
        usual_scale = None if own["guidance_scale"] == 1 else IMAGE_GUIDANCE  # unguided, it would change nothing
        asked = request.image_guidance_scale
        own["image_guidance_scale"] = usual_scale if asked is None else asked
    else:
        own["strength"] = _strength(request, own["steps"], 1.0 if config.unet.reads == "masked" else STRENGTH)
    return own | _second_pass(request, own["steps"])


def _check_second_pass(asked: str, own: dict[str, Any], config: "ModelConfig", schedule: str | None) -> None:
    """Raise UsageError where the model cannot draw the second pass that is `asked` for, `own` being what was filled
    in."""
    size, strength = hires.hires_size(asked, own["width"], own["height"]), own["hires_strength"]
    _check_size(f"hires {asked}: size", *size, config.size_multiple)
    in_full = hires.run_in_full(own["hires_steps"], strength)
    try:
        check_fit(sampler_named(own["sampler"]), config.schedule, in_full, schedule)
    except UsageError as error:
        given = f"{own['hires_steps']} steps of strength {strength:g}"
        raise UsageError(f"the second pass, {given}, is the end of {in_full} steps, and {error}") from None


def _check_size(what: str, width: int, height: int, multiple: int) -> None:
    if width % multiple or height % multiple:
        nearest = "×".join(str(max(1, round(side / multiple)) * multiple) for side in (width, height))
        raise UsageError(
            f"{what} {width}×{height} does not fit the model, whose sides are multiples of {multiple}; the nearest is "
            f"{nearest}."
        )


def _second_pass(request: GenerationRequest, steps: int) -> dict[str, Any]:
    """The HIRES_FIELDS that a request with a second pass leaves open. Raises UsageError where there is none to apply
    them to, or a mask, which says what is not to be drawn anew."""
    if request.hires is None:
        for name in HIRES_FIELDS:
            if getattr(request, name) is not None:
                raise UsageError(f"{name} is for a request with hires; give that, or leave it out.")
        return {}
    if request.mask is not None:
        raise UsageError("hires draws the whole picture anew, and a mask keeps parts of it; leave out one of them.")
    usual = {"hires_strength": hires.STRENGTH, "hires_steps": steps, "hires_upscaler": hires.LATENT}
    given = {name: getattr(request, name) for name in usual}
    return {name: usual[name] if value is None else value for name, value in given.items()}


def _enlarging(request: GenerationRequest, config: "ModelConfig") -> dict[str, int | None]:
    """The ENLARGING_FIELDS that a request leaves open, for a model that enlarges pictures."""
    patch = PATCH if request.patch is None else request.patch
    if config.noising is None:
        return {"patch": patch}
    return {"patch": patch, "noise_level": NOISE_LEVEL if request.noise_level is None else request.noise_level}


def _strength(request: GenerationRequest, steps: int, usual: float) -> float | None:
    """The strength of a request with an image, `usual` where it says none. Raises UsageError where there is no image to
    apply it to, or no step."""
    if request.image is None:
        for name in ("strength", "mask"):
            if getattr(request, name) is not None:
                raise UsageError(f"{name} is for a request with an image; give one, or leave it out.")
        return None
    strength = usual if request.strength is None else request.strength
    if 0 < strength * steps < 1:
        raise UsageError(
            f"strength {strength:g} of {steps} steps is less than one step; use {math.ceil(1000 / steps) / 1000:g} or "
            "more, or 0 for the picture as the autoencoder gives it back."
        )
    return strength
