"""From a model source to modules on a device: built on the meta device, then filled strictly, file by file."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldmcli.checkpoints.files import WeightFile, read_tensors
from ldmcli.checkpoints.header import FLOATING
from ldmcli.checkpoints.key_map import (
    IGNORED_ORIGINAL,
    clip_text_names,
    is_transposed,
    of_vae_encoder,
    old_diffusers_vae_key,
    openclip_text_names,
    original_unet_keys,
    original_vae_keys,
)
from ldmcli.checkpoints.source import ModelSource, list_keys
from ldmcli.conditioning.prompts import TextEncoder
from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.config import TextEncoderConfig
from ldmcli.errors import BadDataError, printable
from ldmcli.networks.clip import TextTransformer
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL

_log = logging.getLogger(__name__)
_Module = TypeVar("_Module", bound=nn.Module)
_READERS = 4  # threads that read a part: reading, checking and converting numbers take more time than the disk
_SHARE = 64 << 20  # bytes that a thread reads before another may take over
# What quantizers keep beside weights, without which those mean nothing.
_SCALES = re.compile(
    r"(scale_weight|weight_scale\w*|scale_input|input_scale|scaled_fp8|absmax|quant_map|comfy_quant|SCB)$|quant_state\."
)

# For each canonical key the names it may have on disk, the likeliest first. What has its name in common with others is
# stacked there, in the module's order.
DiskNames = dict[str, Sequence[str]]
Shapes = dict[str, tuple[int, ...]]


def load_unet(source: ModelSource, device: torch.device, dtype: torch.dtype) -> UNet:
    """The source's U-Net."""
    unet = on_meta(lambda: UNet(source.config.unet))
    names: DiskNames = {key: [key] for key in unet.state_dict()}
    if source.single_file:
        names = {key: [disk] for key, disk in original_unet_keys(names, source.config.unet).items()}
    fill(unet, names, source.keys("unet"), _where(source, "unet"), device, dtype)
    return unet


def load_vae(source: ModelSource, device: torch.device, dtype: torch.dtype, *, encoder: bool = True) -> AutoencoderKL:
    """The source's autoencoder; without its `encoder`, two fifths of it, where pictures are only drawn."""
    vae = on_meta(lambda: AutoencoderKL(source.config.vae, encoder=encoder))
    names: DiskNames = {key: [key, old_diffusers_vae_key(key)] for key in vae.state_dict()}
    if source.single_file:
        names = {key: [disk] for key, disk in original_vae_keys(names, source.config.vae).items()}
    on_disk = source.keys("vae")
    if not encoder:
        prefix = source.prefixes.get("vae", "")
        on_disk = {key: file for key, file in on_disk.items() if not of_vae_encoder(key, prefix)}
    fill(vae, names, on_disk, _where(source, "vae"), device, dtype)
    return vae


def load_text_encoders(source: ModelSource, device: torch.device, dtype: torch.dtype) -> list[TextEncoder]:
    """The source's text encoders, each with its tokenizer."""
    pairs = zip(source.config.text_encoders, source.tokenizers, strict=True)
    return [load_text_encoder(source, text, tokenizer, device, dtype) for text, tokenizer in pairs]


def load_text_encoder(
    source: ModelSource, text: TextEncoderConfig, tokenizer: ClipTokenizer, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """One of the source's text encoders: `text` is its configuration there. It gives pooled prompts only where the
    U-Net reads them, which are the last encoder's."""
    model = on_meta(lambda: TextTransformer(text))
    prefix = source.prefixes.get(text.part, "")
    name = clip_text_names if text.layout == "clip" else openclip_text_names
    names: DiskNames = {key: [prefix + disk for disk in name(key)] for key in model.state_dict()}
    fill(model, names, source.keys(text.part), _where(source, text.part), device, dtype)
    return TextEncoder(model, tokenizer, pooled=source.config.pools(text))


def on_meta(build: Callable[[], _Module]) -> _Module:
    """The module that `build` makes, on the meta device: it has shapes and no weights."""
    with torch.device("meta"), _Uninitialized():
        return build()


class _Uninitialized(TorchFunctionMode):
    """Leaves out what torch.nn.init does: on meta it comes to nothing, takes half the time of building a module, and
    for an nn.Embedding imports torch's compiler, which takes longer than all else."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


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
    wanted = {key: tuple(meta.shape) for key, meta in module.state_dict().items()}
    canonical = _match(wanted, names, on_disk, where)
    by_file: dict[int, tuple[WeightFile, list[str]]] = {}
    for disk_key in canonical:
        file = on_disk[disk_key]
        by_file.setdefault(id(file), (file, []))[1].append(disk_key)
    state: dict[str, Tensor] = {}
    for disk_key, tensor in _read(list(by_file.values()), device, dtype):
        shapes = {key: wanted[key] for key in canonical[disk_key]}
        state |= _taken_apart(disk_key, tensor, shapes)
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()


def _read(
    wanted: list[tuple[WeightFile, list[str]]], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Each of the tensors with its name, in no order; read and converted by several threads where there is much."""
    shares = [(file, names) for file, keys in wanted for names in _shares(file, keys)]
    if len(shares) == len(wanted):
        for file, names in shares:
            yield from read_tensors(file, names, device, dtype)
        return

    def read(file: WeightFile, names: list[str]) -> list[tuple[str, Tensor]]:
        torch.set_num_threads(1)  # of this thread, and of those to come
        return list(read_tensors(file, names, device, dtype))

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(_READERS, "read weights") as readers:
        futures = [readers.submit(read, *share) for share in shares]
        for future in futures:
            yield from future.result()
    torch.set_num_threads(threads)


def _shares(file: WeightFile, names: list[str]) -> list[list[str]]:
    """The names in the order of the file, in lists of tensors of at least _SHARE bytes each."""
    shares: list[list[str]] = [[]]
    size = 0
    for name in sorted(names, key=lambda name: file.tensors[name].start):
        if size > _SHARE:
            shares.append([])
            size = 0
        shares[-1].append(name)
        size += file.tensors[name].end - file.tensors[name].start
    return shares


def _where(source: ModelSource, part: str) -> str:
    path = source.path if source.single_file else source.path / part
    return f"{printable(str(path))} is not the {part} it should be"


def _match(wanted: Shapes, names: DiskNames, on_disk: dict[str, WeightFile], where: str) -> dict[str, list[str]]:
    """Disk key → the canonical keys that it holds, for all that are wanted. Raises BadDataError listing what does not
    fit."""
    canonical: dict[str, list[str]] = {}
    faults: dict[str, list[str]] = {}
    for key in wanted:
        found = next((name for name in names[key] if name in on_disk), None)
        if found is not None:
            canonical.setdefault(found, []).append(key)
        elif names[key][0] not in (lacking := faults.setdefault("lacks tensors", [])):
            lacking.append(names[key][0])
    for found, keys in canonical.items():
        info, right = on_disk[found].tensors[found], _stored_shape(found, (wanted[key] for key in keys))
        if not _same_shape(info.shape, right):
            told = f"{found}: {list(info.shape)} for {list(right)}"
            faults.setdefault("has tensors of the wrong shape", []).append(told)
        if info.dtype not in FLOATING:
            faults.setdefault("has tensors that hold no floating numbers", []).append(f"{found}: {info.dtype}")
    left = [key for key in on_disk if key not in canonical and not _may_be_left(key)]
    scales = [key for key in left if _SCALES.search(key)]
    if scales:
        faults["has quantized weights, whose scales this version does not apply"] = scales
    strays = _strays(left, list(canonical))
    left = [key for key in left if key not in scales and (faults or key not in strays)]
    if left:
        faults["has tensors of no use here"] = left
    if faults:
        told = "; it ".join(list_keys(what, keys) for what, keys in faults.items())
        raise BadDataError(f"{where}: it {told}.")
    if strays:
        _log.warning("%s", list_keys(f"{where.partition(' is not ')[0]} has tensors that are ignored", strays))
    return canonical


def _strays(left: list[str], known: list[str]) -> list[str]:
    """Those of the tensors that are `left` which are of none of the network's own blocks. Other programs pass over
    them; more of a block than is built, or other than that, would be another network."""
    paths = [key.split(".") for key in known]
    depth = next((i for i, names in enumerate(zip(*paths, strict=False)) if len(set(names)) > 1), 0)
    blocks = {tuple(path[: depth + 1]) for path in paths}
    return [key for key in left if tuple(key.split(".")[: depth + 1]) not in blocks]


def _stored_shape(disk_key: str, shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape on disk of what tensors of these shapes are stored as."""
    first, *others = shapes
    stacked = (first[0] + sum(shape[0] for shape in others), *first[1:])
    return stacked[::-1] if is_transposed(disk_key) else stacked


def _taken_apart(disk_key: str, tensor: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """The tensors of these shapes that are stored as one: views of it, so that nothing is held twice."""
    stored = tensor.reshape(_stored_shape(disk_key, shapes.values()))
    rows = (stored.T if is_transposed(disk_key) else stored).split([shape[0] for shape in shapes.values()])
    return dict(zip(shapes, rows, strict=True))


def _same_shape(on_disk: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal, or a 1×1 convolution where the same matrix is a linear layer now."""
    return on_disk == wanted or (len(on_disk) == 4 and len(wanted) == 2 and on_disk == (*wanted, 1, 1))


def _may_be_left(key: str) -> bool:
    return key.endswith("position_ids") or bool(IGNORED_ORIGINAL.match(key))
