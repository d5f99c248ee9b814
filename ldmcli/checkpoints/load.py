"""From a model source to modules on a device: built on the meta device, then filled strictly, file by file."""

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldmcli.checkpoints.files import WeightFile, read_tensors
from ldmcli.checkpoints.header import FLOATING
from ldmcli.checkpoints.key_map import IGNORED_ORIGINAL, DiskNames, disk_names, is_transposed, stacked_heads
from ldmcli.checkpoints.source import ModelSource, PartSource, list_keys
from ldmcli.conditioning.prompts import TextEncoder
from ldmcli.config import TinyVAEConfig, VAEConfig
from ldmcli.disk.opening import shown
from ldmcli.errors import BadDataError
from ldmcli.networks.clip import TextTransformer
from ldmcli.networks.conditioners import ClassEmbedder, EmbeddingNoiser, MapEncoder
from ldmcli.networks.taesd import TinyVAE
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import Autoencoder, autoencoder_of

_log = logging.getLogger(__name__)
_Module = TypeVar("_Module", bound=nn.Module)
_READERS = 4  # threads that read a part: reading, checking and converting numbers take more time than the disk
_SHARE = 64 << 20  # bytes that a thread reads before another may take over
# What quantizers keep beside weights, without which those mean nothing.
_SCALES = re.compile(
    r"(scale_weight|weight_scale\w*|scale_input|input_scale|scaled_fp8|absmax|quant_map|comfy_quant|SCB)$|quant_state\."
)

_CONDITIONERS: dict[str, Callable[[Any], nn.Module]] = {
    "label": ClassEmbedder, "layout": TextTransformer, "map": MapEncoder,
    "image_embedding": EmbeddingNoiser,
}  # fmt: skip

Shapes = dict[str, tuple[int, ...]]


def load_unet(source: ModelSource, device: torch.device, dtype: torch.dtype) -> UNet:
    """The source's U-Net."""
    return fill(on_meta(lambda: UNet(source.config.unet)), source.part("unet"), device, dtype)


def load_vae(
    source: ModelSource | PartSource[VAEConfig | TinyVAEConfig],
    device: torch.device,
    dtype: torch.dtype,
    *,
    encoder: bool = True,
    decoder: bool = True,
) -> Autoencoder | TinyVAE:
    """A model's autoencoder, or one by itself; without its `encoder`, two fifths of it, where pictures are only drawn;
    or without its `decoder`."""
    part = source.part("vae") if isinstance(source, ModelSource) else source
    config: VAEConfig | TinyVAEConfig = part.config
    if isinstance(config, TinyVAEConfig):
        return fill(on_meta(lambda: TinyVAE(config)), part, device, dtype)
    halves = {"encoder.": encoder, "quant_conv.": encoder, "decoder.": decoder, "post_quant_conv.": decoder}
    unread = tuple(f"{part.prefix}{name}" for name, wanted in halves.items() if not wanted)
    return fill(on_meta(lambda: autoencoder_of(config, encoder=encoder, decoder=decoder)), part, device, dtype, unread)


def load_text_encoders(source: ModelSource, device: torch.device, dtype: torch.dtype) -> list[TextEncoder]:
    """The source's text encoders, each with its tokenizer. They give pooled prompts only where the U-Net reads them,
    which are the last encoder's."""
    config = source.config
    return [
        TextEncoder(
            fill(on_meta(functools.partial(TextTransformer, text)), source.part(text.part), device, dtype),
            tokenizer,
            pooled=config.pools(text),
        )
        for text, tokenizer in zip(config.text_encoders, source.tokenizers, strict=True)
    ]


def load_conditioner(source: ModelSource, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    """What encodes the source's conditions where those are no prompts, if anything does."""
    config = source.config.conditioner
    if config is None:
        return None
    return fill(on_meta(lambda: _CONDITIONERS[config.kind](config)), source.part(config.part), device, dtype)


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
    module: _Module, part: PartSource[Any], device: torch.device, dtype: torch.dtype, unread: tuple[str, ...] = ()
) -> _Module:
    """Read every weight of `module`, which is on meta, and put it in place; none may be missing, left or misshapen, but
    what begins with `unread` on disk. Raises BadDataError saying what does not fit."""
    wanted = {key: tuple(meta.shape) for key, meta in module.state_dict().items()}
    names = disk_names(wanted, part.config, part.prefix, original=part.original, dotless=part.dotless)
    on_disk = {key: file for key, file in part.keys().items() if not key.startswith(unread)}
    canonical = _match(wanted, names, on_disk, part)
    by_file: dict[int, tuple[WeightFile, list[str]]] = {}
    for disk_key in canonical:
        file = on_disk[disk_key]
        by_file.setdefault(id(file), (file, []))[1].append(disk_key)
    state: dict[str, Tensor] = {}
    for disk_key, tensor in read_all(list(by_file.values()), device, dtype):
        shapes = {key: wanted[key] for key in canonical[disk_key]}
        heads = stacked_heads(canonical[disk_key][0], part.config) if len(shapes) > 1 else 1
        state |= _taken_apart(disk_key, tensor, shapes, heads)
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def read_all(
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


def _match(
    wanted: Shapes, names: DiskNames, on_disk: dict[str, WeightFile], part: PartSource[Any]
) -> dict[str, list[str]]:
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
        if not same_shape(info.shape, right):
            difference = f"{found}: {list(info.shape)} for {list(right)}"
            faults.setdefault("has tensors of the wrong shape", []).append(difference)
        if info.dtype not in FLOATING:
            faults.setdefault("has tensors that hold no floating numbers", []).append(f"{found}: {info.dtype}")
    left = [key for key in on_disk if key not in canonical and not IGNORED_ORIGINAL.match(key)]
    scales = [key for key in left if _SCALES.search(key)]
    if scales:
        faults["has quantized weights, whose scales this version does not apply"] = scales
    ignored = _ignored(left, list(canonical))
    left = [key for key in left if key not in scales and (faults or key not in ignored)]
    if left:
        faults["has tensors of no use here"] = left
    if faults:
        listed = "; it ".join(list_keys(what, keys) for what, keys in faults.items())
        raise BadDataError(f"{shown(part.path)} is not the {part.name} it should be: it {listed}.")
    if ignored:
        _log.warning("%s %s", shown(part.path), list_keys("has tensors that are ignored", ignored))
    return canonical


def _ignored(left: list[str], known: list[str]) -> list[str]:
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


def _taken_apart(disk_key: str, tensor: Tensor, shapes: Shapes, heads: int = 1) -> dict[str, Tensor]:
    """The tensors of these shapes that are stored as one: views of it, so that nothing is held twice, unless each head
    has its rows of all."""
    stored = tensor.reshape(_stored_shape(disk_key, shapes.values()))
    if heads > 1:
        stored = stored.unflatten(0, (heads, len(shapes), -1)).transpose(0, 1).flatten(0, 2)
    rows = (stored.T if is_transposed(disk_key) else stored).split([shape[0] for shape in shapes.values()])
    return dict(zip(shapes, rows, strict=True))


def same_shape(on_disk: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal, or a convolution of one pixel where the same matrix is a linear layer now."""
    return on_disk == wanted or (len(wanted) == 2 and on_disk in ((*wanted, 1), (*wanted, 1, 1)))
