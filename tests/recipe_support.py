"""The training recipe's modules, and a run's folder that needs no emoji font.

The recipe's scripts import each other as plain modules; they are imported here once, with their folder on the path only
meanwhile, since some of their names are those of other projects.
"""

import argparse
import contextlib
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from PIL import Image, ImageDraw

RECIPE = Path(__file__).parents[1] / "weights" / "recipe"
EMOJI = ("red apple", "unicorn", "red heart", "happy face")  # two of them have a kind
VIEWS = 4


def recipe_module(name: str) -> ModuleType:
    """A script of the recipe, imported."""
    sys.path.insert(0, str(RECIPE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPE))


def call_main(name: str, *arguments: object) -> None:
    """What `python weights/recipe/NAME.py ARGUMENTS` does, in this process."""
    with mock.patch.object(sys, "argv", [f"{name}.py", *map(str, arguments)]):
        recipe_module(name).main()


def finish(*command: object) -> str:
    """What a Python command prints; it must succeed. One thread is enough for stages this small."""
    words, env = [sys.executable, *map(str, command)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def glyphs() -> list[Image.Image]:
    """A picture for each of EMOJI: a disc, a square, a triangle and a ring."""
    pictures = [Image.new("RGBA", (64, 64), (0, 0, 0, 0)) for _ in EMOJI]
    disc, square, triangle, ring = map(ImageDraw.Draw, pictures)
    disc.ellipse((0, 0, 63, 63), fill=(220, 20, 30, 255))
    square.rectangle((0, 0, 63, 63), fill=(240, 240, 255, 255))
    triangle.polygon(((0, 0), (63, 0), (32, 63)), fill=(255, 60, 40, 255))
    ring.ellipse((0, 0, 63, 63), outline=(255, 210, 60, 255), width=16)
    return pictures


def write_dataset(run: Path, seed: int = 0) -> None:
    """What data.py writes, of `glyphs` in the preset `smoke`."""
    by_name = {one.name: one.character for one in recipe_module("emoji")._listed()}
    dataset = recipe_module("data").render_dataset(recipe_module("presets").SMOKE, glyphs(), VIEWS, seed)
    characters = [by_name[name] for name in EMOJI]
    recipe_module("training").save_atomically({**dataset, "characters": characters}, run / "dataset.pt")


def copy_run(run: Path, target: Path, *without: str) -> Path:
    """A copy of a run's folder that lacks some results."""
    return shutil.copytree(run, target, ignore=lambda _folder, names: [name for name in names if name in without])


def take_team_step(folder: Path) -> None:
    """One step of stage 2 by this process or its team on the batch in `folder`, each with its share, in float32; leaves
    gradients, weights, and what `Team` said in a file for each process."""
    train_unet, training = recipe_module("train_unet"), recipe_module("training")
    team = training.Team()
    args = argparse.Namespace(out=folder, start=None, device="cpu", average=0.99, rate=1e-3, optimizer="muon")
    torch.manual_seed(0)
    stage = train_unet.Stage2(recipe_module("presets").SMOKE, args, team)
    torch.nn.init.normal_(stage.denoiser.unet.conv_out.weight, std=0.1)  # so that layers before it learn, too
    batch = tuple(part[team.rank :: team.size] for part in torch.load(folder / "batch.pt"))
    with mock.patch.object(train_unet, "half_precision", return_value=contextlib.nullcontext()):
        told = stage.learn(batch, 1e-3, 0.25 * (team.rank + 1), team)
    found = {
        "told": told,
        "gradients": torch.cat([p.grad.flatten() for p in stage.denoiser.parameters() if p.grad is not None]),
        "weights": torch.cat([p.detach().flatten() for p in stage.denoiser.parameters()]),
        "rows": team.together(torch.arange(5.0)[team.rank :: team.size, None], 5),
    }
    training.save_atomically(found, folder / f"rank_{team.rank}_of_{team.size}.pt")
