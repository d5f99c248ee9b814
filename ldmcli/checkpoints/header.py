"""The beginning of a weight file: the safetensors header, or what kind of file it is instead.

Pure: bytes in, descriptions out, no file and no torch. A safetensors file begins with eight bytes of length, then JSON
that names every tensor with type, shape and place. Format: https://github.com/huggingface/safetensors#format
"""

import collections
import dataclasses
import json
import math
import re
from typing import Any

MAX_HEADER_BYTES = 32 << 20  # real checkpoints stay below 1 MB
MAX_TENSORS = 50_000  # the largest known have 5,000
HEAD_BYTES = 1024  # that tell what another file is
_MAX_COMMAS = 500_000  # 50,000 four-dimensional tensors need 350,000: bounds what the JSON parser may build
_MAX_RANK = 32
_MAX_ELEMENTS = 1 << 60  # so that strides and byte counts fit in 64 bits, even where another dimension is 0
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON's escapes make lone ones

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

_CONVERT = (
    "get or convert it to .safetensors, for a pickle can run any code; ldm never unpickles, but --allow-pickle reads "
    "plain tensors out of one"
)
_DOWNLOAD = "download the weight file itself again"
_EXPORT = "name the model's .safetensors file instead"
_PICTURE = "name a weight file (.safetensors), not a picture"
_UNPACK = "unpack it and name the .safetensors file in it"
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
# By the first bytes of a file: what it is, and the cure.
_MAGIC = {
    **dict.fromkeys(_PICKLES, ("a pickle (.ckpt, .pt or .bin)", _CONVERT)),
    b"GGUF": ("a GGUF file", _EXPORT),
    b"ggjt": ("a GGML file", _EXPORT),
    b"\x89HDF\r\n": ("an HDF5 (Keras) file", _EXPORT),
    b"\x93NUMPY": ("a NumPy array", _EXPORT),
    b"\x89PNG": ("a PNG picture", _PICTURE),
    b"\xff\xd8\xff": ("a JPEG picture", _PICTURE),
    b"GIF8": ("a GIF picture", _PICTURE),
    b"RIFF": ("a RIFF (WebP or WAV) file", _PICTURE),
    b"%PDF": ("a PDF document", _EXPORT),
    b"\x1f\x8b": ("a gzip archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", _UNPACK),
    b"\xfd7zXZ": ("an xz archive", _UNPACK),
    b"7z\xbc\xaf": ("a 7-Zip archive", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    b"\x7fELF": ("a compiled program or library", _EXPORT),
}


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
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # some writers say null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise HeaderError("has a __metadata__ that is not a table of texts")
    if any(_SURROGATE.search(text) for pair in metadata.items() for text in pair):
        raise HeaderError("has a __metadata__ with a lone surrogate, which is no Unicode text")
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


def identify(head: bytes) -> tuple[str, str] | None:
    """What a file that begins with `head` (its first HEAD_BYTES bytes) is, if no safetensors file, and the cure; None
    where it is not recognised. Nothing is unpickled."""
    found = next((verdict for magic, verdict in _MAGIC.items() if head.startswith(magic)), None)
    if found:
        return found
    if head.startswith(b"PK\x03\x04"):
        if b".pkl" in head or b"/byteorder" in head:
            return "a pickle in a zip (.ckpt, .pt or .bin of torch.save)", _CONVERT
        return "a zip archive", _UNPACK
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head[:1] == b"\x08" and head[2:3] == b"\x12" and 1 <= head[1] <= 20:  # protobuf: ir_version, producer_name
        return "an ONNX model", _EXPORT
    return None if b"\0" in head else _identify_text(head)


def may_be_pickled(head: bytes) -> bool:
    """Whether a file that begins like this may be one of torch.save's, in a zip (since torch 1.6) or bare."""
    return head.startswith((b"PK\x03\x04", *_PICKLES))


def _identify_text(head: bytes) -> tuple[str, str] | None:
    """The same for text: git-lfs pointers, pages, JSON, error messages of servers."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights", "fetch them with `git lfs pull`"
    if text.startswith(b"<"):
        return "a web page or an XML answer, not weights", f"{_DOWNLOAD} (the “resolve” or “raw” link)"
    if text.startswith((b"{", b"[")):
        if b'"weight_map"' in head or b'"total_size"' in head:
            return "the index of a sharded model", "name the folder, or one of the files the index lists"
        return "a JSON text (a configuration or a server's error answer), not weights", _DOWNLOAD
    if text and all(byte in b"\t\n\r\x1b" or 32 <= byte < 127 for byte in text):
        return f"a text that begins “{text.splitlines()[0].decode('ascii')[:60]}”, not weights", _DOWNLOAD
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of `pairs`; a key given twice is an error, where json would keep the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
        raise HeaderError(f"names “{_cut(twice)}” twice")
    return found


def _tensor(name: str, entry: object, data_start: int) -> TensorInfo:
    """The checked description of one tensor, offsets made absolute."""
    quoted = f"tensor “{_cut(name)}”"
    if _SURROGATE.search(name):
        raise HeaderError(f"has a {quoted} with a lone surrogate in its name, which is no Unicode text")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise HeaderError(f"describes {quoted} without dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"gives {quoted} the unknown type {_cut(repr(dtype))}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(_is_count(dim) for dim in shape):
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


def _cut(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
