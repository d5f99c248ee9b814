"""Images from a model in training: DDIM with guidance, on the package's own schedule and samplers."""

import torch
from torch import Tensor

from ldmcli.config import ScheduleConfig
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL
from ldmcli.sampling.ddim import ddim
from ldmcli.sampling.denoiser import predicting
from ldmcli.sampling.guidance import guided
from ldmcli.sampling.schedule import Schedule, Step


def start_noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """One image's noise for each seed, from a generator of its own."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def generate(
    unet: UNet,
    vae: AutoencoderKL,
    context: Tensor,
    empty: Tensor,
    *,
    seeds: list[int],
    guidance_scale: float,
    steps: int = 25,
    begun: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Images (batch, 3, height, width) in [-1, 1] for contexts (batch, tokens, dim); `empty` is (1, tokens, dim).
    Scaled latents `begun` are drawn anew by the last `strength` of the steps."""
    size = unet.config.sample_size
    latents = start_noise(seeds, (unet.config.in_channels, size, size)).to(context.device)
    conditioned = unet.project_context(context)
    both = unet.project_context(torch.cat([empty.expand_as(context), context]))

    def model(x: Tensor, step: Step) -> Tensor:
        chosen = conditioned if len(x) == len(context) else both
        return unet(x, unet.embed_time(torch.tensor([step.timestep], device=x.device)), chosen)

    if guidance_scale != 1:
        model = guided(model, guidance_scale)
    taken = Schedule(ScheduleConfig()).steps(steps)[steps - int(steps * strength) :]
    if begun is not None:
        latents = taken[0].signal * begun + taken[0].spread * latents
    every_step = ddim(predicting(model, "epsilon"), latents, taken, lambda: latents)
    *_, final = every_step
    return vae.decode(final / vae.config.scaling_factor).clamp(-1, 1)
