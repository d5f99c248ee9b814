"""What a network reads beside the latents."""

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
        parts = vars(self).items()
        return Conditioning(**{name: None if part is None else part.to(device, dtype) for name, part in parts})  # type: ignore[arg-type]


def without_channels(condition: Conditioning) -> Conditioning:
    """The condition with zeros in the channels that it joins to the latents."""
    assert condition.channels is not None
    return dataclasses.replace(condition, channels=torch.zeros_like(condition.channels))


def joined(conditions: Sequence[Conditioning]) -> Conditioning:
    """The batch of these, one after the other; contexts must be of one length."""
    columns = {name: [vars(each)[name] for each in conditions] for name in vars(conditions[0])}
    given = {name: [part for part in parts if part is not None] for name, parts in columns.items()}
    return Conditioning(**{name: torch.cat(parts) if parts else None for name, parts in given.items()})  # type: ignore[arg-type]
