"""What a network reads beside the latents."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Conditions of a batch, as data: whoever encodes prompts, pictures or classes makes one, any network reads it.

    `context` (batch, tokens, width) is attended to. `vector` (batch, width) is added to the time embedding: pooled
    prompts, sinusoids of sizes; or it is whole numbers (batch,), of classes that the network embeds. `channels`
    (batch, channels, height, width) are joined to the latents.
    """

    context: Tensor | None = None
    vector: Tensor | None = None
    channels: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditioning":
        """The same in another place and number type; whole numbers stay such."""

        def placed(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device, dtype if part.is_floating_point() else None)

        return Conditioning(**{name: placed(part) for name, part in vars(self).items()})

    @property
    def tokens(self) -> int:
        """How many it attends to."""
        return 0 if self.context is None else self.context.shape[1]


def without_channels(condition: Conditioning) -> Conditioning:
    """The condition with zeros in the channels that it joins to the latents."""
    assert condition.channels is not None
    return dataclasses.replace(condition, channels=torch.zeros_like(condition.channels))


def joined(conditions: Sequence[Conditioning]) -> Conditioning:
    """The batch of these, one after the other; contexts must be of one length."""
    columns = {name: [vars(each)[name] for each in conditions] for name in vars(conditions[0])}
    given = {name: [part for part in parts if part is not None] for name, parts in columns.items()}
    return Conditioning(**{name: torch.cat(parts) if parts else None for name, parts in given.items()})
