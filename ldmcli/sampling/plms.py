"""PLMS: pseudo linear multistep sampling (Liu, Ren, Lin & Zhao 2022, "Pseudo Numerical Methods…")."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ldmcli.sampling.ddim import ddim_step
from ldmcli.sampling.denoiser import Denoiser, from_noise
from ldmcli.sampling.schedule import Step

# Adams–Bashforth weights, newest prediction first, by how many there are (equation 12 and its shorter kin).
_WEIGHTS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def plms(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Callable[[], Tensor], *, eta: float = 0.0
) -> Iterator[Tensor]:
    """Yield the latents after each step. Costs one prediction a step and one more: without history, the first step is
    taken with the mean of the predictions at its two ends. Draws no noise; `noise` and `eta` are every sampler's.

    It combines predicted noises, as the paper does. diffusers combines raw outputs, which is another thing for v.
    """
    history: list[Tensor] = []
    for step in steps:
        prediction = denoise(latents, step)
        history = [prediction.noise, *history[:3]]
        if len(history) > 1:
            terms = [w * e for w, e in zip(_WEIGHTS[len(history)], history, strict=True)]
            prediction = from_noise(torch.stack(terms).sum(dim=0), latents, step)
        elif len(steps) > 1:
            ahead = denoise(ddim_step(prediction, step), steps[1])
            prediction = from_noise((prediction.noise + ahead.noise) / 2, latents, step)
        latents = ddim_step(prediction, step)
        yield latents
