"""What evaluate.py asks a model for, and real pictures of the same things."""

import dataclasses
import itertools
import random
from typing import NamedTuple

import torch
from data import LARGEST, SMALLEST, compose, shaded, stack, to_float
from emoji import BACKGROUNDS, article, held_out_background
from judge import foreground
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


class Pair(NamedTuple):
    """An emoji on a background, as indices."""

    emoji: int
    background: int

    @property
    def held_out(self) -> bool:
        return self.background == held_out_background(self.emoji)


Pairs = list[Pair]


def pairs_of(emoji: int, count: int) -> Pairs:
    """`count` pairs, every other one held out of training: all emoji equally often, if there are more pairs than
    emoji, on backgrounds that change from one round over the emoji to the next."""
    found = []
    for number in range(count):
        round_, place = divmod(number, emoji)
        left = min(emoji, count - round_ * emoji)
        index = place * emoji // left
        held = held_out_background(index)
        other = (held + 1 + (index + round_) % (len(BACKGROUNDS) - 1)) % len(BACKGROUNDS)
        found.append(Pair(index, held if (place + round_) % 2 else other))
    return found


def spread(pairs: Pairs, count: int) -> Pairs:
    """Some of the pairs, seen and held out by turns, at even distances."""
    seen, held = [pair for pair in pairs if not pair.held_out], [pair for pair in pairs if pair.held_out]
    chosen = [(seen, held)[i % 2] for i in range(count)]
    return [part[i * len(part) // count] for i, part in enumerate(chosen)]


def real_pictures(glyphs: list[Image.Image], pairs: Pairs, size: int, seed: int) -> Tensor:
    """One picture of each pair, made as data.py makes them: (N, 3, size, size) in [-1, 1]."""
    rng, colours, images = random.Random(seed), list(BACKGROUNDS.values()), []
    for pair in pairs:
        scale, place = rng.uniform(SMALLEST, LARGEST), (rng.random(), rng.random())
        images.append(compose(glyphs[pair.emoji], shaded(colours[pair.background], rng), size, scale, place))
    return to_float(stack(images))


def varied(images: Tensor, seeds: int) -> dict[str, float]:
    """How much the pictures of one prompt differ, on average over prompts; images (prompts × seeds, 3, height, width),
    those of one prompt together.

    "difference": mean over pairs of pictures of their root mean square difference at 16 × 16, of 255. "place" and
    "extent": standard deviations over seeds, in pixels, of the centre of what is not background (mean of the two
    directions) and of the square root of its area.
    """
    small = F.adaptive_avg_pool2d(images, 16).flatten(1).unflatten(0, (-1, seeds)) * 127.5
    first, second = zip(*itertools.combinations(range(seeds), 2), strict=True)
    difference = (small[:, first] - small[:, second]).square().mean(dim=2).sqrt().mean()
    mask = foreground(images).float()
    area = mask.sum(dim=(1, 2)).clamp(min=1)
    down = (mask.sum(dim=2) * torch.arange(mask.shape[1])).sum(dim=1) / area
    across = (mask.sum(dim=1) * torch.arange(mask.shape[2])).sum(dim=1) / area
    found = {"place": torch.stack([down, across]), "extent": area.sqrt()[None]}
    return {"difference": float(difference)} | {
        name: float(values.unflatten(1, (-1, seeds)).var(dim=2).mean().sqrt()) for name, values in found.items()
    }


@dataclasses.dataclass(frozen=True)
class NegativeRow:
    """Prompts with one negative prompt, and the words for them in the table."""

    title: str
    prompts: list[str]
    negative: str


def negative_rows(seeds: int = 11) -> list[NegativeRow]:
    """Hearts of any colour on backgrounds that are not red, and red hearts, each without and with words against red."""
    grounds = ("white", "gray", "blue", "green", "yellow", "black")
    any_heart = [f"a heart on {article(ground)} background" for ground in grounds for _ in range(seeds)]
    red_heart = ["red heart"] * len(any_heart)
    return [
        *(NegativeRow("a heart on a … background", any_heart, negative) for negative in ("", "red heart", "red")),
        *(NegativeRow("red heart", red_heart, negative) for negative in ("", "red")),
    ]
