"""UniPC: a unified predictor and corrector (Zhao et al. 2023), of second order, on x₀, with B₂(h) = e^h − 1."""

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from ldmcli.sampling.denoiser import Denoiser
from ldmcli.sampling.dpmpp import dpmpp_step, extrapolated
from ldmcli.sampling.schedule import Step

_Point = tuple[Step, Tensor]


def unipc(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Callable[[], Tensor], *, eta: float = 0.0
) -> Iterator[Tensor]:
    """Yield the latents after each step (algorithms 1 and 2). The predictor, UniP-2, is DPM-Solver++ 2M's step; each
    prediction then also corrects the step that led to it, at no cost. Draws no noise. It is diffusers'
    UniPCMultistepScheduler as it comes: solver_order 2, bh2, lower_order_final, final sigma zero."""
    start = latents
    history: list[_Point] = []  # newest first
    for step in steps:
        denoised = denoise(latents, step).denoised
        start = _corrected(start, denoised, history) if history else latents
        latents = dpmpp_step(start, extrapolated(denoised, step, history[0] if history else None), step)
        history = [(step, denoised), *history[:1]]
        yield latents


def _corrected(start: Tensor, denoised: Tensor, history: Sequence[_Point]) -> Tensor:
    """The last step taken again from its `start`, now that x₀ at its end is known (UniC; equation 9): of second order
    where one point came before, of third where two did, as x₀ is then a parabola in λ through all three."""
    (step, here), *before = history
    if not before:
        return dpmpp_step(start, (here + denoised) / 2, step)
    ((older, there),) = before
    length = math.log(step.previous_sigma / step.sigma)  # −h
    whole = math.expm1(length)
    # The right-hand side of equation 9, h · φ₂ and h² · φ₃ over B₂, and the place of `older`, in steps from `step`'s.
    first = (whole / length - 1) / whole
    second = 2 * ((whole / length - 1) / length - 0.5) / whole
    place = math.log(older.sigma / step.sigma) / length
    weight = (first - second) / (1 - place)
    image = here + weight / place * (there - here) + (first - weight) * (denoised - here)
    return dpmpp_step(start, image, step)
