"""From a model's raw output to what samplers use: the noise and the image that it means, within bounds."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldmcli.config import Walk
from ldmcli.sampling.schedule import Step

USUAL = Walk()


class Prediction(NamedTuple):
    """What a model takes latents √ᾱ · x₀ + √(1−ᾱ) · ε to be made of: `noise` ε and `denoised` x₀, shaped like them."""

    noise: Tensor
    denoised: Tensor


Model = Callable[[Tensor, Step], Tensor]
Denoiser = Callable[[Tensor, Step], Prediction]
Noise = Callable[[], Tensor]  # draws standard-normal noise, shaped like the latents


def predicting(model: Model, prediction_type: str) -> Denoiser:
    """The denoiser that a model makes which was trained to predict the noise, v (Salimans & Ho 2022) or the image.

    This is the only place that knows prediction types. v and image stay defined where ᾱ is 0; the noise alone, which
    the latents then are, tells nothing of the image.
    """
    meaning = {"epsilon": from_noise, "v_prediction": from_velocity, "sample": _from_image}[prediction_type]

    def denoise(latents: Tensor, step: Step) -> Prediction:
        return meaning(model(latents, step), latents, step)

    return denoise


def from_noise(noise: Tensor, latents: Tensor, step: Step) -> Prediction:
    """The prediction whose noise is this."""
    return Prediction(noise, (latents - step.spread * noise) / step.signal)


def from_velocity(velocity: Tensor, latents: Tensor, step: Step) -> Prediction:
    """The prediction whose v (Salimans & Ho 2022) is this."""
    signal, spread = step.signal, step.spread
    return Prediction(signal * velocity + spread * latents, signal * latents - spread * velocity)


def _from_image(image: Tensor, latents: Tensor, step: Step) -> Prediction:
    return Prediction((latents - step.signal * image) / step.spread, image)


def limited(denoise: Denoiser, walk: Walk, *, keeps_noise: bool = True) -> Denoiser:
    """The denoiser with its predicted image bounded as `walk` says, for models whose configuration asks for it; the
    noise is that which was predicted where `keeps_noise`, else what the latents hold beside the bounded image."""
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
