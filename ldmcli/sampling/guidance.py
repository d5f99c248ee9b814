"""Classifier-free guidance (Ho & Salimans 2022) and what tempers it, as a wrapper of a model."""

import torch
from torch import Tensor

from ldmcli.sampling.denoiser import Model
from ldmcli.sampling.schedule import Step


def guided(
    model: Model,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    unguided: Model | None = None,
) -> Model:
    """Push the output away from the negative prompt: o₋ + scale · (o₊ − o₋).

    `model` takes a batch of twice the size, the negative prompts' half first; the result takes the plain batch. It acts
    on raw outputs, which for plain guidance means the same for every prediction type. `rescale`: see `rescaled`.
    `interval` (low, high): guidance only at noise levels low < σ <= high, where σ² = (1−ᾱ)/ᾱ (Kynkäänniemi et al.
    2024); elsewhere `unguided` runs, which takes the plain batch with the positive prompts: half the work.
    """
    if interval is not None and unguided is None:
        raise ValueError("guidance in an interval needs a model for the steps outside it")

    def run_guided(latents: Tensor, step: Step) -> Tensor:
        return pushed(model(torch.cat([latents, latents]), step), scale, rescale)

    return run_guided if interval is None or unguided is None else within(interval, run_guided, unguided)


def pushed(outputs: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """The guided output (batch, …) of a model's (2 · batch, …), the negative prompts' half first."""
    negative, positive = outputs.chunk(2)
    output = negative + scale * (positive - negative)
    return rescaled(output, positive, rescale) if rescale > 0 else output


def within(interval: tuple[float, float], model: Model, otherwise: Model) -> Model:
    """`model` at noise levels low < σ <= high, and the other elsewhere."""
    low, high = interval
    return lambda latents, step: (model if low < step.sigma <= high else otherwise)(latents, step)


def rescaled(output: Tensor, positive: Tensor, amount: float) -> Tensor:
    """The guided output with each image's standard deviation moved towards the positive prompt's, which guidance
    inflates: 0 leaves it, 1 restores it fully (Lin et al. 2023, equations 15 and 16). Shapes (batch, …)."""
    dims = tuple(range(1, output.ndim))
    restored = output * (positive.std(dim=dims, keepdim=True) / output.std(dim=dims, keepdim=True))
    return amount * restored + (1 - amount) * output
