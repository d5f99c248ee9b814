"""Latent consistency models: sampling in few steps (Luo et al. 2023; Song et al. 2023, "Consistency Models")."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ldmcli.config import Walk
from ldmcli.sampling.denoiser import USUAL, Denoiser, Noise, limited
from ldmcli.sampling.schedule import Step


def lcm(
    denoise: Denoiser, latents: Tensor, steps: Sequence[Step], noise: Noise, *, eta: float = 0.0, walk: Walk = USUAL
) -> Iterator[Tensor]:
    """Yield the latents after each step (Luo et al. 2023, algorithm 3): the image at once, then noise again to the next
    level. Only for models distilled to it, or with an adapter that makes them so. `eta` is another sampler's."""
    denoise = limited(denoise, walk)
    for step in steps:
        keep, replace = boundary_scalings(step.timestep, scaling=walk.timestep_scaling)
        latents = replace * denoise(latents, step).denoised + keep * latents
        if step.previous_spread > 0:
            latents = step.previous_signal * latents + step.previous_spread * noise()
        yield latents


def boundary_scalings(timestep: float, deviation: float = 0.5, scaling: float = 10.0) -> tuple[float, float]:
    """c_skip and c_out of Luo et al. 2023, section 4.1: 1 and 0 at timestep 0, where the latents are the image.
    `deviation` is that of the data, `scaling` what timesteps are multiplied with, both as in the original training."""
    time = scaling * timestep
    return deviation**2 / (time**2 + deviation**2), time / (time**2 + deviation**2) ** 0.5
