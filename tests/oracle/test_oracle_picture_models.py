"""The paper's models that read pictures draw what CompVis' own code draws, with the same weights and noise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import ldm_here, pixels
from oracle.make_paper_models import SEED, STEPS, kept
from oracle.make_picture_models import RUNS
from paper_models import write_model
from picture_models import LARGE, LATENTS, PATCH, low_res, png, small, to_fill
from PIL import Image

from ldmcli.session import Session
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec

FACTS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("picture_models.json").read_text())
FP32 = RuntimeSpec(device="cpu", dtype="fp32", cache=False)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("pictured")

    def written(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        return path if path.exists() else write_model(path, small(name))

    return written


def apart(ours: np.ndarray, theirs: list[float]) -> float:
    """The largest difference of what is kept, as a share of the largest value."""
    return float(np.abs(np.array(kept(torch.as_tensor(ours))) - theirs).max() / np.abs(theirs).max())


def test_super_resolution(model: Callable[[str], Path]) -> None:
    """Plainly, with fresh noise, and a large picture by patches whose weights are CompVis'."""
    facts = FACTS["bsr_sr"]
    with Session(ModelSpec(str(model("bsr_sr"))), FP32) as session:

        def drawn(latents: tuple[int, int], **settings: Any) -> Any:
            image = png(low_res(latents))
            request = GenerationRequest("", image=image, seed=SEED, steps=STEPS, **settings)
            (picture,) = session.draw([request])
            return picture

        for run, settings in RUNS.items():
            picture = drawn(LATENTS, **settings)
            assert apart(picture.latents, facts[run]) < 1e-4, run
        planes = picture.pixels().transpose(2, 0, 1)[None].astype(np.float32)
        levels = (np.array(facts["decoded"]) / 2 + 0.5).clip(0, 1) * 255
        assert np.abs(np.array(kept(torch.as_tensor(planes))) - levels).max() <= 1
        assert apart(drawn(LARGE, patch=PATCH).latents, facts["patches"]) < 1e-4
        whole = drawn(LARGE, patch=0).latents
        assert apart(whole, facts["patches"]) > 1e-2
        assert torch.equal(whole, drawn(LARGE).latents)  # 128 latents a side are computed at once


def test_inpainting_by_the_command(model: Callable[[str], Path], tmp_path: Path) -> None:
    """Without a prompt; what is not masked stays as it is."""
    image, mask = to_fill()
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    done = ldm_here(
        "img2img", "-m", model("inpainting_big"), "-i", tmp_path / "image.png", "--mask", tmp_path / "mask.png",
        "--steps", str(STEPS), "--seed", str(SEED), "--dtype", "fp32", "-o", tmp_path / "filled.png",
    )  # fmt: skip
    assert done.code == 0, done
    found = pixels(tmp_path / "filled.png")
    planes = found.transpose(2, 0, 1)[None].astype(np.float32)
    assert np.abs(np.array(kept(torch.as_tensor(planes))) - FACTS["inpainting_big"]["pixels"]).max() <= 1
    assert np.array_equal(found[~mask], image[~mask])
    assert np.abs(found[mask].astype(int) - image[mask]).max() > 20


def test_inpainting_latents(model: Callable[[str], Path]) -> None:
    image, mask = to_fill()
    masks = png(np.repeat(255 * mask.astype(np.uint8)[..., None], 3, axis=2))
    with Session(ModelSpec(str(model("inpainting_big"))), FP32) as session:
        for run, settings in RUNS.items():
            request = GenerationRequest("", image=png(image), mask=masks, seed=SEED, steps=STEPS, **settings)
            (picture,) = session.draw([request])
            assert apart(picture.latents, FACTS["inpainting_big"][run]) < 1e-4, run
