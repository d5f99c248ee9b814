"""Pictures steered by control networks and T2I-Adapters are diffusers': latents of every step, and pixels."""

import copy
import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from conftest import load, open_session
from oracle.comparing import diffusers_scheduler, fitted, pixels_apart, relative
from oracle.family_models import FamilyModels
from oracle.random_model import random_pipeline, randomise, save
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ldmcli.control import CONTROL_FIELDS
from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.spec import GenerationRequest

TOLERANCE = 1e-4
SIZE = 96
Pair = tuple[Pipeline, Any]
# Stable Diffusion 1's for inpainting, and with the widths of a light adapter, whose last two are the same.
_UNETS: dict[str, dict[str, Any]] = {
    "sd1-9": {"in_channels": 9},
    "sd1-even": {"block_out_channels": (32, 64, 64, 64)},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four pictures of any size and proportions; of the first, a mask beside it."""
    folder, generator = tmp_path_factory.mktemp("hints"), np.random.default_rng(3)
    for i in range(4):
        small = generator.integers(0, 256, (5 + i, 6, 3)).astype(np.uint8)
        Image.fromarray(small).resize((SIZE + 20 * i, SIZE + 4), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[20:70, 33:81] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return [folder / f"{i}.png" for i in range(4)]


class Networks:
    """diffusers' networks for the models, and the folders that they are saved in, each made once."""

    def __init__(self, root: Path, family_models: FamilyModels, pipeline: Pipeline, random_model: Any) -> None:
        self._root, self._families = root, family_models
        self.models: dict[str, Pair] = {"sd1": (pipeline, random_model)}
        self._made: dict[tuple[str, str], tuple[Any, Path]] = {}

    def pair(self, name: str) -> Pair:
        if name not in self.models:
            if name in _UNETS:
                reference = random_pipeline(unet=_UNETS[name])
                self.models[name] = load(save(reference, self._root / name)), reference
            else:
                self.models[name] = self._families.ours(name), self._families.diffusers(name)
        return self.models[name]

    def network(self, model: str, kind: str) -> tuple[Any, Path]:
        if (model, kind) not in self._made:
            made = self._make(self.pair(model)[1].unet, kind)
            randomise(made, torch.Generator().manual_seed(len(self._made) + 20))
            made.requires_grad_(False).eval()
            path = self._root / f"{model}-{kind}"
            made.save_pretrained(path)
            self._made[model, kind] = made, path
        return self._made[model, kind]

    def _make(self, unet: Any, kind: str) -> Any:
        widths = list(unet.config.block_out_channels)
        if kind.startswith("net"):
            channels = {"conditioning_embedding_out_channels": (8, 16, 16, 24)}
            if unet.config.in_channels == 9:
                unet = diffusers.UNet2DConditionModel(**{**unet.config, "in_channels": 4})
            made = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False, **channels)
            if kind == "net-pooled":
                made.register_to_config(global_pool_conditions=True)
            return made
        if kind == "union":
            own = inspect.signature(diffusers.ControlNetUnionModel.__init__).parameters
            shared = {name: value for name, value in unet.config.items() if name in own}
            more = {"conditioning_embedding_out_channels": (8, 16, 16, 24), "num_control_type": 6}
            more |= {"num_trans_channel": widths[0], "num_proj_channel": widths[0]}
            return diffusers.ControlNetUnionModel(**shared | more)
        settings: dict[str, Any] = {"adapter_type": "full_adapter", "channels": widths, "downscale_factor": 8}
        if kind == "light":
            settings |= {"adapter_type": "light_adapter", "channels": widths[:3], "num_res_blocks": 4}
        elif kind == "xl":
            settings |= {"adapter_type": "full_adapter_xl", "channels": [*widths, widths[-1]], "downscale_factor": 16}
        return diffusers.T2IAdapter(in_channels=1 if kind == "grey" else 3, **settings)


@pytest.fixture(scope="module")
def networks(
    tmp_path_factory: pytest.TempPathFactory, family_models: FamilyModels, pipeline: Pipeline, random_model: Any
) -> Networks:
    return Networks(tmp_path_factory.mktemp("networks"), family_models, pipeline, random_model)


def requests_for(count: int = 2, **settings: Any) -> list[GenerationRequest]:
    usual: dict[str, Any] = {"steps": 4, "guidance_scale": 3.0, "width": SIZE, "height": SIZE, "sampler": "ddim"}
    prompts = ["a red apple", "a whale"][:count]
    return [GenerationRequest(prompt, "fog", seed=7 + i, **usual | settings) for i, prompt in enumerate(prompts)]


def draw_theirs(
    reference: Any, kind: str, requests: Sequence[GenerationRequest], **given: Any
) -> tuple[list[Tensor], np.ndarray]:
    """diffusers' latents after each step, and its pictures, by its pipeline of this kind."""
    family = "StableDiffusionXL" if hasattr(reference, "text_encoder_2") else "StableDiffusion"
    cls = getattr(diffusers, f"{family}{kind}Pipeline")
    takes = inspect.signature(cls.__init__).parameters
    parts = {name: part for name, part in reference.components.items() if name in takes}
    off = {"add_watermarker": False, "requires_safety_checker": False, "force_zeros_for_empty_prompt": True}
    own = {name: given.pop(name) for name in ("controlnet", "adapter") if name in given}
    other = cls(**parts, **own, **{name: value for name, value in off.items() if name in takes})
    other.set_progress_bar_config(disable=True)
    settings, latents = requests[0], list[Tensor]()
    other.scheduler = diffusers_scheduler(settings.sampler or "", reference.scheduler.config)

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"].clone())
        return tensors

    calls = inspect.signature(cls.__call__).parameters
    hears = {"callback_on_step_end": keep}
    if "callback_on_step_end" not in calls:
        hears = {"callback": lambda _step, _timestep, now: latents.append(now.clone()), "callback_steps": 1}
    if settings.strength is not None:
        given = {"strength": settings.strength, "controlnet_conditioning_scale": 1.0} | given
    with mock.patch.object(other, "check_inputs"):
        images = other(
            [request.prompt for request in requests],
            negative_prompt=[request.negative_prompt for request in requests],
            height=SIZE,
            width=SIZE,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            output_type="np",
            **hears,
            **given,
        ).images
    return latents, (images * 255).round().astype(np.uint8)


def draw_ours(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> tuple[list[Tensor], np.ndarray]:
    """This program's latents after each step, as they are gone on with, and its pictures."""
    latents: list[Tensor] = []
    drawn = pipeline.draw(fitted(pipeline, requests), lambda done, now, denoised: latents.append(now.clone()))
    return latents[1:], np.stack([pixels.numpy() for pixels in drawn.pixels])


def assert_same(ours: Pipeline, requests: Sequence[GenerationRequest], theirs: tuple[list[Tensor], np.ndarray]) -> None:
    latents, pixels = draw_ours(ours, requests)
    errors = [relative(a, b) for a, b in zip(latents, theirs[0], strict=True)]
    assert max(errors) < TOLERANCE, f"worst after step {errors.index(max(errors)) + 1}: {errors}"
    assert pixels_apart(pixels, theirs[1]) <= 1
    assert theirs[1].std() > 10
    plain, _ = draw_ours(ours, [with_control(request) for request in requests])
    assert relative(latents[-1], plain[-1]) > 1e-2  # and the networks matter


def with_control(request: GenerationRequest, **control: Any) -> GenerationRequest:
    """The request with these fields about control and no others."""
    return dataclasses.replace(request, **dict.fromkeys(CONTROL_FIELDS, ()) | control)


def opened(*paths: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in paths]


SETTINGS = {
    "plain": ({}, {}),
    "half": ({"control_strength": 0.5}, {"controlnet_conditioning_scale": 0.5}),
    "range": (
        {"control_start": 0.25, "control_end": 0.75},
        {"control_guidance_start": 0.25, "control_guidance_end": 0.75},
    ),
    "guess": (
        {"control_mode": "guess", "control_strength": 0.8},
        {"guess_mode": True, "controlnet_conditioning_scale": 0.8},
    ),
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_one_network(networks: Networks, pictures: list[Path], model: str, settings: str) -> None:
    ours, reference = networks.pair(model)
    network, path = networks.network(model, "net")
    own, theirs = SETTINGS[settings]
    requests = [
        with_control(request, control_net=str(path), control_image=str(picture), **own)
        for request, picture in zip(requests_for(), pictures, strict=False)
    ]
    given = {"controlnet": network, "image": opened(*pictures[:2])}
    assert_same(ours, requests, draw_theirs(reference, "ControlNet", requests, **given, **theirs))


def test_a_lora_is_merged_beneath_the_network(
    networks: Networks, pictures: list[Path], model_folder: Path, tmp_path: Path
) -> None:
    _, reference = networks.pair("sd1")
    network, path = networks.network("sd1", "net")
    unet = copy.deepcopy(reference.unet)
    weight = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight
    generator = torch.Generator().manual_seed(1)
    down, up = (
        torch.randn(4, weight.shape[1], generator=generator),
        torch.randn(weight.shape[0], 4, generator=generator),
    )
    with torch.no_grad():
        weight += 0.5 * up @ down
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "lora.safetensors")
    requests = requests_for(
        1, control_net=str(path), control_image=str(pictures[0]), loras=f"{tmp_path}/lora.safetensors:0.5"
    )
    with mock.patch.object(reference, "unet", unet):
        theirs, their_pixels = draw_theirs(
            reference, "ControlNet", requests, controlnet=network, image=opened(pictures[0])
        )
    (picture,) = open_session(model_folder).draw(requests)
    assert pixels_apart(picture.pixels()[None], their_pixels) <= 1
    assert relative(picture.latents, theirs[-1]) < TOLERANCE


def test_a_network_of_version_2(networks: Networks, pictures: list[Path]) -> None:
    ours, reference = networks.pair("sd2-v")
    network, path = networks.network("sd2-v", "net")
    requests = requests_for(1, control_net=str(path), control_image=str(pictures[0]))
    assert_same(
        ours, requests, draw_theirs(reference, "ControlNet", requests, controlnet=network, image=opened(pictures[0]))
    )


def test_pooled_residuals_steer_the_prompt_alone(networks: Networks, pictures: list[Path]) -> None:
    """As Shuffle's, which are means over all pixels."""
    ours, reference = networks.pair("sd1")
    network, path = networks.network("sd1", "net-pooled")
    requests = requests_for(1, control_net=str(path), control_image=str(pictures[1]), control_strength=0.7)
    theirs = draw_theirs(
        reference, "ControlNet", requests, controlnet=network, image=opened(pictures[1]),
        controlnet_conditioning_scale=0.7,
    )  # fmt: skip
    assert_same(ours, requests, theirs)


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_two_networks_each_with_its_own_picture(networks: Networks, pictures: list[Path], model: str) -> None:
    ours, reference = networks.pair(model)
    (one, first), (two, second) = networks.network(model, "net"), networks.network(model, "net-2")
    control = {
        "control_net": (str(first), str(second)),
        "control_image": (str(pictures[0]), str(pictures[1])),
        "control_strength": (1.0, 0.4),
        "control_start": (0.0, 0.5),
        "control_end": (0.75, 1.0),
    }
    requests = requests_for(1, **control)
    theirs = draw_theirs(
        reference,
        "ControlNet",
        requests,
        controlnet=[one, two],
        image=opened(*pictures[:2]),
        controlnet_conditioning_scale=[1.0, 0.4],
        control_guidance_start=[0.0, 0.5],
        control_guidance_end=[0.75, 1.0],
    )
    assert_same(ours, requests, theirs)


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_drawing_on_a_picture(networks: Networks, pictures: list[Path], model: str) -> None:
    ours, reference = networks.pair(model)
    network, path = networks.network(model, "net")
    control = {"control_net": str(path), "control_image": str(pictures[1]), "control_end": 0.7}
    requests = requests_for(1, image=str(pictures[0]), strength=0.75, **control)
    theirs = draw_theirs(
        reference, "ControlNetImg2Img", requests, controlnet=network, control_image=opened(pictures[1]),
        image=[Image.open(pictures[0]).resize((SIZE, SIZE), Image.Resampling.LANCZOS)], control_guidance_end=0.7,
    )  # fmt: skip
    assert_same(ours, requests, theirs)


@pytest.mark.parametrize("model", ["sd1", "sd1-9", "sdxl"])
def test_drawing_on_parts_of_a_picture(networks: Networks, pictures: list[Path], model: str) -> None:
    """By models with four input channels and with nine, of which the network reads four."""
    ours, reference = networks.pair(model)
    network, path = networks.network(model, "net")
    mask, control = pictures[0].with_name("mask.png"), {"control_net": str(path), "control_image": str(pictures[1])}
    square = pictures[0].with_name("square.png")
    Image.open(pictures[0]).resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(square)
    strength = 1.0 if model == "sd1-9" else 0.75
    requests = requests_for(1, image=str(square), mask=str(mask), strength=strength, paste_back=False, **control)
    theirs = draw_theirs(
        reference, "ControlNetInpaint", requests, controlnet=network, control_image=opened(pictures[1]),
        image=opened(square), mask_image=[Image.open(mask)],
    )  # fmt: skip
    assert_same(ours, requests, theirs)


def test_pixels_under_the_mask_are_minus_one_to_an_inpainting_network(networks: Networks, pictures: list[Path]) -> None:
    ours, reference = networks.pair("sd1")
    network, path = networks.network("sd1", "net")
    mask, square = pictures[0].with_name("mask.png"), pictures[0].with_name("square.png")
    Image.open(pictures[0]).resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(square)
    requests = requests_for(
        1, image=str(square), mask=str(mask), strength=0.75, paste_back=False, control_net=str(path),
        control_type="inpaint",
    )  # fmt: skip
    hint = torch.from_numpy(np.array(Image.open(square))).permute(2, 0, 1)[None] / 255
    hint[:, :, np.array(Image.open(mask)) > 127] = -1
    theirs = draw_theirs(
        reference, "ControlNetInpaint", requests, controlnet=network, control_image=hint, image=opened(square),
        mask_image=[Image.open(mask)],
    )  # fmt: skip
    assert_same(ours, requests, theirs)


def test_a_union_network(networks: Networks, pictures: list[Path]) -> None:
    ours, reference = networks.pair("sdxl")
    network, path = networks.network("sdxl", "union")
    own, given = SETTINGS["half"]
    control = {"control_net": str(path), "control_image": str(pictures[0]), "control_type": "lineart"}
    requests = requests_for(1, **control, **own)
    theirs = draw_theirs(
        reference, "ControlNetUnion", requests, controlnet=network, control_image=opened(pictures[0]),
        control_mode=[3], **given,
    )  # fmt: skip
    assert_same(ours, requests, theirs)


@pytest.mark.parametrize(("model", "kind"), [("sd1", "full"), ("sd1-even", "light"), ("sd1", "grey"), ("sdxl", "xl")])
def test_an_adapter(networks: Networks, pictures: list[Path], model: str, kind: str) -> None:
    ours, reference = networks.pair(model)
    network, path = networks.network(model, kind)
    control = {"control_net": str(path), "control_image": str(pictures[0]), "control_strength": 0.6}
    given: dict[str, Any] = {"adapter_conditioning_scale": 0.6}
    if model == "sdxl":
        control, given = control | {"control_end": 0.5}, given | {"adapter_conditioning_factor": 0.5}
    requests = requests_for(1, **control)
    picture = Image.open(pictures[0]).convert("L" if kind == "grey" else "RGB")
    theirs = draw_theirs(reference, "Adapter", requests, adapter=network, image=picture, **given)
    assert_same(ours, requests, theirs)


def test_two_adapters(networks: Networks, pictures: list[Path]) -> None:
    ours, reference = networks.pair("sd1-even")
    (one, first), (two, second) = networks.network("sd1-even", "full"), networks.network("sd1-even", "light")
    requests = requests_for(
        1, control_net=(str(first), str(second)), control_image=(str(pictures[0]), str(pictures[1])),
        control_strength=(0.6, 0.5),
    )  # fmt: skip
    theirs = draw_theirs(
        reference, "Adapter", requests, adapter=[one, two], image=opened(*pictures[:2]),
        adapter_conditioning_scale=[0.6, 0.5],
    )  # fmt: skip
    assert_same(ours, requests, theirs)
