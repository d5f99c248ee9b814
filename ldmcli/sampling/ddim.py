"""DDIM: denoising diffusion implicit models (Song, Meng & Ermon 2020)."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ldmcli.config import Walk
from ldmcli.sampling.denoiser import USUAL, Denoiser, Noise, Prediction, limited
from ldmcli.sampling.schedule import Step


def ddim_step(prediction: Prediction, step: Step, deviation: float = 0.0) -> Tensor:
    """Equation 12 without its random term: the predicted image, and as much of the predicted noise as the next level
    holds beside fresh noise of standard deviation `deviation`."""
    kept = max(step.previous_spread**2 - deviation**2, 0.0)  # rounding may lead below 0
    return step.previous_signal * prediction.denoised + kept**0.5 * prediction.noise


def ddim(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Noise, *, eta: float = 0.0, walk: Walk = USUAL
) -> Iterator[Tensor]:
    """Yield the latents after each step. eta 0 is deterministic; eta 1 adds as much noise as DDPM (equation 16)."""
    denoise = limited(denoise, walk)
    for step in steps:
        variance = (step.previous_spread / step.spread) ** 2 * (1.0 - (step.signal / step.previous_signal) ** 2)
        deviation = eta * max(variance, 0.0) ** 0.5
        latents = ddim_step(denoise(latents, step), step, deviation)
        if eta > 0:
            latents = latents + deviation * noise()
        yield latents
