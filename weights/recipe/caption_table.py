"""All captions as tokens, and of each pair of an emoji and a background which captions fit it and how often."""

import random
from pathlib import Path

import torch
from emoji import BACKGROUNDS, Captions, Emoji
from tokenizer import tokenise
from torch import Tensor


class CaptionTable:
    """Captions by number; number 0 is the empty one."""

    def __init__(self, tokenizer: Path, emoji: tuple[Emoji, ...]) -> None:
        captions = Captions(emoji)
        self.texts = captions.every()
        self.tokens = tokenise(tokenizer, self.texts)
        self.number = {text: i for i, text in enumerate(self.texts)}
        self.fitting: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
        for o in range(len(emoji)):
            for b in range(len(BACKGROUNDS)):
                weighted = captions(o, b)
                self.fitting[o, b] = [self.number[text] for text, _ in weighted], [weight for _, weight in weighted]

    def draw(self, objects: Tensor, backgrounds: Tensor, rng: random.Random) -> Tensor:
        """The number of one fitting caption for each pair."""
        pairs = zip(objects.tolist(), backgrounds.tolist(), strict=True)
        return torch.tensor([rng.choices(*self.fitting[pair])[0] for pair in pairs])
