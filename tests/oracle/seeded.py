"""Weights and pictures that follow from a seed and from names and shapes alone: the program and the original code get
the same ones without a file."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def seeded_state(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep a signal's size, those of norms near one; codebooks and biases are spread as signals are."""
    random = np.random.default_rng(seed)
    state = {}
    for key in sorted(shapes):
        shape = shapes[key]
        values = random.standard_normal(shape, np.float32)
        if key.endswith("embedding.weight"):
            values *= 0.5
        elif len(shape) > 1:
            values /= np.sqrt(np.prod(shape[1:], dtype=np.float32))
        else:
            values = 0.1 * values + (1.0 if key.endswith("weight") else 0.0)
        state[key] = torch.from_numpy(values.astype(np.float32))
    return state


def seeded_pixels(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A picture (height, width, 3) uint8: a slope of each colour under noise."""
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    slopes = np.stack([down, across, (down + across) / 2], axis=2)
    noise = np.random.default_rng(seed).random((height, width, 3))
    return np.rint(255 * (0.7 * slopes + 0.3 * noise)).astype(np.uint8)
