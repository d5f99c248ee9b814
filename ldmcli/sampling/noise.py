"""Noise that belongs to images: each has its own CPU generator, so that it does not depend on its neighbours."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """Successive standard-normal draws for a batch; image i's come from a CPU generator of seeds[i].

    Drawing on the CPU in float32 makes the same noise on every device: what diffusers draws for CPU generators.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        """shape: that of one image's latents, (channels, height, width)."""
        # A copy of a generator is one of its own. To make one anew, torch has to be imported whole: 0.3 s.
        blank = torch.default_generator
        self._generators = [blank.clone_state().manual_seed(_as_signed(seed)) for seed in seeds]
        self._shape = (1, *shape)
        self._device = device

    def __call__(self, channels: int | None = None) -> Tensor:
        """The next draw, (len(seeds), *shape), float32, on the device; with so many channels where given."""
        return self.of(*(self._shape[1:] if channels is None else (channels, *self._shape[2:])))

    def of(self, *shape: int) -> Tensor:
        """The next draw, (len(seeds), *shape), of another shape than the latents'."""
        draws = [torch.randn((1, *shape), generator=g, dtype=torch.float32) for g in self._generators]
        return to_device(torch.cat(draws), self._device)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host's on the device. The host does not wait for a GPU, which could first be at work for long:
    that takes memory which stays in its place."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _as_signed(seed: int) -> int:
    """torch takes 0 … 2⁶⁴−1 only as the signed number of the same bits."""
    return seed - 2**64 if seed >= 2**63 else seed
