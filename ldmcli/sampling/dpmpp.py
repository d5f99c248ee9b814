"""DPM-Solver++ (Lu et al. 2022): multistep solvers that integrate the exponential part of the ODE or SDE exactly.

λ = ln(√ᾱ / √(1−ᾱ)) = −ln σ is the time they step in; h, the step's length in it, gives σ′/σ = e^(−h).
"""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from ldmcli.config import Walk
from ldmcli.sampling.denoiser import USUAL, Denoiser, Noise, limited
from ldmcli.sampling.schedule import Step

Point = tuple[Step, Tensor]  # a step and the image predicted at its start


def dpmpp_step(latents: Tensor, image: Tensor, step: Step) -> Tensor:
    """Where the ODE leads were x₀ this `image` all along the step (equation 9, order 1): exact for any length."""
    keep = step.previous_sigma / step.sigma
    return step.previous_spread / step.spread * latents + step.previous_signal * (1 - keep) * image


def dpmpp_2m(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Noise, *, eta: float = 0.0, walk: Walk = USUAL
) -> Iterator[Tensor]:
    """Yield the latents after each step (algorithm 2: x₀ extrapolated to the middle of the step). The first step and
    the one that ends without noise are of first order. Draws no noise. It is diffusers' DPMSolverMultistepScheduler,
    as it comes where `walk` is the usual: order 2, midpoint, lower_order_final, final sigma zero."""
    denoise = limited(denoise, walk)
    history: list[Point] = []  # newest first
    for step in steps:
        denoised = denoise(latents, step).denoised
        latents = dpmpp_step(latents, extrapolated(denoised, step, history, walk.solver), step)
        history = [(step, denoised), *history[:1]]
        yield latents


def dpmpp_2m_sde(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Noise, *, eta: float = 0.0, walk: Walk = USUAL
) -> Iterator[Tensor]:
    """Yield the latents after each step of the SDE's solver (SDE-DPM-Solver++(2M), appendix B): as `dpmpp_2m`, but
    forgetting twice as fast and filling up with fresh, independent noise, where k-diffusion's comes from one Brownian
    path. It is diffusers' algorithm_type "sde-dpmsolver++"."""
    denoise = limited(denoise, walk)
    history: list[Point] = []
    for step in steps:
        denoised = denoise(latents, step).denoised
        image = extrapolated(denoised, step, history, walk.solver, factor=2)
        keep = step.previous_sigma / step.sigma
        signal, spread = step.previous_signal, step.previous_spread
        latents = spread / step.spread * keep * latents + signal * (1 - keep**2) * image
        if spread > 0:
            latents = latents + spread * (1 - keep**2) ** 0.5 * noise()
        history = [(step, denoised)]
        yield latents


def extrapolated(
    denoised: Tensor, step: Step, history: Sequence[Point], solver: str = "", *, factor: int = 1
) -> Tensor:
    """The x₀ that stands for all along the step, from this prediction and those before it, newest first: in the middle
    of the step, on the line in λ through two of them; where `solver` is "heun", or there are three, its mean by the
    weights of the exact solution. `factor` is 2 for the SDE, whose exponent is twice the ODE's."""
    order = min(step.order, len(history) + 1)
    if order == 1 or step.previous_sigma in (0, step.sigma):
        return denoised
    length = math.log(step.sigma / step.previous_sigma)
    (before, denoised_before), *older = history
    ratio = math.log(before.sigma / step.sigma) / length
    if order == 2 and solver != "heun":
        return denoised + (denoised - denoised_before) / (2 * ratio)
    h = factor * length
    decay = math.expm1(-h)
    slope = (denoised - denoised_before) / ratio
    if order == 2:
        return denoised - (1 / h + 1 / decay) * slope
    ((oldest, denoised_oldest),) = older
    ratio_before = math.log(oldest.sigma / before.sigma) / length
    bend = (slope - (denoised_before - denoised_oldest) / ratio_before) / (ratio + ratio_before)
    slope = slope + ratio * bend
    return denoised - (1 / h + 1 / decay) * slope + ((decay + h) / h**2 - 0.5) / decay * bend
