"""Wrappers of a model: classifier-free guidance (Ho & Salimans 2022), what tempers it, and what joins the latents.

Each takes a model and gives one; `DiffusionModel._chain` in pipeline.py says in which order they stand.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldmcli.sampling.denoiser import Model
from ldmcli.sampling.schedule import Step


def with_channels(model: Callable[..., Tensor], channels: Tensor) -> Model:
    """`model` on latents with more input channels behind them, (batch, more, height, width), as inpainting reads; what
    else it is given, it gets."""

    def run(latents: Tensor, step: Step, *more: Any) -> Tensor:
        return model(torch.cat([latents, channels.to(latents)], dim=1), step, *more)

    return run


def controlled(model: Callable[..., Tensor], residuals: Callable[[Tensor, Step], Any]) -> Model:
    """`model` with what to add inside the network, its third argument, for these latents and this step: what a control
    network computes once for the whole batch (Zhang et al. 2023, ControlNet)."""
    return lambda latents, step: model(latents, step, residuals(latents, step))


def paired(negative: Model, positive: Model, count: int) -> Model:
    """The model of a batch whose last `count` are the positive's: for prompts of different lengths."""

    def run(latents: Tensor, step: Step) -> Tensor:
        return torch.cat([negative(latents[:-count], step), positive(latents[-count:], step)])

    return run


def guided(model: Model, scale: float, rescale: float = 0.0) -> Model:
    """Push the output away from the negative prompt: o₋ + scale · (o₊ − o₋).

    `model` takes a batch of twice the size, the negative prompts' half first; the result takes the plain batch. It acts
    on raw outputs, which for plain guidance means the same for every prediction type. `rescale`: see `rescaled`.
    """

    def run(latents: Tensor, step: Step) -> Tensor:
        negative, positive = model(torch.cat([latents, latents]), step).chunk(2)
        output = negative + scale * (positive - negative)
        return rescaled(output, positive, rescale) if rescale > 0 else output

    return run


def guided_on_image(model: Model, scale: float, image_scale: float, rescale: float = 0.0) -> Model:
    """As `guided`, and away from no picture: o₀ + scale · (o₊ − o₋) + image_scale · (o₋ − o₀), for models that edit
    pictures (Brooks et al. 2023, InstructPix2Pix, equation 3). `model` takes a batch of three times the size: negative
    prompts without their pictures, negative prompts, prompts. With an image_scale of 1 the first make no difference."""

    def run(latents: Tensor, step: Step) -> Tensor:
        blank, negative, positive = model(torch.cat([latents] * 3), step).chunk(3)
        output = blank + scale * (positive - negative) + image_scale * (negative - blank)
        return rescaled(output, positive, rescale) if rescale > 0 else output

    return run


def in_interval(interval: tuple[float, float], model: Model, otherwise: Model) -> Model:
    """`model` at noise levels low < σ <= high, and the other elsewhere, at half the work where that is the positive
    prompt alone (Kynkäänniemi et al. 2024)."""
    return lambda latents, step: (model if within(interval, step) else otherwise)(latents, step)


def within(interval: tuple[float, float], step: Step) -> bool:
    """Whether the step's noise level is in the interval."""
    low, high = interval
    return low < step.sigma <= high


def rescaled(output: Tensor, positive: Tensor, amount: float) -> Tensor:
    """The guided output with each image's standard deviation moved towards the positive prompt's, which guidance
    inflates: 0 leaves it, 1 restores it fully (Lin et al. 2023, equations 15 and 16). Shapes (batch, …)."""
    dims = tuple(range(1, output.ndim))
    restored = output * (positive.std(dim=dims, keepdim=True) / output.std(dim=dims, keepdim=True))
    return amount * restored + (1 - amount) * output
