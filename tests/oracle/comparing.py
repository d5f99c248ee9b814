"""Running this program and diffusers on the same requests, and measuring how far apart they are."""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ldmcli.fitting import FittedRequest, fit_to_model
from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.sampling.registry import SAMPLERS
from ldmcli.spec import REFINER_START, GenerationRequest

DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "plms": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over the norm of what is right."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


@contextlib.contextmanager
def recorded_latents() -> Iterator[list[Tensor]]:
    """Every latent that any sampler yields inside the block."""
    latents: list[Tensor] = []

    def recording(sampler: Any) -> Any:
        def sample(*args: Any, **settings: Any) -> Iterator[Tensor]:
            for after_step in sampler(*args, **settings):
                latents.append(after_step.clone())
                yield after_step

        return sample

    with mock.patch.dict(SAMPLERS, {name: recording(sampler) for name, sampler in SAMPLERS.items()}):
        yield latents


def draw(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> tuple[list[Tensor], np.ndarray]:
    """This program's latents after each step, and its pictures (n, height, width, 3)."""
    with recorded_latents() as latents:
        pictures = pictures_of(pipeline, requests)
    return latents, pictures


def fitted(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> list[FittedRequest]:
    """The requests with the model's own in place of what they leave open."""
    if pipeline.refiner:
        requests = [dataclasses.replace(r, refiner_start=r.refiner_start or REFINER_START) for r in requests]
    return [fit_to_model(request, pipeline.config) for request in requests]


def pictures_of(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> np.ndarray:
    """Pictures (n, height, width, 3) of requests that agree in all but prompts and seed, drawn together."""
    return np.stack([pixels.numpy() for pixels in pipeline.draw(fitted(pipeline, requests)).pixels])


@torch.inference_mode()
def decoded(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Images (batch, 3, height, width) in about -1…1, before they are rounded to pixels."""
    return pipeline._decode_as(latents, next(pipeline.vae.parameters()).dtype)


def draw_with_diffusers(
    reference: Any, requests: Sequence[GenerationRequest], schedule: dict[str, Any] | None = None
) -> tuple[list[Tensor], np.ndarray]:
    """diffusers' latents after each step, and its pictures; `schedule` replaces settings of the noise schedule.

    Each image has a CPU generator of its seed, as diffusers' documentation recommends for reproducible batches.
    """
    requests = [with_defaults(request) for request in requests]
    sampler = str(requests[0].sampler)
    scheduler = diffusers_scheduler(sampler, reference.scheduler.config, **(schedule or {}))
    with mock.patch.object(reference, "scheduler", scheduler):
        latents, images = call_diffusers(reference, their_arguments(requests))
    return scaled_as_ours(latents, sampler, scheduler), as_pixels(images)


def their_arguments(requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    """The requests as diffusers' pipelines take them, sizes of SDXL included."""
    settings = requests[0]
    size = settings.height, settings.width
    negatives = [request.negative_prompt for request in requests]
    return {
        "prompt": [request.prompt for request in requests],
        "negative_prompt": negatives if any(negatives) else None,
        "height": settings.height,
        "width": settings.width,
        "original_size": (settings.original_height or settings.height, settings.original_width or settings.width),
        "crops_coords_top_left": (settings.crop_top, settings.crop_left),
        # Its refiner would take 0, 0 here, where its base takes the prompt's own and Stability AI's code does in both.
        "negative_crops_coords_top_left": (settings.crop_top, settings.crop_left),
        "target_size": size,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "guidance_rescale": settings.guidance_rescale,
        "clip_skip": settings.clip_skip - 1 or None,
        "eta": settings.eta,
        "generator": [torch.Generator().manual_seed(request.seed) for request in requests],
    }


def call_diffusers(pipeline: Any, arguments: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """A pipeline's latents whenever it has called its model, and its images, given those arguments that it takes."""
    takes = inspect.signature(pipeline.__call__).parameters
    latents: list[Tensor] = []

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"].clone())
        return tensors

    def keep_alone(_step: int, _timestep: Any, tensor: Tensor) -> None:
        latents.append(tensor.clone())

    listening = {"callback_on_step_end": keep} if "callback_on_step_end" in takes else {"callback": keep_alone}
    listening |= {"callback_steps": 1} if "callback" in listening else {}
    given = {name: value for name, value in arguments.items() if name in takes}
    images = pipeline(**{"output_type": "np", **given, **listening}).images
    return latents, images


def scaled_as_ours(latents: list[Tensor], sampler: str, scheduler: Any) -> list[Tensor]:
    """diffusers' latents after each whole step, in our scale, of a run with `scheduler` to its end."""
    if sampler == "plms" and len(latents) > 1:
        latents = latents[1:]  # the first is where a provisional step leads: it calls the model steps + 1 times
    if sampler == "heun":
        latents = [*latents[1::2], latents[-1]]  # each step but the last calls the model twice
    if sampler in ("euler", "euler-a", "heun"):  # theirs are latents / √ᾱ
        levels = [(sigma**2 + 1) ** 0.5 for sigma in sorted(set(scheduler.sigmas.tolist()), reverse=True)[1:]]
        latents = [each / level for each, level in zip(latents, levels[-len(latents) :], strict=True)]
    return latents


def as_pixels(images: np.ndarray) -> np.ndarray:
    """Images from 0 to 1 in 256 steps."""
    return (images * 255).round().astype(np.uint8)


def with_defaults(request: GenerationRequest) -> GenerationRequest:
    """The request with what Stable Diffusion is drawn with where nothing else is asked for."""
    usual = {"sampler": "ddim", "steps": 50, "guidance_scale": 7.5}
    return dataclasses.replace(request, **{k: v for k, v in usual.items() if getattr(request, k) is None})


def diffusers_scheduler(sampler: str, config: Any, **settings: Any) -> Any:
    """diffusers' scheduler for one of our samplers, as it comes, for a noise schedule's configuration."""
    import diffusers

    name, own = DIFFUSERS[sampler]
    # Without this, from_config would take its own class's default for what the file does not say.
    usual = {"timestep_spacing": config.get("timestep_spacing", "leading")}
    return getattr(diffusers, name).from_config(config, **{**usual, **own, **settings})


def pixels_apart(ours: np.ndarray, theirs: np.ndarray) -> int:
    """The largest difference of any pixel's channel."""
    assert ours.shape == theirs.shape
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())
