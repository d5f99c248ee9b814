"""The samplers there are, as data: what a user may ask of each. What they compute is in `ldmcli.sampling`."""

import dataclasses

from ldmcli.config import RESPACED, ScheduleConfig
from ldmcli.errors import BadDataError, UsageError, printable

_TRAINING_SPACINGS = ("leading", "trailing", "linspace")
SPACINGS = (*_TRAINING_SPACINGS, *RESPACED)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """One sampler: the name users type, the title that AUTOMATIC1111 gives it in a picture's metadata, one line.

    `grid` says where its steps sit (see `ScheduleConfig.timesteps`), `spacings` which `--schedule` it takes: none where
    it has its own. `draws_noise`: with fresh noise in every step; `takes_eta`: only as much as `--eta` says.
    """

    name: str
    title: str
    summary: str
    grid: str
    spacings: tuple[str, ...] = SPACINGS
    draws_noise: bool = False
    takes_eta: bool = False
    predictions_per_step: int = 1
    more_predictions: int = 0

    def predictions(self, steps: int) -> int:
        """How often a run of so many steps calls the model."""
        return self.predictions_per_step * steps + self.more_predictions if steps > 1 else 1

    def spacing(self, schedule: ScheduleConfig, asked: str | None) -> str:
        """The spacing to use: what was asked for, or the model's own where this sampler takes it; with the name of
        respaced noise levels behind it where the model asks for them."""
        if asked is not None:
            return asked
        model = schedule.of(self.name)
        own = model.spacing if model.spacing in self.spacings else "leading"
        return f"{own} {model.sigmas}" if model.sigmas else own


SAMPLERS = {
    row.name: row
    for row in (
        Sampler(
            "ddim", "DDIM", "deterministic; --eta adds noise (Song, Meng & Ermon 2020)", "ddim", _TRAINING_SPACINGS,
            takes_eta=True,
        ),
        Sampler(
            "plms", "PLMS", "fourth-order multistep on the noise prediction (Liu et al. 2022)", "ddim",
            _TRAINING_SPACINGS, more_predictions=1,
        ),
        Sampler("euler", "Euler", "first order, deterministic (Karras et al. 2022)", "euler"),
        Sampler(
            "euler-a", "Euler a", "Euler with fresh noise in every step (ancestral sampling; Song et al. 2020)",
            "euler", draws_noise=True,
        ),
        Sampler(
            "heun", "Heun", "second order, two predictions a step (Karras et al. 2022)", "euler",
            predictions_per_step=2, more_predictions=-1,
        ),
        Sampler("dpmpp-2m", "DPM++ 2M", "second-order multistep: good in 20 to 30 steps (Lu et al. 2022)", "dpm"),
        Sampler(
            "dpmpp-2m-sde", "DPM++ 2M SDE", "DPM++ 2M with fresh noise in every step (Lu et al. 2022)", "dpm",
            draws_noise=True,
        ),
        Sampler("unipc", "UniPC", "predictor and corrector: good in 10 to 20 steps (Zhao et al. 2023)", "dpm"),
        Sampler(
            "lcm", "LCM", "for latent consistency models only: 1 to 8 steps (Luo et al. 2023)", "lcm", (),
            draws_noise=True,
        ),
    )
}  # fmt: skip


def sampler_named(name: str) -> Sampler:
    """The row of this name. Raises UsageError for an unknown one."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise UsageError(f"sampler {printable(repr(name))} is not known; choose from {', '.join(SAMPLERS)}.")
    return SAMPLERS[name]


def check_spacing(sampler: Sampler, spacing: str | None) -> None:
    """Raises UsageError where the sampler does not take this spacing; None, the model's own, always goes."""
    if spacing is None or spacing in sampler.spacings:
        return
    if spacing not in SPACINGS:
        raise UsageError(f"schedule {printable(repr(spacing))} is not known; choose from {', '.join(SPACINGS)}.")
    if not sampler.spacings:
        raise UsageError(f"sampler {sampler.name} has a schedule of its own; leave out --schedule {spacing}.")
    others = ", ".join(row.name for row in SAMPLERS.values() if spacing in row.spacings)
    raise UsageError(
        f"schedule {spacing} does not go with sampler {sampler.name}, which takes {', '.join(sampler.spacings)}; it "
        f"goes with {others}."
    )


def check_fit(sampler: Sampler, schedule: ScheduleConfig, steps: int, spacing: str | None = None) -> None:
    """Raises UsageError where the sampler cannot walk the model's schedule in so many steps and this spacing, and
    BadDataError where it cannot at all."""
    own = sampler.spacing(schedule, None)
    schedule = schedule.of(sampler.name)
    if spacing != own:
        check_spacing(sampler, spacing)
    if schedule.refused:
        raise BadDataError(schedule.refused)
    if sampler.name == "plms" and schedule.starts_without_signal:
        raise UsageError(
            "sampler plms divides by the signal level, which is 0 at the start of this model's schedule (zero terminal "
            "SNR); use ddim or another sampler."
        )
    if schedule.prediction_type == "epsilon" and schedule.starts_without_signal and sampler.grid in ("ddim", "lcm"):
        raise UsageError(
            f"sampler {sampler.name} would divide by 0: the model predicts noise, and its schedule starts with nothing "
            "else (zero terminal SNR); is its prediction type another?"
        )
    if not schedule.fits(steps, sampler.grid, own if spacing is None else spacing):
        raise UsageError(
            f"{steps} steps do not fit the model's schedule of {schedule.training_steps} training steps with sampler "
            f"{sampler.name}; use fewer."
        )
