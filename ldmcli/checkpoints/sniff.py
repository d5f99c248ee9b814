"""What a file that is not safetensors is, told from its first bytes, and the cure. Nothing is unpickled."""

import dataclasses

SNIFF_BYTES = 1024
_DOWNLOAD = "download the weight file itself again"
_CONVERT = (
    "get or convert it to .safetensors, for a pickle can run any code; ldm never unpickles, but --allow-pickle reads "
    "plain tensors out of one"
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the file is ("a PNG picture"), and the cure."""

    what: str
    cure: str


_PICKLE = Verdict("a pickle (.ckpt, .pt or .bin)", _CONVERT)
_PICTURE = "name a weight file (.safetensors), not a picture"
_UNPACK = "unpack it and name the .safetensors file in it"
_LFS = Verdict("a git-lfs pointer, not the weights", "fetch them with `git lfs pull`")
_PAGE = Verdict("a web page or an XML answer, not weights", f"{_DOWNLOAD} (the “resolve” or “raw” link)")
_EXPORT = "name the model's .safetensors file instead"

_MAGIC: tuple[tuple[bytes, Verdict], ...] = (
    *((b"\x80" + bytes([protocol]), _PICKLE) for protocol in range(2, 6)),
    (b"GGUF", Verdict("a GGUF file", _EXPORT)),
    (b"ggjt", Verdict("a GGML file", _EXPORT)),
    (b"\x89HDF\r\n", Verdict("an HDF5 (Keras) file", _EXPORT)),
    (b"\x93NUMPY", Verdict("a NumPy array", _EXPORT)),
    (b"\x89PNG", Verdict("a PNG picture", _PICTURE)),
    (b"\xff\xd8\xff", Verdict("a JPEG picture", _PICTURE)),
    (b"GIF8", Verdict("a GIF picture", _PICTURE)),
    (b"RIFF", Verdict("a RIFF (WebP or WAV) file", _PICTURE)),
    (b"%PDF", Verdict("a PDF document", _EXPORT)),
    (b"\x1f\x8b", Verdict("a gzip archive", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", Verdict("a Zstandard archive", _UNPACK)),
    (b"\xfd7zXZ", Verdict("an xz archive", _UNPACK)),
    (b"7z\xbc\xaf", Verdict("a 7-Zip archive", _UNPACK)),
    (b"Rar!", Verdict("a RAR archive", _UNPACK)),
    (b"\x7fELF", Verdict("a compiled program or library", _EXPORT)),
)


def sniff(head: bytes) -> Verdict | None:
    """What a file beginning with `head` (its first SNIFF_BYTES bytes) is; None where that cannot be told."""
    for magic, verdict in _MAGIC:
        if head.startswith(magic):
            return verdict
    if head.startswith(b"PK\x03\x04"):
        if b".pkl" in head or b"/byteorder" in head:
            return Verdict("a pickle in a zip (.ckpt, .pt or .bin of torch.save)", _CONVERT)
        return Verdict("a zip archive", _UNPACK)
    if head[257:262] == b"ustar":
        return Verdict("a tar archive", _UNPACK)
    if head[:1] == b"\x08" and head[2:3] == b"\x12" and 1 <= head[1] <= 20:  # protobuf: ir_version, producer_name
        return Verdict("an ONNX model", _EXPORT)
    return _sniff_text(head)


def may_be_pickled(head: bytes) -> bool:
    """Whether a file that begins like this may be one of torch.save's, in a zip (since torch 1.6) or bare."""
    return head.startswith(b"PK\x03\x04") or any(head.startswith(magic) for magic, what in _MAGIC if what is _PICKLE)


def _sniff_text(head: bytes) -> Verdict | None:
    """The same for text: git-lfs pointers, pages, JSON, error messages of servers."""
    if b"\0" in head:
        return None
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"version https://git-lfs"):
        return _LFS
    if text.startswith(b"<"):
        return _PAGE
    if text.startswith((b"{", b"[")):
        if b'"weight_map"' in head or b'"total_size"' in head:
            return Verdict("the index of a sharded model", "name the folder, or one of the files the index lists")
        return Verdict("a JSON text (a configuration or a server's error answer), not weights", _DOWNLOAD)
    if text and all(byte in b"\t\n\r\x1b" or 32 <= byte < 127 for byte in text):
        first = text.splitlines()[0].decode("ascii")
        return Verdict(f"a text that begins “{first[:60]}”, not weights", _DOWNLOAD)
    return None
