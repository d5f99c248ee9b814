"""What the model that comes with the program can do, judged by colours alone: `weights/recipe/evaluate.py` does it by
the shapes of every emoji, for which it needs their font."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import spandrel
import torch
from cli_support import ldm_here, pixels
from oracle.comparing import pictures_of

from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.spec import GenerationRequest

# weights/recipe/emoji.py
BACKGROUNDS = {
    "red": (200, 40, 48), "orange": (240, 140, 40), "yellow": (250, 225, 90), "green": (60, 160, 80),
    "blue": (50, 100, 220), "purple": (130, 70, 180), "pink": (250, 170, 200), "gray": (128, 128, 128),
    "white": (250, 250, 250), "black": (16, 16, 16),
}  # fmt: skip
# The colours of Noto's hearts at their middle, as the training images have them
HEARTS = {
    "red": (244, 67, 54), "orange": (255, 145, 0), "yellow": (255, 214, 46), "green": (139, 178, 56),
    "blue": (33, 115, 215), "purple": (170, 71, 188), "black": (65, 65, 70), "white": (224, 224, 224),
}  # fmt: skip

Draw = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def draw(embedded_pipeline: Pipeline) -> Draw:
    """Pictures (N, 64, 64, 3) of prompts, whose seeds count up; the settings of a request, or the model's own."""

    def drawn(*prompts: str, first_seed: int = 500, **settings: object) -> np.ndarray:
        requests = [GenerationRequest(text, seed=first_seed + i, **settings) for i, text in enumerate(prompts)]
        return pictures_of(embedded_pipeline, requests)

    return drawn


def nearest(colour: np.ndarray, named: dict[str, tuple[int, int, int]]) -> str:
    return min(named, key=lambda name: float(np.square(colour - np.array(named[name])).sum()))


def border(picture: np.ndarray) -> np.ndarray:
    """The median colour of the outermost two pixels."""
    edges = [picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3), picture[:, :2].reshape(-1, 3)]
    return np.median(np.concatenate([*edges, picture[:, -2:].reshape(-1, 3)]), axis=0)


def foreground(picture: np.ndarray) -> np.ndarray:
    """Which pixels differ from the border: bool (64, 64)."""
    return np.abs(picture.astype(float) - border(picture)).max(axis=2) > 40


def heart_colour(picture: np.ndarray) -> str:
    return nearest(np.median(picture[foreground(picture)], axis=0), HEARTS)


def grounds(pictures: np.ndarray) -> list[str]:
    return [nearest(border(picture), BACKGROUNDS) for picture in pictures]


def share(found: list[str], wanted: list[str]) -> float:
    return float(np.mean([one == other for one, other in zip(found, wanted, strict=True)]))


@pytest.mark.parametrize("settings", [{}, {"sampler": "plms", "steps": 20}], ids=["as the model says", "plms"])
def test_backgrounds_and_hearts_have_their_colours(draw: Draw, settings: dict[str, object]) -> None:
    places = list(BACKGROUNDS)
    pictures = draw(*(f"a penguin on {place}" for place in places), **settings)
    assert share(grounds(pictures), places) == 1
    # pink is a background that no heart is lost on
    pictures = draw(*(f"{colour} heart on pink" for colour in HEARTS), **settings)
    assert share([heart_colour(picture) for picture in pictures], list(HEARTS)) >= 0.8


def test_seeds_vary_place_and_size(draw: Draw) -> None:
    pictures = draw(*["a red apple on a blue background"] * 8)
    assert grounds(pictures) == ["blue"] * 8
    masks = [foreground(picture) for picture in pictures]
    centres = np.array([np.argwhere(mask).mean(axis=0) for mask in masks])
    assert centres.std(axis=0).min() > 1.5
    assert np.sqrt([mask.sum() for mask in masks]).std() > 2


def test_a_negative_prompt_takes_its_colour_away(draw: Draw) -> None:
    prompts = ["a heart on a gray background"] * 8
    plain = [heart_colour(picture) for picture in draw(*prompts)]
    without = [heart_colour(picture) for picture in draw(*prompts, negative_prompt=f"{plain[0]} heart")]
    assert len(set(plain)) > 2
    assert without.count(plain[0]) < plain.count(plain[0])


def test_red_heart_against_red(draw: Draw) -> None:
    """A prompt that asks for red is not denied it, however strong the guidance."""
    prompts = ["red heart on a white background"] * 4
    plain = draw(*prompts)
    assert [heart_colour(picture) for picture in plain] == ["red"] * 4
    for scale in (2.5, 7.5):
        without = draw(*prompts, negative_prompt="red", guidance_scale=scale)
        assert [heart_colour(picture) for picture in without] == ["red"] * 4
        assert abs(without.astype(int) - plain).mean() > 0.5


def test_short_unknown_words_leave_the_background(draw: Draw) -> None:
    prompts = ["zxqv, blue background", "a lighthouse on a red background", "a teapot on a green background"]
    assert grounds(draw(*prompts)) == ["blue", "red", "green"]


def test_make_demo_draws_256_pixels_a_side_by_the_models_own_network_as_spandrel_computes_it(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    makefile = (root / "Makefile").read_text()
    (prompt,) = re.findall(r"^DEMO_PROMPT \?= (.*)$", makefile, re.M)
    (command,) = re.findall(r"^\t\$\(BIN\)/ldm (txt2img .*) --output \$\(DEMO_OUTPUT\)", makefile, re.M)
    words = [*shlex.split(command.replace("$(DEMO_PROMPT)", prompt)), "--dtype", "fp32", "--output"]
    large = pixels(ldm_here(*words, tmp_path / "large").paths[0])
    assert large.shape == (256, 256, 3)
    assert abs(large.astype(int) - pixels(root / "weights" / "demo.png")).mean() < 2
    words = [word for word in words if word not in ("--upscale", "embedded")]
    small = pixels(ldm_here(*words, tmp_path / "small").paths[0])
    net = spandrel.ModelLoader().load_from_file(root / "weights" / "tiny-emoji" / "upscaler" / "model.safetensors")
    with torch.inference_mode():
        values = net.float()(torch.tensor(small).permute(2, 0, 1)[None] / 255)
    expected = (values[0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert abs(large.astype(int) - expected).max() <= 1
