"""Drawing on pictures gives the numbers of diffusers' Img2Img and Inpaint, with four and nine input channels."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import load
from graph_support import FakeRecorder, load_plainly, recording
from oracle.comparing import (
    as_pixels,
    call_diffusers,
    diffusers_scheduler,
    draw_with_diffusers,
    fitted,
    pixels_apart,
    relative,
    scaled_as_ours,
    their_arguments,
)
from oracle.family_models import FamilyModels
from oracle.original_layout import original_state, write
from oracle.random_model import save, with_channels
from PIL import Image
from torch import Tensor

from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.spec import HIRES_FIELDS, GenerationRequest

TOLERANCE = 1e-4
SIZE = 96
SAMPLERS = [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("euler-a", 0.0), ("dpmpp-2m", 0.0)]
Pair = tuple[Pipeline, Any]


def runs(*names: str) -> list[tuple[str, str, float]]:
    """Each model with each sampler; of DDIM only eta 1, which is the same and more, where a model is slow."""
    slow = ("sdxl", "sdxl-9", "sdxl-8", "sd2-9", "sd2-5")
    return [(name, *sampler) for name in names for sampler in SAMPLERS[name in slow :]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four pictures, and of each a mask beside it, a blob that is on no latent's edge, and a depth map of 16 bits."""
    folder = tmp_path_factory.mktemp("pictures")
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    for i in range(4):
        waves = [np.sin((3 + i) * x + c) * np.cos((2 + c) * y + i) for c in range(3)]
        pixels = (np.stack(waves, -1) * 100 + 128).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        inside = (x - 0.45 - 0.05 * i) ** 2 + (y - 0.55) ** 2 < 0.09
        Image.fromarray(inside.astype(np.uint8) * 255).save(folder / f"{i}-mask.png")
        near = 3000 + 200 * i + 400 * np.sin(5 * x + i) * np.cos(9 * y)  # less than two of 256 greys
        Image.fromarray(near[::2, ::2].astype(np.uint16)).save(folder / f"{i}-depth.png")
    return [folder / f"{i}.png" for i in range(4)]


def mask_of(picture: Path) -> Path:
    return picture.with_name(f"{picture.stem}-mask.png")


def depth_of(picture: Path) -> Path:
    return picture.with_name(f"{picture.stem}-depth.png")


class Models(dict[str, Pair]):
    """This program and diffusers with the same weights, by the model's name, made once it is asked for. Those of more
    than four channels are single files, but for version 1, which is a folder."""

    def __init__(self, family_models: FamilyModels, pipeline: Pipeline, random_model: Any, folder: Path) -> None:
        super().__init__({"sd1": (pipeline, random_model)})
        self._families, self._folder = family_models, folder

    def __missing__(self, name: str) -> Pair:
        family, _, channels = name.partition("-")
        if not channels.isdecimal():
            self[name] = self._families.ours(name), self._families.diffusers(name)
        else:
            usual = self["sd1"][1] if family == "sd1" else self._families.diffusers(family)
            reference = with_channels(usual, int(channels))
            self[name] = load(self.path(name, reference, single=family != "sd1")), reference
        return self[name]

    def path(self, name: str, reference: Any, *, single: bool) -> Path:
        """The model on disk."""
        path = self._folder / f"{name}{'.safetensors' if single else ''}"
        if not single:
            return path if path.exists() else save(reference, path)
        parts = {part: getattr(reference, part, None) for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
        more = {"depth_model.model.pretrained.cls_token": torch.zeros(1)} if name == "sd2-5" else {}
        return write(original_state({part: network for part, network in parts.items() if network}) | more, path)


@pytest.fixture(scope="module")
def models(
    family_models: FamilyModels, pipeline: Pipeline, random_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> Models:
    return Models(family_models, pipeline, random_model, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", ["sd1-8", "sd1-9", "sd2-5", "sd2-9", "sdxl-8", "sdxl-9"])
def test_the_other_layout_has_the_same_weights(models: Models, name: str) -> None:
    ours, reference = models[name]
    other = load(models.path(name, reference, single=name.startswith("sd1")))
    assert other.config.unet.reads == ours.config.unet.reads == {"5": "depth", "8": "image", "9": "mask"}[name[-1]]
    assert other.config.schedule.prediction_type == ours.config.schedule.prediction_type
    found, wanted = other.model.unet.state_dict(), ours.model.unet.state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def requests_for(pictures: Sequence[Path], **settings: Any) -> list[GenerationRequest]:
    """One for each picture."""
    usual: dict[str, Any] = {"steps": 5, "guidance_scale": 3.0, "width": SIZE, "height": SIZE, "paste_back": False}
    prompts = ["a red apple", "", "a whale", "a rose"]
    return [
        GenerationRequest(prompt, "fog", seed=7 + i, image=str(picture), **usual | settings)
        for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=False))
    ]


def their_pipeline(reference: Any, settings: GenerationRequest) -> Any:
    """diffusers' pipeline that draws such a request on a picture, of the reference's parts."""
    import diffusers

    kinds = {5: "Depth2Img", 8: "InstructPix2Pix"}
    kind = kinds.get(reference.unet.config.in_channels, "Inpaint" if settings.mask else "Img2Img")
    family = "StableDiffusionXL" if hasattr(reference, "text_encoder_2") else "StableDiffusion"
    cls = getattr(diffusers, f"{family}{kind}Pipeline")
    takes = inspect.signature(cls.__init__).parameters
    parts = {name: part for name, part in reference.components.items() if name in takes}
    off = {"add_watermarker": False, "requires_safety_checker": False, "force_zeros_for_empty_prompt": True}
    off |= {"depth_estimator": None, "feature_extractor": None}
    off["requires_aesthetics_score"] = reference.config.get("requires_aesthetics_score", False)
    other = cls(**parts, **{name: value for name, value in off.items() if name in takes and name not in parts})
    other.set_progress_bar_config(disable=True)
    assert settings.sampler
    other.scheduler = diffusers_scheduler(settings.sampler, reference.scheduler.config)
    if settings.sampler == "plms" and kind != "InstructPix2Pix":
        mend_plms(other)
    return other


def draw_theirs(
    reference: Any, requests: Sequence[GenerationRequest], given: Any = None, refiner: Any = None
) -> tuple[list[Tensor], np.ndarray]:
    """diffusers' latents after each step, scaled as ours, and its pictures. `given`: latents or pictures to draw on, in
    place of those that the requests name. A refiner takes over where the requests say."""
    settings = requests[0]
    assert settings.sampler
    other = their_pipeline(reference, settings)
    if given is None:
        given = [Image.open(str(request.image)).convert("RGB") for request in requests]
    arguments = their_arguments(requests) | {"image": given, "strength": settings.strength}
    if settings.mask:
        arguments["mask_image"] = [Image.open(str(request.mask)) for request in requests]
    if settings.depth:
        maps = [np.asarray(Image.open(str(request.depth)), np.float32) for request in requests]
        arguments["depth_map"] = torch.tensor(np.stack(maps))
    if settings.image_guidance_scale:
        arguments["image_guidance_scale"] = settings.image_guidance_scale
    with mock.patch.object(other, "check_inputs"):
        if refiner is None:
            latents, images = call_diffusers(other, arguments)
        else:
            share = settings.refiner_start
            latents, handed = call_diffusers(other, arguments | {"output_type": "latent", "denoising_end": share})
            further = arguments | {"image": handed, "denoising_start": share}
            more, images = call_diffusers(their_pipeline(refiner, settings), further)
            latents += more
    return scaled_as_ours(latents, settings.sampler, other.scheduler), as_pixels(images)


def draw_ours(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> tuple[list[Tensor], np.ndarray]:
    """This program's latents after each step, as they are gone on with, and its pictures."""
    latents: list[Tensor] = []
    drawn = pipeline.draw(fitted(pipeline, requests), lambda done, now, denoised: latents.append(now.clone()))
    return latents[1:], np.stack([pixels.numpy() for pixels in drawn.pixels])


def mend_plms(other: Any) -> None:
    """Have diffusers' PLMS begin at its first step as it does at the noisiest: with the next timestep twice. Its
    Img2Img pipeline cuts a list in which that of the whole run is doubled, so that it skips a level later on."""

    def timesteps(num_inference_steps: int, strength: float, device: Any, **_: Any) -> tuple[Tensor, int]:
        all_of_them = other.scheduler.timesteps
        taken = int(num_inference_steps * strength)
        distinct = torch.cat([all_of_them[:1], all_of_them[2:]])[-taken:]
        return torch.cat([distinct[:2], distinct[1:]]), taken + 1

    other.get_timesteps = timesteps


def assert_same(pair: Pair, requests: list[GenerationRequest], refiner: Any = None) -> None:
    ours, pixels = draw_ours(pair[0], requests)
    theirs, their_pixels = draw_theirs(pair[1], requests, refiner=refiner)
    steps, strength = requests[0].steps, requests[0].strength
    assert steps is not None
    assert len(ours) == len(theirs) == int(steps * (1 if strength is None else strength))
    errors = [relative(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) < TOLERANCE, f"worst after step {errors.index(max(errors)) + 1}: {errors}"
    assert pixels_apart(pixels, their_pixels) <= 1
    assert their_pixels.std() > 10  # a picture, not a flat colour


@pytest.mark.parametrize(("count", "strength"), [(1, 0.84), (4, 0.5)])
@pytest.mark.parametrize(("name", "sampler", "eta"), runs("sd1", "sd2-v", "sdxl"))
def test_a_picture(
    models: Models, pictures: list[Path], name: str, sampler: str, eta: float, count: int, strength: float
) -> None:
    assert_same(models[name], requests_for(pictures[:count], sampler=sampler, eta=eta, strength=strength))


@pytest.mark.parametrize(("count", "strength"), [(1, 1.0), (4, 0.5)])
@pytest.mark.parametrize(("name", "sampler", "eta"), runs("sd1", "sd2-v", "sdxl", "sd1-9", "sd2-9", "sdxl-9"))
def test_parts_of_a_picture(
    models: Models, pictures: list[Path], name: str, sampler: str, eta: float, count: int, strength: float
) -> None:
    requests = requests_for(pictures[:count], sampler=sampler, eta=eta, strength=strength)
    for request in requests:
        object.__setattr__(request, "mask", str(mask_of(Path(str(request.image)))))
    assert_same(models[name], requests)


@pytest.mark.parametrize(
    ("name", "sampler", "eta", "count", "scales"),
    [
        *[("sd1-8", sampler, eta, 1, (3.0, 1.5)) for sampler, eta in SAMPLERS],
        ("sd1-8", "ddim", 1.0, 4, (5.0, 2.5)),
        ("sd1-8", "ddim", 0.0, 2, (3.0, 1.0)),  # for which the prompts without pictures make no difference
        ("sd1-8", "ddim", 0.0, 1, (1.0, 1.5)),  # unguided
        ("sdxl-8", "ddim", 1.0, 1, (3.0, 1.5)),
        ("sdxl-8", "euler-a", 0.0, 4, (5.0, 2.5)),
    ],
)
def test_a_picture_edited_by_words(
    models: Models,
    pictures: list[Path],
    name: str,
    sampler: str,
    eta: float,
    count: int,
    scales: tuple[float, float],
) -> None:
    guidance, image_guidance = scales
    assert_same(
        models[name],
        requests_for(
            pictures[:count],
            sampler=sampler,
            eta=eta,
            guidance_scale=guidance,
            image_guidance_scale=image_guidance,
            guidance_rescale=0.4 if name == "sdxl-8" else 0.0,
        ),
    )


@pytest.mark.parametrize(("count", "strength"), [(1, 0.84), (4, 0.5)])
@pytest.mark.parametrize(("name", "sampler", "eta"), runs("sd2-5"))
def test_a_picture_and_its_depth(
    models: Models, pictures: list[Path], name: str, sampler: str, eta: float, count: int, strength: float
) -> None:
    requests = requests_for(pictures[:count], sampler=sampler, eta=eta, strength=strength)
    for request in requests:
        object.__setattr__(request, "depth", str(depth_of(Path(str(request.image)))))
    assert_same(models[name], requests)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp-2m-sde", "unipc"])
@pytest.mark.parametrize("masked", [False, True])
def test_other_samplers(models: Models, pictures: list[Path], sampler: str, masked: bool) -> None:
    mask = str(mask_of(pictures[0])) if masked else None
    assert_same(models["sd1"], requests_for(pictures[:1], sampler=sampler, strength=0.7, mask=mask))


def test_recorded_steps_read_the_mask_of_each_picture(models: Models, pictures: list[Path]) -> None:
    """As on a GPU, where a recording made for one picture is replayed for another."""
    plain = load_plainly(models.path("sd1-9", models["sd1-9"][1], single=False))
    graphed = recording(plain, FakeRecorder())
    for picture in pictures[:2]:
        requests = requests_for([picture], strength=1.0, mask=str(mask_of(picture)), sampler="ddim")
        (latents, _), (wanted, _) = draw_ours(graphed, requests), draw_ours(plain, requests)
        assert relative(latents[-1], wanted[-1]) < TOLERANCE


@pytest.mark.parametrize("sampler", ["ddim", "euler-a"])
def test_a_refiner_draws_on_a_picture_by_itself(models: Models, pictures: list[Path], sampler: str) -> None:
    assert_same(models["refiner"], requests_for(pictures[:2], sampler=sampler, strength=0.6))


@pytest.mark.parametrize(("sampler", "count"), [("ddim", 1), ("euler", 2)])
def test_a_refiner_takes_the_last_steps_of_a_drawing_on_a_picture(
    family_models: FamilyModels, pictures: list[Path], sampler: str, count: int
) -> None:
    pair = family_models.ours("sdxl", refiner="refiner"), family_models.diffusers("sdxl")
    requests = requests_for(pictures[:count], strength=0.8, sampler=sampler, refiner_start=0.6)
    assert_same(pair, requests, family_models.diffusers("refiner"))


def test_a_refiner_takes_the_last_steps_of_a_drawing_on_parts_of_a_picture(
    family_models: FamilyModels, pictures: list[Path]
) -> None:
    ours = family_models.ours("sdxl", refiner="refiner")
    requests = requests_for(
        pictures[:1], strength=0.8, sampler="euler", refiner_start=0.6, mask=str(mask_of(pictures[0]))
    )
    latents, _ = draw_ours(ours, requests)
    alone, _ = draw_ours(family_models.ours("sdxl"), [dataclasses.replace(r, refiner_start=None) for r in requests])
    same = [relative(a, b) < TOLERANCE for a, b in zip(latents, alone, strict=True)]
    assert same == [True, True, False, False]


def test_no_strength_is_the_picture_through_the_autoencoder(models: Models, pictures: list[Path]) -> None:
    ours, reference = models["sd1"]
    requests = requests_for(pictures[:2], strength=0.0, sampler="ddim")
    _, pixels = draw_ours(ours, requests)
    for request, found in zip(requests, pixels, strict=True):
        image = torch.tensor(np.asarray(Image.open(str(request.image)))).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.inference_mode():
            posterior = reference.vae.encode(image).latent_dist
            again = reference.vae.decode(posterior.sample(torch.Generator().manual_seed(request.seed))).sample[0]
        theirs = ((again / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert pixels_apart(found, theirs) <= 1


def second_passes(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    """What diffusers is to do for the second pass: the last `hires_steps` of as many as its strength makes."""
    first = requests[0]
    assert first.hires_steps
    assert first.hires_strength
    steps = int(first.hires_steps / first.hires_strength)
    settings: dict[str, Any] = {"hires": None, "hires_strength": None, "hires_steps": None, "hires_upscaler": None}
    settings |= {"strength": (first.hires_steps + 0.5) / steps, "width": SIZE * 3 // 2, "height": SIZE * 3 // 2}
    return [dataclasses.replace(r, steps=steps, image="-", **settings) for r in requests]


def larger_requests(count: int = 1, **settings: Any) -> list[GenerationRequest]:
    common: dict[str, Any] = {"steps": 3, "guidance_scale": 3.0, "width": SIZE, "height": SIZE, "hires": "1.5"}
    common |= {"hires_strength": 0.6, "hires_steps": 4}
    prompts = ["a red apple", "", "a whale"][:count]
    return [GenerationRequest(prompt, "fog", seed=5 + i, **common | settings) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("name", "sampler", "eta", "count"),
    [
        *[("sd1", sampler, eta, 2) for sampler, eta in SAMPLERS],
        *[("sd1", sampler, 0.0, 1) for sampler in ("euler", "heun", "dpmpp-2m-sde", "unipc")],
        ("sd2-v", "ddim", 1.0, 1),
        ("sdxl", "euler-a", 0.0, 2),
        ("sdxl", "ddim", 0.0, 1),
    ],
)
def test_a_second_pass_on_enlarged_latents(models: Models, name: str, sampler: str, eta: float, count: int) -> None:
    ours, reference = models[name]
    requests = larger_requests(count, sampler=sampler, eta=eta)
    latents, pixels = draw_ours(ours, requests)
    first, _ = draw_with_diffusers(reference, requests)
    size = (SIZE * 3 // 2 // 8,) * 2
    enlarged = torch.nn.functional.interpolate(first[-1], size, mode="bilinear", antialias=False)
    theirs, their_pixels = draw_theirs(reference, second_passes(requests), enlarged)
    assert [relative(a, b) < TOLERANCE for a, b in zip(latents, [*first, *theirs], strict=True)] == [True] * 7
    assert pixels.shape == (count, SIZE * 3 // 2, SIZE * 3 // 2, 3)
    assert pixels_apart(pixels, their_pixels) <= 1


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_second_pass_on_an_enlarged_picture(models: Models, name: str) -> None:
    ours, reference = models[name]
    requests = larger_requests(2, sampler="euler-a", hires_upscaler="lanczos")
    latents, pixels = draw_ours(ours, requests)
    _, small = draw_ours(ours, [dataclasses.replace(r, **dict.fromkeys(HIRES_FIELDS)) for r in requests])
    size = (SIZE * 3 // 2,) * 2
    given = [Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS) for picture in small]
    theirs, their_pixels = draw_theirs(reference, second_passes(requests), given)
    assert [relative(a, b) < TOLERANCE for a, b in zip(latents[3:], theirs, strict=True)] == [True] * 4
    assert pixels_apart(pixels, their_pixels) <= 1


def test_a_second_pass_of_other_proportions_cuts_the_enlarged_latents(models: Models) -> None:
    """As AUTOMATIC1111 does: scaled to cover, and as much cut away on each side."""
    ours, reference = models["sd1"]
    requests = larger_requests(sampler="ddim", hires=f"{SIZE * 2}x{SIZE + 32}")
    latents, pixels = draw_ours(ours, requests)
    assert pixels.shape == (1, SIZE + 32, SIZE * 2, 3)
    enlarged = torch.nn.functional.interpolate(latents[2], (SIZE * 2 // 8,) * 2, mode="bilinear", antialias=False)
    theirs, _ = draw_theirs(reference, second_passes(requests), enlarged[:, :, 4:20])
    assert relative(latents[-1], theirs[-1]) < TOLERANCE


def test_a_refiner_takes_the_end_of_the_second_pass_alone(family_models: FamilyModels) -> None:
    refined, plain = family_models.ours("sdxl", refiner="refiner"), family_models.ours("sdxl")
    requests = larger_requests(sampler="euler", refiner_start=0.9)
    latents, _ = draw_ours(refined, requests)
    alone, _ = draw_ours(plain, [dataclasses.replace(r, refiner_start=None) for r in requests])
    same = [relative(a, b) < TOLERANCE for a, b in zip(latents, alone, strict=True)]
    assert same == [True, True, True, True, True, True, False]


def test_a_model_for_inpainting_draws_a_second_pass_as_if_all_were_masked(models: Models) -> None:
    ours, _ = models["sd1-9"]
    requests = larger_requests(sampler="ddim")
    latents, pixels = draw_ours(ours, requests)
    other, _ = draw_ours(ours, [dataclasses.replace(r, hires_strength=1.0) for r in requests])
    assert pixels.shape == (1, SIZE * 3 // 2, SIZE * 3 // 2, 3)
    assert [bool(each.isfinite().all()) for each in (*latents, *other)] == [True] * 14


def test_strips_give_the_same_picture(models: Models, pictures: list[Path]) -> None:
    plain, _ = models["sd1"]
    requests = requests_for(pictures[:1], strength=0.4, sampler="ddim")
    (latents, _), (wanted, _) = (draw_ours(dataclasses.replace(plain, tile_vae=t), requests) for t in (True, False))
    assert relative(latents[-1], wanted[-1]) < TOLERANCE


def test_a_model_for_inpainting_draws_without_a_picture_as_if_all_were_masked(
    models: Models, pictures: list[Path], tmp_path: Path
) -> None:
    ours, reference = models["sd1-9"]
    settings: dict[str, Any] = {"steps": 3, "sampler": "ddim", "guidance_scale": 3.0, "width": SIZE, "height": SIZE}
    latents, _ = draw_ours(ours, [GenerationRequest("a pear", "fog", seed=3, **settings)])
    white = tmp_path / "white.png"
    Image.new("L", (SIZE, SIZE), 255).save(white)
    masked = GenerationRequest(
        "a pear", "fog", seed=3, image=str(pictures[0]), mask=str(white), strength=1.0, **settings
    )
    theirs, _ = draw_theirs(reference, [masked])
    assert [relative(a, b) < TOLERANCE for a, b in zip(latents, theirs, strict=True)] == [True] * 3
