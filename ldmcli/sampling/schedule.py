"""The noise schedule, and where the steps of a run sit on it."""

import dataclasses

import torch
from torch import Tensor

from ldmcli.config import ScheduleConfig
from ldmcli.errors import BadDataError, UsageError


@dataclasses.dataclass(frozen=True)
class Step:
    """One sampling step, from `timestep` to the next lower one. Signal levels are ᾱ (alphas_cumprod) as host floats, so
    that the loop never waits for the device."""

    index: int
    timestep: int
    alpha_cumprod: float
    previous_alpha_cumprod: float


class Schedule:
    """ᾱ over all training steps (Ho et al. 2020), float32 and computed as diffusers does."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.alphas_cumprod = torch.cumprod(1.0 - _betas(config), dim=0)

    def steps(self, count: int) -> list[Step]:
        """`count` steps, noisiest first, in SD's spacing. Raises UsageError when so many do not fit."""
        timesteps = self.config.timesteps(count)
        if timesteps is None:
            raise UsageError(f"{count} steps do not fit a schedule of {self.config.training_steps}.")
        levels = self.alphas_cumprod.tolist()
        last = 1.0 if self.config.set_alpha_to_one else levels[0]
        stride = self.config.training_steps // count
        return [Step(i, t, levels[t], levels[t - stride] if t >= stride else last) for i, t in enumerate(timesteps)]


def _betas(config: ScheduleConfig) -> Tensor:
    if config.betas is not None:
        return torch.tensor(config.betas, dtype=torch.float32)
    start, end, count = config.beta_start, config.beta_end, config.training_steps
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32).square()
    raise BadDataError(f"beta_schedule {config.beta_schedule!r} is not known; linear and scaled_linear are.")
