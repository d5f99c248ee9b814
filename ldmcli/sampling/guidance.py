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


def in_patches(model: Callable[..., Tensor], size: int) -> Model:
    """`model` computed by patches of `size` latents a side where there are more; patches overlap by half, and where
    they do, each counts the more the further from its edge a latent lies: at every step, so that no seams arise. As
    CompVis' latent-diffusion samples large pictures (Rombach et al. 2022, section 4.3.2)."""

    def run(latents: Tensor, step: Step, *more: Any) -> Tensor:
        height, width = latents.shape[2:]
        if max(height, width) <= size:
            return model(latents, step, *more)
        rows, columns = min(size, height), min(size, width)
        weights = _inwards(rows, columns, latents)
        total, found = latents.new_zeros(1, 1, height, width), None
        for top in _starts(height, rows):
            for left in _starts(width, columns):
                place = ..., slice(top, top + rows), slice(left, left + columns)
                part = model(latents[place], step, *more) * weights
                found = part.new_zeros(*part.shape[:2], height, width) if found is None else found
                found[place] += part
                total[place] += weights
        assert found is not None
        return found / total

    return run


def _starts(length: int, size: int) -> list[int]:
    """Where windows of this size begin that cover a length, half of it apart or less."""
    count = max(0, -(-(length - size) // (size // 2)))
    return [min(i * (size // 2), length - size) for i in range(count + 1)]


def _inwards(height: int, width: int, like: Tensor) -> Tensor:
    """Of each place (height, width), how far from the nearest edge it is, as a share of its row or column; 0.01 at the
    edge."""
    shares = []
    for length in (height, width):
        line = torch.linspace(0, 1, length, dtype=like.dtype, device=like.device)
        shares.append(torch.minimum(line, 1 - line))
    return torch.minimum(shares[0][:, None], shares[1][None]).clamp(0.01, 0.5)


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
