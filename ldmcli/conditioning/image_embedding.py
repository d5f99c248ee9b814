"""Embeddings of pictures as a U-Net reads them: noised, and how much so beside them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldmcli.conditioning.pairs import added_vector
from ldmcli.config import ScheduleConfig, UNetConfig
from ldmcli.fitting import FittedRequest
from ldmcli.networks.conditioners import EmbeddingNoiser
from ldmcli.sampling.noise import SeededNoise
from ldmcli.sampling.schedule import Schedule


class ImageEmbeddings:
    """What makes vectors of requests' embeddings: `read` gives a request's (1, width) in float32, and `noiser`
    noises it on `noising`'s levels, on the `device`."""

    def __init__(
        self,
        unet: UNetConfig,
        noiser: EmbeddingNoiser,
        noising: ScheduleConfig,
        read: Callable[[FittedRequest], Tensor],
        device: torch.device,
    ) -> None:
        self._unet, self._noiser, self._read, self._device = unet, noiser, read, device
        self._levels = Schedule(noising).alphas_cumprod

    def __call__(self, requests: Sequence[FittedRequest], noise: SeededNoise) -> Tensor:
        """What is added to time embeddings, (batch, width), before what it projects. Each image's generator draws its
        embedding's noise, before that of its latents, as in diffusers."""
        level = requests[0].noise_level
        embeddings = torch.cat([self._read(request).to(self._device) for request in requests])
        noised = self._noiser(embeddings, noise.of(embeddings.shape[1]), self._levels[level])
        numbers = torch.full((len(requests), 1), float(level), device=self._device)
        return added_vector(noised, numbers, self._unet)
