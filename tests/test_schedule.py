"""The noise schedule and where sampling steps sit on it: diffusers', bit for bit."""

import dataclasses
from typing import Any

import pytest
import torch

from ldmcli.config import ScheduleConfig
from ldmcli.errors import BadDataError, UsageError
from ldmcli.sampling.schedule import Schedule

BETAS = tuple(0.001 * (i + 1) for i in range(40))
CONFIGS = [
    ScheduleConfig(),
    ScheduleConfig(steps_offset=0, set_alpha_to_one=True),
    ScheduleConfig(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    ScheduleConfig(training_steps=400, steps_offset=7),
    ScheduleConfig(training_steps=40, betas=BETAS),
    ScheduleConfig(spacing="trailing"),
    ScheduleConfig(spacing="linspace", set_alpha_to_one=True),
]


def diffusers_settings(config: ScheduleConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    names = {"training_steps": "num_train_timesteps", "betas": "trained_betas", "spacing": "timestep_spacing"}
    return {names.get(name, name): value for name, value in fields.items()}


@pytest.mark.parametrize("config", CONFIGS)
def test_alphas_cumprod_are_diffusers(config: ScheduleConfig) -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**diffusers_settings(config)).alphas_cumprod
    assert torch.equal(Schedule(config).alphas_cumprod, theirs)


@pytest.mark.parametrize("steps", [50, 20, 10, 3, 1, 999, 2, 7, 333, 500])
@pytest.mark.parametrize("config", CONFIGS)
def test_timesteps_are_diffusers(config: ScheduleConfig, steps: int) -> None:
    from diffusers import DDIMScheduler, PNDMScheduler

    if config.timesteps(steps) is None:
        pytest.skip("too many steps for this schedule")
    ours = [step.timestep for step in Schedule(config).steps(steps)]
    ddim = DDIMScheduler(**diffusers_settings(config))
    ddim.set_timesteps(steps)
    assert ours == ddim.timesteps.tolist() == config.timesteps(steps)
    plms = PNDMScheduler(**diffusers_settings(config), skip_prk_steps=True)
    plms.set_timesteps(steps)
    theirs = plms.timesteps.tolist()
    if steps > 1:
        assert theirs[1] == theirs[2] == ours[1]  # the provisional step's end, visited twice
        del theirs[1]
    assert ours == theirs


@pytest.mark.parametrize("steps", [50, 3, 999])
@pytest.mark.parametrize("config", CONFIGS[:3])
def test_signal_levels(config: ScheduleConfig, steps: int) -> None:
    schedule = Schedule(config)
    levels = schedule.alphas_cumprod.tolist()
    stride = 1000 // steps
    found = schedule.steps(steps)
    for i, step in enumerate(found):
        assert step.index == i
        assert step.alpha_cumprod == levels[step.timestep]
        if i + 1 < len(found):  # with the usual offset of 1, steps join without a gap
            assert step.previous_alpha_cumprod == levels[step.timestep - stride] == found[i + 1].alpha_cumprod
    assert found[-1].previous_alpha_cumprod == (1.0 if config.set_alpha_to_one else levels[0])


def test_golden_timesteps() -> None:
    assert [step.timestep for step in Schedule(ScheduleConfig()).steps(10)] == [1 + 100 * i for i in range(9, -1, -1)]
    assert [step.timestep for step in Schedule(ScheduleConfig()).steps(3)] == [667, 334, 1]
    levels = Schedule(ScheduleConfig()).alphas_cumprod
    # The values that every description of Stable Diffusion's schedule gives.
    assert levels[0].item() == pytest.approx(1 - 0.00085, rel=1e-6)
    assert levels[999].item() == pytest.approx(0.0047, rel=0.01)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (ScheduleConfig(), 1000),  # the offset of 1 would lead past the last training step
        (ScheduleConfig(steps_offset=0), 1001),
        (ScheduleConfig(), 0),
        (ScheduleConfig(), -1),
        (ScheduleConfig(training_steps=40, betas=BETAS), 41),
        (ScheduleConfig(steps_offset=30), 50),
    ],
)
def test_steps_that_do_not_fit_are_refused(config: ScheduleConfig, steps: int) -> None:
    assert config.timesteps(steps) is None
    with pytest.raises(UsageError, match=f"{steps} steps do not fit"):
        Schedule(config).steps(steps)


def test_offset_zero_takes_all_steps() -> None:
    found = Schedule(ScheduleConfig(steps_offset=0)).steps(1000)
    assert [step.timestep for step in found] == list(range(999, -1, -1))


def test_unknown_beta_schedule_is_refused() -> None:
    with pytest.raises(BadDataError, match="squaredcos"):
        Schedule(ScheduleConfig(beta_schedule="squaredcos_cap_v2"))
