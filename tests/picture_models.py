"""The latent diffusion paper's models that read pictures, in their original layout: super-resolution and inpainting."""

import io

import numpy as np
from oracle.seeded import seeded_pixels
from paper_models import Model, narrowed
from PIL import Image

PICTURED = {
    "bsr_sr": Model(6, 3, 160, (1, 2, 2, 4), (16, 8), betas=(0.0015, 0.0155), parameters=113.6),
    "inpainting_big": Model(7, 3, 256, (1, 2, 3, 4), (8, 4, 2), 8, resampling=True, betas=(0.0015, 0.0205),
                            parameters=387.2),
}  # fmt: skip
LATENTS = 6, 10  # height and width
LARGE, PATCH = (24, 32), 16  # latents that are computed by patches, and these


def small(name: str) -> Model:
    """A model of the same structure that draws in a moment."""
    return narrowed(PICTURED[name])


def low_res(latents: tuple[int, int]) -> np.ndarray:
    """A picture to enlarge, a pixel a latent."""
    return seeded_pixels(latents[1], latents[0], seed=5)


def to_fill() -> tuple[np.ndarray, np.ndarray]:
    """A picture, and of which pixels it is to be filled in, (height, width) bool."""
    height, width = (4 * side for side in LATENTS)
    mask = np.zeros((height, width), bool)
    mask[5:17, 9:30] = True
    return seeded_pixels(width, height, seed=6), mask


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()
