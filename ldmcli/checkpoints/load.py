"""From a model source to modules on a device: built on the meta device, then filled strictly, file by file."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldmcli.checkpoints.files import WeightFile, read_tensors
from ldmcli.checkpoints.key_map import (
    IGNORED_ORIGINAL,
    old_diffusers_vae_key,
    original_unet_keys,
    original_vae_keys,
    without_text_prefix,
)
from ldmcli.checkpoints.source import ModelSource, list_keys
from ldmcli.config import TextEncoderConfig
from ldmcli.errors import BadDataError, printable
from ldmcli.models.unet import UNet
from ldmcli.models.vae import AutoencoderKL
from ldmcli.text.clip import ClipTextEncoder, build_clip, restore_position_ids
from ldmcli.text.conditioning import PromptEncoder, TextEncoder
from ldmcli.text.openclip import OpenClipTextEncoder, build_openclip, restore_mask
from ldmcli.text.tokenizer import ClipTokenizer

_Module = TypeVar("_Module", bound=nn.Module)

# For each canonical key the names it may have on disk, the likeliest first.
DiskNames = dict[str, Sequence[str]]


def load_unet(source: ModelSource, device: torch.device, dtype: torch.dtype) -> UNet:
    """The source's U-Net."""
    unet = on_meta(lambda: UNet(source.config.unet))
    names: DiskNames = {key: [key] for key in unet.state_dict()}
    if source.single_file:
        names = {key: [disk] for key, disk in original_unet_keys(names, source.config.unet).items()}
    fill(unet, names, source.keys("unet"), _where(source, "unet"), device, dtype)
    return unet


def load_vae(source: ModelSource, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """The source's autoencoder."""
    vae = on_meta(lambda: AutoencoderKL(source.config.vae))
    names: DiskNames = {key: [key, old_diffusers_vae_key(key)] for key in vae.state_dict()}
    if source.single_file:
        names = {key: [disk] for key, disk in original_vae_keys(names, source.config.vae).items()}
    fill(vae, names, source.keys("vae"), _where(source, "vae"), device, dtype)
    return vae


def load_text_encoders(source: ModelSource, device: torch.device, dtype: torch.dtype) -> PromptEncoder:
    """The source's text encoders, each with its tokenizer."""
    pairs = zip(source.config.text_encoders, source.tokenizers, strict=True)
    return PromptEncoder([_load_text_encoder(source, text, tokenizer, device, dtype) for text, tokenizer in pairs])


def _load_text_encoder(
    source: ModelSource, text: TextEncoderConfig, tokenizer: ClipTokenizer, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    prefix = source.prefixes.get(text.part, "")
    openclip = text.layout == "openclip"
    model = on_meta(lambda: build_openclip(text) if openclip else build_clip(text))
    names: DiskNames = {}
    for key in model.state_dict():
        bare = without_text_prefix(key)
        names[key] = [prefix + key] if openclip else [f"{prefix}text_model.{bare}", f"{prefix}{bare}"]
    fill(model, names, source.keys(text.part), _where(source, text.part), device, dtype)
    if openclip:
        restore_mask(model, device, dtype)
        return OpenClipTextEncoder(model, tokenizer, text)
    restore_position_ids(model, device)
    return ClipTextEncoder(model, tokenizer, text)


def on_meta(build: Callable[[], _Module]) -> _Module:
    with torch.device("meta"):
        return build()


def fill(
    module: nn.Module,
    names: DiskNames,
    on_disk: dict[str, WeightFile],
    where: str,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Read every weight of `module`, which is on meta, and put it in place; none may be missing, left or misshapen.

    `on_disk` has the keys of the module's part with the files they are in; `where` begins the error that says what of
    them does not fit (BadDataError).
    """
    canonical = _match(module, names, on_disk, where)
    by_file: dict[int, tuple[WeightFile, list[str]]] = {}
    for disk_key in canonical:
        file = on_disk[disk_key]
        by_file.setdefault(id(file), (file, []))[1].append(disk_key)
    wanted = module.state_dict()
    state: dict[str, Tensor] = {}
    for file, disk_keys in by_file.values():
        for disk_key, tensor in read_tensors(file, disk_keys, device, dtype):
            key = canonical[disk_key]
            state[key] = tensor.reshape(wanted[key].shape)
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()


def _where(source: ModelSource, part: str) -> str:
    path = source.path if source.single_file else source.path / part
    return f"{printable(str(path))} is not the {part} it should be"


def _match(module: nn.Module, names: DiskNames, on_disk: dict[str, WeightFile], where: str) -> dict[str, str]:
    """Disk key → canonical key for the whole module. Raises BadDataError listing what does not fit."""
    canonical: dict[str, str] = {}
    faults: dict[str, list[str]] = defaultdict(list)
    for key, meta in module.state_dict().items():
        found = next((name for name in names[key] if name in on_disk), None)
        if found is None:
            faults["lacks tensors"].append(names[key][0])
            continue
        canonical[found] = key
        shape = on_disk[found].tensors[found].shape
        if not _same_shape(shape, tuple(meta.shape)):
            faults["has tensors of the wrong shape"].append(f"{found}: {list(shape)} for {list(meta.shape)}")
    left = [key for key in on_disk if key not in canonical and not _may_be_left(key)]
    if left:
        faults["has tensors of no use here"] = left
    if faults:
        told = "; it ".join(list_keys(what, keys) for what, keys in faults.items())
        raise BadDataError(f"{where}: it {told}.")
    return canonical


def _same_shape(on_disk: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal, or a 1×1 convolution where the same matrix is a linear layer now."""
    return on_disk == wanted or (len(on_disk) == 4 and len(wanted) == 2 and on_disk == (*wanted, 1, 1))


def _may_be_left(key: str) -> bool:
    return key.endswith("position_ids") or bool(IGNORED_ORIGINAL.match(key))
