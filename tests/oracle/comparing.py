"""Running this program and diffusers on the same requests, and measuring how far apart they are."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ldmcli.pipeline import Pipeline
from ldmcli.request import GenerationRequest
from ldmcli.sampling.samplers import SAMPLERS


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
        pictures = pipeline.draw(requests)
    return latents, np.stack(pictures)


def draw_with_diffusers(
    reference: Any, requests: Sequence[GenerationRequest], schedule: dict[str, Any] | None = None
) -> tuple[list[Tensor], np.ndarray]:
    """diffusers' latents after each step, and its pictures; `schedule` replaces settings of the noise schedule.

    Each image has a CPU generator of its seed, as diffusers' documentation recommends for reproducible batches.
    """
    from diffusers import DDIMScheduler, PNDMScheduler

    settings = requests[0]
    sampler = {"ddim": DDIMScheduler, "plms": PNDMScheduler}[settings.sampler]
    scheduler = sampler.from_config(reference.scheduler.config, **(schedule or {}))
    latents: list[Tensor] = []

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"].clone())
        return tensors

    with mock.patch.object(reference, "scheduler", scheduler):
        images = reference(
            [request.prompt for request in requests],
            negative_prompt=[request.negative_prompt for request in requests],
            width=settings.width,
            height=settings.height,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            eta=settings.eta,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            output_type="np",
            callback_on_step_end=keep,
        ).images
    if settings.sampler == "plms" and settings.steps > 1:
        del latents[0]  # where its first, provisional step leads: it calls the model steps + 1 times
    return latents, (images * 255).round().astype(np.uint8)


def pixels_apart(ours: np.ndarray, theirs: np.ndarray) -> int:
    """The largest difference of any pixel's channel."""
    assert ours.shape == theirs.shape
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())
