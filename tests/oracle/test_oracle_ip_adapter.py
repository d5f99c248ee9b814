"""Pictures as prompts are diffusers' `load_ip_adapter`: latents of every step, and pixels."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from conftest import load, open_session
from control_support import random_control, write
from diffusers.image_processor import IPAdapterMaskProcessor
from image_prompt_support import ENCODER, random_encoder, random_ip_adapter
from oracle import test_oracle_img2img as on_pictures
from oracle.comparing import pixels_apart, relative, their_arguments
from oracle.family_models import FamilyModels
from oracle.random_model import random_pipeline, save
from oracle.test_oracle_control import SIZE, TOLERANCE, Pair, draw_ours, draw_theirs, opened, requests_for
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil

from ldmcli.image_prompt import IP_ADAPTER_FIELDS
from ldmcli.images.image_prompt_picture import clip_pixels
from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.spec import GenerationRequest

PROCESSOR = CLIPImageProcessorPil(size=ENCODER["image_size"], crop_size=ENCODER["image_size"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes, two masks and an image encoder; adapters of each model in folders of their own."""
    root, generator = tmp_path_factory.mktemp("image prompts"), np.random.default_rng(3)
    for i in range(3):
        small = generator.integers(0, 256, (5 + i, 6, 3)).astype(np.uint8)
        Image.fromarray(small).resize((90 + 40 * i, 100), Image.Resampling.BICUBIC).save(root / f"{i}.png")
    for name, box in (("left", (0, 0, 44, 96)), ("right", (44, 10, 96, 80))):
        mask = Image.new("L", (SIZE, SIZE))
        mask.paste(255, box)
        mask.save(root / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Any:
    tower = random_encoder()
    tower.save_pretrained(folder / "image_encoder")
    return tower


class Adapters:
    """Models with adapters' files beside the image encoder, each made once."""

    def __init__(self, folder: Path, encoder: Any, models: Mapping[str, Pair]) -> None:
        self.folder, self.encoder, self.models = folder, encoder, models
        self._states: dict[tuple[str, str], Mapping[str, Tensor]] = {}

    def file(self, model: str, kind: str) -> Path:
        path = self.folder / f"{model}-{kind}.safetensors"
        if (model, kind) not in self._states:
            unet = self.models[model][0].config.unet
            state = random_ip_adapter(unet, kind, seed=40 + len(self._states)).state_dict()
            self._states[model, kind] = state
            write(path, state)
        return path

    def their_pipeline(self, model: str, kinds: Sequence[str], scale: Any, unet: Any = None) -> Any:
        """diffusers' pipeline, of its own U-Net, with these adapters."""
        reference = self.models[model][1]
        parts = {
            name: part
            for name, part in reference.components.items()
            if name not in ("image_encoder", "feature_extractor", "unet")
        }
        parts["unet"] = copy.deepcopy(unet or reference.unet)
        other = type(reference)(
            **parts, image_encoder=self.encoder, feature_extractor=PROCESSOR, **_off(type(reference))
        )
        states = []
        for kind in kinds:
            self.file(model, kind)
            state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
            for key, tensor in self._states[model, kind].items():
                group, _, name = key.partition(".")
                state[group][name] = tensor
            states.append(state)
        count = len(states)
        other.load_ip_adapter(states, subfolder=[""] * count, weight_name=[""] * count, image_encoder_folder=None)
        other.set_ip_adapter_scale(scale)
        return other


def _off(cls: type) -> dict[str, Any]:
    if "XL" in cls.__name__:
        return {"add_watermarker": False, "force_zeros_for_empty_prompt": True}
    return {"requires_safety_checker": False}


@pytest.fixture(scope="module")
def adapters(
    folder: Path, encoder: Any, family_models: FamilyModels, pipeline: Pipeline, random_model: Any
) -> Adapters:
    models = {
        "sd1": (pipeline, random_model),
        "sdxl": (family_models.ours("sdxl"), family_models.diffusers("sdxl")),
    }
    return Adapters(folder, encoder, models)


def request_for(**settings: Any) -> list[GenerationRequest]:
    return requests_for(1, **{"steps": 2} | settings)


def assert_same(
    ours: Pipeline, requests: Sequence[GenerationRequest], theirs: tuple[list[Tensor], np.ndarray], least: float = 1e-2
) -> None:
    latents, pixels = draw_ours(ours, requests)
    errors = [relative(a, b) for a, b in zip(latents, theirs[0], strict=True)]
    assert max(errors) < TOLERANCE, f"worst after step {errors.index(max(errors)) + 1}: {errors}"
    assert pixels_apart(pixels, theirs[1]) <= 1
    without = [dataclasses.replace(request, **dict.fromkeys(IP_ADAPTER_FIELDS, ())) for request in requests]
    assert relative(latents[-1], draw_ours(ours, without)[0][-1]) > least  # and the pictures matter


@pytest.mark.parametrize(
    ("model", "kind", "strength"),
    [("sd1", "base", 1.0), ("sd1", "plus", 0.5), ("sd1", "full", 1.0), ("sdxl", "base", 0.5), ("sdxl", "plus", 1.0)],
)
def test_one_picture(adapters: Adapters, model: str, kind: str, strength: float) -> None:
    picture = adapters.folder / "1.png"
    requests = request_for(
        ip_adapter=str(adapters.file(model, kind)), ip_adapter_image=str(picture), ip_adapter_strength=strength
    )
    other = adapters.their_pipeline(model, [kind], strength)
    assert_same(adapters.models[model][0], requests, draw_theirs(other, "", requests, ip_adapter_image=opened(picture)))


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_two_adapters_each_with_its_mask(adapters: Adapters, model: str) -> None:
    kinds, pictures = ("base", "plus"), [adapters.folder / f"{i}.png" for i in (0, 2)]
    masks = [adapters.folder / f"{name}.png" for name in ("left", "right")]
    requests = request_for(
        ip_adapter=tuple(str(adapters.file(model, kind)) for kind in kinds),
        ip_adapter_image=tuple(map(str, pictures)),
        ip_adapter_strength=(0.7, 1.0),
        ip_adapter_mask=tuple(map(str, masks)),
    )
    other = adapters.their_pipeline(model, kinds, [0.7, 1.0])
    theirs = IPAdapterMaskProcessor().preprocess([Image.open(mask) for mask in masks], height=SIZE, width=SIZE)
    given = {"ip_adapter_image": opened(*pictures), "cross_attention_kwargs": {"ip_adapter_masks": [*theirs[:, None]]}}
    assert_same(adapters.models[model][0], requests, draw_theirs(other, "", requests, **given))


BLOCKS: dict[tuple[str, str], dict[str, Any]] = {
    ("sdxl", "style"): {"up": {"block_0": [0.0, 0.8, 0.0]}},
    ("sdxl", "layout"): {"down": {"block_2": [0.0, 0.8]}},
    ("sd1", "style"): {"up": {"block_1": [0.8] * 3}},
    ("sd1", "layout"): {"down": {"block_2": [0.8] * 2}, "mid": 0.8},
}


@pytest.mark.parametrize(("model", "blocks"), BLOCKS)
def test_blocks(adapters: Adapters, model: str, blocks: str) -> None:
    picture = adapters.folder / "0.png"
    requests = request_for(
        ip_adapter=str(adapters.file(model, "base")), ip_adapter_image=str(picture), ip_adapter_strength=0.8,
        ip_adapter_blocks=blocks,
    )  # fmt: skip
    other = adapters.their_pipeline(model, ["base"], BLOCKS[model, blocks])
    theirs = draw_theirs(other, "", requests, ip_adapter_image=opened(picture))
    assert_same(adapters.models[model][0], requests, theirs, least=1e-3)


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_drawing_on_a_picture_with_a_control_network(adapters: Adapters, model: str) -> None:
    ours, reference = adapters.models[model]
    pictures = [adapters.folder / f"{i}.png" for i in range(3)]
    channels = {"conditioning_embedding_out_channels": (8, 16, 16, 24)}
    network = diffusers.ControlNetModel.from_unet(reference.unet, load_weights_from_unet=False, **channels)
    network.load_state_dict(random_control(ours.config.unet).state_dict())
    write(adapters.folder / f"{model}-net.safetensors", network.state_dict())
    requests = request_for(
        image=str(pictures[0]),
        strength=0.75,
        control_net=str(adapters.folder / f"{model}-net.safetensors"),
        control_image=str(pictures[1]),
        ip_adapter=str(adapters.file(model, "plus")),
        ip_adapter_image=str(pictures[2]),
    )
    theirs = draw_theirs(
        adapters.their_pipeline(model, ["plus"], 1.0),
        "ControlNetImg2Img",
        requests,
        controlnet=network.requires_grad_(False).eval(),
        control_image=opened(pictures[1]),
        image=[Image.open(pictures[0]).resize((SIZE, SIZE), Image.Resampling.LANCZOS)],
        ip_adapter_image=opened(pictures[2]),
    )
    assert_same(ours, requests, theirs)


def test_editing_a_picture(adapters: Adapters, tmp_path: Path) -> None:
    """By a model that reads it beside the latents, whose batches have the negative prompts twice."""
    reference = random_pipeline(unet={"in_channels": 8})
    adapters.models["edit"] = load(save(reference, tmp_path / "edit")), reference
    pictures = [adapters.folder / f"{i}.png" for i in range(2)]
    (tmp_path / "square.png").write_bytes(pictures[0].read_bytes())
    Image.open(pictures[0]).resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(tmp_path / "square.png")
    requests = request_for(
        image=str(tmp_path / "square.png"), image_guidance_scale=1.5, ip_adapter=str(adapters.file("edit", "plus")),
        ip_adapter_image=str(pictures[1]),
    )  # fmt: skip
    shown = {"ip_adapter_image": opened(pictures[1])}
    with mock.patch.object(on_pictures, "their_arguments", lambda given: their_arguments(given) | shown):
        theirs = on_pictures.draw_theirs(adapters.their_pipeline("edit", ["plus"], 1.0), requests)
    assert_same(adapters.models["edit"][0], requests, theirs)


def test_a_lora_is_merged_beneath_the_adapter(adapters: Adapters, model_folder: Path, tmp_path: Path) -> None:
    _, reference = adapters.models["sd1"]
    unet, picture = copy.deepcopy(reference.unet), adapters.folder / "1.png"
    weight = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q.weight
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(4, weight.shape[1], generator=generator)
    up = torch.randn(weight.shape[0], 4, generator=generator)
    with torch.no_grad():
        weight += 0.5 * up @ down
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "lora.safetensors")
    requests = request_for(ip_adapter=str(adapters.file("sd1", "base")), ip_adapter_image=str(picture),
        loras=f"{tmp_path}/lora.safetensors:0.5",
    )  # fmt: skip
    other = adapters.their_pipeline("sd1", ["base"], 1.0, unet)
    theirs, their_pixels = draw_theirs(other, "", requests, ip_adapter_image=opened(picture))
    (found,) = open_session(model_folder).draw(requests)
    assert relative(found.latents, theirs[-1]) < TOLERANCE
    assert pixels_apart(found.pixels()[None], their_pixels) <= 1


@pytest.mark.parametrize("size", [(90, 100), (333, 57), (56, 56), (57, 201), (20, 31)])
def test_pictures_are_read_as_transformers_reads_them(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    theirs = PROCESSOR(picture, return_tensors="np").pixel_values[0]
    assert np.abs(clip_pixels(picture, ENCODER["image_size"]) - theirs).max() < 1e-6
