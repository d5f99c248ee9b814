"""From a model's raw output to what samplers use: the noise and the image that it means."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ldmcli.sampling.schedule import Step


class Prediction(NamedTuple):
    """What a model takes latents √ᾱ · x₀ + √(1−ᾱ) · ε to be made of: `noise` ε and `denoised` x₀, shaped like them."""

    noise: Tensor
    denoised: Tensor


Model = Callable[[Tensor, Step], Tensor]
Denoiser = Callable[[Tensor, Step], Prediction]


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
