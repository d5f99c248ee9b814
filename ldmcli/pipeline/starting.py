"""What sampling starts from: noise, a request's pictures and masks, or what an earlier pass drew."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldmcli.config import ScheduleConfig
from ldmcli.errors import BadDataError
from ldmcli.fitting import FittedRequest
from ldmcli.sampling.inpainting import Kept, noised
from ldmcli.sampling.noise import SeededNoise, to_device
from ldmcli.sampling.schedule import Schedule, Step

if TYPE_CHECKING:
    from ldmcli.images.canvas import Canvas

Earlier = Callable[[SeededNoise], Tensor]  # the latents of an earlier pass, enlarged; it may draw noise to make them


@dataclasses.dataclass(frozen=True)
class Start:
    """What sampling starts from: latents, what joins them as input channels, what of a picture is kept all along."""

    latents: Tensor
    channels: Tensor | None = None
    kept: Kept | None = None


@dataclasses.dataclass(frozen=True)
class Starter:
    """Makes starts. `encode` gives the latents of pictures (batch, 3, height, width) in -1…1 that a noise stands for in
    their posteriors, and `modes` the likeliest ones, not scaled. `noising` is how pictures to be enlarged are noised,
    where they are."""

    encode: Callable[[Tensor, Tensor], Tensor]
    modes: Callable[[Tensor], Tensor]
    device: torch.device
    noising: ScheduleConfig | None = None

    def start(
        self,
        settings: FittedRequest,
        canvases: "Sequence[Canvas]",
        noise: SeededNoise,
        taken: Sequence[Step],
        scale: float,
        earlier: Earlier | None = None,
    ) -> Start:
        """What the first of the steps to be taken starts from. Each image's generator draws, as in diffusers, the noise
        of its picture's posterior, that of the start, and that of the posterior of what is not masked, read or not; as
        in CompVis' code, the model that reads `masked` has none of the last."""
        reads = settings.model_reads
        inpaints = reads in ("mask", "masked")
        if not canvases and not inpaints and earlier is None:
            return Start(noise() * scale)
        pictures = self._pictures(canvases)
        if reads == "low_res":
            assert pictures is not None
            if self.noising:
                level = Schedule(self.noising).alphas_cumprod[settings.noise_level]
                pictures = level.sqrt() * pictures + (1 - level).sqrt() * noise(pictures.shape[1])
            return Start(noise() * scale, pictures)
        if reads == "image":
            assert pictures is not None
            return Start(noise() * scale, self.modes(pictures))
        strong = settings.strength == 1 and earlier is None
        image = earlier(noise) if earlier else None
        if pictures is not None and (not strong or (settings.mask is not None and not inpaints)):
            image = self.encode(pictures, noise())
        fresh = noise()
        latents = fresh * scale
        depth = self._depths(canvases, fresh) if reads == "depth" else None
        if settings.mask is None and not inpaints:
            if image is not None:
                latents = noised(image, fresh, taken[0]) if taken else image
            return Start(latents, depth)
        beside = fresh if reads == "masked" else noise()  # for that the likeliest latents count, as with CompVis
        masks = self._masks(settings, canvases, len(fresh))
        factor = settings.height // fresh.shape[2]
        small = masks[:, :, ::factor, ::factor]
        if image is not None and not strong:
            content = image
            if settings.masked_content in ("noise", "zero"):
                new = noise() if settings.masked_content == "noise" else torch.zeros_like(image)
                content = (1 - small) * image + small * new
            latents = noised(content, fresh, taken[0]) if taken else content
        if not inpaints:
            assert image is not None
            return Start(latents, depth, Kept(image, fresh, small))
        if reads == "masked":
            assert pictures is not None
            black = pictures * (1 - masks) - masks  # what is masked is black there
            return Start(latents, torch.cat([self.modes(black), 2 * small - 1], dim=1))
        unmasked = torch.zeros_like(masks).expand(-1, 3, -1, -1) if pictures is None else pictures * (1 - masks)
        return Start(latents, torch.cat([small, self.encode(unmasked, beside)], dim=1))

    def _pictures(self, canvases: "Sequence[Canvas]") -> Tensor | None:
        """The canvases' pictures (batch, 3, height, width) in -1…1, on the device."""
        if not canvases:
            return None
        pixels = torch.stack([torch.tensor(canvas.pixels) for canvas in canvases])
        return as_image(to_device(pixels, self.device))

    def _masks(self, settings: FittedRequest, canvases: "Sequence[Canvas]", count: int) -> Tensor:
        """What is repainted, (batch, 1, height, width), as 1; all of a picture that has no mask."""
        if settings.mask is None:
            return torch.ones(count, 1, settings.height, settings.width, device=self.device)
        masks = torch.stack([torch.tensor(canvas.mask)[None] for canvas in canvases])
        return to_device(masks.to(torch.float32), self.device)

    def _depths(self, canvases: "Sequence[Canvas]", latents: Tensor) -> Tensor:
        """Depth maps (batch, 1, height, width) of the latents' size, each from -1 to 1."""
        found = []
        for canvas in canvases:
            depth = torch.tensor(canvas.depth)[None, None]
            depth = torch.nn.functional.interpolate(depth, latents.shape[2:], mode="bicubic", align_corners=False)
            low, high = depth.aminmax()
            if low == high:  # of a large map that is flat but for a few pixels
                raise BadDataError("the depth map is the same everywhere, but for less than a latent.")
            found.append(2 * (depth - low) / (high - low) - 1)
        return to_device(torch.cat(found), self.device)


def as_image(pixels: Tensor) -> Tensor:
    """Pixels (batch, height, width, 3) uint8 as (batch, 3, height, width) in -1…1."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 255 * 2 - 1


def canvases_of(requests: Sequence[FittedRequest]) -> "list[Canvas]":
    """What is drawn on, of each; none where no picture bears on the result."""
    if not requests[0].reads_image:
        return []
    from ldmcli.images.canvas import canvas_of

    return [canvas_of(request) for request in requests]
