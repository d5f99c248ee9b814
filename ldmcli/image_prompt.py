"""What a request says of pictures that are prompts: IP-Adapters, each with its picture."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ldmcli.entries import MAX_STRENGTH, Reader, choice, entries, for_each, number, picture, text
from ldmcli.errors import UsageError
from ldmcli.frozen import frozen

if TYPE_CHECKING:
    from ldmcli.config import UNetConfig

IP_ADAPTER_FIELDS = (
    "ip_adapter", "ip_adapter_image", "ip_adapter_strength", "ip_adapter_mask", "ip_adapter_blocks",
)  # fmt: skip
NO_MASK = "none"
# What decides about a picture's style and layout, in SDXL (Wang et al. 2024, InstantStyle) and else (as in InvokeAI).
_BLOCKS = {
    ("style", True): ("up_blocks.0.attentions.1.",),
    ("style", False): ("up_blocks.1.",),
    ("layout", True): ("down_blocks.2.attentions.1.",),
    ("layout", False): ("down_blocks.2.", "mid_block."),
}
BLOCKS = ("all", "style", "layout")


@frozen
class ImagePrompt:
    """One IP-Adapter with its picture, a path or a file's bytes, and maybe a mask of where it counts; in which `blocks`
    of the U-Net is one of BLOCKS."""

    adapter: str
    image: str | bytes
    strength: float = 1.0
    mask: str | bytes | None = None
    blocks: str = "all"

    @property
    def settings(self) -> tuple[object, ...]:
        """What pictures that are drawn together must agree in."""
        return self.adapter, self.strength, self.mask is None, self.blocks

    def transformers(self, unet: "UNetConfig") -> list[str]:
        """The transformers of a U-Net in which the picture counts. Raises UsageError where there are none such."""
        names = list(dict.fromkeys(place.transformer for place in unet.cross_attentions))
        if self.blocks == "all":
            return names
        found = [name for name in names if f"{name}.".startswith(_BLOCKS[self.blocks, unet.reads_sizes])]
        if not found:
            raise UsageError(f"ip_adapter_blocks {self.blocks} are none of this model's blocks; leave it out.")
        return found


def read_ip_adapter(name: str, value: Any) -> tuple[Any, ...]:
    """The entries of one of the IP_ADAPTER_FIELDS. Raises UsageError."""
    return entries(name, value, _READERS[name])


def image_prompts_of(fields: Mapping[str, Any]) -> tuple[ImagePrompt, ...]:
    """The IP-Adapters that a request's fields name, with their pictures: `ip_adapter_image`, or the `image` drawn on.
    Raises UsageError where there are fewer or more of something than adapters."""
    found = []
    for given in for_each(fields, IP_ADAPTER_FIELDS):
        said = {name.removeprefix("ip_adapter_"): value for name, value in given.items()}
        said["adapter"] = said.pop("ip_adapter")
        if said.get("mask") == NO_MASK:
            del said["mask"]
        found.append(ImagePrompt(**said))
    return tuple(found)


_READERS: dict[str, Reader] = {
    "ip_adapter": text,
    "ip_adapter_image": picture,
    "ip_adapter_strength": number(MAX_STRENGTH),
    "ip_adapter_mask": picture,
    "ip_adapter_blocks": choice(BLOCKS),
}
