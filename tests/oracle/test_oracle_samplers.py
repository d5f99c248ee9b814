"""Every sampler gives diffusers' latents after every step: all spacings, prediction types and zero terminal SNR.

Both are driven with the same smooth function in place of a network, one that depends on latents and time step, and with
the same noise.
"""

import dataclasses
import inspect
import itertools
from typing import Any

import pytest
import torch
from oracle.comparing import DIFFUSERS, relative
from torch import Tensor

from ldmcli.config import ScheduleConfig
from ldmcli.sampling import catalogue as samplers
from ldmcli.sampling.denoiser import predicting
from ldmcli.sampling.guidance import rescaled
from ldmcli.sampling.noise import SeededNoise
from ldmcli.sampling.registry import SAMPLERS
from ldmcli.sampling.schedule import SMALLEST_LEVEL, Schedule, Step
from ldmcli.spacings import RESPACED, SPACINGS

TOLERANCE = 2e-5
COUNTS = (1, 2, 5, 20)
TYPES = ("epsilon", "v_prediction", "sample")
THEIR_LEVELS = ("karras", "exponential", "beta")  # of RESPACED; tests/test_schedule.py has the others' formulas
SHARED = tuple(spacing for spacing in SPACINGS if spacing in THEIR_LEVELS or spacing not in RESPACED)
SEEDS, SHAPE = (3, 2**40), (4, 6, 5)
IN_SIGMA_SPACE = ("euler", "euler-a", "heun")  # diffusers' latents are ours / √ᾱ there


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers with numpy 2
]


def network(latents: Tensor, timestep: float) -> Tensor:
    wave = torch.sin(2 * latents + timestep / 150)
    return 0.6 * latents.roll(1, dims=1) + 0.4 * wave + 0.1 * latents.mean(dim=(1, 2, 3), keepdim=True)


def settings(config: ScheduleConfig, spacing: str, count: int) -> dict[str, Any]:
    """diffusers' names. Its Euler takes the ends of respaced noise levels from the spacing: the whole schedule's are
    linspace's, but where there is one step, it sits at the wrong end."""
    names = {"training_steps": "num_train_timesteps", "betas": "trained_betas"}
    fields = {names.get(name, name): value for name, value in dataclasses.asdict(config).items()}
    respaced = {f"use_{spacing}_sigmas": True, "timestep_spacing": "linspace" if count > 1 else "trailing"}
    fields |= respaced if spacing in THEIR_LEVELS else {"timestep_spacing": spacing}
    return fields | {"rescale_betas_zero_snr": config.zero_terminal_snr, "clip_sample": False, "skip_prk_steps": True}


def diffusers_scheduler(name: str, config: ScheduleConfig, spacing: str, count: int) -> Any:
    import diffusers

    kind, own = DIFFUSERS[name]
    made = getattr(diffusers, kind)
    known = inspect.signature(made).parameters
    fields = {key: value for key, value in settings(config, spacing, count).items() if key in known}
    scheduler = made(**fields, **own)
    if name == "heun" and config.zero_terminal_snr:  # its setting is missing there
        scheduler.alphas_cumprod = Schedule(config).alphas_cumprod.clamp(min=SMALLEST_LEVEL)
    scheduler.set_timesteps(count)
    if name == "euler-a" and spacing in THEIR_LEVELS:  # they are missing there
        plain = diffusers_scheduler("euler", config, spacing, count)
        scheduler.sigmas, scheduler.timesteps = plain.sigmas, plain.timesteps
        scheduler.register_to_config(timestep_spacing="linspace")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


def theirs(
    name: str, config: ScheduleConfig, spacing: str, count: int, eta: float = 0.0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """diffusers' latents after each step, as ours are scaled."""
    scheduler = diffusers_scheduler(name, config, spacing, count)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.to(dtype)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    latents = torch.cat([torch.randn(1, *SHAPE, generator=generator) for generator in generators])
    latents = latents.to(dtype) * scheduler.init_noise_sigma
    known = inspect.signature(scheduler.step).parameters
    more = {key: value for key, value in {"eta": eta, "generator": generators}.items() if key in known}
    after = []
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(latents, timestep), float(timestep))
        latents = scheduler.step(output, timestep, latents, **more).prev_sample
        after.append(latents)
    if name == "plms" and count > 1:
        del after[0]  # where its provisional first step leads
    if name == "heun":
        after = [*after[1::2], after[-1]]  # two predictions a step, but for the last
    if name in IN_SIGMA_SPACE:
        sigmas = scheduler.sigmas[1:] if name != "heun" else [*scheduler.sigmas[1:-1:2], scheduler.sigmas[-1]]
        after = [each / (sigma**2 + 1) ** 0.5 for each, sigma in zip(after, sigmas, strict=True)]
    return after


def ours(
    name: str,
    config: ScheduleConfig,
    spacing: str | None,
    count: int,
    eta: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    schedule = Schedule(config)
    steps = schedule.steps(count, name, spacing)
    noise = SeededNoise(SEEDS, SHAPE)

    def model(latents: Tensor, step: Step) -> Tensor:
        return network(latents, step.timestep)

    latents = noise().to(dtype) * schedule.first_scale(steps, name, spacing)
    return list(SAMPLERS[name](predicting(model, config.prediction_type), latents, steps, noise, eta=eta))


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert len(found) == len(wanted)
    return max(relative(a, b) for a, b in zip(found, wanted, strict=True))


def supported(name: str, prediction_type: str) -> bool:
    """What diffusers can do, and does as the paper says: its PLMS mixes raw outputs, which for v is something else."""
    return prediction_type == "epsilon" or not (name == "plms" or (name, prediction_type) == ("euler-a", "sample"))


def spacings(name: str) -> tuple[str, ...]:
    """Those where the two agree: diffusers' PLMS takes its strides for equal, which linspace's are not."""
    row = samplers.SAMPLERS[name]
    return row.spacings[:2] if name == "plms" else tuple(s for s in row.spacings if s in SHARED) or ("leading",)


def asked(name: str, spacing: str) -> str | None:
    return spacing if samplers.SAMPLERS[name].spacings else None


CASES = [
    (name, spacing, prediction_type)
    for name, prediction_type in itertools.product(SAMPLERS, TYPES)
    if supported(name, prediction_type)
    for spacing in spacings(name)
]


@pytest.mark.parametrize(("name", "spacing", "prediction_type"), CASES)
def test_trajectories(name: str, spacing: str, prediction_type: str) -> None:
    config = ScheduleConfig(prediction_type=prediction_type)
    for count in COUNTS:
        error = worst(ours(name, config, asked(name, spacing), count), theirs(name, config, spacing, count))
        assert error < TOLERANCE, f"{count} steps"


@pytest.mark.parametrize(("name", "spacing", "prediction_type"), [case for case in CASES if case[2] != "epsilon"])
def test_zero_terminal_snr(name: str, spacing: str, prediction_type: str) -> None:
    """In float32, diffusers' Euler and Heun lose digits at the first noise level, 4096; ours give what float64 does."""
    config = ScheduleConfig(prediction_type=prediction_type, zero_terminal_snr=True)
    for count in COUNTS:
        found = ours(name, config, asked(name, spacing), count)
        exact = ours(name, config, asked(name, spacing), count, dtype=torch.float64)
        error = worst(found, theirs(name, config, spacing, count))
        assert error < (3e-3 if name in IN_SIGMA_SPACE else TOLERANCE), f"{count} steps"
        assert worst(found, exact) < TOLERANCE, f"{count} steps"
        if name == "heun":  # theirs can be run in float64
            error = worst(exact, theirs(name, config, spacing, count, dtype=torch.float64))
            assert error < TOLERANCE, f"{count} steps"


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_eta(eta: float, spacing: str, prediction_type: str) -> None:
    config = ScheduleConfig(prediction_type=prediction_type)
    for count in COUNTS:
        error = worst(ours("ddim", config, spacing, count, eta), theirs("ddim", config, spacing, count, eta))
        assert error < TOLERANCE, f"{count} steps"


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig(steps_offset=0, set_alpha_to_one=True, beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
        ScheduleConfig(training_steps=100, betas=tuple(0.002 + 0.0006 * i for i in range(100)), steps_offset=3),
    ],
    ids=["linear", "own betas"],
)
def test_other_noise_schedules(name: str, config: ScheduleConfig) -> None:
    for spacing in spacings(name):
        error = worst(ours(name, config, asked(name, spacing), 10), theirs(name, config, spacing, 10))
        assert error < TOLERANCE, spacing


@pytest.mark.parametrize("name", ["euler", "dpmpp-2m", "unipc", "heun"])
@pytest.mark.parametrize("spacing", SHARED)
def test_long_runs(name: str, spacing: str) -> None:
    """Steps so short that float32 has trouble telling their ends apart: diffusers computes their length in it."""
    config = ScheduleConfig()
    assert worst(ours(name, config, spacing, 400), theirs(name, config, spacing, 400)) < 1e-4


def test_rescaling() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    output, positive = torch.randn(2, 3, 4, 5, 6)
    for amount in (0.3, 0.7, 1.0):
        torch.testing.assert_close(rescaled(output, positive, amount), rescale_noise_cfg(output, positive, amount))
