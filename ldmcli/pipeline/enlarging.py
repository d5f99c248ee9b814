"""What a first pass drew, brought to the size of the second."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldmcli.fitting import FittedRequest
from ldmcli.hires import LANCZOS

if TYPE_CHECKING:
    import numpy as np

    from ldmcli.upscaling.upscaler import Upscaler

ReadUpscaler = Callable[[str], "Upscaler"]


def enlarged_latents(latents: Tensor, second: FittedRequest, factor: int) -> Tensor:
    """Latents (batch, channels, height, width) interpolated to the second pass's size as AUTOMATIC1111's "Latent" does;
    of other proportions, so that they cover it, and cut at both ends. `factor`: pixels to a latent."""
    high, wide = latents.shape[2:]
    height, width = second.height // factor, second.width // factor
    if wide * second.height < width * factor * high:
        cover = width * factor * high // wide // factor, width
    else:
        cover = height, height * factor * wide // high // factor
    found = torch.nn.functional.interpolate(latents, cover, mode="bilinear", antialias=False)
    top, left = (cover[0] - height) // 2, (cover[1] - width) // 2
    return found[:, :, top : top + height, left : left + width].contiguous()


def enlarged_pixels(pixels: "np.ndarray", second: FittedRequest, read_upscaler: ReadUpscaler) -> "np.ndarray":
    """Pixels (height, width, 3) uint8 in the second pass's size, by Lanczos or the network that it names; what has
    other proportions is cut at both ends. Raises as `Upscaler.enlarged` does."""
    if second.hires_upscaler == LANCZOS:
        import numpy as np
        from PIL import Image

        from ldmcli.images.canvas import resized

        return np.asarray(resized(Image.fromarray(pixels), second.width, second.height, "crop"))
    from ldmcli.upscaling.target import Target, upscaled

    return upscaled(read_upscaler(second.hires_upscaler), pixels, Target(width=second.width, height=second.height))
