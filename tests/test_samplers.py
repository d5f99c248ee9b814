"""Samplers against a model whose answers are known in closed form: data from a normal distribution.

Where data are N(mean, deviation²), latents at signal level ᾱ are normal too, with mean √ᾱ·mean and variance
ᾱ·deviation² + 1 − ᾱ. That gives the exact noise prediction, and the exact end of the probability-flow ODE: each latent
keeps its standard score all the way.
"""

import inspect
import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from ldmcli.cli.samplers import samplers as command
from ldmcli.config import ScheduleConfig
from ldmcli.sampling import catalogue as samplers
from ldmcli.sampling.denoiser import Model, predicting
from ldmcli.sampling.noise import SeededNoise
from ldmcli.sampling.registry import SAMPLERS
from ldmcli.sampling.schedule import Schedule, Step

pytestmark = pytest.mark.usefixtures("one_thread")
MEAN, DEVIATION = 0.6, 0.35
SCHEDULE = Schedule(ScheduleConfig())
ROWS = samplers.SAMPLERS


def deviation(signal: float, spread: float) -> float:
    return math.hypot(signal * DEVIATION, spread)


def exact_noise(latents: Tensor, step: Step) -> Tensor:
    return step.spread * standard_scores(latents, step) / deviation(step.signal, step.spread)


def exact_velocity(latents: Tensor, step: Step) -> Tensor:
    """v = √ᾱ · ε − √(1−ᾱ) · x₀; defined at ᾱ = 0 too, where x₀ is best guessed as the mean."""
    signal, spread = step.signal, step.spread
    image = MEAN + signal * DEVIATION**2 * standard_scores(latents, step) / deviation(signal, spread)
    return signal * exact_noise(latents, step) - spread * image


def at_level(scores: Tensor, step: Step) -> Tensor:
    """Latents of these standard scores, where the step starts."""
    return step.signal * MEAN + deviation(step.signal, step.spread) * scores


def standard_scores(latents: Tensor, step: Step) -> Tensor:
    """Of latents where the step starts."""
    return (latents - step.signal * MEAN) / deviation(step.signal, step.spread)


def scores_after(latents: Tensor, step: Step) -> Tensor:
    """Of latents where the step leads."""
    signal, spread = step.previous_signal, step.previous_spread
    return (latents - signal * MEAN) / deviation(signal, spread)


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def normal_draws(count: int, seed: int = 0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(count, generator=generator, dtype=torch.float64)


def run(
    sampler: str,
    count: int,
    scores: Tensor,
    eta: float = 0.0,
    noise: Callable[[], Tensor] = no_noise,
    model: Model = exact_noise,
    schedule: Schedule = SCHEDULE,
    spacing: str | None = None,
) -> Tensor:
    """The standard scores in which the sampler ends, having started from `scores`: the same, were it exact."""
    steps = schedule.steps(count, sampler, spacing)
    latents = at_level(scores, steps[0])
    denoise = predicting(model, schedule.config.prediction_type)
    *_, latents = SAMPLERS[sampler](denoise, latents, steps, noise, eta=eta)
    return scores_after(latents, steps[-1])


def error(sampler: str, count: int, schedule: Schedule = SCHEDULE, spacing: str | None = None) -> float:
    """How far the worst of thirteen latents ends from where the exact solution does, in standard deviations."""
    scores = torch.linspace(-3, 3, 13, dtype=torch.float64)
    model = exact_noise if schedule.config.prediction_type == "epsilon" else exact_velocity
    ends = run(sampler, count, scores, schedule=schedule, spacing=spacing, model=model)
    return (ends - scores).abs().max().item()


# ---- the table ----


def test_both_tables_have_the_same_samplers() -> None:
    assert list(SAMPLERS) == list(ROWS)
    for name, row in ROWS.items():
        assert row.name == name
        assert (SAMPLERS[name].__doc__ or "").startswith("Yield the latents after each step")
        assert inspect.signature(SAMPLERS[name]) == inspect.signature(SAMPLERS["ddim"])
    assert [row.title for row in ROWS.values()] == [
        "DDIM", "PLMS", "Euler", "Euler a", "Heun", "DPM++ 2M", "DPM++ 2M SDE", "UniPC", "LCM",
    ]  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_number_of_predictions(sampler: str, steps: int) -> None:
    seen: list[float] = []

    def counting(latents: Tensor, step: Step) -> Tensor:
        seen.append(step.timestep)
        return exact_noise(latents, step)

    run(sampler, steps, torch.zeros(1), model=counting, noise=lambda: torch.zeros(1))
    assert len(seen) == ROWS[sampler].predictions(steps)
    assert seen == sorted(seen, reverse=True)
    timesteps = [step.timestep for step in SCHEDULE.steps(steps, sampler)]
    assert list(dict.fromkeys(seen)) == timesteps


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_who_draws_noise(sampler: str, eta: float) -> None:
    draws: list[int] = []

    def counting() -> Tensor:
        draws.append(1)
        return torch.zeros(1)

    run(sampler, 9, torch.zeros(1), eta=eta, noise=counting)
    row = ROWS[sampler]
    assert bool(draws) == (row.draws_noise or (row.takes_eta and eta > 0))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_are_yielded_after_every_step_and_left_alone(sampler: str) -> None:
    start = torch.randn(2, 4, 3, 3)
    kept = start.clone()
    denoise = predicting(exact_noise, "epsilon")
    noise = SeededNoise([1, 2], (4, 3, 3))
    yielded = list(SAMPLERS[sampler](denoise, start, SCHEDULE.steps(9, sampler), noise, eta=0.0))
    assert len(yielded) == 9
    assert torch.equal(start, kept)
    assert len({latents.data_ptr() for latents in yielded}) == 9
    assert all(latents.shape == start.shape for latents in yielded)
    assert all(latents.dtype == start.dtype for latents in yielded)


def test_the_command_lists_them() -> None:
    lines = CliRunner().invoke(command, []).output.splitlines()
    assert [line.split()[0] for line in lines] == list(SAMPLERS)
    assert all(row.summary in line for row, line in zip(ROWS.values(), lines, strict=True))
    assert lines[0].endswith("only with --schedule leading, trailing, linspace")
    records = [json.loads(line) for line in CliRunner().invoke(command, ["--json"]).output.splitlines()]
    assert [(record["name"], record["title"]) for record in records] == [(r.name, r.title) for r in ROWS.values()]
    assert records[2]["spacings"] == list(samplers.SPACINGS)


# ---- right on a Gaussian ----


def test_ddim_converges_at_first_order() -> None:
    errors = [error("ddim", count) for count in (25, 50, 100, 200)]
    assert errors[-1] < 0.06
    for coarse, fine in itertools.pairwise(errors):
        assert 0.45 < fine / coarse < 0.57


def test_plms_converges_faster() -> None:
    """At equal strides: with Stable Diffusion's offset of 1, the last step is a stump that hides the order."""
    schedule = Schedule(ScheduleConfig(steps_offset=0))
    counts = (25, 50, 100, 200, 500)
    ddim, plms = ([error(sampler, count, schedule) for count in counts] for sampler in ("ddim", "plms"))
    orders = [math.log(plms[i] / plms[i + 1]) / math.log(counts[i + 1] / counts[i]) for i in range(4)]
    assert orders == sorted(orders)  # towards 2, the order of its first step
    assert orders[0] > 1.2
    assert orders[-1] > 1.7
    assert math.log(ddim[0] / ddim[-1]) / math.log(20) < 1
    assert all(better < plain / 2 for better, plain in zip(plms, ddim, strict=True))


# What is measured is where the last step but one leads: the last ends without noise in one stride of first order, whose
# error depends on the schedule's lowest noise level only.


def solver_error(sampler: str, count: int, schedule: Schedule) -> float:
    steps = schedule.steps(count, sampler, "karras")
    prediction_type = schedule.config.prediction_type
    denoise = predicting(exact_noise if prediction_type == "epsilon" else exact_velocity, prediction_type)
    scores = torch.linspace(-3, 3, 13, dtype=torch.float64)
    *_, end, _ = SAMPLERS[sampler](denoise, at_level(scores, steps[0]), steps, no_noise)
    return (standard_scores(end, steps[-1]) - scores).abs().max().item()


def variance_error(sampler: str, count: int, schedule: Schedule) -> float:
    """How far the variance of where a noisy sampler leads is from the data's, over the latter: exactly, not by drawing.
    All being linear here, it is the sum of squares of what one unit in the start or in one draw does to the end."""
    steps = schedule.steps(count, sampler, "karras")
    units = iter(torch.eye(count, dtype=torch.float64))
    start = at_level(next(units), steps[0])
    every = SAMPLERS[sampler](predicting(exact_noise, "epsilon"), start, steps, lambda: next(units))
    *_, end = itertools.islice(every, count - 1)
    return abs(1 - (standard_scores(end, steps[-1]) ** 2).sum().item())


@pytest.mark.parametrize(
    ("sampler", "order", "last"),
    [("euler", 1, 0.04), ("heun", 2, 8e-4), ("dpmpp-2m", 2, 8e-4), ("unipc", 3, 5e-5), ("euler-a", 1, 0.05),
     ("dpmpp-2m-sde", 2, 2e-3)],
)  # fmt: skip
def test_orders_of_convergence(sampler: str, order: int, last: float) -> None:
    """UniPC's is one more than its name: the corrector adds it. Also from pure noise, zero terminal SNR: from a noise
    level of 4096 instead of 15."""
    noisy = ROWS[sampler].draws_noise
    errors = [(variance_error if noisy else solver_error)(sampler, count, SCHEDULE) for count in (40, 80, 160)]
    if not noisy:
        schedule = Schedule(ScheduleConfig(prediction_type="v_prediction", zero_terminal_snr=True))
        coarse, fine = (solver_error(sampler, count, schedule) for count in (80, 160))
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)
    assert errors[-1] < last


# ---- runs in two parts ----


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("cut", [1, 12, 23])
def test_a_run_can_be_split(sampler: str, cut: int) -> None:
    """Another model may go on where one stops. Samplers without a memory do not notice; the others start afresh."""
    steps = SCHEDULE.steps(24, sampler)
    denoise = predicting(exact_noise, "epsilon")
    latents = at_level(torch.linspace(-2, 2, 5, dtype=torch.float64), steps[0])
    noise = normal_draws(5)
    whole = list(SAMPLERS[sampler](denoise, latents, steps, noise))
    noise = normal_draws(5)
    first = list(SAMPLERS[sampler](denoise, latents, steps[:cut], noise))
    second = list(SAMPLERS[sampler](denoise, first[-1], steps[cut:], noise))
    assert len(first) + len(second) == 24
    memory = sampler in ("plms", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc")
    assert torch.equal(second[-1], whole[-1]) or memory
    torch.testing.assert_close(second[-1], whole[-1], rtol=0, atol=0.08)


# ---- what outputs mean ----


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_types_mean_the_same(prediction_type: str) -> None:
    generator = torch.Generator().manual_seed(2)
    image, noise = torch.randn(2, 100, generator=generator, dtype=torch.float64)
    for step in SCHEDULE.steps(20):
        signal, spread = step.signal, step.spread
        outputs = {"epsilon": noise, "v_prediction": signal * noise - spread * image, "sample": image}
        denoise = predicting(lambda _latents, _step, given=outputs: given[prediction_type], prediction_type)
        found = denoise(signal * image + spread * noise, step)
        torch.testing.assert_close(found.noise, noise, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.denoised, image, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_pure_noise_is_well_defined(prediction_type: str) -> None:
    """At ᾱ = 0 the latents are the noise, and v is minus the image."""
    latents, image = torch.randn(2, 9)
    step = Step.ddpm(0, 999, 0.0, 0.1)
    output = -image if prediction_type == "v_prediction" else image
    found = predicting(lambda _latents, _step: output, prediction_type)(latents, step)
    assert torch.equal(found.noise, latents)
    assert torch.equal(found.denoised, image)
    assert step.sigma == math.inf


# ---- noise ----


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_each_image_has_the_noise_of_its_own_cpu_generator(seed: int) -> None:
    noise = SeededNoise([5, seed], (4, 3, 2))
    signed = seed if seed < 2**63 else seed - 2**64  # torch 2.x refuses the upper half as it is
    generators = [torch.Generator().manual_seed(each) for each in (5, signed)]
    for _ in range(3):
        expected = [torch.randn(1, 4, 3, 2, generator=generator) for generator in generators]
        assert torch.equal(noise(), torch.cat(expected))
