"""The seams hold what is to come: each technique here is a few lines on what the package has."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load, loaded, open_session
from oracle.comparing import fitted, pictures_of, pixels_apart, relative
from oracle.random_model import randomise
from torch import Tensor

from ldmcli.checkpoints.load import load_unet
from ldmcli.checkpoints.source import open_model
from ldmcli.config import ScheduleConfig, UNetConfig, VAEConfig
from ldmcli.networks.inputs import Conditioning, joined
from ldmcli.networks.unet import Residuals, UNet
from ldmcli.networks.vae import AutoencoderKL
from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.sampling.denoiser import Denoiser, Prediction, predicting
from ldmcli.sampling.guidance import controlled, guided, with_channels
from ldmcli.sampling.registry import SAMPLERS
from ldmcli.sampling.schedule import Schedule, Step
from ldmcli.spec import GenerationRequest

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = UNetConfig(
    sample_size=8, block_channels=(8, 16), attention=(1, 0), middle_attention=1, heads=(2, 2), context_dim=6,
    layers_per_block=1, norm_groups=4,
)  # fmt: skip
SCHEDULE = Schedule(ScheduleConfig())
STEPS = SCHEDULE.steps(6)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_unet(config: UNetConfig = SMALL) -> UNet:
    unet = UNet(config)
    randomise(unet, torch.Generator().manual_seed(0))
    return unet.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def unet() -> UNet:
    return random_unet()


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


# ---- the network and what wraps it ----


def test_more_input_channels_are_data_of_the_conditioning() -> None:
    """Inpainting's nine: a mask and the latents behind it, behind the latents."""
    unet = random_unet(dataclasses.replace(SMALL, in_channels=9))
    one, other = (Conditioning(normal(1, 5, 6, seed=s), channels=normal(1, 5, 8, 8, seed=s)) for s in (1, 2))
    both = joined([one, other])
    assert both.channels is not None
    model = guided(with_channels(unet.prepare(both, STEPS), both.channels), 3.0)
    latents = normal(1, 4, 8, 8, seed=3)
    found = model(latents, STEPS[2])
    assert found.shape == latents.shape
    negative, positive = (
        unet.prepare(each, STEPS)(torch.cat([latents, each.channels], 1), STEPS[2])  # type: ignore[list-item]
        for each in (one, other)
    )
    assert relative(found, negative + 3.0 * (positive - negative)) < 1e-5
    changed = with_channels(unet.prepare(both, STEPS), both.channels + 1)
    assert relative(guided(changed, 3.0)(latents, STEPS[2]), found) > 1e-3


def test_a_pipeline_joins_channels_that_its_conditioning_has(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldmcli.pipeline import diffusion as module

    config = dataclasses.replace(pipeline.config.unet, in_channels=9)
    inpainting = dataclasses.replace(pipeline.model, unet=random_unet(config))
    request = GenerationRequest("a", steps=2, width=64, height=64, sampler="ddim")
    pairs = module.pairs
    seen: list[int] = []
    inpainting.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))

    def with_mask(*given: object) -> list[tuple[Conditioning, Conditioning]]:
        mask = normal(1, 5, 8, 8)
        return [tuple(dataclasses.replace(c, channels=mask) for c in pair) for pair in pairs(*given)]  # type: ignore[misc,arg-type]

    monkeypatch.setattr(module, "pairs", with_mask)
    assert pictures_of(dataclasses.replace(pipeline, model=inpainting), [request]).shape == (1, 64, 64, 3)
    assert seen == [9, 9]


def test_residuals_are_added_at_every_skip_and_the_middle(unet: UNet) -> None:
    """ControlNet: those of nothing change nothing, and each changes the output."""
    latents, conditioning = normal(2, 4, 8, 8), Conditioning(normal(2, 5, 6))
    model = unet.prepare(conditioning, STEPS)
    shapes: list[tuple[int, ...]] = []
    handle = unet.mid_block.register_forward_hook(lambda _m, _i, output: shapes.append(tuple(output.shape)))
    plain = model(latents, STEPS[1])
    handle.remove()
    skips = [(2, 8, 8, 8), (2, 8, 8, 8), (2, 8, 4, 4), (2, 16, 4, 4)]
    zeros = Residuals([torch.zeros(shape) for shape in skips], torch.zeros(shapes[0]))
    told: list[tuple[int | Tensor, int]] = []

    def residuals(inputs: Tensor, step: Step) -> Residuals:
        told.append((step.index, len(inputs)))
        return zeros

    assert torch.equal(controlled(model, residuals)(latents, STEPS[1]), plain)
    assert told == [(1, 2)]
    for place in range(len(skips) + 1):
        at_skips, at_middle = [skip.clone() for skip in zeros[0]], zeros[1].clone()
        [*at_skips, at_middle][place].add_(normal(*[*skips, shapes[0]][place]))
        more = Residuals(at_skips, at_middle)
        changed = controlled(model, lambda *_, r=more: r)(latents, STEPS[1])  # type: ignore[misc]
        assert relative(changed, plain) > 1e-3
    with pytest.raises(ValueError, match="argument"):
        controlled(model, lambda *_: Residuals(zeros[0][:-1], zeros[1]))(latents, STEPS[1])
    guided(controlled(model, residuals), 2.0)(latents[:1], STEPS[3])
    assert told[-1] == (3, 2)


def test_cross_attention_takes_a_second_pair_of_keys_and_values(unet: UNet) -> None:
    """IP-Adapter: what the second pair gives, weighted, is added to what the first gives, in every cross-attention."""
    latents, text, image = normal(1, 4, 8, 8), unet.project_context(normal(1, 5, 6)), normal(1, 3, 6, seed=1)
    time = unet.embed_time(torch.tensor([500.0]))
    plain = unet(latents, time, text)
    values = unet.project_context(image)

    def beside(one: Any, other: Any, factor: float) -> Any:
        """The pairs of one context, each with the other's and its weight behind it."""
        if isinstance(one, tuple):
            count.append(1)
            return (*one, *other, torch.tensor(factor))
        return [beside(*both, factor) for both in zip(one, other, strict=True)]

    count: list[int] = []
    assert torch.equal(unet(latents, time, beside(text, values, 0.0)), plain)
    assert len(count) == sum(name.endswith("attn2") for name, _ in unet.named_modules())
    assert relative(unet(latents, time, beside(text, values, 1.0)), plain) > 1e-3


# ---- the sampler and its caller ----


def denoise(latents: Tensor, step: Step) -> Prediction:
    """The exact denoiser of data from N(0.4, 0.5²)."""
    deviation = (0.25 * step.signal**2 + step.spread**2) ** 0.5
    noise = step.spread * (latents - 0.4 * step.signal) / deviation**2
    return predicting(lambda *_: noise, "epsilon")(latents, step)


def walk(sampler: str, latents: Tensor, steps: list[Step], denoise: Denoiser = denoise) -> Iterator[Tensor]:
    drawn = iter([normal(*latents.shape, seed=step.index) for step in steps])  # type: ignore[arg-type]
    return SAMPLERS[sampler](denoise, latents, steps, lambda: next(drawn))


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler-a", "lcm", "dpmpp-2m"])
@pytest.mark.parametrize("start", [0, 2, 5])
def test_a_sampler_starts_at_any_step_from_given_latents(sampler: str, start: int) -> None:
    """Image to image: one without a memory gives the tail of the whole run. DPM++ 2M's first step there is of first
    order, so that it ends near it."""
    steps = SCHEDULE.steps(6, sampler)
    whole = [normal(1, 4, 4, 4), *(latents.clone() for latents in walk(sampler, normal(1, 4, 4, 4), steps))]
    tail = list(walk(sampler, whole[start], steps[start:]))
    assert len(tail) == 6 - start
    if sampler == "dpmpp-2m" and start:
        assert 0 < relative(tail[-1], whole[-1]) < 0.1 or start == 5  # the last step is of first order anyway
    else:
        assert all(torch.equal(one, other) for one, other in zip(tail, whole[start + 1 :], strict=True))


def test_latents_at_a_step_are_signal_times_image_and_spread_times_noise() -> None:
    """Which is where image to image starts: the denoiser then finds that image in them."""
    image, noise = normal(1, 4, 4, 4), normal(1, 4, 4, 4, seed=1)
    for step in STEPS:
        found = predicting(lambda *_: noise, "epsilon")(step.signal * image + step.spread * noise, step)
        assert relative(found.denoised, image) < 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_written_into_yielded_latents_is_gone_on_with(sampler: str) -> None:
    """Inpainting: outside the mask the latents are those of the picture, at every step's level."""
    steps = SCHEDULE.steps(6, sampler)
    picture, noise = normal(1, 4, 4, 4, seed=7), normal(1, 4, 4, 4, seed=8)
    seen: list[Tensor] = []

    def noting(latents: Tensor, step: Step) -> Prediction:
        seen.append(latents.clone())
        return denoise(latents, step)

    kept: list[Tensor] = []
    for latents, step in zip(walk(sampler, normal(1, 4, 4, 4), steps, noting), steps, strict=True):
        latents[..., :2] = (step.previous_signal * picture + step.previous_spread * noise)[..., :2]
        kept.append(latents.clone())
    assert torch.equal(kept[-1][..., :2], (steps[-1].previous_signal * picture)[..., :2]) or steps[-1].previous_spread
    per_step = 2 if sampler == "heun" else 1
    for i, latents in enumerate(kept[:-1]):
        told = seen[per_step * (i + 1) + (sampler == "plms")]
        assert torch.equal(told, latents), f"step {i + 1}"


# ---- weights and latents ----


def test_weights_changed_before_speed_is_applied_are_what_is_computed_with(model_folder: Path) -> None:
    """LoRA: read, changed, then laid out for speed."""
    plain = load(model_folder)
    runtime = plain.runtime

    def changed() -> UNet:
        unet = load_unet(open_model(model_folder), runtime.device, runtime.dtype)
        for name, weight in unet.named_parameters():
            if name.endswith("attn2.to_v.weight"):
                weight.mul_(3.0)
        return unet

    def picture(unet: UNet) -> np.ndarray:
        model = dataclasses.replace(plain.model, unet=unet)
        return pictures_of(dataclasses.replace(plain, model=model), [GenerationRequest("a pear", steps=2, seed=3)])

    fast = picture(runtime.prepare(changed()))
    assert pixels_apart(fast, picture(changed())) <= 1
    assert pixels_apart(fast, picture(plain.model.unet)) > 1


def test_an_autoencoder_owns_factor_channels_scale_and_shift(model_folder: Path) -> None:
    """Flux's has 16 channels and a shift; here one of factor 4 stands in the place of the model's own, of factor 8."""
    pipeline = loaded(open_session(model_folder))
    config = VAEConfig(
        latent_channels=6, block_channels=(8, 16, 16), layers_per_block=1, norm_groups=4, scaling_factor=0.36,
        shift_factor=0.12,
    )  # fmt: skip
    vae = AutoencoderKL(config)
    randomise(vae, torch.Generator().manual_seed(0))
    vae.eval().requires_grad_(False)
    assert config.factor == 4
    latents = normal(1, 6, 16, 16)
    assert torch.equal(config.unscaled(latents), latents / 0.36 + 0.12)
    unet = random_unet(dataclasses.replace(pipeline.config.unet, in_channels=6, out_channels=6))
    other = dataclasses.replace(
        pipeline, vae=vae, model=dataclasses.replace(
            pipeline.model, unet=unet, config=dataclasses.replace(pipeline.config, vae=config, unet=unet.config)
        )
    )  # fmt: skip
    seen: list[Tensor] = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    request = GenerationRequest("a pear", steps=2, width=52, height=44)
    ended: list[Tensor] = []
    drawn = other.draw(fitted(other, [request]), lambda done, latents, denoised: ended.append(latents.clone()))
    assert drawn.pixels[0].shape == (44, 52, 3)
    assert drawn.latents.shape == (1, 6, 11, 13)
    assert torch.equal(drawn.latents, ended[-1])
    wanted = vae.decode(ended[-1] / 0.36 + 0.12)
    assert abs(drawn.pixels[0].int() - ((wanted[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).round()).max() <= 1
