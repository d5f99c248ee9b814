"""Models that read pictures: told apart, by the commands that draw with them, and what they refuse."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import assert_refused, ldm, ldm_here, pixels
from paper_models import shapes_of, unet_shapes, write_model
from picture_models import LATENTS, PICTURED, low_res, png, small, to_fill
from PIL import Image

from ldmcli.checkpoints.file_kinds import describe_single_file
from ldmcli.checkpoints.key_map import disk_names
from ldmcli.checkpoints.load import on_meta
from ldmcli.checkpoints.single_file import unet_from_shapes
from ldmcli.images.metadata import read_record
from ldmcli.networks.unet import UNet
from ldmcli.sampling.guidance import in_patches
from ldmcli.sampling.schedule import Step

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = {"bsr_sr": "super-resolution latent diffusion", "inpainting_big": "inpainting latent diffusion"}
READS = {"bsr_sr": "low_res", "inpainting_big": "masked"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("pictured")

    def written(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        return path if path.exists() else write_model(path, small(name))

    return written


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "small.png"
    path.write_bytes(png(low_res(LATENTS)))
    return path


@pytest.mark.parametrize("name", PICTURED)
def test_published_unets_have_every_key_and_no_other(name: str) -> None:
    shapes = unet_shapes(PICTURED[name])
    config = unet_from_shapes(shapes, 0)
    unet = on_meta(lambda: UNet(config))
    names = disk_names(unet.state_dict(), config, original=True)
    assert {name for found in names.values() for name in found} | {"out.2.weight", "out.2.bias"} == set(shapes)
    assert round(sum(map(math.prod, shapes.values())) / 1e6, 1) == PICTURED[name].parameters


@pytest.mark.parametrize("name", PICTURED)
def test_each_is_told_by_its_structure(name: str, model: Callable[[str], Path]) -> None:
    """Inpainting's checkpoint has the first stage twice: it encodes the condition too."""
    stage = {"first_stage_model.decoder.conv_in.weight": (512, 3, 3, 3)}
    again = {"cond_stage_model.decoder.conv_in.weight": (512, 3, 3, 3)} if name == "inpainting_big" else {}
    for one in (PICTURED[name], small(name)):
        assert describe_single_file(shapes_of(one) | stage | again) == FAMILIES[name]
    facts = ldm_here("info", "--json", model(name)).records[0]
    assert (facts["is"], facts["family"], facts["reads"]) == (FAMILIES[name], FAMILIES[name], READS[name])


# ---- patches ----


def test_patches_of_a_function_of_each_place_give_that_function() -> None:
    step = Step.ddpm(0, 500.0, 0.5, 0.6)
    for shape in ((2, 3, 33, 50), (1, 3, 16, 40), (1, 3, 17, 16)):
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        seen: list[tuple[int, ...]] = []

        def double(part: torch.Tensor, step: Step, seen: list[tuple[int, ...]] = seen) -> torch.Tensor:
            seen.append(tuple(part.shape[2:]))
            return 2 * part

        assert torch.allclose(in_patches(double, 16)(latents, step), 2 * latents, atol=1e-6)
        assert set(seen) == {(16, 16)}
        down, across = (math.ceil((side - 16) / 8) + 1 for side in shape[2:])
        assert len(seen) == down * across


# ---- ldm upscale ----


def test_upscale(model: Callable[[str], Path], picture: Path, tmp_path: Path) -> None:
    """The record says how; the same seed gives the same, another or none else; sizes and transparency as ever."""
    options = ("upscale", picture, "-m", model("bsr_sr"), "--steps", "2", "-o")
    done = ldm_here(*options, tmp_path / "a.png", "--seed", "4", "--json")
    assert done.code == 0, done
    assert (done.records[0]["width"], done.records[0]["height"]) == (40, 24)
    ldm_here(*options, tmp_path / "b.png", "--seed", "4")
    random = ldm_here(*options, tmp_path / "c.png")
    assert "seed " in random.err
    first, again, other = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert first.shape == (24, 40, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    text = Image.open(tmp_path / "a.png").info["parameters"]
    assert "Postprocess upscaler: bsr_sr, Postprocess steps: 2" in text
    assert "Postprocess eta: 1.0" in text
    assert "Postprocess seed: 4" in text
    see_through = tmp_path / "alpha.png"
    Image.open(picture).convert("RGBA").save(see_through)
    ldm_here("upscale", see_through, *options[2:], tmp_path / "d.png", "--size", "100x60", "--seed", "4")
    with Image.open(tmp_path / "d.png") as large:
        assert (large.mode, large.size) == ("RGBA", (100, 60))


def test_upscale_by_patches(model: Callable[[str], Path], picture: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(png(low_res((24, 32))))
    found = []
    for tile in ("0", "16", "128"):
        out = tmp_path / f"{tile}.png"
        options = ("--steps", "2", "--seed", "1", "--tile", tile, "--dtype", "fp32", "-o", out)
        assert ldm_here("upscale", large, "-m", model("bsr_sr"), *options).code == 0
        found.append(pixels(out))
    assert np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])
    assert_refused(
        ldm_here("upscale", large, "-m", model("bsr_sr"), "--tile", "5", "-o", tmp_path / "x.png"), 2, "less than 16"
    )


def test_upscale_refuses(model: Callable[[str], Path], picture: Path, tmp_path: Path) -> None:
    """As real processes: what is typed wrong, and files of other kinds."""
    out = tmp_path / "x.png"
    drawing = ("upscale", picture, "-o", out, "-m", model("bsr_sr"))
    assert_refused(ldm(*drawing, "--noise-level", "10"), 2, "noise_level is for a model")
    assert_refused(ldm(*drawing, "--prompt", "a fox"), 2, "reads a picture alone")
    assert_refused(ldm_here(*drawing, "-g", "4"), 2, "guidance_scale is not for this model")
    assert_refused(ldm_here(*drawing, "--steps", "0"), 2, "steps 0")
    assert_refused(ldm_here(*drawing, "--eta", "2"), 2, "eta 2")
    assert_refused(ldm_here("upscale", picture, "-o", out, "--steps", "3"), 2, "--steps is for models that draw")
    gone = ldm_here("upscale", picture, "-m", "gone.safetensors", "-o", out, "--steps", "3")
    assert_refused(gone, 66, "gone.safetensors does not exist")
    masked = ("upscale", picture, "-o", out, "-m", model("inpainting_big"))
    assert_refused(ldm_here(*masked), 65, "is an inpainting latent diffusion, not an upscaler")
    assert_refused(ldm_here(*drawing[:-1], tmp_path), 65, "without model_index.json")
    assert_refused(ldm_here(*drawing[:-1], tmp_path / "none.safetensors"), 66)
    drawn = ldm_here("a fox", "--upscale", model("bsr_sr"), "-o", out)
    assert_refused(drawn, 65, "not an upscaler; enlarge what is drawn with it by ldm upscale -m")
    assert not out.exists()


# ---- ldm img2img and rows ----


def files_to_fill(folder: Path) -> tuple[Path, Path]:
    image, mask = to_fill()
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "image.png", folder / "mask.png"


def test_a_filled_picture_is_drawn_again_from_its_record(model: Callable[[str], Path], tmp_path: Path) -> None:
    image, mask = files_to_fill(tmp_path)
    options = ("--steps", "2", "--seed", "3", "-o")
    first = ldm_here(
        "img2img", "-m", model("inpainting_big"), "-i", image, "--mask", mask, *options, tmp_path / "a.png"
    )  # fmt: skip
    assert first.code == 0, first
    request = read_record(tmp_path / "a.png")["request"]
    assert (request["prompt"], request["strength"]) == ("", 1.0)
    again = ldm_here("img2img", "--from-image", tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert again.code == 0, again
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_rows_name_pictures_and_need_no_prompt(model: Callable[[str], Path], picture: Path, tmp_path: Path) -> None:
    image, mask = files_to_fill(tmp_path)
    for name, row in (
        ("bsr_sr", {"image": str(picture), "patch": 16}),
        ("inpainting_big", {"image": str(image), "mask": str(mask)}),
    ):
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text(json.dumps({"prompt": "", "steps": 2} | row) + "\n")
        done = ldm_here("batch", rows, "-m", model(name), "-o", tmp_path / name, "--json")
        assert done.code == 0, done
        (path,) = (tmp_path / name).rglob("*.png")
        assert pixels(path).shape == (24, 40, 3)
        again = ldm_here("batch", rows, "-m", model(name), "-o", tmp_path / name)
        assert again.code == 0, again
        assert len(list((tmp_path / name).rglob("*.png"))) == 1


def test_what_a_model_that_reads_pictures_refuses(
    model: Callable[[str], Path], picture: Path, model_file: Path, tmp_path: Path
) -> None:
    image, mask = files_to_fill(tmp_path)
    fill = ("img2img", "-m", model("inpainting_big"), "-o", tmp_path, "-i", image)
    enlarge = ("img2img", "-m", model("bsr_sr"), "-o", tmp_path, "-i", picture)
    assert_refused(ldm_here(*fill), 2, "give a picture and a mask")
    assert_refused(ldm_here(*fill, "--mask", mask, "a dog"), 2, "prompt is not for this model")
    assert_refused(ldm_here(*fill, "--mask", mask, "--patch", "64"), 2, "patch is for a model that enlarges")
    assert_refused(ldm_here(*enlarge, "--strength", "0.5"), 2, "strength is not for a model that enlarges")
    assert_refused(ldm_here(*enlarge, "--hires", "2"), 2, "hires is not for a model that edits pictures, enlarges")
    assert_refused(ldm_here("sample", "-m", model("bsr_sr"), "-o", tmp_path), 2, "give it one")
    assert_refused(ldm_here("sample", "-m", model("inpainting_big"), "-o", tmp_path), 2, "give a picture and a mask")
    assert_refused(ldm_here("img2img", "-m", model_file, "-i", image, "-o", tmp_path), 2, "give a PROMPT")
    Image.new("L", (40, 24)).save(mask)
    assert_refused(ldm_here(*fill, "--mask", mask), 65, "leaves nothing to repaint")
