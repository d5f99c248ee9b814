"""Every name that an adapter file may give a model's modules.

The table is made from the model, and names are looked up in it, never parsed: `down_blocks_0` and `to_q` both contain
the mark that separates. Its sources are the writers themselves: sd-scripts, LyCORIS, OneTrainer, PEFT, diffusers of all
versions, ComfyUI.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from ldmcli.checkpoints.key_map import UNET_PREFIX, disk_names
from ldmcli.networks.unet import UNet
from ldmcli.speed.weights import names_with_weights

_TEXT_PARTS = ("text_encoder", "text_encoder_2")
_PEFT = "base_model.model."
_UNET_FLAT = ("lora_unet_", "oft_unet_", "lycoris_", "diffusion_model_")  # sd-scripts, its OFT, LyCORIS, sliders
_UNET_DOTTED = ("", "unet.", _PEFT, f"unet.{_PEFT}")  # old diffusers, diffusers, PEFT's file, PEFT's folder
_UNET_ORIGINAL = ("diffusion_model.", UNET_PREFIX)  # ComfyUI
_TEXT_FLAT = {"text_encoder": ("lora_te_", "lora_te1_", "lycoris_"), "text_encoder_2": ("lora_te2_",)}
_TEXT_DOTTED = {
    "text_encoder": (_PEFT, "text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer.", "clip_l."),
    "text_encoder_2": ("text_encoders.clip_g.transformer.", "clip_g."),
}
# As diffusers named the projections of a text encoder's attention before it had PEFT.
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclasses.dataclass(frozen=True)
class Place:
    """A module of a model: its part, and its name there."""

    part: str
    name: str

    def __str__(self) -> str:
        return f"{self.part}.{self.name}"


def module_table(networks: Mapping[str, nn.Module]) -> dict[str, Place]:
    """Every spelling of every module that has a weight, with its place; `networks` are the model's by part ("unet",
    "text_encoder", "text_encoder_2"), and may be on the meta device.

    A lone second text encoder, as XL's refiner has, is named like a first one too.
    """
    table: dict[str, Place] = {}
    lone = "text_encoder" not in networks
    for part, network in networks.items():
        names = names_with_weights(network)
        spelled = _unet(names, network) if isinstance(network, UNet) else _text(names, part, lone=lone)
        for name, spelling in spelled:
            table.setdefault(spelling, Place(part, name))
    return table


def _unet(names: list[str], unet: UNet) -> Iterator[tuple[str, str]]:
    """Each name with each of its spellings."""
    originals = disk_names([f"{name}.weight" for name in names], unet.config, original=True)
    for name in names:
        original = originals[f"{name}.weight"][0].removesuffix(".weight")
        yield from _joined(name, _UNET_FLAT, (_flat(name), _flat(original)))
        yield from _joined(name, _UNET_DOTTED, _with_processor(name))
        yield from _joined(name, _UNET_ORIGINAL, (original,))


def _with_processor(name: str) -> Iterator[str]:
    """A name, and what it was called when the adapter was part of an attention's processor."""
    yield name
    block, attention, rest = name.rpartition(".attn1.") if ".attn1." in name else name.rpartition(".attn2.")
    if attention:
        last = rest.removesuffix(".0")
        yield f"{block}{attention}{last}"
        yield f"{block}{attention}processor.{last}"


def _text(names: list[str], part: str, *, lone: bool) -> Iterator[tuple[str, str]]:
    """Each name of a text encoder with each of its spellings."""
    parts = _TEXT_PARTS if lone else (part,)
    flat = [prefix for each in parts for prefix in _TEXT_FLAT[each]]
    dotted = [prefix for each in parts for prefix in (f"{each}.", f"{each}.{_PEFT}", *_TEXT_DOTTED[each])]
    for name in names:
        old = _old_text(name)
        spelled = [f"text_model.{name}", name, f"text_model.{old}", old]
        yield from _joined(name, flat, map(_flat, spelled))
        yield from _joined(name, dotted, spelled)
        if part == parts[0]:  # in a file that names no part
            yield name, f"text_model.{name}"


def _old_text(name: str) -> str:
    block, found, last = name.rpartition(".self_attn.")
    return f"{block}{found}{_OLD_TEXT.get(last, last)}" if found else name


def _joined(name: str, prefixes: Iterable[str], spellings: Iterable[str]) -> Iterator[tuple[str, str]]:
    prefixes = tuple(prefixes)
    return ((name, prefix + spelling) for spelling in spellings for prefix in prefixes)


def _flat(name: str) -> str:
    return name.replace(".", "_")
