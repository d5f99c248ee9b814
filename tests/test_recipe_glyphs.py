"""Small models of classes and maps: they learn, go on, and leave files that draw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import ldm_here, pixels
from PIL import Image
from recipe_support import EMOJI, call_main, glyphs, recipe_module

from ldmcli.checkpoints.load import load_conditioner, load_unet
from ldmcli.checkpoints.source import open_model

train_glyphs = recipe_module("train_glyphs")
FAST = ("--steps", "2", "--device", "cpu", "--dtype", "fp32", "--no-server", "-s", "1")


@pytest.fixture
def font(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [one for one in recipe_module("emoji")._listed() if one.name in EMOJI]
    known.sort(key=lambda one: EMOJI.index(one.name))
    monkeypatch.setattr(train_glyphs, "load_glyphs", lambda preset, font: (known, glyphs()))


def learn(kind: str, out: Path, steps: int, *more: object) -> Path:
    call_main("train_glyphs", kind, "--out", out, "--batch", "4", "--views", "4", "--steps", steps, *more)
    return out / "model.safetensors"


def test_both_kinds_learn_and_their_files_draw(font: None, tmp_path: Path) -> None:
    by_map = learn("map", tmp_path / "map", 2)
    by_class = learn("class", tmp_path / "class", 2, "--start", tmp_path / "map" / "checkpoint.pt")
    learn("class", tmp_path / "class", 3)  # goes on
    for path, named in ((by_map, "semantic synthesis"), (by_class, "class-conditional")):
        source, device = open_model(path), torch.device("cpu")
        kept = torch.load(path.with_name("checkpoint.pt"), weights_only=True)
        loaded = {"unet": load_unet(source, device, torch.float32)}
        loaded["encoder"] = load_conditioner(source, device, torch.float32)
        for part, network in loaded.items():
            for name, weight in network.state_dict().items():
                learnt = kept["average"][f"{part}.{name}"]
                assert torch.allclose(weight, learnt, rtol=1e-3, atol=1e-4), name
        assert f"is: {named} latent diffusion\n".encode() in ldm_here("info", path).out
    assert kept["step"] == 3
    drawn = ldm_here("sample", "-m", by_class, "--label", EMOJI[1], "--size", "64x64", *FAST, "-o", tmp_path / "a.png")
    assert drawn.code == 0, drawn.err
    Image.fromarray(np.full((64, 128), 3, np.uint8)).save(tmp_path / "map.png")
    drawn = ldm_here("sample", "-m", by_map, "--map", tmp_path / "map.png", *FAST, "-o", tmp_path / "b.png")
    assert drawn.code == 0, drawn.err
    assert pixels(tmp_path / "b.png").shape == (64, 128, 3)


def test_maps_have_the_emoji_inside_its_shape_and_the_background_outside() -> None:
    sprites_module = recipe_module("sprites")
    views = sprites_module.random_views(len(EMOJI), 1, 64, torch.Generator().manual_seed(0))
    sprites = sprites_module.Sprites(glyphs(), 64, torch.device("cpu"))
    maps, pictures = train_glyphs.class_maps(sprites, views, 1, len(EMOJI)), sprites.compose(views)
    for number, ground, colour, found, picture in zip(
        views.objects, views.backgrounds, views.colours, maps, pictures, strict=True
    ):
        outside = found == len(EMOJI) + ground
        assert (outside | (found == number)).all()
        plain = (picture - colour[:, None, None]).abs().amax(0) <= 1
        assert (plain == outside).float().mean() > 0.9  # but for edges
