"""DPM-Solver++ (Lu et al. 2022): multistep solvers that integrate the exponential part of the ODE or SDE exactly.

λ = ln(√ᾱ / √(1−ᾱ)) = −ln σ is the time they step in; h, the step's length in it, gives σ′/σ = e^(−h).
"""

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from ldmcli.sampling.denoiser import Denoiser
from ldmcli.sampling.schedule import Step


def dpmpp_step(latents: Tensor, image: Tensor, step: Step) -> Tensor:
    """Where the ODE leads were x₀ this `image` all along the step (equation 9, order 1): exact for any length."""
    keep = step.previous_sigma / step.sigma
    return step.previous_spread / step.spread * latents + step.previous_signal * (1 - keep) * image


def dpmpp_2m(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Callable[[], Tensor], *, eta: float = 0.0
) -> Iterator[Tensor]:
    """Yield the latents after each step (algorithm 2: x₀ extrapolated to the middle of the step). The first step and
    the one that ends without noise are of first order. Draws no noise. It is diffusers' DPMSolverMultistepScheduler as
    it comes: order 2, midpoint, lower_order_final, final sigma zero."""
    history: tuple[Step, Tensor] | None = None
    for step in steps:
        denoised = denoise(latents, step).denoised
        latents = dpmpp_step(latents, extrapolated(denoised, step, history), step)
        history = step, denoised
        yield latents


def dpmpp_2m_sde(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Callable[[], Tensor], *, eta: float = 0.0
) -> Iterator[Tensor]:
    """Yield the latents after each step of the SDE's solver (SDE-DPM-Solver++(2M), appendix B): as `dpmpp_2m`, but
    forgetting twice as fast and filling up with fresh, independent noise, where k-diffusion's comes from one Brownian
    path. It is diffusers' algorithm_type "sde-dpmsolver++"."""
    history: tuple[Step, Tensor] | None = None
    for step in steps:
        denoised = denoise(latents, step).denoised
        image = extrapolated(denoised, step, history)
        keep = step.previous_sigma / step.sigma
        signal, spread = step.previous_signal, step.previous_spread
        latents = spread / step.spread * keep * latents + signal * (1 - keep**2) * image
        if spread > 0:
            latents = latents + spread * (1 - keep**2) ** 0.5 * noise()
        history = step, denoised
        yield latents


def extrapolated(denoised: Tensor, step: Step, history: tuple[Step, Tensor] | None) -> Tensor:
    """x₀ in the middle of the step, on the line in λ through the last step's prediction and this one."""
    if history is None or step.previous_sigma == 0:
        return denoised
    before, denoised_before = history
    ratio = math.log(before.sigma / step.sigma) / math.log(step.sigma / step.previous_sigma)
    return denoised + (denoised - denoised_before) / (2 * ratio)
