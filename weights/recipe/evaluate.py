"""Score an exported model: does a prompt give its object on its background, also for pairs never trained on?

A sample's background is the nearest of the ten colours to the median of its border. Its object is that of
the nearest clean view of all emoji on that background, at 16 × 16 pixels. On real held-out images this
classifier should be right nearly always; its own scores are printed first.

    python weights/recipe/evaluate.py weights/tiny-emoji --sheet weights/contact-sheet.png
"""

import argparse
from pathlib import Path

import numpy
import torch
from data import (
    BACKGROUNDS,
    DEFAULT_FONT,
    OBJECT_NAMES,
    caption,
    held_out_background,
    reference_images,
    render_dataset,
    save_grid,
    to_float,
)
from torch import Tensor
from torch.nn import functional as F

from ldmcli.checkpoints.source import open_model
from ldmcli.pipeline import load_pipeline
from ldmcli.request import GenerationRequest
from ldmcli.runtime.policy import choose_runtime

Pairs = list[tuple[int, int]]


class Judge:
    """Names the object and the background of images (N, 3, 64, 64) in [-1, 1]."""

    def __init__(self, font: Path) -> None:
        self.colours = to_float(torch.tensor(list(BACKGROUNDS.values())))
        self.references = []
        for background in range(len(BACKGROUNDS)):
            images, labels = reference_images(font, background)
            self.references.append((self._shrink(to_float(images)), labels))

    @staticmethod
    def _shrink(images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 4).flatten(1)

    def backgrounds(self, images: Tensor) -> Tensor:
        border = torch.cat([images[..., :2, :].flatten(2), images[..., -2:, :].flatten(2)], dim=2)
        border = torch.cat([border, images[..., :2].flatten(2), images[..., -2:].flatten(2)], dim=2)
        return torch.cdist(border.median(dim=2).values, self.colours).argmin(dim=1)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        backgrounds, objects = self.backgrounds(images), []
        for small, background in zip(self._shrink(images), backgrounds.tolist(), strict=True):
            views, labels = self.references[background]
            objects.append(labels[(views - small).square().sum(dim=1).argmin()])
        return torch.stack(objects), backgrounds


class Model:
    """An exported folder behind the pipeline that `ldm txt2img` uses, in float32."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = load_pipeline(open_model(folder), choose_runtime("cpu", "fp32"))

    def images(self, prompts: list[str], guidance_scale: float, steps: int, first_seed: int) -> Tensor:
        """One image (3, 64, 64) in [-1, 1] of each prompt, with seeds counting up."""
        requests = [
            GenerationRequest(prompt, seed=first_seed + i, steps=steps, guidance_scale=guidance_scale)
            for i, prompt in enumerate(prompts)
        ]
        batches = [requests[start : start + 30] for start in range(0, len(requests), 30)]
        pictures = numpy.stack([picture for batch in batches for picture in self.pipeline.draw(batch)])
        return to_float(torch.from_numpy(pictures).permute(0, 3, 1, 2))


def seen_pairs(shift: int) -> Pairs:
    """Every object once, on a background it was trained on."""
    return [(i, (held_out_background(i) + 1 + (i + shift) % 9) % 10) for i in range(len(OBJECT_NAMES))]


def held_out_pairs() -> Pairs:
    return [(i, held_out_background(i)) for i in range(len(OBJECT_NAMES))]


def accuracy(judge: Judge, images: Tensor, pairs: Pairs) -> tuple[float, float, Tensor]:
    objects, backgrounds = judge(images)
    wanted = torch.tensor(pairs)
    right = objects == wanted[:, 0]
    return right.float().mean().item(), (backgrounds == wanted[:, 1]).float().mean().item(), right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 5.0, 7.5])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=1, help="images of each object in each cell")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of all objects")
    parser.add_argument("--sheet-guidance", type=float, default=3.0)
    args = parser.parse_args()

    judge, model = Judge(args.font), Model(args.folder)
    real = render_dataset(args.font, jitters=2, seed=12345)
    pairs = torch.stack([real["objects"], real["backgrounds"]], dim=1)[real["held_out"]].tolist()
    scores = accuracy(judge, to_float(real["images"][real["held_out"]]), pairs)
    print(f"judge on {len(pairs)} real held-out images: object {scores[0]:.3f}, background {scores[1]:.3f}")
    if args.sheet:
        prompts = [caption(o, b) for o, b in seen_pairs(0)]
        save_grid(model.images(prompts, args.sheet_guidance, args.steps, first_seed=0), args.sheet)

    print("| guidance | object, seen | object, held out | background, seen | background, held out |")
    print("|---|---|---|---|---|")
    missed: dict[str, int] = {}
    for guidance in args.guidance:
        row = []
        for pairs in (
            [pair for shift in range(args.rounds) for pair in seen_pairs(shift)],
            held_out_pairs() * args.rounds,
        ):
            prompts = [caption(o, b) for o, b in pairs]
            *scores, right = accuracy(judge, model.images(prompts, guidance, args.steps, args.seed), pairs)
            row.append(scores)
            for (o, _), good in zip(pairs, right.tolist(), strict=True):
                missed[OBJECT_NAMES[o]] = missed.get(OBJECT_NAMES[o], 0) + (not good)
        (seen_object, seen_ground), (held_object, held_ground) = row
        scores = (seen_object, held_object, seen_ground, held_ground)
        print(f"| {guidance:g} | " + " | ".join(f"{score:.2f}" for score in scores) + " |", flush=True)
    worst = sorted(missed.items(), key=lambda item: (-item[1], item[0]))[:12]
    print("most often missed:", ", ".join(f"{name} {count}" for name, count in worst if count))


if __name__ == "__main__":
    main()
