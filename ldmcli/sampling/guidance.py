"""Classifier-free guidance (Ho & Salimans 2022), as a wrapper of a denoiser."""

import torch
from torch import Tensor

from ldmcli.sampling.denoiser import Denoiser
from ldmcli.sampling.schedule import Step


def guided(denoise: Denoiser, scale: float) -> Denoiser:
    """Push the prediction away from the negative prompt: ε₋ + scale · (ε₊ − ε₋).

    `denoise` takes a batch of twice the size, the negative prompts' half first; the result takes the plain batch.
    """

    def denoise_guided(latents: Tensor, step: Step) -> Tensor:
        negative, positive = denoise(torch.cat([latents, latents]), step).chunk(2)
        return negative + scale * (positive - negative)

    return denoise_guided
