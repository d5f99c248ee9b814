"""unCLIP models draw of an embedding what diffusers' pipeline draws of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import open_session
from diffusers import DDIMScheduler, StableUnCLIPImg2ImgPipeline
from oracle.original_layout import original_state
from oracle.seeded import seeded_pixels
from oracle.test_key_lists import loaded, shapes, write_hollow
from oracle.unclip_models import embeddings, original, published, unclip
from PIL import Image
from safetensors.torch import save_file

from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session
from ldmcli.checkpoints.key_map import disk_names
from ldmcli.checkpoints.source import open_model
from ldmcli.errors import MissingInputError

SEED, PROMPT, UNWANTED = 3, "a red apple", "blue"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("unclip")
    unclip().save_pretrained(folder / "model")
    save_file({"image_embeds": embeddings(3)}, folder / "embeds.safetensors")
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder


def ours(path: Path, **request: Any) -> tuple[torch.Tensor, np.ndarray]:
    settings = {"prompt": PROMPT, "seed": SEED, "image_embedding": str(path.parent / "embeds.safetensors")}
    with open_session(path) as session:
        (found,) = session.draw([GenerationRequest(**settings | {"embedding_row": 1} | request)])
        return found.latents, found.pixels()


def assert_alike(found: tuple[torch.Tensor, np.ndarray], pipeline: Any, row: int = 1, **call: Any) -> None:
    settings = {"prompt": PROMPT, "image_embeds": embeddings(3)[row : row + 1]} | call

    def drawn(kind: str) -> Any:
        return pipeline(**settings, generator=torch.Generator().manual_seed(SEED), output_type=kind).images

    theirs, image = drawn("latent"), drawn("np")[0]
    assert theirs.std() > 0.3
    assert (found[0] - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert image.std() > 0.02
    assert np.abs(found[1].astype(int) - np.rint(image * 255)).max() <= 1


def test_a_folder_draws_the_same_as_users_run_it(model: tuple[Any, Path]) -> None:
    pipeline, folder = model
    assert_alike(ours(folder / "model"), pipeline)  # 20 steps, guidance 10, of its own


@pytest.mark.parametrize("level", [0, 400, 999])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_noise_and_guidance(level: int, scale: float, model: tuple[Any, Path]) -> None:
    pipeline, folder = model
    settings = {"negative_prompt": UNWANTED, "guidance_scale": scale, "noise_level": level}
    found = ours(folder / "model", steps=4, width=48, height=80, **settings)
    assert_alike(found, pipeline, num_inference_steps=4, width=48, height=80, **settings)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim(eta: float, model: tuple[Any, Path]) -> None:
    """The embedding's noise is drawn first, then that of the latents, then that of the steps."""
    pipeline, folder = model
    other = StableUnCLIPImg2ImgPipeline(
        **pipeline.components | {"scheduler": DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)}
    )
    other.set_progress_bar_config(disable=True)
    found = ours(folder / "model", steps=4, sampler="ddim", eta=eta, noise_level=700)
    assert_alike(found, other, num_inference_steps=4, eta=eta, noise_level=700)


def test_a_picture_is_embedded_by_the_folders_own_encoder(model: tuple[Any, Path]) -> None:
    """And by one that is named, where there is none."""
    pipeline, folder = model
    Image.fromarray(seeded_pixels(50, 41)).save(folder / "picture.png")
    settings = {"steps": 3, "noise_level": 20, "embedding_row": None, "image_embedding": str(folder / "picture.png")}
    shown = {"image": Image.open(folder / "picture.png"), "image_embeds": None}
    found = ours(folder / "model", **settings)
    assert_alike(found, pipeline, num_inference_steps=3, noise_level=20, **shown)
    save_file(original(pipeline), folder / "alone.safetensors")
    with pytest.raises(MissingInputError, match="--image-encoder"):
        ours(folder / "alone.safetensors", **settings)
    named = ModelSpec(str(folder / "alone.safetensors"), image_encoder=str(folder / "model" / "image_encoder"))
    with Session(named, RuntimeSpec(device="cpu", dtype="fp32", cache=False)) as session:
        settings |= {"steps": 1, "sampler": "ddim", "width": 64, "height": 64}
        (picture,) = session.draw([GenerationRequest(PROMPT, seed=SEED, **settings)])
    wanted = ours(folder / "model", **settings)[0]
    assert (picture.latents - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_pictures_drawn_together_have_their_own_embeddings_and_noise(model: tuple[Any, Path]) -> None:
    pipeline, folder = model
    settings = {"prompt": PROMPT, "image_embedding": str(folder / "embeds.safetensors"), "steps": 2, "seed": SEED}
    requests = [GenerationRequest(**settings, embedding_row=row, noise_level=500) for row in range(3)]
    with open_session(folder / "model") as session:
        for row, picture in enumerate(session.draw(requests, batch_size=3)):
            found = picture.latents, picture.pixels()
            assert_alike(found, pipeline, row, num_inference_steps=2, noise_level=500)


def test_a_file_in_the_original_layout(model: tuple[Any, Path]) -> None:
    pipeline, folder = model
    save_file(original(pipeline), folder / "file.safetensors")
    settings = {"steps": 3, "noise_level": 600, "width": 64, "height": 64, "sampler": "ddim"}
    wanted, found = ours(folder / "model", **settings), ours(folder / "file.safetensors", **settings)
    assert (found[0] - wanted[0]).abs().max() < 1e-4 * wanted[0].abs().max()
    defaults = open_model(folder / "file.safetensors").config.defaults
    assert (defaults.steps, defaults.guidance_scale) == (20, 10.0)


def test_a_file_without_statistics_is_as_one_of_mean_0_and_deviation_1(model: tuple[Any, Path], tmp_path: Path) -> None:
    pipeline = unclip(statistics=False)
    save_file({"image_embeds": embeddings(3)}, tmp_path / "embeds.safetensors")
    save_file(original(pipeline, statistics=False), tmp_path / "file.safetensors")
    found = ours(tmp_path / "file.safetensors", steps=3, sampler="ddim", noise_level=300, width=64, height=64)
    other = StableUnCLIPImg2ImgPipeline(
        **pipeline.components | {"scheduler": DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)}
    )
    other.set_progress_bar_config(disable=True)
    assert_alike(found, other, num_inference_steps=3, noise_level=300, width=64, height=64)


@pytest.mark.parametrize("width", [768, 1024])
def test_published_files_load_whole(width: int, tmp_path: Path) -> None:
    with torch.device("meta"):
        parts = published(width)
    state = original_state(parts)
    source = open_model(write_hollow(tmp_path / "unclip.safetensors", state))
    modules = loaded(source)
    unet = modules["unet"].state_dict()
    renamed = {key.replace("add_embedding", "class_embedding"): shape for key, shape in shapes(unet.items()).items()}
    assert renamed == shapes(parts["unet"].state_dict().items())
    names = disk_names(unet, source.config.unet, "model.diffusion_model.", original=True)
    wanted = {name for name in state if name.startswith("model.diffusion_model.")}
    assert {name for found in names.values() for name in found} == wanted
    assert source.config.default_size == 768
    assert any("no statistics" in note for note in source.config.notes) == (width == 768)
    assert source.config.schedule.prediction_type == "v_prediction"
