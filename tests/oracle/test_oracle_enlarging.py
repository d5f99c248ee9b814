"""Models that enlarge pictures draw what diffusers' pipelines draw."""

import functools
import inspect
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import open_session
from oracle.enlarging_models import sd_upscaler, super_resolution
from oracle.seeded import seeded_pixels
from PIL import Image

from ldmcli import GenerationRequest

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
