"""Weight files on disk: checked without torch, then read tensor by tensor.

Pickled files, where they are allowed, are read by `pickled` and are the same to the caller.

Nothing is ever memory-mapped: a mapped file that someone truncates kills the process with SIGBUS.
"""

import functools
import io
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ldmcli.checkpoints.header import (
    DTYPES,
    FLOATING,
    HEAD_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    HeaderError,
    TensorInfo,
    identify,
    may_be_pickled,
    parse_header,
    parse_json_object,
)
from ldmcli.disk.opening import WEIGHTS, bad_file, open_regular

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldmcli.checkpoints.pickled import Loader

_AGAIN = "download or convert it again"
_MAX_SHARDS = 1000
_STRUCT = {"F16": "e", "F32": "f", "F64": "d"}  # letters of types that are read without torch


@dataclass(frozen=True)
class WeightFile:
    """A checked weight file: tensors by name, metadata, and what identifies the file as checked."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    stamp: tuple[int, ...] = field(default=(), compare=False)  # device, inode, bytes, modification time in ns
    loader: "Loader | None" = field(default=None, compare=False, repr=False)  # of a pickled file

    @property
    def changed(self) -> bool:
        """Whether the file is another now than the one that was checked, or gone."""
        try:
            return _stamp(os.stat(self.path)) != self.stamp
        except OSError:
            return True


def open_weights(path: Path, *, allow_pickle: bool = False, cure: str = WEIGHTS[1]) -> WeightFile:
    """Check the weight file at `path` and describe it, without torch and without reading tensor data. `cure` is the
    advice where it is no regular file.

    It has to be safetensors or, with `allow_pickle`, a pickle of plain tensors by torch.save. Raises
    MissingInputError (no such file, not readable), BadDataError (anything else; the message says what it is) or
    StorageError.
    """
    with open_regular(path, (WEIGHTS[0], cure)) as file:
        status = os.fstat(file.fileno())
        # What the kernel makes up as it is read (/proc/kmsg, /proc/self/mem) has no size: it is not even read.
        head = file.read(HEAD_BYTES) if status.st_size else b""
        if allow_pickle and may_be_pickled(head) and not _begins_as_safetensors(head):
            return _open_pickled(path, file, status)
        header_bytes = _header_length(path, head, status.st_size)
        file.seek(8)
        raw = file.read(header_bytes)
    if len(raw) < header_bytes:
        raise bad_file(path, "changed while it was read", "try again once nothing writes to it")
    try:
        tensors, metadata = parse_header(raw, 8 + header_bytes, status.st_size)
    except HeaderError as error:
        raise bad_file(path, str(error), _AGAIN) from None
    return WeightFile(path, tensors, metadata, _stamp(status))


def open_sharded(index: Path, *, allow_pickle: bool = False) -> list[WeightFile]:
    """The files of a sharded model, by name, from its `*.safetensors.index.json` (or `*.bin.index.json`).

    Every tensor of `weight_map` is in the file the map gives, and in no other. Files stay inside the folder
    of the index, or, as links, in `blobs` of the same Hugging Face cache. Raises what open_weights raises.
    """
    with open_regular(index) as file:
        raw = file.read(MAX_HEADER_BYTES + 1)
    try:
        weight_map = parse_json_object(raw).get("weight_map")
    except HeaderError as error:
        raise bad_file(index, str(error), _AGAIN) from None
    if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > MAX_TENSORS:
        raise bad_file(index, f"has no weight_map with 1 to {MAX_TENSORS} tensors", _AGAIN)
    names = {name if isinstance(name, str) else repr(name) for name in weight_map.values()}
    if len(names) > _MAX_SHARDS:
        raise bad_file(index, f"lists {len(names)} files, more than {_MAX_SHARDS}", _AGAIN)
    shards = {name: open_weights(_inside(index, name), allow_pickle=allow_pickle) for name in sorted(names)}
    for key, name in weight_map.items():
        if key not in shards[name].tensors:
            raise bad_file(index, f"promises tensor “{key}” in {name}, which lacks it", _AGAIN)
    owner: dict[str, str] = {}
    for name, shard in shards.items():
        for key in shard.tensors:
            if owner.setdefault(key, name) != name:
                raise bad_file(index, f"has tensor “{key}” both in {owner[key]} and in {name}", _AGAIN)
    return list(shards.values())


def read_tensors(
    weights: WeightFile, names: Iterable[str], device: "torch.device | str", dtype: "torch.dtype | None"
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield each of `names` once with its tensor on `device`, in the order of the file.

    Floating tensors become `dtype` (None: as on disk), others keep theirs; those of four dimensions are laid out
    channels last. Memory: one tensor beyond what is yielded. Raises BadDataError for a name the file lacks, NaN or
    infinity on disk, values `dtype` cannot hold, and a file that changed since open_weights.
    """
    import torch

    try:
        wanted = sorted(((name, weights.tensors[name]) for name in set(names)), key=lambda item: item[1].start)
    except KeyError as error:
        raise bad_file(weights.path, f"has no tensor “{error.args[0]}”", "check that it is the right file") from None
    target = torch.device(device)
    stored = _unpickled(weights, wanted) if weights.loader else _read_raw(weights, wanted, target.type == "cpu", dtype)
    for name, tensor in stored:
        floating = tensor.is_floating_point()
        if floating and not _all_finite(tensor):
            raise bad_file(weights.path, f"holds NaN or infinity in tensor “{name}”", _AGAIN)
        wish = dtype if dtype is not None and floating else tensor.dtype
        yield name, _converted(weights.path, name, tensor, target, wish)


def read_numbers(weights: WeightFile, name: str, limit: int = 10_000) -> list[float]:
    """The values of a small list of floating numbers; without torch for the usual types of safetensors.

    Raises BadDataError where there is none of that name, it has another shape or type or more than `limit` numbers,
    holds NaN or infinity, or the file changed.
    """
    info = weights.tensors.get(name)
    if info is None:
        raise bad_file(weights.path, f"has no tensor “{name}”", "check that it is the right file")
    if len(info.shape) > 1 or math.prod(info.shape) > limit or info.dtype not in FLOATING:
        cause = f"holds tensor “{name}” as {info.dtype} {list(info.shape)}, not as a list of up to {limit} numbers"
        raise bad_file(weights.path, cause, _AGAIN)
    if weights.loader or info.dtype not in _STRUCT:
        return [number for _, read in read_tensors(weights, [name], "cpu", None) for number in read.flatten().tolist()]
    raw = bytearray(info.end - info.start)
    with open_regular(weights.path) as file:
        _read_into(raw, weights, file, info)
    numbers = [number for (number,) in struct.iter_unpack(f"<{_STRUCT[info.dtype]}", raw)]
    if not all(map(math.isfinite, numbers)):
        raise bad_file(weights.path, f"holds NaN or infinity in tensor “{name}”", _AGAIN)
    return numbers


def _open_pickled(path: Path, file: io.FileIO, status: os.stat_result) -> WeightFile:
    from ldmcli.checkpoints import pickled  # seldom needed, and zipfile takes time to import

    tensors = pickled.parse_pickled(path, file, status.st_size)
    return WeightFile(path, tensors, {}, _stamp(status), pickled.Loader(path))


def _begins_as_safetensors(head: bytes) -> bool:
    return len(head) > 8 and 0 < int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES and head[8:9] == b"{"


def _header_length(path: Path, head: bytes, size: int) -> int:
    """The length of the JSON header of a file that begins with `head`. Raises BadDataError."""
    if not head:
        raise bad_file(path, "is empty", _AGAIN)
    length = int.from_bytes(head[:8], "little")
    if _begins_as_safetensors(head):
        if 8 + length > size:
            raise bad_file(path, f"is cut short: its header needs {8 + length} bytes, it has {size}", _AGAIN)
        return length
    if other := identify(head):
        raise bad_file(path, f"is {other[0]}", other[1])
    if len(head) < 9:
        raise bad_file(path, f"is no safetensors file: it has only {size} bytes", _AGAIN)
    if length > MAX_HEADER_BYTES:
        raise bad_file(path, f"is no safetensors file: its first 8 bytes claim a header of {length} bytes", _AGAIN)
    raise bad_file(path, "is no safetensors file: no JSON object follows its first 8 bytes", _AGAIN)


def _inside(index: Path, name: str) -> Path:
    """The file `name` beside `index`; a link must stay there or lead to `blobs` of the same hub cache."""
    cure = "its files must lie beside it"
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        raise bad_file(index, f"names the file “{name}”", cure)
    path = index.parent / name
    folder = Path(os.path.realpath(index.parent))
    target = Path(os.path.realpath(path))
    # …/models--OWNER--NAME/snapshots/REVISION[/part] has blobs beside snapshots; huggingface_hub 2 has some beside the
    # repositories too, which several of them share.
    caches = [at for parent in folder.parents if parent.name == "snapshots" for at in parent.parents[:2]]
    if not any(target.is_relative_to(root) for root in (folder, *(cache / "blobs" for cache in caches))):
        raise bad_file(index, f"names the file “{name}”, a link that leads out of the folder", cure)
    return path


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


_Wanted = list[tuple[str, TensorInfo]]


def _read_raw(
    weights: WeightFile, wanted: _Wanted, on_cpu: bool, dtype: "torch.dtype | None"
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Each tensor of a safetensors file as it is stored; it lives until the next, unless it is the result itself."""
    import numpy as np
    import torch

    scratch = np.empty(0, np.uint8)
    with open_regular(weights.path) as file:
        for name, info in wanted:
            source = getattr(torch, DTYPES[info.dtype][0])
            size = info.end - info.start
            if on_cpu and (dtype in (None, source) or not source.is_floating_point):
                raw = np.empty(size, np.uint8)  # the result itself
            else:  # `to` copies: fresh memory for each tensor would cost ten times the read in page faults
                scratch = scratch if scratch.size >= size else np.empty(size, np.uint8)
                raw = scratch[:size]
            _read_into(raw, weights, file, info)
            yield name, _as_tensor(raw, source, info.shape)


def _unpickled(weights: WeightFile, wanted: _Wanted) -> "Iterator[tuple[str, torch.Tensor]]":
    """Each tensor of a pickled file, which must be what the file's outline said."""
    import torch

    assert weights.loader
    tensors = weights.loader.take(name for name, _ in wanted)
    for name, info in wanted:
        tensor = tensors.pop(name)
        if tensor.dtype != getattr(torch, DTYPES[info.dtype][0]) or tuple(tensor.shape) != info.shape:
            raise bad_file(weights.path, f"holds tensor “{name}” otherwise than it says", _AGAIN)
        yield name, tensor


def _read_into(raw: "np.ndarray | bytearray", weights: WeightFile, file: io.FileIO, info: TensorInfo) -> None:
    """Fill `raw` with the tensor's bytes. Raises BadDataError where the file is no longer the one checked."""
    view = memoryview(raw)  # type: ignore[arg-type]
    file.seek(info.start)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            break
        done += count
    changed = weights.stamp and weights.stamp != _stamp(os.fstat(file.fileno()))
    if done < len(view) or changed:
        raise bad_file(weights.path, "changed while it was read", "try again once nothing writes to it")


def _as_tensor(raw: "np.ndarray", dtype: "torch.dtype", shape: tuple[int, ...]) -> "torch.Tensor":
    """`raw` seen as the tensor it holds, on the CPU, without a copy."""
    import torch

    if not raw.size:
        return torch.empty(shape, dtype=dtype)
    flat = torch.from_numpy(raw)
    if dtype is torch.bool:
        return flat.ne(0).reshape(shape)  # any other byte than 0 and 1 in a bool is undefined behaviour
    return flat.view(dtype).reshape(shape)


def _converted(
    path: Path, name: str, tensor: "torch.Tensor", device: "torch.device", dtype: "torch.dtype"
) -> "torch.Tensor":
    """The finite CPU tensor `tensor` as `dtype` on `device`; narrowed before it is moved, widened after. Weights of
    convolutions are laid out channels last, in the same pass."""
    import torch

    layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    if dtype == tensor.dtype:
        return tensor.to(device, memory_format=layout)
    if dtype.itemsize > tensor.dtype.itemsize:
        return tensor.to(device).to(dtype, memory_format=layout)
    narrow = tensor.to(dtype, memory_format=layout)
    if not _all_finite(narrow):
        largest = tensor.double().abs().max().item()
        kind = str(dtype).removeprefix("torch.")
        cause = f"holds {largest:.4g} in tensor “{name}”, more than {kind} can hold"
        raise bad_file(path, cause, "use --dtype fp32 or --dtype bf16")
    return narrow.to(device)


def _all_finite(tensor: "torch.Tensor") -> bool:
    """Whether the floating CPU tensor has no NaN and no infinity: exact, from the bits.

    Those have all exponent bits set, so they are the largest patterns of their sign: at or above +infinity
    read as signed numbers, at or above -infinity as unsigned ones. On 500 MB of fp16 numpy's two maxima take
    25–34 ms, torch.isfinite 2.6–4.2 s, torch.aminmax 32 ms in one tensor but 500 ms in tensors of 6 MB.
    """
    import torch

    if not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # float8 types differ in what they have of the two
        return bool(torch.isfinite(tensor.float()).all())
    bits = tensor.reshape(-1).view(torch.uint8).numpy()
    width = tensor.dtype.itemsize
    positive = _infinity(tensor.dtype)
    negative = positive | 1 << (8 * width - 1)
    return bool(bits.view(f"i{width}").max() < positive and bits.view(f"u{width}").max() < negative)


@functools.cache
def _infinity(dtype: "torch.dtype") -> int:
    """The bits of +infinity, as an unsigned number."""
    import torch

    bits = torch.tensor([float("inf")], dtype=dtype).view(torch.uint8).numpy()
    return int(bits.view(f"u{dtype.itemsize}")[0])
