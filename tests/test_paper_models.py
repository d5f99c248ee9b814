"""The models of the latent diffusion paper: told apart, loaded whole."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_support import FakeRecorder, load_plainly, recording
from oracle.compvis_layout import vae_state
from oracle.test_key_lists import loaded, write_hollow
from paper_models import PUBLISHED, UNET, Model, class_map, shapes_of, small, state_of, unet_shapes, write_model
from picture_models import PICTURED
from PIL import Image
from safetensors.torch import save_file

from ldmcli.checkpoints.families import PAPER
from ldmcli.checkpoints.file_kinds import describe_single_file
from ldmcli.checkpoints.key_map import disk_names, stacked_heads
from ldmcli.checkpoints.load import load_unet, on_meta
from ldmcli.checkpoints.single_file import unet_from_shapes
from ldmcli.checkpoints.source import open_model
from ldmcli.config import VAEConfig
from ldmcli.errors import BadDataError
from ldmcli.fitting import fit_to_model
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import autoencoder_of
from ldmcli.spec import GenerationRequest

FAMILIES = dict(
    zip(
        ("txt2img-1p4B", "text2img256", "celeba256", "churches256", "cin256", "cin256-v2", "layout2img", "semantic"),
        PAPER,
        strict=True,
    )
)
NAMES = sorted(PUBLISHED)


@pytest.mark.parametrize("name", NAMES)
def test_published_unets_have_every_key_and_no_other(name: str) -> None:
    shapes = unet_shapes(PUBLISHED[name])
    config = unet_from_shapes(shapes, 0)
    unet = on_meta(lambda: UNet(config))
    wanted = {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
    names = disk_names(wanted, config, original=True)
    assert {name for found in names.values() for name in found} | {"out.2.weight", "out.2.bias"} == set(shapes)
    assert round(sum(map(math.prod, shapes.values())) / 1e6, 1) == PUBLISHED[name].parameters
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    for key, shape in wanted.items():
        if "conv_out" not in key:
            sizes[names[key][0]] -= math.prod(shape)
    assert not any(size for key, size in sizes.items() if not key.startswith("out.2"))


@pytest.mark.parametrize("whole", [PUBLISHED, {name: small(name) for name in NAMES}], ids=["published", "small"])
@pytest.mark.parametrize("name", NAMES)
def test_each_is_told_by_its_structure(name: str, whole: dict[str, Model]) -> None:
    shapes = shapes_of(whole[name]) | {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}
    assert describe_single_file(shapes) == FAMILIES[name].name


@pytest.mark.parametrize("name", NAMES)
def test_small_models_load_with_the_weights_that_are_drawn_with(name: str, tmp_path: Path) -> None:
    model = small(name)
    source = open_model(write_model(tmp_path / "model.safetensors", model))
    unet = load_unet(source, torch.device("cpu"), torch.float32)
    drawn = source.single_file
    assert drawn is not None
    key = "model_ema.diffusion_modelout2weight" if model.averaged else f"{UNET}out.2.weight"
    from safetensors import safe_open

    with safe_open(drawn.path, "pt") as file:
        assert torch.equal(unet.conv_out.weight, file.get_tensor(key))


def test_queries_keys_and_values_of_each_head_are_taken_from_its_rows(tmp_path: Path) -> None:
    model = small("celeba256")
    source = open_model(write_model(tmp_path / "model.safetensors", model))
    unet = load_unet(source, torch.device("cpu"), torch.float32)
    attention = unet.mid_block.attentions[0]
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        rows = file.get_tensor("model_ema.diffusion_modelmiddle_block1qkvweight")[:, :, 0]
    heads = stacked_heads("mid_block.attentions.0.to_q.weight", unet.config)
    assert heads == 128 // 32
    per_head = rows.reshape(heads, 3, 32, 128)
    for i, layer in enumerate((attention.to_q, attention.to_k, attention.to_v)):  # type: ignore[union-attr]
        assert torch.equal(layer.weight.reshape(heads, 32, 128), per_head[:, i])


_F4 = VAEConfig(latent_channels=3, block_channels=(128, 256, 512), codes=8192)
_KL_F8 = VAEConfig(block_channels=(128, 256, 512, 512))
_VQ_F8 = VAEConfig(block_channels=(128, 256, 256, 512), attention=(False, False, False, True), codes=16384)
STAGES = {
    "churches256": _KL_F8,
    "txt2img-1p4B": _KL_F8,
    "cin256": _VQ_F8,
    "inpainting_big": dataclasses.replace(_F4, middle_attention=False),
}  # where it is not VQ f4


@pytest.mark.parametrize("name", [*NAMES, *PICTURED])
def test_published_checkpoints_load_whole(name: str, tmp_path: Path) -> None:
    """With the first stage that each was published with; inpainting's encodes its condition too, and is there twice."""
    model, stage = {**PUBLISHED, **PICTURED}[name], STAGES.get(name, _F4)
    with torch.device("meta"):
        first = vae_state(autoencoder_of(stage).state_dict())
        state = first | {key: torch.empty(shape) for key, shape in shapes_of(model).items()}
        if name == "inpainting_big":
            state |= {key.replace("first_stage_model", "cond_stage_model"): tensor for key, tensor in first.items()}
    source = open_model(write_hollow(tmp_path / f"{name}.safetensors", state))
    if model.text and model.text[3] == 77:
        lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(30518))]
        (tmp_path / "vocab.txt").write_text("\n".join(lines))
    assert source.config.vae == dataclasses.replace(stage, scaling_factor=source.config.vae.scaling_factor)
    keys = {part: source.part(part).keys() for part in source.parts}
    read = {part: sum(math.prod(file.tensors[key].shape) for key, file in keys[part].items()) for part in keys}
    modules = loaded(source)
    assert modules.keys() == read.keys()
    for part, module in modules.items():
        unread = sum(math.prod(shape) for key, shape in shapes_of(model).items() if ".to_logits." in key)
        held = sum(weight.numel() for weight in module.parameters())
        assert held == read[part] - (unread if part in ("text_encoder", "layout_encoder") else 0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("churches256", {}),
        ("cin256-v2", {"label": 3, "guidance_scale": 3.0}),
        ("semantic", {"map": "map.png"}),
        ("txt2img-1p4B", {"prompt": "a red apple"}),
    ],
)
def test_recorded_steps_draw_the_same(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = small(name)
    path = write_model(tmp_path / "model.safetensors", model)
    if "map" in settings:
        settings |= {"map": str(tmp_path / "map.png")}
        Image.fromarray(class_map(40, 24, model.classes)).save(settings["map"])
    plain, recorder = load_plainly(path), FakeRecorder()
    graphed = recording(plain, recorder)
    size = {"width": 10 * plain.vae.config.factor, "height": 6 * plain.vae.config.factor}
    for seed in (1, 2):
        asked = GenerationRequest(**{"prompt": "", "seed": seed, "steps": 9, **size} | settings)
        request = fit_to_model(asked, plain.config)
        assert torch.equal(graphed.draw([request]).latents, plain.draw([request]).latents)
    assert recorder.recordings


def test_a_header_says_how_many_groups_norms_have_and_how_large_latents_are(tmp_path: Path) -> None:
    state = state_of(small("cin256"))
    path = tmp_path / "grouped.safetensors"
    save_file(state, path, metadata={"norm_groups": "8", "sample_size": "12"})
    config = open_model(path).config
    assert (config.unet.norm_groups, config.vae.norm_groups) == (8, 8)
    assert config.default_size == 12 * config.vae.factor
    for name in ("norm_groups", "sample_size"):
        for wrong in ("0", "-8", "eight", "9" * 40):
            save_file(state, path, metadata={name: wrong})
            with pytest.raises(BadDataError, match=name):
                open_model(path)
    save_file(state, path, metadata={"norm_groups": "7"})
    with pytest.raises(BadDataError, match="7 norm groups"):
        open_model(path)
