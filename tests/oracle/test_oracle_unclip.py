"""unCLIP models draw of an embedding what diffusers' pipeline draws of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import open_session
from diffusers import DDIMScheduler, StableUnCLIPImg2ImgPipeline
from oracle.compvis_layout import unet_state
from oracle.original_layout import original_state, with_extras
from oracle.unclip_models import embeddings, unclip
from safetensors.torch import save_file

from ldmcli import GenerationRequest

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
