"""What tensors a pickle of torch.save would give, told without running it and without torch.

A pickle is a program for a stack machine that may call anything. The machine here knows only what a state dict needs,
and its values are inert: numbers, texts, tuples, tables, and descriptions of storages and tensors. What it accepts,
torch.load(weights_only=True) can read in bounded time and memory; all else is refused before torch sees it.
Format: https://docs.python.org/3/library/pickletools.html, torch/serialization.py, torch/_utils.py
"""

import dataclasses
import math
import pickletools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeGuard

from ldmcli.checkpoints.header import MAX_TENSORS, HeaderError, check_shape

_MAX_OPS = 500_000  # a checkpoint with 5,000 tensors needs 200,000; 1 µs each
_MAX_NESTING = 3  # tables inside the state dict, as in textual-inversion embeddings

_STORAGES = {
    "torch BoolStorage": "BOOL",
    "torch ByteStorage": "U8",
    "torch CharStorage": "I8",
    "torch ShortStorage": "I16",
    "torch IntStorage": "I32",
    "torch LongStorage": "I64",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch FloatStorage": "F32",
    "torch DoubleStorage": "F64",
}
_TABLE = "collections OrderedDict"
_SIZE = "torch Size"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_KNOWN = {*_STORAGES, _TABLE, _SIZE, _TENSOR, _PARAMETER}

_NO_METADATA: tuple[tuple[Any, ...], ...] = ((), (None,), ({},))

_MARK = object()


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of `count` numbers of one type (safetensors' name), by its key in the archive."""

    dtype: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as a view of a storage; offset and strides in numbers, and all it sees is inside the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """How many numbers lie between its first and its last, both counted."""
        if not math.prod(self.shape):
            return 0
        return 1 + sum((dim - 1) * stride for dim, stride in zip(self.shape, self.strides, strict=True))


class _Global(str):
    """A name that the pickle would import: "module name"."""

    __slots__ = ()


class Outline:
    """A machine for the pickles of one file: `run` gives the value of the next one; `storages` are those seen so far,
    by key. Raises HeaderError."""

    def __init__(self, file: BinaryIO) -> None:
        self.storages: dict[str, Storage] = {}
        self._file = file
        self._left = _MAX_OPS
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        """The value of the pickle that begins where the file stands; leaves it at the pickle's end."""
        self._stack, self._memo = [], {}
        try:
            for op, value, _ in pickletools.genops(self._file):
                self._left -= 1
                if self._left < 0:
                    raise HeaderError(f"has a pickle of more than {_MAX_OPS} steps, far beyond any model")
                self._step(op.name, value)
            return self._stack.pop()
        except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, HeaderError):
                raise
            raise HeaderError("has a broken pickle") from None

    def _step(self, name: str, value: Any) -> None:
        if name in _PUSHED:
            self._stack.append(value)
        elif name in _MADE:
            self._stack.append(_MADE[name]())
        elif name in _ACTIONS:
            _ACTIONS[name](self, value)
        else:
            raise HeaderError(f"has a pickle with the step {name}, which no plain table of tensors needs")

    def _since_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _short_tuple(self, length: int) -> None:
        items = self._stack[-length:]
        if len(items) != length or any(item is _MARK for item in items):
            raise IndexError
        self._stack[-length:] = [tuple(items)]

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise HeaderError("has a pickle that appends to what is no list")
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        table = self._stack[-1]
        if type(table) is not dict or len(items) % 2:
            raise HeaderError("has a pickle that fills in what is no table")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, float, bool, type(None)):  # a nested tuple may take for ever to hash
                raise HeaderError("has a table with keys that are neither texts nor numbers")
            table[key] = value

    def _import(self, name: str) -> None:
        if name not in _KNOWN:
            wanted = name.replace(" ", ".")
            raise HeaderError(f"wants “{wanted[:200]}”, which is more than plain tensors and may be code")
        self._stack.append(_Global(name))

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise HeaderError("has a pickle that calls what is no function")
        if function == _TENSOR:
            self._stack.append(_tensor(*arguments))
        elif function == _TABLE and arguments == ():
            self._stack.append({})
        elif _gives_first(function, arguments):
            self._stack.append(arguments[0])
        else:
            raise HeaderError(f"calls “{function.replace(' ', '.')}” in a way torch.save never does")

    def _build(self) -> None:
        """`_metadata`, which state_dict() hangs on its table; any other attribute could hide a method."""
        state, table = self._stack.pop(), self._stack[-1]
        if type(table) is not dict or type(state) is not dict or set(state) != {"_metadata"}:
            raise HeaderError("has a pickle that sets attributes, which no plain table of tensors needs")

    def _persistent(self) -> None:
        """A storage: ("storage", type, key, device, count), in the format before torch 1.6 with None after it."""
        mark, kind, key, device, count, *view = self._stack.pop()
        if mark != "storage" or not isinstance(kind, _Global) or kind not in _STORAGES or view not in ([], [None]):
            raise HeaderError("refers to something that is not the storage of a tensor")
        texts = type(key) is str and type(device) is str and key.isascii() and key.isalnum() and len(key) < 100
        if not texts or type(count) is not int or not 0 <= count < 1 << 60:
            raise HeaderError("has a storage with an impossible name or size")
        storage = Storage(_STORAGES[kind], key, count)
        if self.storages.setdefault(key, storage) != storage:
            raise HeaderError(f"describes the storage “{key}” in two ways")
        self._stack.append(storage)

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]


def _gives_first(function: str, arguments: tuple[Any, ...]) -> bool:
    """Whether this call is one of those that wrap a tensor or a shape, which here stay what they are."""
    if function == _PARAMETER:
        return len(arguments) == 3 and isinstance(arguments[0], StoredTensor)
    return function == _SIZE and len(arguments) == 1 and _whole_numbers(arguments[0])


def _tensor(storage: object, offset: object, shape: object, strides: object, *rest: object) -> StoredTensor:
    """torch._utils._rebuild_tensor_v2, as a description; the rest is requires_grad, hooks and metadata."""
    if (
        not isinstance(storage, Storage)
        or rest[0] not in (True, False)
        or rest[1] != {}
        or rest[2:] not in _NO_METADATA
    ):
        raise HeaderError("has a tensor that torch.save would describe otherwise")
    if not _whole_numbers(shape) or not _whole_numbers(strides) or len(strides) != len(shape):
        raise HeaderError("has a tensor with an impossible shape or strides")
    check_shape("a tensor", shape)
    if type(offset) is not int or offset < 0:
        raise HeaderError("has a tensor at an impossible place")
    tensor = StoredTensor(storage, offset, shape, strides)
    # The first half refuses numbers seen more than once, with which four bytes could stand for a tensor of any size.
    if math.prod(shape) > storage.count or offset + tensor.extent > storage.count:
        raise HeaderError(f"has a tensor of shape {list(shape)} that reaches beyond the data it is stored in")
    return tensor


def _whole_numbers(value: object) -> TypeGuard[tuple[int, ...]]:
    return type(value) is tuple and all(type(number) is int and 0 <= number < 1 << 60 for number in value)


def state_dict(value: object, tensor: type, *, most: int = MAX_TENSORS) -> dict[str, Any]:
    """The objects of type `tensor` in what a checkpoint holds, by name; the rest (numbers, texts) is passed over.

    Training programs keep the state dict under `state_dict`; inner tables give names with dots. Raises HeaderError.
    """
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise HeaderError("holds no table of tensors")
    found: dict[str, Any] = {}
    for name, item in _entries(value, "", set(), _MAX_NESTING):
        if not isinstance(item, tensor):
            continue
        if name in found:
            raise HeaderError(f"names “{name[:120]}” twice")
        found[name] = item
        if len(found) > most:
            raise HeaderError(f"lists more than {most} tensors")
    return found


def _entries(table: dict[Any, Any], prefix: str, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    """Names and values, inner tables opened to `depth`, each table once: it may hold itself."""
    seen.add(id(table))
    for key, item in table.items():
        name = f"{prefix}{key}"
        if not isinstance(item, dict):
            yield name, item
        elif depth and id(item) not in seen:
            yield from _entries(item, f"{name}.", seen, depth - 1)


_PUSHED = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_MADE: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_ACTIONS: dict[str, Callable[[Outline, Any], object]] = {
    "PROTO": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    "GLOBAL": lambda machine, name: machine._import(name),
    "BINPUT": lambda machine, index: machine._remember(index),
    "LONG_BINPUT": lambda machine, index: machine._remember(index),
    "BINGET": lambda machine, index: machine._stack.append(machine._memo[index]),
    "LONG_BINGET": lambda machine, index: machine._stack.append(machine._memo[index]),
    "TUPLE": lambda machine, _: machine._stack.append(tuple(machine._since_mark())),
    "TUPLE1": lambda machine, _: machine._short_tuple(1),
    "TUPLE2": lambda machine, _: machine._short_tuple(2),
    "TUPLE3": lambda machine, _: machine._short_tuple(3),
    "APPEND": lambda machine, _: machine._extend([machine._stack.pop()]),
    "APPENDS": lambda machine, _: machine._extend(machine._since_mark()),
    "SETITEM": lambda machine, _: machine._set([machine._stack.pop(-2), machine._stack.pop()]),
    "SETITEMS": lambda machine, _: machine._set(machine._since_mark()),
    "REDUCE": lambda machine, _: machine._call(),
    "BUILD": lambda machine, _: machine._build(),
    "BINPERSID": lambda machine, _: machine._persistent(),
}
