"""From a model source to modules on a device: built on the meta device, then filled strictly, file by file."""

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldmcli.checkpoints.files import WeightFile, file_sha256, read_tensors
from ldmcli.checkpoints.key_map import (
    IGNORED_ORIGINAL,
    TEXT_PREFIX,
    old_diffusers_vae_key,
    original_unet_keys,
    original_vae_keys,
    without_text_prefix,
)
from ldmcli.checkpoints.source import ModelSource, list_keys
from ldmcli.errors import BadDataError, printable
from ldmcli.models.unet import UNet
from ldmcli.models.vae import AutoencoderKL
from ldmcli.text.clip import ClipTextEncoder, build_clip, restore_position_ids

_Module = TypeVar("_Module", bound=nn.Module)

# For each canonical key the names it may have on disk, the likeliest first.
DiskNames = dict[str, Sequence[str]]


def load_unet(source: ModelSource, device: torch.device, dtype: torch.dtype) -> UNet:
    """The source's U-Net."""
    unet = _on_meta(lambda: UNet(source.config.unet))
    names: DiskNames = {key: [key] for key in unet.state_dict()}
    if source.single_file:
        names = {key: [disk] for key, disk in original_unet_keys(names, source.config.unet).items()}
    _fill(unet, source, "unet", names, device, dtype)
    return unet


def load_vae(source: ModelSource, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """The source's autoencoder."""
    vae = _on_meta(lambda: AutoencoderKL(source.config.vae))
    names: DiskNames = {key: [key, old_diffusers_vae_key(key)] for key in vae.state_dict()}
    if source.single_file:
        names = {key: [disk] for key, disk in original_vae_keys(names, source.config.vae).items()}
    _fill(vae, source, "vae", names, device, dtype)
    return vae


def load_text_encoder(source: ModelSource, device: torch.device, dtype: torch.dtype) -> ClipTextEncoder:
    """The source's text encoder with its tokenizer."""
    tokenizer = source.tokenizer
    model = _on_meta(lambda: build_clip(source.config.text_encoder))
    prefix = TEXT_PREFIX if source.single_file else ""
    names: DiskNames = {}
    for key in model.state_dict():
        bare = without_text_prefix(key)
        names[key] = [f"{prefix}text_model.{bare}", f"{prefix}{bare}"]
    _fill(model, source, "text_encoder", names, device, dtype)
    restore_position_ids(model, device)
    return ClipTextEncoder(model, tokenizer)


def model_sha256(source: ModelSource) -> "Future[str]":
    """The model's identity, computed in a thread beside the sampling: the SHA-256 of its file; for a folder, that of
    the list of its weight files' hashes."""
    future: Future[str] = Future()

    def compute() -> None:
        try:
            future.set_result(_sha256(source))
        except Exception as error:
            future.set_exception(error)

    # A daemon, so that an interrupted run does not wait for gigabytes to be hashed.
    threading.Thread(target=compute, name="sha256", daemon=True).start()
    return future


def _sha256(source: ModelSource) -> str:
    paths = source.weight_paths()
    if source.single_file:
        return file_sha256(paths[0])
    lines = [f"{file_sha256(path)}  {path.relative_to(source.path).as_posix()}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _on_meta(build: Callable[[], _Module]) -> _Module:
    with torch.device("meta"):
        return build()


def _fill(
    module: nn.Module,
    source: ModelSource,
    part: str,
    names: DiskNames,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Read every weight of `module`, which is on meta, and put it in place; none may be missing, left or misshapen."""
    on_disk = source.keys(part)
    canonical = _match(module, source, part, names, on_disk)
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


def _match(
    module: nn.Module, source: ModelSource, part: str, names: DiskNames, on_disk: dict[str, WeightFile]
) -> dict[str, str]:
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
        where = printable(str(source.path if source.single_file else source.path / part))
        told = "; it ".join(list_keys(what, keys) for what, keys in faults.items())
        raise BadDataError(f"{where} is not the {part} it should be: it {told}.")
    return canonical


def _same_shape(on_disk: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal, or a 1×1 convolution where the same matrix is a linear layer now."""
    return on_disk == wanted or (len(on_disk) == 4 and len(wanted) == 2 and on_disk == (*wanted, 1, 1))


def _may_be_left(key: str) -> bool:
    return key.endswith("position_ids") or bool(IGNORED_ORIGINAL.match(key))
