"""The noise schedule, and where the steps of a run sit on it."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ldmcli.config import BETA_SCHEDULES, COSINE, ScheduleConfig, Walk, cosine_betas
from ldmcli.errors import BadDataError
from ldmcli.sampling.catalogue import Sampler, check_fit, sampler_named
from ldmcli.spacings import RESPACED

# Samplers that divide by the signal level take this for 0, as diffusers does: float16's smallest positive number.
SMALLEST_LEVEL = 2.0**-24
# σ of the ten steps of "Align Your Steps", and where the last of them ends before all noise is taken.
_AYS = (14.6146, 6.4746, 3.8637, 2.6946, 1.8842, 1.3944, 0.9643, 0.6524, 0.3977, 0.1515, 0.0292)
_AYS_XL = (14.6146, 6.3184, 3.7682, 2.1812, 1.3405, 0.8621, 0.5551, 0.3799, 0.2332, 0.1114, 0.0292)


@dataclasses.dataclass(frozen=True)
class Step:
    """One sampling step, from `timestep` to the next lower one: latents hold `signal` of the image and `spread` of
    noise (its standard deviation), and where the step leads `previous_signal` and `previous_spread`. They are host
    floats, so that the loop never waits for the device. `index` counts the steps of the whole run; in a recorded graph
    it lies on the device, (1,). `timestep` is what the model reads, and no whole number where the step sits between
    two training steps. `order` is the highest that a multistep solver takes here."""

    index: int | Tensor
    timestep: float
    signal: float
    spread: float
    previous_signal: float
    previous_spread: float
    order: int = 2

    @classmethod
    def ddpm(cls, index: int, timestep: float, alpha_cumprod: float, previous: float, order: int = 2) -> Self:
        """A step of a schedule that keeps variance, from signal level ᾱ to `previous` (Ho et al. 2020)."""
        signal, spread = alpha_cumprod**0.5, (1.0 - alpha_cumprod) ** 0.5
        return cls(index, timestep, signal, spread, previous**0.5, (1.0 - previous) ** 0.5, order)

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

    def steps(self, count: int, sampler: str = "ddim", spacing: str | None = None) -> list[Step]:
        """`count` steps, noisiest first; `spacing` is the model's own where None. Raises UsageError when so many do not
        fit, or sampler and spacing do not go together.

        DDIM and PLMS end at the first training step's level, or at 1 where the model's configuration says so; all other
        samplers end at 1, without noise.
        """
        row = sampler_named(sampler)
        check_fit(row, self.config, count, spacing)
        own = self.of(sampler)
        spacing = row.spacing(self.config, spacing)
        points = own._points(count, row.grid, spacing)
        levels = [level for _, level in points]
        joined = [*levels[1:], own._end(count, row, spacing, levels[-1])]
        ends = own._ddim_ends(points) if row.grid == "ddim" else joined
        orders = own._orders(count, sampler)
        rows = enumerate(zip(points, ends, orders, strict=True))
        return [Step.ddpm(i, t, level, end, order) for i, ((t, level), end, order) in rows]

    def of(self, sampler: str) -> "Schedule":
        """The schedule as the sampler of this name reads the model's configuration."""
        own = self.config.of(sampler)
        return self if own is self.config else Schedule(own)

    def walk(self, sampler: str) -> Walk:
        """How the sampler of this name computes on its steps."""
        return self.config.of(sampler).walk

    def first_scale(self, steps: list[Step], sampler: str, spacing: str | None = None) -> float:
        """What the first noise is multiplied with to be the first latents, as diffusers does: 1, though the first level
        may hold a little less noise; that level's √(1−ᾱ) for Euler and Heun in all but the leading spacing."""
        row = sampler_named(sampler)
        leading = row.spacing(self.config, spacing).startswith("leading")
        return steps[0].spread if row.grid == "euler" and not leading else 1.0

    def _points(self, count: int, grid: str, spacing: str) -> list[tuple[float, float]]:
        """Timesteps and ᾱ of `count` steps."""
        spacing, _, sigmas = spacing.partition(" ")
        if spacing in ("karras", "exponential", "beta"):
            return self._respaced(count, spacing, self.sigmas[-1], self.sigmas[0], whole=grid == "dpm")
        if spacing in RESPACED:
            logs = self._log_levels(count, spacing)
            return [(_position(log, self._logs), _level_of(math.exp(log))) for log in logs]
        timesteps = self.config.timesteps(count, grid, spacing) or []
        if grid == "lcm" or not sigmas:
            return [(timestep, self._level(timestep, grid)) for timestep in timesteps]
        if sigmas == "log":
            return list(zip(timesteps, map(_level_of, self._log_sigmas(count)), strict=False))
        # diffusers' Euler and Heun respace the levels that the spacing gives, its DPM-Solvers those of all training.
        between = (len(self.sigmas) - 1, 0) if grid == "dpm" else (timesteps[0], timesteps[-1])
        ends = [self._sigma(timestep) for timestep in between]
        high, low = self.config.sigma_max or ends[0], self.config.sigma_min or ends[1]
        return self._respaced(count, sigmas, high, low, whole=grid == "dpm")

    def _end(self, count: int, row: Sampler, spacing: str, last: float) -> float:
        """ᾱ where the last of `count` steps, which starts at `last`, leads."""
        if spacing.endswith(" log"):
            return _level_of(self._log_sigmas(count)[count])
        if self.config.ends_clean or row.grid == "lcm":
            return 1.0
        return last if row.name == "unipc" and " " in spacing else float(self.alphas_cumprod[0])

    def _orders(self, count: int, sampler: str) -> list[int]:
        """The highest order of each step, as diffusers lowers it at the end."""
        config, order = self.config, self.config.walk.order
        if sampler == "unipc":
            return [min(order, count - i) if config.lower_order_final else order for i in range(count)]
        few = config.lower_order_final and count < 15
        last = [1 if few or config.euler_at_final or config.ends_clean else order]
        return [*[order] * (count - 2), *[min(order, 2) if few else order] * (count > 1), *last]

    def _ddim_ends(self, points: list[tuple[float, float]]) -> list[float]:
        levels, stride = self.alphas_cumprod.tolist(), self.config.training_steps // len(points)
        last = 1.0 if self.config.set_alpha_to_one else levels[0]
        return [levels[int(t) - stride] if t >= stride else last for t, _ in points]

    def _level(self, timestep: float, grid: str) -> float:
        """ᾱ at a timestep; between two training steps, σ is interpolated."""
        if grid in ("ddim", "lcm"):
            return float(self.alphas_cumprod[int(timestep)])
        return _level_of(self._sigma(timestep))

    def _sigma(self, timestep: float) -> float:
        low, sigmas = int(timestep), self.sigmas
        part = timestep - low
        return sigmas[low] if part == 0 else (1 - part) * sigmas[low] + part * sigmas[low + 1]

    @functools.cached_property
    def sigmas(self) -> list[float]:
        """The noise levels √((1−ᾱ)/ᾱ) of all training steps, as host floats; 4096 at the most."""
        levels = self.alphas_cumprod.clamp(min=SMALLEST_LEVEL)
        return ((1 - levels) / levels).sqrt().tolist()

    @functools.cached_property
    def _logs(self) -> list[float]:
        return [math.log(sigma) for sigma in self.sigmas]

    def _log_levels(self, count: int, spacing: str) -> list[float]:
        """log σ of each step, as ComfyUI and AUTOMATIC1111 place them: "normal" evenly from the last training step to
        the first; "sgm_uniform" as if one step more led to the first; "simple" at whole training steps; "ays" where
        Sabour et al. 2024 ("Align Your Steps") found ten to be best, others interpolated."""
        logs, last = self._logs, len(self.sigmas) - 1
        if spacing == "simple":
            return [logs[last - int(i * len(logs) / count)] for i in range(count)]
        if spacing == "ays":
            levels = [math.log(sigma) for sigma in (_AYS_XL if self.config.xl else _AYS)]
            return [_between(levels, i / count) for i in range(count)]
        parts = max(count - 1, 1) if spacing == "normal" else count
        return [_between(logs, 1 - i / parts) for i in range(count)]

    def _log_sigmas(self, count: int) -> list[float]:
        """σ at `count` + 1 points from the highest to the lowest, evenly in the logarithm."""
        high, low = math.log(self.sigmas[-1]), math.log(self.sigmas[0])
        return [math.exp(high + i / count * (low - high)) for i in range(count + 1)]

    def _respaced(
        self, count: int, kind: str, highest: float, lowest: float, *, whole: bool
    ) -> list[tuple[float, float]]:
        """Timesteps and ᾱ of `count` noise levels from the highest to the lowest, of a `kind` of ScheduleConfig.sigmas:
        Karras's are even in σ^(1/7) (Karras et al. 2022, equation 5). `whole`: the model reads whole timesteps."""
        logs = self._logs
        rounds = kind in ("karras", "lu")
        if whole and not rounds:  # diffusers cuts them off instead, in float32: the highest may lie below itself
            logs = torch.tensor(logs, dtype=torch.float32).tolist()
        rho = 7.0
        high, low = highest ** (1 / rho), lowest ** (1 / rho)
        points = []
        for i in range(count):
            done = i / max(count - 1, 1)
            if kind == "karras":
                sigma = (high + done * (low - high)) ** rho
            elif kind == "beta":
                sigma = lowest + _beta_quantile(1 - done) * (highest - lowest)
            else:
                sigma = highest ** (1 - done) * lowest**done
            timestep = _position(math.log(sigma), logs)
            read = timestep if not whole else round(timestep) if rounds else int(timestep)
            points.append((read, _level_of(sigma)))
        return points


def _level_of(sigma: float) -> float:
    """ᾱ at a noise level."""
    return 1 / (1 + sigma**2)


def _beta_quantile(share: float, shape: float = 0.6) -> float:
    """Below which number `share` of a beta distribution lies, both of whose parameters are `shape`."""
    if share > 0.5:
        return 1 - _beta_quantile(1 - share, shape)
    whole = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    low, high = 0.0, 0.5
    for _ in range(60):
        middle = (low + high) / 2
        part, factor = 0.0, middle**shape
        for n in range(60):  # the power series of the incomplete beta function
            part += factor / (shape + n)
            factor *= middle * (n + 1 - shape) / (n + 1)
        low, high = (middle, high) if part < share * whole else (low, middle)
    return low


def _ratio(spread: float, signal: float) -> float:
    return spread / signal if signal > 0 else math.inf


def _between(values: Sequence[float], share: float) -> float:
    """The value at that share of the way from the first to the last, interpolated."""
    place = share * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    return values[low] + (place - low) * (values[low + 1] - values[low])


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
    if config.beta_schedule == COSINE:
        return torch.tensor(cosine_betas(count), dtype=torch.float32)
    raise BadDataError(f"beta_schedule {config.beta_schedule!r} is not known; {', '.join(BETA_SCHEDULES)} are.")
