"""Euler's method, plain and ancestral, and Heun's: solvers of the probability-flow ODE in the noise level σ.

The ODE is dx/dσ = ε(x, σ) for x = latents / √ᾱ, σ² = (1−ᾱ)/ᾱ (Karras et al. 2022, equation 1 and table 1). One Euler
step, x + (σ′ − σ) · ε = x₀ + σ′ · ε, is then DDIM's step (Song, Meng & Ermon 2020, section 4.3). What makes Euler
another sampler is where its steps sit and that it ends at σ = 0: that comes with `steps`.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ldmcli.config import Walk
from ldmcli.sampling.ddim import ddim, ddim_step
from ldmcli.sampling.denoiser import USUAL, Denoiser, Noise, limited
from ldmcli.sampling.schedule import Step


def euler(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Noise, *, eta: float = 0.0, walk: Walk = USUAL
) -> Iterator[Tensor]:
    """Yield the latents after each step (Karras et al. 2022, algorithm 1 without its second-order correction)."""
    return ddim(denoise, latents, steps, noise, eta=0.0)


def euler_ancestral(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Noise, *, eta: float = 0.0, walk: Walk = USUAL
) -> Iterator[Tensor]:
    """Yield the latents after each step: down to less noise than the next level has, then up to it with fresh noise, as
    much as DDPM adds (Song et al. 2020, "Score-Based Generative Modeling", appendix F: ancestral sampling)."""
    return ddim(denoise, latents, steps, noise, eta=1.0)


def heun(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Noise, *, eta: float = 0.0, walk: Walk = USUAL
) -> Iterator[Tensor]:
    """Yield the latents after each step: Euler's, taken again with the mean of the slopes at its two ends (Karras et
    al. 2022, algorithm 1). Costs two predictions a step; the last, which ends where there is no noise, costs one, as
    does the last before another model goes on. Draws no noise."""
    denoise = limited(denoise, walk, keeps_noise=False)
    for i, step in enumerate(steps):
        prediction = denoise(latents, step)
        latents = ddim_step(prediction, step)
        if i + 1 < len(steps):
            # The slopes there and here differ by the difference of the predicted images over σ′: of σ ≫ 1, as where
            # there is next to no signal, this formula keeps the rounding errors small.
            ahead = denoise(latents, steps[i + 1])
            half = (step.sigma / step.previous_sigma - 1) / 2
            latents = latents + step.previous_signal * half * (ahead.denoised - prediction.denoised)
        yield latents
