"""Starting from a picture's latents, and keeping them outside a mask while a sampler walks."""

import dataclasses

from torch import Tensor

from ldmcli.sampling.denoiser import Denoiser, Prediction
from ldmcli.sampling.schedule import Step


def noised(image: Tensor, noise: Tensor, step: Step) -> Tensor:
    """Latents of an image at the noise that a step starts from (Meng et al. 2022, SDEdit)."""
    return step.signal * image + step.spread * noise


@dataclasses.dataclass(frozen=True)
class Kept:
    """The latents `image` (batch, channels, height, width), kept where `mask` (batch, 1, height, width) is 0, with the
    same `noise` at every step. What a model that knows no masks needs (Lugmayr et al. 2022, RePaint, without its
    resampling)."""

    image: Tensor
    noise: Tensor
    mask: Tensor

    def at(self, latents: Tensor, step: Step | None) -> Tensor:
        """The latents at the start of a step with the image in them; None: at the end of all."""
        image = self.image if step is None else noised(self.image, self.noise, step)
        return (1 - self.mask) * image + self.mask * latents

    def beside(self, denoise: Denoiser, first: Step) -> Denoiser:
        """The denoiser with the image in all latents but those of the `first` step, as they came: in those too that a
        sampler only tries and does not yield."""

        def run(latents: Tensor, step: Step) -> Prediction:
            return denoise(latents if step is first else self.at(latents, step), step)

        return run
