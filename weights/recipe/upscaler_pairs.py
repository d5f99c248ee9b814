"""Pairs for the upscaler: what the embedded model makes of an emoji at its own size, and the emoji in its place at four
times the size.

Each view of an emoji on a background has two small pictures: as the model's VAE gives it back, and as the model draws
it from there with its caption, as `ldm img2img` does. Little is drawn anew, so that emoji stay where they are. The
background that is held out for an emoji in training is held out here too.

Killed, the same command goes on; what is there can be trained on while it is at work.

    python weights/recipe/upscaler_pairs.py
"""

import argparse
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from data import DEFAULT_FONT, LARGEST, SMALLEST, Colour, compose, load_glyphs, shaded, stack, to_float
from drawing import Artist
from emoji import BACKGROUNDS, Captions
from generate import generate
from PIL import Image
from presets import PRESETS, RUNS
from questions import Pair
from sprites import Sprites, random_views
from tokenizer import tokenise
from torch import Tensor
from train_vae import reconstruct
from training import load, save_atomically

from ldmcli.checkpoints.load import load_text_encoders, load_unet, load_vae
from ldmcli.checkpoints.source import open_model
from ldmcli.spec import GenerationRequest

SCALE = 4
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6)
STEPS = 12  # of which the strength's share is taken
GUIDANCE = 2.5
BATCH = 16  # pictures drawn together, at one strength
FILE = "upscaler_pairs.pt"  # in the run's folder
KINDS = ("reconstructed", "drawn")


class View(NamedTuple):
    """An emoji on a shade of a background, in pixels of the small picture: where its square begins, and its side."""

    pair: Pair
    colour: Colour
    side: int
    left: int
    top: int

    def picture(self, glyphs: Sequence[Image.Image], size: int, scale: int = 1) -> Tensor:
        """uint8 (3, size · scale, size · scale); the emoji lies at the same place at every scale."""
        room = max(1, size - self.side)
        place = self.left / room, self.top / room
        image = compose(glyphs[self.pair.emoji], self.colour, size * scale, self.side / size, place)
        return stack([image])[0]


def views_of(emoji: int, count: int, size: int, seed: int) -> list[View]:
    """`count` views of each emoji on each background, in an order without one."""
    rng, views = random.Random(seed), []
    for pair in (Pair(e, b) for e in range(emoji) for b in range(len(BACKGROUNDS)) for _ in range(count)):
        side = rng.randint(round(SMALLEST * size), round(LARGEST * size))
        left, top = (rng.randint(0, size - side) for _ in range(2))
        views.append(View(pair, shaded(list(BACKGROUNDS.values())[pair.background], rng), side, left, top))
    rng.shuffle(views)
    return views


def requests_of(views: Sequence[View], images: Tensor, captions: Captions, seed: int) -> list[GenerationRequest]:
    """What has each view drawn anew in part; strengths change from batch to batch."""
    requests = []
    for number, (view, image) in enumerate(zip(views, images, strict=True)):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "png")
        strength = STRENGTHS[number // BATCH % len(STRENGTHS)]
        prompt = captions.fullest(*view.pair)
        request = GenerationRequest(prompt, seed=seed + number, steps=STEPS, image=file.getvalue(), strength=strength)
        requests.append(request)
    return requests


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def pairs_arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what says which pairs: they are the same for all who ask for the same."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("weights/tiny-emoji"), help="the model")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="the model's (default: cpu)")
    parser.add_argument("--out", type=Path, default=RUNS, help="folder of the run (default: runs/recipe)")
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT)
    parser.add_argument("--views", type=int, default=3, help="of each emoji on each background (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


class Pairs:
    """The views that were asked for, and their small pictures once they are drawn."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.size = PRESETS[args.preset].size
        self.emoji, self.glyphs = load_glyphs(PRESETS[args.preset], args.font)
        self.views = views_of(len(self.emoji), args.views, self.size, args.seed)
        self.held_out = torch.tensor([view.pair.held_out for view in self.views])

    def small(self) -> Tensor:
        """The emoji as they are at the model's size."""
        return torch.stack([view.picture(self.glyphs, self.size) for view in self.views])

    def large(self, chosen: Tensor) -> Tensor:
        """Some of the emoji at the upscaler's size, uint8."""
        return torch.stack([self.views[i].picture(self.glyphs, self.size, SCALE) for i in chosen.tolist()])


class PairsOnDevice:
    """Pairs of other views, all made on a device at once: on a GPU that takes seconds, and `Pairs` an hour."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        size = PRESETS[args.preset].size
        self._emoji, glyphs = load_glyphs(PRESETS[args.preset], args.font)
        generator = torch.Generator(device).manual_seed(args.seed)
        self.views = random_views(len(glyphs), args.views, size, generator)
        self.held_out = self.views.held_out
        self._small, self._large = (Sprites(glyphs, size, device, scale) for scale in (1, SCALE))

    def large(self, chosen: Tensor) -> Tensor:
        """Some of the emoji at the upscaler's size, uint8."""
        return self._large.compose(self.views[chosen])

    @torch.no_grad()
    def drawn(self, folder: Path, batch: int = 512) -> dict[str, Tensor]:
        """What `main` leaves in its file: uint8 pictures (N, 3, size, size) of each kind."""
        source, device, found = open_model(folder), self.held_out.device, {kind: [] for kind in KINDS}
        unet, vae = (one(source, device, torch.float32) for one in (load_unet, load_vae))
        text = load_text_encoders(source, device, torch.float32)[0].model
        captions = Captions(self._emoji)
        for number, start in enumerate(range(0, len(self.views), batch)):
            views = self.views[slice(start, start + batch)]
            pairs = torch.stack([views.objects, views.backgrounds], 1).tolist()
            tokens = tokenise(folder / "tokenizer", ["", *(captions.fullest(*pair) for pair in pairs)])
            context, _ = text(tokens.to(device))
            means = vae.encode(to_float(self._small.compose(views))).mean
            images = generate(
                unet,
                vae,
                context[1:],
                context[:1],
                seeds=list(range(start, start + len(views))),
                guidance_scale=GUIDANCE,
                steps=STEPS,
                begun=means * vae.config.scaling_factor,
                strength=STRENGTHS[number % len(STRENGTHS)],
            )
            for kind, made in zip(KINDS, (vae.decode(means), images), strict=True):
                found[kind].append(to_bytes(made))
        return {kind: torch.cat(batches) for kind, batches in found.items()}


def main() -> None:
    args = pairs_arguments(__doc__).parse_args()
    pairs, path = Pairs(args), args.out / FILE
    small = pairs.small()
    found = load(path) if path.exists() else {}
    if "reconstructed" not in found:
        vae = load_vae(open_model(args.folder), torch.device("cpu"), torch.float32)
        found = {"reconstructed": to_bytes(reconstruct(vae, small)), "drawn": small[:0]}
        save_atomically(found, path)
    with Artist(args.folder, processes=1, batch=BATCH) as artist:
        requests = requests_of(pairs.views, small, Captions(pairs.emoji), args.seed)
        for start in range(len(found["drawn"]), len(requests), 10 * BATCH):
            drawn = to_bytes(artist(requests[start : start + 10 * BATCH]))
            found["drawn"] = torch.cat([found["drawn"], drawn])
            save_atomically(found, path)
            print(f"{len(found['drawn'])} of {len(requests)} drawn", flush=True)


if __name__ == "__main__":
    main()
