"""The noise schedule, and where the steps of a run sit on it."""

import bisect
import dataclasses
import functools
import math
from typing import Self

import torch
from torch import Tensor

from ldmcli.config import ScheduleConfig
from ldmcli.errors import BadDataError
from ldmcli.sampling.catalogue import Sampler, check_fit, sampler_named

# Samplers that divide by the signal level take this for 0, as diffusers does: float16's smallest positive number.
SMALLEST_LEVEL = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Step:
    """One sampling step, from `timestep` to the next lower one: latents hold `signal` of the image and `spread` of
    noise (its standard deviation), and where the step leads `previous_signal` and `previous_spread`. They are host
    floats, so that the loop never waits for the device. `index` counts the steps of the whole run; in a recorded graph
    it lies on the device, (1,). `timestep` is what the model is told, and no whole number where the step sits between
    two training steps."""

    index: int | Tensor
    timestep: float
    signal: float
    spread: float
    previous_signal: float
    previous_spread: float

    @classmethod
    def ddpm(cls, index: int, timestep: float, alpha_cumprod: float, previous: float) -> Self:
        """A step of a schedule that keeps variance, from signal level ᾱ to `previous` (Ho et al. 2020)."""
        return cls(
            index, timestep, alpha_cumprod**0.5, (1.0 - alpha_cumprod) ** 0.5, previous**0.5, (1.0 - previous) ** 0.5
        )

    @property
    def sigma(self) -> float:
        """The noise level σ of Karras et al. 2022: noise per image; infinite where there is no signal."""
        return _ratio(self.spread, self.signal)

    @property
    def previous_sigma(self) -> float:
        """σ where the step leads; 0 where that is the finished image."""
        return _ratio(self.previous_spread, self.previous_signal)


def at(table: Tensor, step: Step) -> Tensor:
    """The row of a table (steps, …) that is the step's; looked up on the device where the step's index lies there."""
    index = step.index
    return table[index] if isinstance(index, int) else table.index_select(0, index)[0]


class Schedule:
    """ᾱ over all training steps (Ho et al. 2020), float32 and computed as diffusers does."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        levels = _alphas_cumprod(config)
        self.alphas_cumprod = _with_zero_terminal_snr(levels, config) if config.zero_terminal_snr else levels
        _check(self.alphas_cumprod, config.training_steps)

    def steps(self, count: int, sampler: Sampler | str = "ddim", spacing: str | None = None) -> list[Step]:
        """`count` steps, noisiest first; `spacing` is the model's own where None. Raises UsageError when so many do not
        fit, or sampler and spacing do not go together.

        DDIM and PLMS end at the first training step's level, or at 1 where the model's configuration says so; all other
        samplers end at 1, without noise.
        """
        row = sampler_named(sampler) if isinstance(sampler, str) else sampler
        check_fit(row, self.config, count, spacing)
        spacing = row.spacing(self.config, spacing)
        if spacing == "karras":
            points = self._karras(count, whole=row.grid == "dpm")
        else:
            timesteps = self.config.timesteps(count, row.grid, spacing) or []
            points = [(timestep, self._level(timestep, row.grid)) for timestep in timesteps]
        levels = [level for _, level in points]
        ends = self._ddim_ends(points) if row.grid == "ddim" else [*levels[1:], 1.0]
        return [Step.ddpm(i, t, level, end) for i, ((t, level), end) in enumerate(zip(points, ends, strict=True))]

    def first_scale(self, steps: list[Step], sampler: Sampler | str, spacing: str | None = None) -> float:
        """What the first noise is multiplied with to be the first latents, as diffusers does: 1, though the first level
        may hold a little less noise; that level's √(1−ᾱ) for Euler and Heun in all but the leading spacing."""
        row = sampler_named(sampler) if isinstance(sampler, str) else sampler
        return steps[0].spread if row.grid == "euler" and row.spacing(self.config, spacing) != "leading" else 1.0

    def _ddim_ends(self, points: list[tuple[float, float]]) -> list[float]:
        levels, stride = self.alphas_cumprod.tolist(), self.config.training_steps // len(points)
        last = 1.0 if self.config.set_alpha_to_one else levels[0]
        return [levels[int(t) - stride] if t >= stride else last for t, _ in points]

    def _level(self, timestep: float, grid: str) -> float:
        """ᾱ at a timestep; between two training steps, σ is interpolated."""
        low = int(timestep)
        if grid in ("ddim", "lcm"):
            return float(self.alphas_cumprod[low])
        sigmas = self.sigmas
        part = timestep - low
        sigma = sigmas[low] if part == 0 else (1 - part) * sigmas[low] + part * sigmas[low + 1]
        return 1 / (1 + sigma**2)

    @functools.cached_property
    def sigmas(self) -> list[float]:
        """The noise levels √((1−ᾱ)/ᾱ) of all training steps, as host floats; 4096 at the most."""
        levels = self.alphas_cumprod.clamp(min=SMALLEST_LEVEL)
        return ((1 - levels) / levels).sqrt().tolist()

    def _karras(self, count: int, whole: bool, rho: float = 7.0) -> list[tuple[float, float]]:
        """Timesteps and ᾱ of `count` noise levels from the schedule's highest to its lowest, evenly spaced in σ^(1/rho)
        (Karras et al. 2022, equation 5). `whole`: the timestep that the model is told is rounded."""
        sigmas = self.sigmas
        logs = [math.log(sigma) for sigma in sigmas]
        high, low = sigmas[-1] ** (1 / rho), sigmas[0] ** (1 / rho)
        points = []
        for i in range(count):
            sigma = (high + i / max(count - 1, 1) * (low - high)) ** rho
            timestep = _position(math.log(sigma), logs)
            points.append((round(timestep) if whole else timestep, 1 / (1 + sigma**2)))
        return points


def _ratio(spread: float, signal: float) -> float:
    return spread / signal if signal > 0 else math.inf


def _position(value: float, ascending: list[float]) -> float:
    """Where `value` sits among these, as an index between theirs, interpolated."""
    low = min(max(bisect.bisect_right(ascending, value) - 1, 0), len(ascending) - 2)
    part = (value - ascending[low]) / (ascending[low + 1] - ascending[low])
    return low + min(max(part, 0.0), 1.0)


def _alphas_cumprod(config: ScheduleConfig) -> Tensor:
    if config.alphas_cumprod is None:
        return torch.cumprod(1.0 - _betas(config), dim=0)
    return torch.tensor(config.alphas_cumprod, dtype=torch.float32)


def _check(levels: Tensor, count: int) -> None:
    falls = bool((levels[1:] < levels[:-1]).all())  # not for NaN
    if len(levels) != count or not falls or not 0 <= levels[-1] <= levels[0] < 1:
        raise BadDataError(
            f"the model's noise schedule (its betas or alphas_cumprod) does not make {count} signal levels that fall "
            "from below 1 to no less than 0."
        )


def _with_zero_terminal_snr(levels: Tensor, config: ScheduleConfig) -> Tensor:
    """√ᾱ shifted so that the last is 0 and scaled so that the first stays (Lin et al. 2023, algorithm 1)."""
    roots = levels.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    rescaled = ((roots - last) * (first / (first - last))) ** 2
    if config.alphas_cumprod is not None:
        return rescaled
    # The way over betas and back changes the last bits; diffusers, whose numbers these are to be, goes it.
    alphas = torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]])
    return torch.cumprod(1 - (1 - alphas), dim=0)


def _betas(config: ScheduleConfig) -> Tensor:
    if config.betas is not None:
        return torch.tensor(config.betas, dtype=torch.float32)
    start, end, count = config.beta_start, config.beta_end, config.training_steps
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32).square()
    raise BadDataError(f"beta_schedule {config.beta_schedule!r} is not known; linear and scaled_linear are.")
