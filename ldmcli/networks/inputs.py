"""What a network is told beside the latents."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Conditions of a batch, as data: whoever encodes prompts, pictures or classes makes one, any network reads it.

    `context` (batch, tokens, width) is attended to. `vector` (batch, width) is added to the time embedding: pooled
    prompts, sinusoids of sizes. `channels` (batch, channels, height, width) are joined to the latents.
    """

    context: Tensor
    vector: Tensor | None = None
    channels: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditioning":
        """The same in another place and number type."""
        return Conditioning(*(None if part is None else part.to(device, dtype) for part in _parts(self)))  # type: ignore[arg-type]


def joined(conditions: Sequence[Conditioning]) -> Conditioning:
    """The batch of these, one after the other; contexts must be of one length."""
    columns = zip(*map(_parts, conditions), strict=True)
    return Conditioning(*(_cat(column) for column in columns))  # type: ignore[arg-type]


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None


def _parts(conditioning: Conditioning) -> tuple[Tensor | None, ...]:
    return conditioning.context, conditioning.vector, conditioning.channels
