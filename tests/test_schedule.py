"""The noise schedule and where sampling steps sit on it: diffusers', bit for bit."""

import dataclasses
import inspect
import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from ldmcli.config import ScheduleConfig
from ldmcli.errors import BadDataError, UsageError
from ldmcli.sampling.catalogue import SAMPLERS, check_fit, check_spacing, sampler_named
from ldmcli.sampling.schedule import SMALLEST_LEVEL, Schedule, Step

BETAS = tuple(0.001 * (i + 1) for i in range(40))
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2
CONFIGS = [
    ScheduleConfig(),
    ScheduleConfig(steps_offset=0, set_alpha_to_one=True),
    ScheduleConfig(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    ScheduleConfig(training_steps=400, steps_offset=7),
    ScheduleConfig(training_steps=40, betas=BETAS),
    ScheduleConfig(spacing="trailing"),
    ScheduleConfig(spacing="linspace", set_alpha_to_one=True),
]


EULER, DPM = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
KIN = [
    ("ddim", "DDIMScheduler"),
    ("euler", EULER),
    ("euler-a", "EulerAncestralDiscreteScheduler"),
    ("heun", "HeunDiscreteScheduler"),
    ("dpmpp-2m", DPM),
    ("unipc", "UniPCMultistepScheduler"),
]


def diffusers_settings(config: ScheduleConfig) -> dict[str, Any]:
    known = ("training_steps", "beta_start", "beta_end", "beta_schedule", "betas", "steps_offset", "set_alpha_to_one")
    fields = {name: getattr(config, name) for name in (*known, "spacing", "prediction_type")}
    fields = {name: value for name, value in fields.items() if value is not None}
    names = {"training_steps": "num_train_timesteps", "betas": "trained_betas", "spacing": "timestep_spacing"}
    return {names.get(name, name): value for name, value in fields.items()}


@pytest.mark.parametrize("config", CONFIGS)
def test_levels_and_timesteps_are_diffusers(config: ScheduleConfig) -> None:
    ddim = diffusers_scheduler("DDIMScheduler", config)
    plms = diffusers_scheduler("PNDMScheduler", config, skip_prk_steps=True)
    schedule = Schedule(config)
    assert torch.equal(schedule.alphas_cumprod, ddim.alphas_cumprod)
    for steps in (50, 20, 10, 3, 1, 999, 2, 7, 333, 500):
        if config.timesteps(steps) is None:  # too many for this schedule
            continue
        ours = [step.timestep for step in schedule.steps(steps)]
        for scheduler in (ddim, plms):
            scheduler.set_timesteps(steps)
        assert ours == ddim.timesteps.tolist() == config.timesteps(steps)
        theirs = plms.timesteps.tolist()
        if steps > 1:
            assert theirs[1] == theirs[2] == ours[1]  # the provisional step's end, visited twice
            del theirs[1]
        assert ours == theirs


def leads_to(step: Step) -> tuple[float, float]:
    return step.previous_signal, step.previous_spread


def diffusers_scheduler(kind: str, config: ScheduleConfig, **more: Any) -> Any:
    import diffusers

    made = getattr(diffusers, kind)
    settings = diffusers_settings(config) | {"rescale_betas_zero_snr": config.zero_terminal_snr} | more
    known = inspect.signature(made).parameters
    return made(**{name: value for name, value in settings.items() if name in known})


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("sampler", "kind"), KIN)
def test_every_samplers_steps_are_diffusers(sampler: str, kind: str, spacing: str) -> None:
    row, config = SAMPLERS[sampler], ScheduleConfig()
    scheduler = diffusers_scheduler(kind, config, timestep_spacing=spacing)
    for count in [*range(1, 130), 192, 206, 250, 333, 400, 500, 640, 998]:
        scheduler.set_timesteps(count)
        theirs = scheduler.timesteps.tolist()
        if sampler == "heun":
            theirs = theirs[::2]
        # Where its floats run over, diffusers' trailing spacing has a step too many, at time step -1.
        assert config.timesteps(count, row.grid, spacing) == pytest.approx(theirs[:count], rel=1e-6), count


def k_diffusion_levels(spacing: str, count: int, sigmas: np.ndarray) -> np.ndarray:
    """The formulas of k-diffusion and ComfyUI, by the logarithms of the training steps' noise levels, ascending."""
    last = len(sigmas) - 1
    if spacing == "simple":
        return np.array([sigmas[-(1 + int(i * len(sigmas) / count))] for i in range(count)])
    timesteps = np.linspace(last, 0, count) if spacing == "normal" else np.linspace(last, 0, count + 1)[:-1]
    return np.exp(np.interp(timesteps, np.arange(last + 1), np.log(sigmas)))


@pytest.mark.parametrize("spacing", ["normal", "sgm_uniform", "simple"])
@pytest.mark.parametrize("sampler", ["euler", "euler-a", "dpmpp-2m"])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], ScheduleConfig(zero_terminal_snr=True)])
def test_levels_are_k_diffusions(spacing: str, sampler: str, config: ScheduleConfig) -> None:
    schedule = Schedule(config)
    for count in (1, 2, 7, 20, 333):
        steps = schedule.steps(count, sampler, spacing)
        theirs = k_diffusion_levels(spacing, count, np.array(schedule.sigmas))
        assert [step.sigma for step in steps] == pytest.approx(theirs, rel=1e-6)
        assert steps[-1].previous_sigma == 0


@pytest.mark.parametrize(("xl", "name"), [(False, "StableDiffusionTimesteps"), (True, "StableDiffusionXLTimesteps")])
def test_align_your_steps_are_diffusers(xl: bool, name: str) -> None:
    from diffusers.schedulers import AysSchedules

    schedule = Schedule(ScheduleConfig(xl=xl))
    steps = schedule.steps(10, "dpmpp-2m", "ays")
    assert [step.timestep for step in steps] == pytest.approx(AysSchedules[name], abs=0.6)
    sigmas = AysSchedules[name.replace("Timesteps", "Sigmas")]
    assert [step.sigma for step in steps] == pytest.approx(sigmas[:-1], rel=5e-3, abs=2e-3)
    between = schedule.steps(20, "dpmpp-2m", "ays")
    assert [step.sigma for step in between[::2]] == pytest.approx([step.sigma for step in steps])


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(("sampler", "kind"), [("euler", EULER), ("dpmpp-2m", DPM), ("unipc", KIN[-1][1])])
def test_karras_steps_are_diffusers(sampler: str, kind: str, zero_terminal_snr: bool) -> None:
    config = ScheduleConfig(zero_terminal_snr=zero_terminal_snr)
    schedule = Schedule(config)
    scheduler = diffusers_scheduler(kind, config, use_karras_sigmas=True, timestep_spacing="linspace")
    for count in (2, 3, 10, 25, 50, 200, 999):
        scheduler.set_timesteps(count)
        steps = schedule.steps(count, sampler, "karras")
        assert [step.timestep for step in steps] == pytest.approx(scheduler.timesteps.tolist(), rel=1e-5, abs=1e-4)
        sigmas = [step.sigma for step in steps]
        assert [*sigmas, 0.0] == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)
        assert sigmas[0] == pytest.approx(schedule.sigmas[-1], rel=1e-9)
        assert sigmas[-1] == pytest.approx(schedule.sigmas[0], rel=1e-9)
    assert schedule.steps(1, sampler, "karras")[0].timestep == 999


def test_lcm_steps_are_diffusers() -> None:
    for config in (ScheduleConfig(), ScheduleConfig(training_steps=400, steps_offset=7)):
        scheduler = diffusers_scheduler("LCMScheduler", config)
        for count in range(1, 51):
            scheduler.set_timesteps(count)
            assert config.timesteps(count, "lcm") == scheduler.timesteps.tolist()
        assert config.timesteps(51, "lcm") is None
    assert ScheduleConfig(training_steps=49).timesteps(1, "lcm") is None


@pytest.mark.parametrize(("sampler", "spacing"), [(n, s) for n, row in SAMPLERS.items() for s in row.spacings])
def test_steps_join(sampler: str, spacing: str) -> None:
    """But for DDIM's and PLMS's, whose strides diffusers takes for equal where they are not quite."""
    steps = Schedule(ScheduleConfig()).steps(7, sampler, spacing)
    assert [step.index for step in steps] == list(range(7))
    assert all(a.signal < b.signal and a.spread > b.spread for a, b in itertools.pairwise(steps))
    if SAMPLERS[sampler].grid != "ddim":
        assert leads_to(steps[-1]) == (1, 0)
        assert steps[-1].previous_sigma == 0
        assert all(leads_to(a) == (b.signal, b.spread) for a, b in itertools.pairwise(steps))
    for step in steps:
        assert step.signal**2 + step.spread**2 == pytest.approx(1)
        assert step.sigma == pytest.approx(step.spread / step.signal)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_zero_terminal_snr_is_diffusers(beta_schedule: str) -> None:
    config = ScheduleConfig(beta_schedule=beta_schedule, zero_terminal_snr=True, prediction_type="v_prediction")
    schedule = Schedule(config)
    levels = schedule.alphas_cumprod
    assert torch.equal(levels, diffusers_scheduler("DDIMScheduler", config).alphas_cumprod)
    assert levels[-1] == 0
    assert levels[0].item() == pytest.approx(Schedule(ScheduleConfig(beta_schedule=beta_schedule)).alphas_cumprod[0])
    # DDIM and LCM start at 0 indeed; what divides by the level starts at diffusers' smallest.
    assert schedule.steps(5, "ddim", "trailing")[0].signal == 0
    assert schedule.steps(5, "lcm")[0].signal == 0
    for sampler in ("euler", "euler-a", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc"):
        for spacing in ("trailing", "linspace", "karras"):
            first = schedule.steps(5, sampler, spacing)[0]
            assert first.signal**2 == pytest.approx(SMALLEST_LEVEL, rel=1e-6)


# ---- a file's own levels ----


def test_a_files_own_levels_are_used_as_they_are() -> None:
    levels = tuple(0.999 * 0.99**i for i in range(1000))
    schedule = Schedule(ScheduleConfig(alphas_cumprod=levels, betas=BETAS))
    assert torch.equal(schedule.alphas_cumprod, torch.tensor(levels))
    assert schedule.steps(10)[0].signal ** 2 == pytest.approx(levels[901])


def test_own_levels_that_end_at_0_are_zero_terminal_snr() -> None:
    levels = (*Schedule(ScheduleConfig()).alphas_cumprod.tolist()[:-1], 0.0)
    config = ScheduleConfig(alphas_cumprod=levels, prediction_type="v_prediction")
    assert config.starts_without_signal
    assert Schedule(config).steps(3, "ddim", "trailing")[0].signal == 0
    first = Schedule(config).steps(3, "euler", "trailing")[0]
    assert first.signal**2 == pytest.approx(SMALLEST_LEVEL, rel=1e-6)


def test_own_levels_can_be_rescaled() -> None:
    """A file may hold its schedule and say beside that it was trained on the rescaled one."""
    levels = tuple(Schedule(ScheduleConfig()).alphas_cumprod.tolist())
    found = Schedule(ScheduleConfig(alphas_cumprod=levels, zero_terminal_snr=True)).alphas_cumprod
    torch.testing.assert_close(found, Schedule(ScheduleConfig(zero_terminal_snr=True)).alphas_cumprod)
    assert found[-1] == 0


@pytest.mark.parametrize(
    "levels",
    [(0.9, 0.5), (0.9, 0.5, 0.5, 0.1), (0.1, 0.5, 0.7, 0.9), (1.0, 0.7, 0.5, 0.1), (0.9, 0.7, 0.5, -0.1),
     (0.9, math.nan, 0.5, 0.1), (0.9, 0.7, 0.5, math.nan)],
)  # fmt: skip
def test_own_levels_that_are_none_are_refused(levels: tuple[float, ...]) -> None:
    with pytest.raises(BadDataError, match="does not make 4 signal levels that fall from below 1"):
        Schedule(ScheduleConfig(training_steps=4, alphas_cumprod=levels))


def test_an_unknown_beta_schedule_is_refused() -> None:
    with pytest.raises(BadDataError, match="sigmoid"):
        Schedule(ScheduleConfig(beta_schedule="sigmoid"))


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


@pytest.mark.parametrize(
    "betas",
    [(0.0, 0.1, 0.1), (0.1, 0.0, 0.1), (0.1, -0.1, 0.1), (0.1, 1.5, 0.1), (0.1, math.nan, 0.1), (1.0, 0.1, 0.1)],
)
def test_betas_that_are_none_are_refused(betas: tuple[float, ...]) -> None:
    with pytest.raises(BadDataError, match="does not make 3 signal levels"):
        Schedule(ScheduleConfig(training_steps=3, betas=betas))


# ---- what does not go together ----


def test_samplers_say_which_spacings_go() -> None:
    for row in SAMPLERS.values():
        check_spacing(row, None)
        for spacing in row.spacings:
            check_spacing(row, spacing)
            check_fit(row, ScheduleConfig(), 25, spacing)
    with pytest.raises(UsageError, match=r"karras does not go with sampler ddim, which takes leading, trailing, linsp"):
        Schedule(ScheduleConfig()).steps(25, "ddim", "karras")
    with pytest.raises(UsageError, match=r"it goes with euler, euler-a, heun, dpmpp-2m, dpmpp-2m-sde, unipc\."):
        check_spacing(SAMPLERS["plms"], "karras")
    with pytest.raises(UsageError, match="lcm has a schedule of its own; leave out --schedule trailing"):
        check_spacing(SAMPLERS["lcm"], "trailing")
    with pytest.raises(
        UsageError, match="schedule 'cosine' is not known; choose from leading, trailing, linspace, kar"
    ):
        check_spacing(SAMPLERS["ddim"], "cosine")
    with pytest.raises(UsageError, match=r"sampler 'ddpm' is not known; choose from ddim, plms, .*lcm\."):
        sampler_named("ddpm")


def test_a_models_own_spacing_is_used_where_the_sampler_takes_it() -> None:
    model = ScheduleConfig(spacing="karras")
    karras, leading = Schedule(model), Schedule(ScheduleConfig())
    assert karras.steps(9, "euler") == leading.steps(9, "euler", "karras")
    assert karras.steps(9, "ddim") == leading.steps(9, "ddim", "leading")
    assert karras.steps(9, "lcm") == leading.steps(9, "lcm")
    steps = karras.steps(9, "euler")
    assert karras.first_scale(steps, "euler") == leading.first_scale(steps, "euler", "karras") < 1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("config", [ScheduleConfig(), ScheduleConfig(training_steps=60, steps_offset=2)])
def test_the_check_before_loading_is_the_schedules(sampler: str, config: ScheduleConfig) -> None:
    """Whatever the check lets pass has its steps, all levels apart; whatever it refuses is refused."""
    row = SAMPLERS[sampler]
    passed = []
    for spacing in row.spacings or (None,):
        for count in (0, 1, 2, 50, 51, 59, 60, 61, 500, 998, 999, 1000, 1001):
            if not config.fits(count, row.grid, row.spacing(config, spacing)):
                for check in (check_fit, lambda row, config, *how: Schedule(config).steps(how[0], sampler, how[1])):
                    with pytest.raises(UsageError, match=f"^{count} steps do not fit"):
                        check(row, config, count, spacing)
                continue
            check_fit(row, config, count, spacing)
            steps = Schedule(config).steps(count, sampler, spacing)
            assert len({step.signal for step in steps}) == count
            passed.append(count)
    assert {1, 2, 50} <= set(passed)
    assert max(passed) <= config.training_steps


def test_zero_terminal_snr_and_samplers_that_divide_by_it() -> None:
    config = ScheduleConfig(zero_terminal_snr=True, prediction_type="v_prediction")
    with pytest.raises(UsageError, match=r"plms divides by the signal level.*use ddim"):
        Schedule(config).steps(10, "plms")
    noise = dataclasses.replace(config, prediction_type="epsilon")
    for sampler in ("ddim", "lcm"):
        with pytest.raises(UsageError, match=f"sampler {sampler} would divide by 0: the model predicts noise"):
            Schedule(noise).steps(10, sampler)
    for sampler in SAMPLERS:
        if sampler != "plms":
            check_fit(SAMPLERS[sampler], config, 10)


def test_the_check_needs_no_torch() -> None:
    code = """
import sys
from ldmcli.config import ScheduleConfig
from ldmcli.sampling.catalogue import SAMPLERS, check_fit
for row in SAMPLERS.values():
    check_fit(row, ScheduleConfig(), 50)
assert not {"torch", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
