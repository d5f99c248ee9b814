"""PLMS: pseudo linear multistep sampling (Liu, Ren, Lin & Zhao 2022, "Pseudo Numerical Methods…")."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldmcli.config import Walk
from ldmcli.sampling.ddim import ddim_step
from ldmcli.sampling.denoiser import USUAL, Denoiser, Noise, Prediction, from_noise, from_velocity
from ldmcli.sampling.schedule import Step

# Adams–Bashforth weights, newest prediction first, by how many there are (equation 12 and its shorter kin).
_WEIGHTS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def plms(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Noise, *, eta: float = 0.0, walk: Walk = USUAL
) -> Iterator[Tensor]:
    """Yield the latents after each step. Costs one prediction a step and one more: without history, the first step is
    taken with the mean of the predictions at its two ends. Draws no noise; `noise` and `eta` are every sampler's.

    It combines predicted noises, as the paper does; where `walk.mixes_velocities`, raw outputs of a model of v, as
    diffusers does.
    """
    velocities = walk.mixes_velocities
    meaning = from_velocity if velocities else from_noise
    history: list[Tensor] = []
    for step in steps:
        prediction = denoise(latents, step)
        history = [_velocity(prediction, step) if velocities else prediction.noise, *history[:3]]
        if len(history) > 1:
            terms = [w * e for w, e in zip(_WEIGHTS[len(history)], history, strict=True)]
            prediction = meaning(torch.stack(terms).sum(dim=0), latents, step)
        elif len(steps) > 1:
            ahead = denoise(ddim_step(prediction, step), steps[1])
            end = _velocity(ahead, steps[1]) if velocities else ahead.noise
            prediction = meaning((history[0] + end) / 2, latents, step)
        latents = ddim_step(prediction, step)
        yield latents


def _velocity(prediction: Prediction, step: Step) -> Tensor:
    return step.signal * prediction.noise - step.spread * prediction.denoised
