"""Models that enlarge pictures draw what diffusers' pipelines draw."""

import functools
import inspect
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cli_support import ldm_here
from conftest import open_session
from oracle.enlarging_models import full_sd_upscaler, sd_upscaler, super_resolution
from oracle.original_layout import original_state
from oracle.seeded import seeded_pixels
from oracle.test_key_lists import shapes, write_hollow
from PIL import Image
from safetensors.torch import save_file

from ldmcli import GenerationRequest
from ldmcli.checkpoints.key_map import disk_names
from ldmcli.checkpoints.load import on_meta
from ldmcli.checkpoints.source import open_model
from ldmcli.errors import BadDataError, LdmError, UsageError
from ldmcli.networks.unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder_sr(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    pipeline, path = super_resolution(), tmp_path_factory.mktemp("sr") / "sr"
    pipeline.save_pretrained(path)
    return pipeline, path


@pytest.fixture(scope="module")
def folder_x4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    pipeline, path = sd_upscaler(), tmp_path_factory.mktemp("x4") / "x4"
    pipeline.save_pretrained(path)
    return pipeline, path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "small.png"
    Image.fromarray(seeded_pixels(64, 32)).save(path)
    return path


def drawn(path: Path, **request: Any) -> tuple[torch.Tensor, np.ndarray]:
    with open_session(path) as session:
        (found,) = session.draw([GenerationRequest(**{"prompt": "", "seed": 3} | request)])
        return found.latents, found.pixels()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_super_resolution(folder_sr: tuple[Any, Path], picture: Path, eta: float) -> None:
    pipeline, path = folder_sr
    _, ours = drawn(path, image=str(picture), steps=5, eta=eta)
    generator = torch.Generator().manual_seed(3)
    # The pipeline has steps draw from no seed.
    step = functools.partial(pipeline.scheduler.step, generator=generator)
    step.__signature__ = inspect.signature(pipeline.scheduler.step)  # type: ignore[attr-defined]
    with mock.patch.object(pipeline.scheduler, "step", step):
        theirs = pipeline(
            Image.open(picture), num_inference_steps=5, eta=eta, generator=generator, output_type="np"
        ).images[0]
    assert ours.shape == (128, 256, 3)
    assert np.abs(ours - 255 * theirs).max() < 1


def test_sd_upscaler_from_one_file(folder_x4: tuple[Any, Path], picture: Path, tmp_path: Path) -> None:
    """In the original layout, with the buffers of what noises the picture; not by the file's own levels."""
    pipeline, folder = folder_x4
    parts = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    state = {key: tensor.contiguous() for key, tensor in original_state(parts).items()}
    signals = pipeline.low_res_scheduler.alphas_cumprod.sqrt()
    path = tmp_path / "x4.safetensors"
    settings = {"image": str(picture), "prompt": "a fox", "steps": 2}
    latents, _ = drawn(folder, **settings)
    for levels, same in ((signals, True), (signals**2, False)):
        buffers = {"betas": torch.zeros(1000), "sqrt_alphas_cumprod": levels, "logvar": torch.zeros(1000)}
        save_file(state | {f"low_scale_model.{name}": buffer for name, buffer in buffers.items()}, path)
        again, _ = drawn(path, **settings)
        assert (float((again - latents).abs().max()) < 1e-4 * float(latents.abs().max())) == same
    facts = ldm_here("info", "--json", path).records[0]
    assert facts["family"] == "Stable Diffusion x4 upscaler"
    assert (facts["reads"], facts["prediction_type"]) == ("low_res", "v_prediction")


def test_every_tensor_of_the_published_upscaler_has_its_place(tmp_path: Path) -> None:
    with torch.device("meta"):
        parts = full_sd_upscaler()
    state = original_state(parts)
    assert sum(weight.numel() for weight in parts["unet"].parameters()) == 473_398_020
    source = open_model(write_hollow(tmp_path / "x4.safetensors", state))
    unet = on_meta(lambda: UNet(source.config.unet)).state_dict()
    assert shapes(unet.items()) == shapes(parts["unet"].state_dict().items())
    assert source.config.unet.heads == (8, 8, 8, 8)
    assert source.config.default_size == 512
    names = disk_names(unet, source.config.unet, "model.diffusion_model.", original=True)
    wanted = {name for name in state if name.startswith("model.diffusion_model.")}
    assert {name for found in names.values() for name in found} == wanted


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sd_upscaler(folder_x4: tuple[Any, Path], picture: Path, guidance: float) -> None:
    pipeline, path = folder_x4
    _, ours = drawn(
        path, image=str(picture), prompt="a fox", negative_prompt="a crow", steps=4, guidance_scale=guidance,
        noise_level=30,
    )  # fmt: skip
    theirs = pipeline(
        "a fox", image=Image.open(picture), num_inference_steps=4, guidance_scale=guidance, noise_level=30,
        negative_prompt="a crow", generator=torch.Generator().manual_seed(3), output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(ours - 255 * theirs).max() < 1


@pytest.mark.parametrize(
    ("file", "changes", "request_", "error", "words"),
    [
        ("unet", {"num_class_embeds": 15}, {}, UsageError, "noise_level 20 is over 14"),
        ("low_res_scheduler", {"num_train_timesteps": 10}, {}, UsageError, "noise_level 20 is over 9"),
        ("low_res_scheduler", {"beta_end": 2.0}, {}, BadDataError, "betas are not all"),
        ("unet", {"only_cross_attention": [True]}, {}, BadDataError, "only_cross_attention is"),
        ("unet", {"only_cross_attention": True}, {}, BadDataError, "only_cross_attention is"),
        ("unet", {"in_channels": 9}, {}, BadDataError, "9 channels, not its 4 latents' and 3 more"),
        ("unet", {"num_class_embeds": 0}, {}, BadDataError, "num_class_embeds is 0"),
        ("unet", {}, {"strength": 0.5}, UsageError, "strength is not for a model that enlarges"),
        ("unet", {}, {"noise_level": 351}, UsageError, "noise_level 351"),
    ],
)
def test_damaged_and_mistaken(
    file: str, changes: dict[str, Any], request_: dict[str, Any], error: type[LdmError], words: str,
    folder_x4: tuple[Any, Path], picture: Path, tmp_path: Path,
) -> None:  # fmt: skip
    shutil.copytree(folder_x4[1], tmp_path / "x4")
    path = next((tmp_path / "x4" / file).glob("*config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(error, match=words):
        open_session(tmp_path / "x4").fit(GenerationRequest("", image=str(picture), **request_))
