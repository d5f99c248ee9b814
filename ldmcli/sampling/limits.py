"""Bounds on the image that a model predicts, for models whose configuration asks for them."""

import torch
from torch import Tensor

from ldmcli.config import Walk
from ldmcli.sampling.denoiser import Denoiser, Prediction
from ldmcli.sampling.schedule import Step

USUAL = Walk()


def limited(denoise: Denoiser, walk: Walk, *, keeps_noise: bool = True) -> Denoiser:
    """The denoiser with its predicted image bounded as `walk` says; the noise is that which was predicted where
    `keeps_noise`, else what the latents hold beside the bounded image."""
    if walk.clip is None and walk.threshold is None:
        return denoise

    def bounded(latents: Tensor, step: Step) -> Prediction:
        noise, image = denoise(latents, step)
        image = _thresholded(image, *walk.threshold) if walk.threshold else image.clamp(-(walk.clip or 0), walk.clip)
        return Prediction(noise if keeps_noise else (latents - step.signal * image) / step.spread, image)

    return bounded


def _thresholded(image: Tensor, quantile: float, most: float) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): each image clipped to a quantile of its own magnitudes,
    which is from 1 to `most`, and divided by it."""
    bound = torch.quantile(image.flatten(1).abs(), quantile, dim=1).clamp(min=1.0, max=most)
    bound = bound.view(-1, *[1] * (image.dim() - 1))
    return image.clamp(-bound, bound) / bound
