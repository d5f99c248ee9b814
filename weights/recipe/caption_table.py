"""All captions as tokens, and of each pair of an emoji and a background which captions fit it and how often."""

from pathlib import Path

import torch
from emoji import BACKGROUNDS, Captions, Emoji
from tokenizer import tokenise
from torch import Tensor


class CaptionTable:
    """Captions by number; number 0 is the empty one."""

    def __init__(self, tokenizer: Path, emoji: tuple[Emoji, ...], device: str = "cpu") -> None:
        captions = Captions(emoji)
        self.texts = captions.every()
        self.tokens = tokenise(tokenizer, self.texts).to(device)
        self.number = {text: i for i, text in enumerate(self.texts)}
        fitting = [captions(o, b) for o in range(len(emoji)) for b in range(len(BACKGROUNDS))]
        numbers, weights = torch.zeros(2, len(fitting), max(map(len, fitting)))
        for row, found in enumerate(fitting):
            numbers[row, : len(found)] = torch.tensor([self.number[text] for text, _ in found])
            weights[row, : len(found)] = torch.tensor([weight for _, weight in found])
        self._numbers, self._weights = numbers.long().to(device), weights.to(device)

    def fitting(self, objects: Tensor, backgrounds: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of the captions that fit each pair and their weights, which are 0 where there are no more."""
        pairs = objects * len(BACKGROUNDS) + backgrounds
        return self._numbers[pairs], self._weights[pairs]

    def draw(self, objects: Tensor, backgrounds: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The number of one fitting caption for each pair."""
        numbers, weights = self.fitting(objects, backgrounds)
        chosen = weights.multinomial(1, generator=generator)
        return numbers.gather(1, chosen)[:, 0]
