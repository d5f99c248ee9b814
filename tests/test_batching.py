"""One request gives one picture: whatever is drawn beside it, and at no more cost than needed."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load
from oracle.comparing import draw, fitted, pictures_of, pixels_apart, relative
from torch import Tensor, nn

from ldmcli.conditioning.prompts import PromptEncoder
from ldmcli.errors import UsageError
from ldmcli.fitting import fit_to_model
from ldmcli.pipeline.pipeline import Pipeline, rounded
from ldmcli.sampling.schedule import Schedule
from ldmcli.spec import GenerationRequest

# Kernels may sum in another order for another batch size; that is all an image's neighbours can change.
LATENTS_TOLERANCE = 1e-5
PIXELS_TOLERANCE = 1
REQUESTS = [
    GenerationRequest(prompt, negative_prompt=negative, seed=seed, steps=8, width=72, height=64, sampler="ddim")
    for prompt, negative, seed in (
        ("a red apple", "", 7),
        ("a whale", "fog", 2**64 - 1),
        ("a red apple", "fog", 0),
        ("", "a rose", 7),
    )
]


def with_settings(**settings: Any) -> list[GenerationRequest]:
    return [GenerationRequest(**{**request.to_dict(), **settings}) for request in REQUESTS]


@contextlib.contextmanager
def passes(pipeline: Pipeline) -> Iterator[list[int]]:
    """The batch size of each pass through the U-Net inside the block."""
    sizes: list[int] = []

    def count(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        sizes.append(len(inputs[0]))

    handle = pipeline.model.unet.register_forward_pre_hook(count)
    yield sizes
    handle.remove()


# ---- batches ----


@pytest.mark.parametrize(
    "settings", [{}, {"eta": 1.0}, {"sampler": "plms"}, {"guidance_scale": 1.0}], ids=["ddim", "eta", "plms", "plain"]
)
def test_an_image_is_the_same_whatever_is_drawn_beside_it(pipeline: Pipeline, settings: dict[str, Any]) -> None:
    requests = with_settings(**settings)
    wanted, wanted_pixels = draw(pipeline, requests)
    for some in ([0], [3, 1, 2]):
        latents, pixels = draw(pipeline, [requests[i] for i in some])
        assert all(relative(latents[-1][k], wanted[-1][i]) < LATENTS_TOLERANCE for k, i in enumerate(some))
        assert pixels_apart(pixels, wanted_pixels[some]) <= PIXELS_TOLERANCE


def test_the_same_batch_gives_the_same_bits(pipeline: Pipeline) -> None:
    torch.manual_seed(1)
    first, _ = draw(pipeline, with_settings(eta=1.0))
    torch.manual_seed(2)  # nothing depends on the global generator
    second, _ = draw(pipeline, with_settings(eta=1.0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_seed_prompts_and_settings_all_matter(pipeline: Pipeline) -> None:
    base = GenerationRequest("a red apple", seed=1, steps=4, width=64, height=64, sampler="ddim")
    others: list[dict[str, Any]] = [
        {"seed": 2},
        {"prompt": "a whale"},
        {"negative_prompt": "fog"},
        {"steps": 5},
        {"guidance_scale": 4.0},
        {"sampler": "plms"},
        {"eta": 0.5},
    ]
    pictures = [pictures_of(pipeline, [dataclasses.replace(base, **other)]) for other in [{}, *others]]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_sizes(pipeline: Pipeline) -> None:
    assert pictures_of(pipeline, [GenerationRequest("a", steps=1)]).shape == (1, 96, 96, 3)
    picture = pictures_of(pipeline, [GenerationRequest("a", steps=1, width=104, height=56)])
    assert picture.shape == (1, 56, 104, 3)
    assert picture.dtype == np.uint8
    with pytest.raises(UsageError, match="multiples of 8; the nearest is 104×96"):
        pictures_of(pipeline, [GenerationRequest("a", steps=1, width=101, height=99)])


# ---- cost ----


@pytest.mark.parametrize(
    ("sampler", "steps", "calls", "guidance_scale", "width"),
    [("ddim", 6, 6, 7.5, 2), ("ddim", 1, 1, 1.0, 1), ("plms", 6, 7, 1, 1), ("plms", 1, 1, 0.0, 2)],
)
def test_passes(pipeline: Pipeline, sampler: str, steps: int, calls: int, guidance_scale: float, width: int) -> None:
    """Guidance doubles the batch instead of the number of passes; scale 1 needs no negative prompt at all."""
    requests = with_settings(sampler=sampler, steps=steps, guidance_scale=guidance_scale)[:3]
    done: list[int] = []
    with passes(pipeline) as sizes:
        pipeline.draw(fitted(pipeline, requests), lambda steps, *_: done.append(steps))
    assert sizes == [3 * width] * calls
    assert done == list(range(steps + 1))


@pytest.mark.parametrize(("guidance_scale", "texts"), [(7.5, 5), (1.0, 3)])
def test_equal_prompts_are_encoded_once(pipeline: Pipeline, guidance_scale: float, texts: int) -> None:
    encoded: list[int] = []
    prompts = PromptEncoder(pipeline.model.prompts.encoders)
    fresh = dataclasses.replace(pipeline, model=dataclasses.replace(pipeline.model, prompts=prompts))
    handle = prompts.encoders[0].model.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    for _ in range(2):
        pictures_of(fresh, with_settings(guidance_scale=guidance_scale, steps=1))
    handle.remove()
    assert encoded == [1] * texts


def test_context_is_in_the_order_of_the_prompts(pipeline: Pipeline) -> None:
    prompts = ["b", "a", "b", "", "a"]
    together = pipeline.model.prompts.encode(prompts)
    for prompt, conditioning in zip(prompts, together, strict=True):
        (alone,) = pipeline.model.prompts.encode([prompt])
        assert relative(conditioning.context, alone.context) < 1e-5


def test_guidance_0_follows_the_negative_prompt(pipeline: Pipeline) -> None:
    """ε₋ + 0 · (ε₊ − ε₋): what an unguided run of the negative prompt gives. (diffusers drops guidance below 1.)"""
    zero = GenerationRequest("a", negative_prompt="b", steps=4, guidance_scale=0.0, width=64, height=64)
    plain = GenerationRequest("b", steps=4, guidance_scale=1.0, width=64, height=64)
    ours, theirs = draw(pipeline, [zero])[0], draw(pipeline, [plain])[0]
    assert relative(ours[-1], theirs[-1]) < 1e-5


# ---- pixels and number types ----


def test_numbers_are_rounded_to_pixels() -> None:
    image = torch.zeros(1, 3, 2, 2)
    image[0, :, 0, 0] = torch.tensor([-1.0, 0.0, 1.0])
    image[0, :, 0, 1] = torch.tensor([-9.0, 9.0, 2 / 255])
    assert rounded(image).tolist() == [[[0, 128, 255], [0, 255, 128]], [[128] * 3, [128] * 3]]  # 127.5 to even


@pytest.mark.parametrize("attention", ["math", "sdpa"])
def test_attention_changes_nothing_to_see(pipeline: Pipeline, model_folder: Path, attention: str) -> None:
    other = load(model_folder, attention=attention)
    wanted, pixels = draw(pipeline, REQUESTS[:2])
    latents, other_pixels = draw(other, REQUESTS[:2])
    assert relative(latents[-1], wanted[-1]) < 1e-4
    assert pixels_apart(other_pixels, pixels) <= 1


def test_16_bits_draw_the_same_picture(embedded_folder: Path, embedded_pipeline: Pipeline) -> None:
    request = GenerationRequest("a red apple on a blue background", seed=1, steps=10)
    halved = pictures_of(load(embedded_folder, "bf16"), [request])
    difference = np.abs(halved.astype(int) - pictures_of(embedded_pipeline, [request]))
    assert difference.mean() < 6


# ---- long prompts ----

LONG = "a whale in a storm, " * 30


def long_request(prompt: str, negative_prompt: str = "", seed: int = 1) -> GenerationRequest:
    return GenerationRequest(
        prompt, negative_prompt, seed=seed, steps=3, guidance_scale=4.0, on_long_prompt="chunk", sampler="ddim"
    )


def test_a_long_prompt_says_more_than_its_beginning(pipeline: Pipeline) -> None:
    chunked = pictures_of(pipeline, [long_request(LONG)])
    cut = pictures_of(pipeline, [dataclasses.replace(long_request(LONG), on_long_prompt="warn")])
    assert pixels_apart(chunked, cut) > 1


def test_guidance_between_prompts_of_other_lengths(pipeline: Pipeline) -> None:
    """The two are run apart, neither of them padded: ε₋ + g · (ε₊ − ε₋) of what each alone gives."""
    request = fit_to_model(long_request(LONG, "fog"), pipeline.config)
    steps = Schedule(pipeline.config.schedule).steps(3)
    latents = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(3))

    def noise(prompt: str, negative_prompt: str, scale: float) -> Tensor:
        asked = dataclasses.replace(request, prompt=prompt, negative_prompt=negative_prompt, guidance_scale=scale)
        with torch.inference_mode():
            return pipeline.model.denoiser([asked], steps, pipeline.stage)(latents, steps[0]).noise

    positive, negative = noise(LONG, "", 1.0), noise("fog", "", 1.0)
    assert relative(noise(LONG, "fog", 4.0), negative + 4.0 * (positive - negative)) < 1e-5
