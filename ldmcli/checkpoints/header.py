"""The safetensors header: eight bytes of length, then JSON naming every tensor with type, shape and place.

Pure: bytes in, descriptions out, no file and no torch. Format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import json
import math
from typing import Any

MAX_HEADER_BYTES = 32 << 20  # real checkpoints stay below 1 MB
MAX_TENSORS = 50_000  # the largest known have 5,000
_MAX_COMMAS = 500_000  # 50,000 four-dimensional tensors need 350,000: bounds what the JSON parser may build
_MAX_RANK = 32
_MAX_ELEMENTS = 1 << 60  # so that strides and byte counts fit in 64 bits, even where another dimension is 0

# By safetensors' name of a type: torch's name, and bytes for one number.
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F64": ("float64", 8),
}
FLOATING = {name for name, (torch_name, _) in DTYPES.items() if "float" in torch_name}


class HeaderError(ValueError):
    """What is wrong with a header, worded to follow the file's name; names in it are not yet escaped."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk: safetensors' type name, shape, absolute byte offsets [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def parse_header(raw: bytes, data_start: int, file_size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of the JSON text `raw`, whose tensor data fill bytes `data_start` to `file_size`.

    Every tensor's type, shape and byte count agree, and together they cover the data exactly: no overlap, no
    hole. Raises HeaderError. MAX_HEADER_BYTES and MAX_TENSORS bound time and memory, whatever `raw` says.
    """
    if not raw.startswith(b"{"):
        raise HeaderError("has a header that is not a JSON object")
    entries = parse_json_object(raw)
    metadata = _metadata(entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise HeaderError(f"lists {len(entries)} tensors, more than {MAX_TENSORS}")
    tensors = {name: _tensor(name, entry, data_start) for name, entry in entries.items()}
    _check_cover(tensors, data_start, file_size)
    return tensors, metadata


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw` (UTF-8), with bounded size and depth and no key twice at any level.

    Raises HeaderError.
    """
    if len(raw) > MAX_HEADER_BYTES:
        raise HeaderError(f"has {len(raw)} bytes of JSON, more than {MAX_HEADER_BYTES}")
    for mark, limit in ((b"{", MAX_TENSORS + 1000), (b"[", 2 * MAX_TENSORS + 1000), (b",", _MAX_COMMAS)):
        if raw.count(mark) > limit:
            raise HeaderError(f"has JSON with more than {limit} “{mark.decode()}”, far beyond any model")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except HeaderError:
        raise
    except UnicodeDecodeError as error:
        raise HeaderError(f"has JSON that is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise HeaderError("has JSON that is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and integers beyond Python's digit limit
        raise HeaderError(f"has broken JSON ({error})") from None
    if not isinstance(value, dict):
        raise HeaderError("has JSON that is not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of `pairs`; a key given twice is an error, where json would keep the last in silence."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise HeaderError(f"names “{_cut(key)}” twice")
        seen.add(key)
    raise AssertionError("unreachable")


def _metadata(value: object) -> dict[str, str]:
    if value is None:  # some writers say so that there is none
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise HeaderError("has a __metadata__ that is not a table of texts")
    if not all(_is_unicode(key) and _is_unicode(text) for key, text in value.items()):
        raise HeaderError("has a __metadata__ with a lone surrogate, which is no Unicode text")
    return value


def _tensor(name: str, entry: object, data_start: int) -> TensorInfo:
    """The checked description of one tensor, offsets made absolute."""
    quoted = f"tensor “{_cut(name)}”"
    if not _is_unicode(name):
        raise HeaderError(f"has a {quoted} with a lone surrogate in its name, which is no Unicode text")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise HeaderError(f"describes {quoted} without dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"gives {quoted} the unknown type {_cut(repr(dtype))}")
    if not isinstance(shape, list):
        raise HeaderError(f"gives {quoted} the impossible shape {_cut(repr(shape))}")
    if len(shape) > _MAX_RANK or not all(_is_count(dim) for dim in shape):
        raise HeaderError(f"gives {quoted} the impossible shape {_cut(repr(shape))}")
    if math.prod(max(dim, 1) for dim in shape) > _MAX_ELEMENTS:
        raise HeaderError(f"gives {quoted} the impossibly large shape {_cut(repr(shape))}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(at) for at in offsets):
        raise HeaderError(f"gives {quoted} the impossible offsets {_cut(repr(offsets))}")
    start, end = offsets
    needed = math.prod(shape) * DTYPES[dtype][1]
    if end - start != needed:
        raise HeaderError(f"gives {quoted} {end - start} bytes where {dtype} {_cut(repr(shape))} needs {needed}")
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + end)


def _check_cover(tensors: dict[str, TensorInfo], data_start: int, file_size: int) -> None:
    """Raise HeaderError unless the tensors, laid end to end, fill the file from `data_start` to its end."""
    needed = max((info.end for info in tensors.values()), default=data_start)
    if needed > file_size:
        raise HeaderError(f"is cut short: its header describes {needed} bytes, the file has {file_size}")
    at, before = data_start, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < at:
            raise HeaderError(f"has tensors “{_cut(before)}” and “{_cut(name)}” overlapping")
        if info.start > at:
            raise HeaderError(f"has a hole of {info.start - at} bytes before tensor “{_cut(name)}”")
        at, before = info.end, name
    if at < file_size:
        raise HeaderError(f"has {file_size - at} bytes after its last tensor")


def _is_count(value: object) -> bool:
    """Whether `value` is a whole number in 0 … 2^63 - 1 (and not a bool)."""
    return type(value) is int and 0 <= value < 1 << 63


def _is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogates (JSON's \\ud800 escapes make them)."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _cut(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
