"""What latents are to become, and look like, at next to no cost: a linear map from their channels to colours."""

from typing import NamedTuple

import torch
from torch import Tensor

from ldmcli.sampling.denoiser import Denoiser, Prediction
from ldmcli.sampling.schedule import Step


class _Linear(NamedTuple):
    """Red, green and blue in -1…1 of a unit of each channel, and of latents that are 0."""

    channels: tuple[tuple[float, float, float], ...]
    base: tuple[float, float, float] = (0.0, 0.0, 0.0)


# By the scaling factor of the autoencoder whose latents they are.
_LINEAR = {
    # Stable Diffusion 1.x and 2.x. Source: https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204
    0.18215: _Linear(((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473))),
    # XL; there in 0…255. Source: https://huggingface.co/blog/TimothyAlexisVass/explaining-the-sdxl-latent-space
    0.13025: _Linear(
        ((0.471, 0.471, 0.471), (-0.471, -0.039, 0.078), (0.196, 0.118, -0.039), (-0.549, -0.392, -0.275)),
        (0.176, 0.098, 0.020),
    ),
}


class Seen:
    """A denoiser that keeps what it predicted last."""

    denoised: Tensor | None = None

    def __init__(self, denoise: Denoiser) -> None:
        self._denoise = denoise

    def __call__(self, latents: Tensor, step: Step) -> Prediction:
        prediction = self._denoise(latents, step)
        self.denoised = prediction.denoised
        return prediction


def linear_images(latents: Tensor, scaling_factor: float) -> Tensor | None:
    """About the images (batch, 3, height, width) in -1…1 of latents (batch, 4, height, width) as they are diffused, a
    pixel for each; None where no map is known for an autoencoder with this scaling factor."""
    known = _LINEAR.get(scaling_factor)
    if known is None or latents.shape[1] != len(known.channels):
        return None
    channels, base = (torch.tensor(each, device=latents.device) for each in known)
    return torch.einsum("bchw,ck->bkhw", latents.float(), channels) + base[:, None, None]
