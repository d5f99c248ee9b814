"""UniPC: a unified predictor and corrector (Zhao et al. 2023), of second order, on x₀, with B₂(h) = e^h − 1."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from ldmcli.config import Walk
from ldmcli.sampling.denoiser import USUAL, Denoiser, Noise, limited
from ldmcli.sampling.dpmpp import Point, dpmpp_step, extrapolated
from ldmcli.sampling.schedule import Step


def unipc(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Noise, *, eta: float = 0.0, walk: Walk = USUAL
) -> Iterator[Tensor]:
    """Yield the latents after each step (algorithms 1 and 2). The predictor, UniP-2, is DPM-Solver++ 2M's step; each
    prediction then also corrects the step that led to it, at no cost. Draws no noise. It is diffusers'
    UniPCMultistepScheduler, as it comes where `walk` is the usual: solver_order 2, bh2, final sigma zero."""
    denoise = limited(denoise, walk)
    start = latents
    history: list[Point] = []  # newest first
    for step in steps:
        denoised = denoise(latents, step).denoised
        corrects = history and step.index - 1 not in walk.uncorrected
        start = _corrected(start, denoised, history, walk.solver) if corrects else latents
        image = extrapolated(denoised, step, history[:1])
        if walk.solver == "bh1" and step.previous_sigma:
            image = denoised + _first_order(step) * (image - denoised)
        latents = dpmpp_step(start, image, step)
        history = [(step, denoised), *history[:1]][: walk.order]
        yield latents


def _first_order(step: Step) -> float:
    """B₁(h) over B₂(h), for diffusers' bh1; they differ where its formula for few points leaves B(h) in."""
    length = math.log(step.previous_sigma / step.sigma)
    return length / math.expm1(length) if length else 1.0


def _corrected(start: Tensor, denoised: Tensor, history: Sequence[Point], solver: str) -> Tensor:
    """The last step taken again from its `start`, now that x₀ at its end is known (UniC; equation 9): of second order
    where one point came before, of third where two did, as x₀ is then a parabola in λ through all three."""
    (step, here), *before = history
    if not before:
        if solver == "bh1":
            return dpmpp_step(start, here + _first_order(step) * (denoised - here) / 2, step)
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
