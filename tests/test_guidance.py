"""Classifier-free guidance, its rescaling and its interval: the formulas, what is off, and what is saved."""

import pytest
import torch
from torch import Tensor

from ldmcli.config import ScheduleConfig
from ldmcli.sampling.denoiser import Model
from ldmcli.sampling.guidance import guided, guided_on_image, in_interval, within
from ldmcli.sampling.schedule import Schedule, Step

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = Schedule(ScheduleConfig()).steps(20)
STEP = STEPS[7]


def batch(images: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(images, 4, 5, 6, generator=torch.Generator().manual_seed(seed))


def halves(latents: Tensor, _step: Step) -> Tensor:
    """Two different answers: to the negative prompts, the first half, and to the others."""
    negative, positive = latents.chunk(2)
    return torch.cat([negative.sin(), 1.5 * positive + 0.3])


def counting(model: Model, sizes: list[int]) -> Model:
    def run(latents: Tensor, step: Step) -> Tensor:
        sizes.append(len(latents))
        return model(latents, step)

    return run


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_guidance(scale: float) -> None:
    """The negative half comes first, and both halves see the same latents."""
    negative, positive = torch.tensor([[2.0]]), torch.tensor([[3.0]])

    def model(latents: Tensor, _: Step) -> Tensor:
        assert torch.equal(latents[:2], latents[2:])
        return latents * torch.cat([negative, negative, positive, positive])

    latents = torch.tensor([[1.0], [10.0]])
    expected = latents * (negative + scale * (positive - negative))
    torch.testing.assert_close(guided(model, scale)(latents, STEP), expected)


def test_guidance_on_a_picture() -> None:
    """Without the picture first, then with it alone, then with the prompt; all see the same latents."""
    parts = [torch.tensor([[value]] * 2) for value in (2.0, 3.0, 5.0)]

    def model(latents: Tensor, _: Step) -> Tensor:
        return latents * torch.cat(parts)

    latents = torch.tensor([[1.0], [10.0]])
    found = guided_on_image(model, 7.0, 1.5)(latents, STEP)
    torch.testing.assert_close(found, latents * (2 + 7 * (5 - 3) + 1.5 * (3 - 2)))
    plain = guided_on_image(model, 7.0, 1.0)(latents, STEP)
    torch.testing.assert_close(plain, guided(lambda both, _: both * torch.cat(parts[1:]), 7.0)(latents, STEP))


def test_what_is_off_changes_no_bit() -> None:
    latents = batch()
    negative, positive = halves(torch.cat([latents, latents]), STEP).chunk(2)
    assert torch.equal(guided(halves, 7.5, rescale=0.0)(latents, STEP), negative + 7.5 * (positive - negative))
    sizes: list[int] = []
    everywhere = in_interval((0.0, float("inf")), guided(halves, 5.0), counting(halves, sizes))
    for step in STEPS:
        assert torch.equal(everywhere(batch(), step), guided(halves, 5.0)(batch(), step))
    assert not sizes


# ---- rescaling ----


def test_rescaling_keeps_images_apart() -> None:
    latents = batch()
    together = guided(halves, 7.5, rescale=0.7)(latents, STEP)
    alone = [guided(halves, 7.5, rescale=0.7)(one, STEP) for one in latents.split(1)]
    torch.testing.assert_close(together, torch.cat(alone))


# ---- the interval ----


def test_guidance_in_an_interval_runs_half_the_batch_elsewhere() -> None:
    guided_sizes: list[int] = []
    plain_sizes: list[int] = []
    plain = counting(lambda latents, _step: 0.5 * latents, plain_sizes)
    model = in_interval((0.3, 5.0), guided(counting(halves, guided_sizes), 7.5), plain)
    for step in STEPS:
        wanted = guided(halves, 7.5)(batch(), step) if 0.3 < step.sigma <= 5.0 else 0.5 * batch()
        assert torch.equal(model(batch(), step), wanted)
    inside = sum(0.3 < step.sigma <= 5.0 for step in STEPS)
    assert 0 < inside < len(STEPS)
    assert guided_sizes == [6] * inside
    assert plain_sizes == [3] * (len(STEPS) - inside)


def test_the_ends_of_the_interval() -> None:
    """Above the lower end, up to the upper one (Kynkäänniemi et al. 2024, equation 5)."""
    for interval, inside in (((STEP.sigma, 9.0), False), ((0.0, STEP.sigma), True)):
        model = in_interval(interval, guided(halves, 7.5), lambda latents, _step: 0 * latents)
        assert bool(model(batch(), STEP).any()) == inside == within(interval, STEP)
    pure_noise = Step.ddpm(0, 999, 0.0, 0.1)
    assert not within((0.0, 1e9), pure_noise)
    assert within((0.0, float("inf")), pure_noise)
