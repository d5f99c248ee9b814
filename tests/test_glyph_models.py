"""What the small models of semantic maps and of classes that come along can do, judged by colours."""

from pathlib import Path

import numpy as np
from cli_support import assert_refused, ldm_here, pixels
from PIL import Image

FOLDER = Path(__file__).parents[1] / "weights" / "tiny-glyphs"
MODEL, CLASSES = FOLDER / "map.safetensors", FOLDER / "class.safetensors"
FAST = ("--steps", "20", "--device", "cpu", "--dtype", "fp32", "--no-server", "-s", "1", "-o")
COLOURS = {"red": (215, 50, 50), "green": (80, 160, 80), "blue": (50, 100, 220), "yellow": (250, 215, 70)}


def named(colours: np.ndarray) -> str:
    """The nearest of COLOURS to the median of colours (…, 3)."""
    median = np.median(colours.reshape(-1, 3), axis=0)
    return min(COLOURS, key=lambda name: float(np.square(median - COLOURS[name]).sum()))


def test_info_says_what_it_is() -> None:
    printed = ldm_here("info", MODEL).out.decode()
    assert "is: semantic synthesis latent diffusion\n" in printed
    assert "conditioned on: map\n" in printed
    listed = (FOLDER / "map.classes.txt").read_text().splitlines()
    assert f"classes: {len(listed)}\n" in printed


def test_a_map_says_what_is_where(tmp_path: Path) -> None:
    number = {name: i for i, name in enumerate((FOLDER / "map.classes.txt").read_text().splitlines())}
    down, across = np.mgrid[0:64, 0:128]
    classes = np.full((64, 128), number["blue background"])
    for name, middle in (("lemon", 32), ("red heart", 96)):
        classes[(down - 32) ** 2 + (across - middle) ** 2 < 24**2] = number[name]
    Image.fromarray(classes.astype(np.uint8)).save(tmp_path / "map.png")
    result = ldm_here("sample", "-m", MODEL, "--map", tmp_path / "map.png", *FAST, tmp_path / "drawn.png")
    assert result.code == 0, result.err
    drawn = pixels(tmp_path / "drawn.png")
    assert drawn.shape == (64, 128, 3)
    places = {"blue": drawn[:6], "yellow": drawn[24:40, 24:40], "red": drawn[24:40, 88:104]}
    assert {name: named(place) for name, place in places.items()} == {name: name for name in places}


def test_a_class_is_drawn_by_its_name_or_number(tmp_path: Path) -> None:
    names = (FOLDER / "class.classes.txt").read_text().splitlines()
    wanted = {"red heart": "red", "green heart": "green", "blue heart": "blue", "lemon": "yellow"}
    labels = ["red heart", str(names.index("green heart")), "blue heart", "lemon"]
    given = [word for label in labels for word in ("--label", label)]
    result = ldm_here("sample", "-m", CLASSES, *given, "-g", "3", *FAST, tmp_path)
    assert result.code == 0, result.err
    drawn = [pixels(path) for path in result.paths]
    assert {picture.shape for picture in drawn} == {(64, 64, 3)}  # the file says so
    assert [named(picture[24:40, 24:40]) for picture in drawn] == list(wanted.values())


def test_pictures_are_not_read_by_half_an_autoencoder(tmp_path: Path) -> None:
    words = ("sample", "-m", CLASSES, "--label", "3", "--hires", "2", "--hires-upscaler", "lanczos", *FAST, tmp_path)
    assert_refused(ldm_here(*words), 2, "the autoencoder only decodes", "--vae")


def test_info_says_what_the_model_of_classes_is() -> None:
    printed = ldm_here("info", CLASSES).out.decode()
    assert "is: class-conditional latent diffusion\n" in printed
    assert "conditioned on: label\n" in printed
    assert "default size: 64x64\n" in printed
