"""Samplers against a denoiser whose answers are known in closed form: data from a normal distribution.

Where data are N(mean, deviation²), latents at signal level ᾱ are normal too, with mean √ᾱ·mean and variance
ᾱ·deviation² + 1 − ᾱ. That gives the exact noise prediction, and the exact end of the probability-flow ODE: each latent
keeps its standard score all the way.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldmcli import request
from ldmcli.config import ScheduleConfig
from ldmcli.sampling.denoiser import Denoiser, as_noise_prediction
from ldmcli.sampling.guidance import guided
from ldmcli.sampling.noise import SeededNoise
from ldmcli.sampling.samplers import SAMPLERS
from ldmcli.sampling.schedule import Schedule, Step

MEAN, DEVIATION = 0.6, 0.35
SCHEDULE = Schedule(ScheduleConfig())


def variance(alpha_cumprod: float) -> float:
    return alpha_cumprod * DEVIATION**2 + 1 - alpha_cumprod


def exact_denoiser(latents: Tensor, step: Step) -> Tensor:
    alpha = step.alpha_cumprod
    return math.sqrt(1 - alpha) * (latents - math.sqrt(alpha) * MEAN) / variance(alpha)


def at_level(scores: Tensor, alpha_cumprod: float) -> Tensor:
    """Latents of these standard scores."""
    return math.sqrt(alpha_cumprod) * MEAN + math.sqrt(variance(alpha_cumprod)) * scores


def standard_scores(latents: Tensor, alpha_cumprod: float) -> Tensor:
    return (latents - math.sqrt(alpha_cumprod) * MEAN) / math.sqrt(variance(alpha_cumprod))


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def run(
    sampler: str,
    count: int,
    scores: Tensor,
    eta: float = 0.0,
    noise: Callable[[], Tensor] = no_noise,
    denoise: Denoiser = exact_denoiser,
    schedule: Schedule = SCHEDULE,
) -> Tensor:
    """The standard scores in which the sampler ends, having started from `scores`: the same, were it exact."""
    steps = schedule.steps(count)
    latents = at_level(scores, steps[0].alpha_cumprod)
    *_, latents = SAMPLERS[sampler](denoise, latents, steps, noise, eta=eta)
    return standard_scores(latents, steps[-1].previous_alpha_cumprod)


def error(sampler: str, count: int, schedule: Schedule = SCHEDULE) -> float:
    """How far the worst of thirteen latents ends from where the exact solution does, in standard deviations."""
    scores = torch.linspace(-3, 3, 13, dtype=torch.float64)
    return (run(sampler, count, scores, schedule=schedule) - scores).abs().max().item()


def test_every_sampler_that_a_request_knows_is_there() -> None:
    assert set(SAMPLERS) == set(request.SAMPLERS)


def test_ddim_converges_at_first_order() -> None:
    errors = [error("ddim", count) for count in (25, 50, 100, 200)]
    assert errors[-1] < 0.06
    for coarse, fine in itertools.pairwise(errors):
        assert 0.45 < fine / coarse < 0.57


def test_plms_is_more_accurate() -> None:
    for count in (25, 50, 100, 200):
        assert error("plms", count) < error("ddim", count) / 5
    assert error("plms", 200) < 0.003


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


def test_one_ddim_step_is_the_formula() -> None:
    """From any level straight to the last: √ᾱ₀ · x̂₀ + √(1−ᾱ₀) · ε."""
    (step,) = SCHEDULE.steps(1)
    latents = torch.tensor([0.3, -1.2], dtype=torch.float64)
    noise = exact_denoiser(latents, step)
    image = (latents - math.sqrt(1 - step.alpha_cumprod) * noise) / math.sqrt(step.alpha_cumprod)
    last = step.previous_alpha_cumprod
    (after,) = SAMPLERS["ddim"](exact_denoiser, latents, [step], no_noise, eta=0.0)
    torch.testing.assert_close(after, math.sqrt(last) * image + math.sqrt(1 - last) * noise, rtol=1e-12, atol=0)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noisy_ddim_samples_the_distribution(eta: float) -> None:
    count = 20_000
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(count, generator=generator, dtype=torch.float64)
    ends = run("ddim", 999, scores, eta, lambda: torch.randn(count, generator=generator, dtype=torch.float64))
    # Monte-Carlo errors of four deviations, and 0.01 for the finite number of steps.
    assert abs(ends.mean().item()) < 4 / math.sqrt(count) + 0.01
    assert abs(ends.var().item() - 1) < 4 * math.sqrt(2 / count) + 0.01
    kurtosis = (ends**4).mean().item()
    assert abs(kurtosis - 3) < 4 * math.sqrt(96 / count) + 0.05
    if eta == 1:  # as in DDPM, nothing is left of where it started
        assert abs((ends * scores).mean().item()) < 4 / math.sqrt(count) + 0.01


def test_noisy_ddim_gets_better_with_steps() -> None:
    """The variance that is missing because each step takes x₀ for known falls with the number of steps."""
    generator = torch.Generator().manual_seed(1)
    missing = []
    for count in (10, 40, 160):
        scores = torch.randn(40_000, generator=generator, dtype=torch.float64)
        ends = run("ddim", count, scores, 1.0, lambda: torch.randn(40_000, generator=generator, dtype=torch.float64))
        missing.append(abs(1 - ends.var().item()))
    assert missing[0] > 2 * missing[1] > 4 * missing[2]


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 20), ("plms", 21)])
def test_number_of_predictions(sampler: str, calls: int) -> None:
    seen: list[int] = []

    def counting(latents: Tensor, step: Step) -> Tensor:
        seen.append(step.timestep)
        return exact_denoiser(latents, step)

    run(sampler, 20, torch.zeros(1), denoise=counting)
    assert len(seen) == calls
    assert seen == sorted(seen, reverse=True)
    timesteps = [step.timestep for step in SCHEDULE.steps(20)]
    assert list(dict.fromkeys(seen)) == timesteps


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_are_yielded_after_every_step_and_left_alone(sampler: str) -> None:
    start = torch.randn(2, 4, 3, 3)
    kept = start.clone()
    yielded = list(SAMPLERS[sampler](exact_denoiser, start, SCHEDULE.steps(9), no_noise, eta=0.0))
    assert len(yielded) == 9
    assert torch.equal(start, kept)
    assert len({latents.data_ptr() for latents in yielded}) == 9
    assert all(latents.shape == start.shape for latents in yielded)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_types_mean_the_same_noise(prediction_type: str) -> None:
    generator = torch.Generator().manual_seed(2)
    image, noise = torch.randn(2, 100, generator=generator, dtype=torch.float64)
    for step in SCHEDULE.steps(20):
        signal, spread = math.sqrt(step.alpha_cumprod), math.sqrt(1 - step.alpha_cumprod)
        latents = signal * image + spread * noise
        outputs = {"epsilon": noise, "v_prediction": signal * noise - spread * image, "sample": image}
        found = as_noise_prediction(outputs[prediction_type], latents, step, prediction_type)
        torch.testing.assert_close(found, noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_guidance(scale: float) -> None:
    """The negative half comes first, and both halves see the same latents."""
    (step,) = SCHEDULE.steps(1)
    negative, positive = torch.tensor([[2.0]]), torch.tensor([[3.0]])

    def denoise(latents: Tensor, _: Step) -> Tensor:
        assert torch.equal(latents[:2], latents[2:])
        return latents * torch.cat([negative, negative, positive, positive])

    latents = torch.tensor([[1.0], [10.0]])
    expected = latents * (negative + scale * (positive - negative))
    torch.testing.assert_close(guided(denoise, scale)(latents, step), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_noise_is_that_of_a_cpu_generator(seed: int) -> None:
    noise = SeededNoise([seed, 5], (4, 3, 2))
    signed = seed if seed < 2**63 else seed - 2**64  # torch 2.x refuses the upper half as it is
    generator = torch.Generator().manual_seed(signed)
    for _ in range(3):
        expected = torch.randn(1, 4, 3, 2, generator=generator)
        assert torch.equal(noise()[:1], expected)


def test_each_image_has_noise_of_its_own() -> None:
    seeds = [3, 1, 3, 2**64 - 1]
    together = SeededNoise(seeds, (4, 5, 6))
    alone = [SeededNoise([seed], (4, 5, 6)) for seed in seeds]
    for _ in range(3):
        assert torch.equal(together(), torch.cat([noise() for noise in alone]))
