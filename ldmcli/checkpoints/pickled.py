"""Pickled checkpoints (.ckpt, .pt, .bin of torch.save), for those who allow them. The only place that calls torch.load.

A pickle is a program that may import anything. Its steps are listed first, and none is run: a file that names more than
plain tensors need is refused before torch sees it. Then torch.load reads it, with weights_only=True and nothing else,
which knows no other step that imports.
"""

import io
import pickletools
import threading
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.checkpoints.header import DTYPES, MAX_TENSORS, HeaderError, TensorInfo
from ldmcli.checkpoints.key_map import IGNORED_ORIGINAL
from ldmcli.disk.opening import bad_file, open_regular

if TYPE_CHECKING:
    import torch

CURE = "get or convert it to .safetensors"
_MAX_PICKLE_BYTES = 4 << 20  # a checkpoint with 2,500 tensors has 0.5 MB
_MAX_STEPS = 500_000  # a checkpoint with 5,000 tensors needs 200,000
_TUPLE_STEPS = 5  # that a tuple counts for: hashing 200,000, one in another, overflows the stack
_BARE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch wrote before 1.6 begins with: a pickled magic number
_BARE_PICKLES = 5  # magic number, version, machine, value, keys; then the numbers
_NUMBERS = ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
_KNOWN = {
    *(f"torch {number}Storage" for number in _NUMBERS),
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}
# What holds no tuple: fetched from the memo however often, it cannot grow.
_ATOMS = {"GLOBAL", "BINUNICODE", "REDUCE", "BINPERSID", "EMPTY_DICT", "EMPTY_LIST"}


def parse_pickled(path: Path, file: io.FileIO, size: int) -> dict[str, TensorInfo]:
    """The tensors of the state dict in `file`, of `size` bytes, whose numbers are not read; the places given count
    from the first to the last. Raises BadDataError."""
    tensors: dict[str, TensorInfo] = {}
    at = 0
    for name, tensor in _load(path, file, size, "meta").items():
        dtype = next(name for name, (known, _) in DTYPES.items() if f"torch.{known}" == str(tensor.dtype))
        tensors[name] = TensorInfo(dtype, tuple(tensor.shape), at, at + tensor.nbytes)
        at += tensor.nbytes
    if at > 2 * size:  # some share their numbers, but not so many: a small file must not make a large model
        raise bad_file(path, f"has tensors of {at} bytes in all, which share {size} bytes of file", CURE)
    return tensors


class Loader:
    """Gives the tensors of one pickled file, which is read once for all parts of a model, at the first that is asked
    for; each is let go of as it is given away."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._tensors: dict[str, torch.Tensor] = {}

    def take(self, names: Iterable[str]) -> "dict[str, torch.Tensor]":
        """The tensors `names`, on the CPU, contiguous and sharing memory with no other. Raises BadDataError."""
        wanted = set(names)
        with self._lock:
            if not wanted <= self._tensors.keys():
                with open_regular(self._path) as file:  # it is checked again: it may have changed
                    loaded = _load(self._path, file, file.seek(0, io.SEEK_END), "cpu")
                kept = {name for name in loaded if not IGNORED_ORIGINAL.match(name)} | wanted
                self._tensors = {name: loaded[name] for name in loaded if name in kept}
            if not wanted <= self._tensors.keys():
                raise bad_file(self._path, "changed while it was read", "try again once nothing writes to it")
            return {name: _own(self._tensors.pop(name)) for name in wanted}


def _own(tensor: "torch.Tensor") -> "torch.Tensor":
    """A copy of the tensor alone: files store views of one memory, whose owner would keep all of it."""
    import torch

    plain = tensor.detach().clone(memory_format=torch.contiguous_format)
    # Any other byte than 0 and 1 in a bool is undefined behaviour.
    return plain.view(torch.uint8).ne(0) if plain.dtype is torch.bool else plain


def _load(path: Path, file: io.FileIO, size: int, device: str) -> "dict[str, torch.Tensor]":
    """The state dict in `file`, by torch.load on `device`, once the check has passed."""
    try:
        _check(file, size)
        import torch

        file.seek(0)
        buffered = io.BufferedReader(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(buffered, map_location=device, weights_only=True, mmap=False)
        buffered.detach()
        return _state_dict(value)
    except HeaderError as error:
        raise bad_file(path, str(error), CURE) from None
    except OSError:
        raise  # a fault of the disk, which open_regular words
    except Exception as error:  # of whatever kind torch finds; there is no second way
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise bad_file(path, f"cannot be read by torch.load with weights_only=True ({said[:200]})", CURE) from None


def _state_dict(value: object) -> "dict[str, torch.Tensor]":
    """The tensors in what a checkpoint holds, by name; the rest (numbers, texts) is passed over.

    Training programs keep the state dict under `state_dict`; inner tables give names with dots, and so do tables in a
    list, as embeddings for several text encoders are, with their numbers in front. Raises HeaderError.
    """
    import torch

    if isinstance(value, list):
        value = {str(place): item for place, item in enumerate(value)}
    if not isinstance(value, dict):
        raise HeaderError("holds no table of tensors")
    inner = value.get("state_dict")
    found: dict[str, torch.Tensor] = {}
    for name, item in _entries(inner if isinstance(inner, dict) else value, "", set()):
        if isinstance(item, torch.Tensor):
            if name in found:
                raise HeaderError(f"names “{name[:120]}” twice")
            found[name] = item
            if len(found) > MAX_TENSORS:
                raise HeaderError(f"lists more than {MAX_TENSORS} tensors")
    return found


def _entries(table: dict[Any, Any], prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Names and values, inner tables opened, each table once: it may hold itself."""
    seen.add(id(table))
    for key, item in dict.items(table):  # a pickle may put something else where the table has its own method
        name = f"{prefix}{key}" if isinstance(key, str | int | float) else ""
        if isinstance(item, dict):
            if id(item) not in seen:
                yield from _entries(item, f"{name}.", seen)
        elif name:
            yield name, item


def _check(file: io.FileIO, size: int) -> None:
    """Raise HeaderError unless every pickle in `file` names no more than plain tensors need. Imports no torch."""
    file.seek(0)
    head = file.read(min(size, _MAX_PICKLE_BYTES))
    zipped, bare = head.startswith(b"PK"), head.startswith(_BARE)
    pickles = io.BytesIO(_pickle_in_zip(file, size) if zipped else head)
    left = _MAX_STEPS
    try:
        for _ in range(_BARE_PICKLES if bare else 1):
            left = _check_steps(pickletools.genops(pickles), left)
    except HeaderError:
        raise
    except (ValueError, IndexError, OverflowError):
        raise HeaderError("has a broken pickle") from None
    if not zipped and not bare:
        raise HeaderError("is a pickle that torch.save did not write")


def _check_steps(steps: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]], left: int) -> int:
    """How many of the steps that are `left` one pickle leaves. What it fetches from its memo costs as many as all that
    was fetched before that was made: tuples of fetched tuples double with every step."""
    costs: dict[Any, int] = {}
    fetched, before = 1, ""
    for step, argument, _ in steps:
        if "PUT" in step.name:
            costs[argument] = 0 if before in _ATOMS else fetched
        else:
            before = step.name
        cost = costs.get(argument, 0) if "GET" in step.name else 0
        fetched += cost
        left -= cost + (_TUPLE_STEPS if step.name.startswith("TUPLE") else 1)
        if left < 0:
            raise HeaderError(f"has a pickle of more than {_MAX_STEPS} steps, far beyond any model")
        if step.name == "GLOBAL" and argument not in _KNOWN:
            wanted = str(argument).replace(" ", ".")[:200]
            raise HeaderError(f"wants “{wanted}”, which is more than plain tensors and may be code")
    return left


def _pickle_in_zip(file: io.FileIO, size: int) -> bytes:
    """The one pickle of a zip by torch.save, which stores all as it is: nothing may unpack to more than `size`."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise HeaderError("is a zip archive with compressed files, which torch.save does not write")
            pickles = [member for member in members if member.filename.endswith("data.pkl")]
            if len(pickles) != 1 or sum(member.file_size for member in members) > size:
                raise HeaderError("is a zip archive that torch.save did not write")
            if pickles[0].file_size > _MAX_PICKLE_BYTES:
                raise HeaderError(f"has a pickle of more than {_MAX_PICKLE_BYTES} bytes, far beyond any model")
            return archive.read(pickles[0])
    except HeaderError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, RuntimeError, EOFError) as error:
        raise HeaderError(f"is a cut or damaged zip archive ({error})") from None
