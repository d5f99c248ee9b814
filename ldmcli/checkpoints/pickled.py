"""Pickled checkpoints (.ckpt, .pt, .bin of torch.save), for those who allow them. The only place that calls torch.load.

First the file is checked as safetensors are, without torch: its archive and the outline of its pickle, which must hold
plain tensors, each inside its own stored bytes. Only then torch.load reads it, with weights_only=True and nothing else.
"""

import io
import struct
import threading
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldmcli.checkpoints.header import DTYPE_BYTES, MAX_TENSORS, HeaderError, TensorInfo
from ldmcli.checkpoints.key_map import IGNORED_ORIGINAL
from ldmcli.checkpoints.outline import Outline, Storage, StoredTensor, state_dict
from ldmcli.disk.opening import bad_file, open_regular

if TYPE_CHECKING:
    import torch

CURE = "get or convert it to .safetensors"
_MAX_PICKLE_BYTES = 4 << 20  # a checkpoint with 2,500 tensors has 0.5 MB
_MAX_DIRECTORY_BYTES = 4 << 20  # of a zip: 100 bytes for each tensor
_END = struct.Struct("<4s4H2LH")  # a zip's last record
_END64 = struct.Struct("<4sQ2H2L4Q")  # and, in large archives, two more before it
_LOCATOR = struct.Struct("<4sLQL")
_MEMBER = struct.Struct("<4s5H3L2H")  # what precedes each member
_MAGIC = 0x1950A86A20F9469CFC6C  # begins what torch wrote before 1.6
_PROTOCOL = 1001


class _Extent(NamedTuple):
    """Where a storage's bytes are in the file."""

    start: int
    end: int


def parse_pickled(file: io.FileIO, size: int) -> dict[str, TensorInfo]:
    """The tensors of the state dict in `file`, of `size` bytes; where a tensor is no plain run of numbers, `start` and
    `end` are those of all that it sees. Reads no tensor data and imports no torch. Raises HeaderError.
    """
    file.seek(0)
    value, extents = (_from_zip if file.read(2) == b"PK" else _from_bare)(file, size)
    tensors: dict[str, TensorInfo] = {}
    total = 0
    for name, tensor in state_dict(value, StoredTensor).items():
        width = DTYPE_BYTES[tensor.storage.dtype]
        start = extents[tensor.storage.key].start + tensor.offset * width
        tensors[name] = TensorInfo(tensor.storage.dtype, tensor.shape, start, start + tensor.extent * width)
        total += tensor.extent * width
    if total > 2 * size:  # some share their numbers, but not so many: a small file must not make a large model
        raise HeaderError(f"has tensors of {total} bytes in all, which share {size} bytes of file")
    return tensors


class Loader:
    """Gives the tensors of one pickled file, which is read once for all parts of a model, at the first that is asked
    for; each is let go of as it is given away."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._tensors: dict[str, torch.Tensor] = {}

    def take(self, names: Iterable[str]) -> "dict[str, torch.Tensor]":
        """The tensors `names`, on the CPU, whole and sharing memory with no other. Raises BadDataError."""
        wanted = set(names)
        with self._lock:
            if not wanted <= self._tensors.keys():
                loaded = _load(self._path)
                kept = {name for name in loaded if not IGNORED_ORIGINAL.match(name)} | wanted
                self._tensors = _apart({name: loaded[name] for name in loaded if name in kept})
            if not wanted <= self._tensors.keys():
                raise bad_file(self._path, "changed while it was read", "try again once nothing writes to it")
            return {name: self._tensors.pop(name) for name in wanted}


def _load(path: Path) -> "dict[str, torch.Tensor]":
    """The state dict in `path` by torch.load, after the check that opening it made: it may have changed since."""
    import torch

    with open_regular(path) as file:
        try:
            parse_pickled(file, file.seek(0, io.SEEK_END))
        except HeaderError as error:
            raise bad_file(path, str(error), CURE) from None
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                buffered = io.BufferedReader(file)
                value = torch.load(buffered, map_location="cpu", weights_only=True, mmap=False)
                buffered.detach()
            return state_dict(value, torch.Tensor)
        except OSError:
            raise  # a fault of the disk, which open_regular words
        except Exception as error:  # of whatever kind torch finds; there is no second way
            told = next(iter(str(error).splitlines()), type(error).__name__)
            raise bad_file(path, f"cannot be read by torch.load with weights_only=True ({told[:200]})", CURE) from None


def _apart(tensors: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The same tensors, contiguous, none sharing memory with another or keeping more than its own numbers alive."""
    import torch

    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        if plain.dtype is torch.bool:
            plain = plain.view(torch.uint8).ne(0)  # any other byte than 0 and 1 in a bool is undefined behaviour
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
    return tensors


# ---- what torch writes since 1.6: a zip, nothing compressed ----


def _from_zip(file: io.FileIO, size: int) -> tuple[object, dict[str, _Extent]]:
    """The outline of the pickle in a zip, and where its storages are."""
    members = _members(file, _check_ends(file, size))
    roots = {name.split("/", 1)[0] for name in members}
    root = min(roots, default="")
    if len(roots) != 1 or f"{root}/data.pkl" not in members:
        raise HeaderError("is a zip archive that torch.save did not write")
    if f"{root}/constants.pkl" in members:
        raise HeaderError("is a TorchScript program, not weights")
    order = members.get(f"{root}/byteorder")
    if order and _read(file, order, 6) != b"little":
        raise HeaderError("was written on a machine with another byte order")
    machine = Outline(io.BytesIO(_read(file, members[f"{root}/data.pkl"], _MAX_PICKLE_BYTES)))
    value = machine.run()
    extents = {}
    for key, storage in machine.storages.items():
        extent = members.get(f"{root}/data/{key}")
        if extent is None or extent.end - extent.start != _bytes(storage):
            raise HeaderError(f"is damaged: the data of storage “{key}” are missing or of another size")
        extents[key] = extent
    return value, extents


def _check_ends(file: io.FileIO, size: int) -> int:
    """Where the directory of a zip begins. Only what torch itself writes will do, so that every reader sees the same
    archive: nothing before, nothing after, and no directory too large to read."""
    tail = _read(file, _Extent(max(0, size - 98), size), 98).rjust(98, b"\0")
    magic, *_, length, start, comment = _END.unpack(tail[76:])
    if magic != b"PK\x05\x06" or comment:
        raise HeaderError("is cut short: the end of its zip archive is missing")
    end = size - 22
    if tail[56:60] == b"PK\x06\x07":
        magic, *_, length, start = _END64.unpack(tail[:56])
        end = size - 98
        if magic != b"PK\x06\x06" or _LOCATOR.unpack(tail[56:76])[2] != end:
            raise HeaderError("has a damaged zip directory")
    if length > _MAX_DIRECTORY_BYTES:
        raise HeaderError(f"has a zip directory of {length} bytes, far beyond any model")
    if start + length != end:
        raise HeaderError("has a damaged zip directory")
    return start


def _members(file: io.FileIO, directory: int) -> dict[str, _Extent]:
    """Where each file of the archive is: stored as it is, all before `directory`, none inside another."""
    try:
        with zipfile.ZipFile(file) as archive:
            listed = sorted(archive.infolist(), key=lambda member: member.header_offset)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise HeaderError(f"has a damaged zip directory ({error})") from None
    if len({member.filename.lower() for member in listed}) != len(listed):
        raise HeaderError("has a zip directory that names a file twice")
    members: dict[str, _Extent] = {}
    at = 0
    for member in listed:
        if (
            member.compress_type != zipfile.ZIP_STORED
            or member.flag_bits & 1
            or member.file_size != member.compress_size
        ):
            raise HeaderError(f"is a zip archive with compressed or locked files (“{member.filename[:100]}”)")
        head = _MEMBER.unpack(_read(file, _Extent(member.header_offset, member.header_offset + 30), 30))
        start = member.header_offset + 30 + head[-2] + head[-1]
        if head[0] != b"PK\x03\x04" or member.header_offset < at or start + member.file_size > directory:
            raise HeaderError(f"has a damaged zip archive at “{member.filename[:100]}”")
        at = start + member.file_size
        members[member.filename] = _Extent(start, at)
    return members


# ---- what torch wrote before: five pickles, then the storages ----


def _from_bare(file: io.FileIO, size: int) -> tuple[object, dict[str, _Extent]]:
    """The outline of the fourth pickle (magic number, version, machine, value, keys), and where its storages are."""
    head = io.BytesIO(_read(file, _Extent(0, min(size, _MAX_PICKLE_BYTES)), _MAX_PICKLE_BYTES))
    machine = Outline(head)
    if machine.run() != _MAGIC or machine.run() != _PROTOCOL:
        raise HeaderError("is a pickle that torch.save did not write")
    system = machine.run()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise HeaderError("was written on a machine with another byte order")
    value, keys = machine.run(), machine.run()
    if not isinstance(keys, list) or len(keys) > MAX_TENSORS or sorted(map(str, keys)) != sorted(machine.storages):
        raise HeaderError("is damaged: it does not list the data that its tensors need")
    at = head.tell()
    extents: dict[str, _Extent] = {}
    for key in map(str, keys):
        storage = machine.storages[key]
        (count,) = struct.unpack("<Q", _read(file, _Extent(at, at + 8), 8))
        extents[key] = _Extent(at + 8, at + 8 + _bytes(storage))
        at = extents[key].end
        if count != storage.count or at > size:
            raise HeaderError(f"is cut short or damaged: the data of storage “{key}” are missing or of another size")
    if at != size:
        raise HeaderError(f"has {size - at} bytes after its last tensor")
    return value, extents


def _bytes(storage: Storage) -> int:
    return storage.count * DTYPE_BYTES[storage.dtype]


def _read(file: io.FileIO, extent: _Extent, most: int) -> bytes:
    """The bytes of `extent`. Raises HeaderError where there are more than `most`, or the file has fewer."""
    length = extent.end - extent.start
    if length > most:
        raise HeaderError(f"has a pickle of {length} bytes, far beyond any model")
    file.seek(extent.start)
    raw = file.read(length)
    if len(raw) < length:
        raise HeaderError("is cut short or damaged")
    return raw
