"""Latents in safetensors files of their own: `latents` (pictures, channels, height, width), as the autoencoder has
them, not scaled; and, of a codebook, `codes` (pictures, height, width), the number of the code nearest to each."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldmcli.checkpoints.files import WeightFile, open_weights, read_tensors
from ldmcli.checkpoints.header import FLOATING
from ldmcli.config import VAEConfig
from ldmcli.disk.opening import bad_file, shown
from ldmcli.errors import printable
from ldmcli.spec import MAX_SIZE

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LATENTS, CODES = "latents", "codes"
_CURE = "name a file that ldm vae encode wrote with this autoencoder"
_MAX_PICTURES = 100_000  # in a file, each of which gets a file of its own
_MOST = 1e4  # that latents are, by far: those of pictures are below 100
_TYPES = {"float32": "F32", "int32": "I32"}
_log = logging.getLogger(__name__)


def tensor_bytes(tensors: "Mapping[str, np.ndarray]", metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of arrays of float32 and int32."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _TYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # numbers lie where processors like them
    return b"".join([len(raw).to_bytes(8, "little"), raw, *(array.tobytes() for array in tensors.values())])


def open_latents(path: Path, vae: VAEConfig) -> tuple[WeightFile, str, int]:
    """Look at a file of latents or codes for this autoencoder: the file, which of the two is to be decoded, and of how
    many pictures. Raises BadDataError saying what keeps it from being decoded, and as `open_weights` does."""
    file = open_weights(path, cure=_CURE)
    name = next((name for name in (LATENTS, CODES) if name in file.tensors), None)
    if name is None:
        raise bad_file(path, f"has no tensor “{LATENTS}” or “{CODES}”", _CURE)
    info = file.tensors[name]
    found = f"holds {name} as {info.dtype} {list(info.shape)[:8]}"
    if name == CODES and not vae.codes:
        raise bad_file(path, "holds codes, and the autoencoder has no codebook", _CURE)
    rank = 4 if name == LATENTS else 3
    whole = info.dtype in FLOATING if name == LATENTS else info.dtype in ("U8", "I16", "I32", "I64")
    if len(info.shape) != rank or not whole or min(info.shape) < 1:
        wanted = "(pictures, channels, height, width)" if name == LATENTS else "whole numbers (pictures, height, width)"
        raise bad_file(path, f"{found}, not as {wanted}", _CURE)
    if name == LATENTS and info.shape[1] != vae.latent_channels:
        channels = f"{info.shape[1]} channels, the autoencoder {vae.latent_channels}"
        raise bad_file(path, f"has latents of {channels}", _CURE)
    if max(info.shape[-2:]) * vae.factor > MAX_SIZE:
        raise bad_file(path, f"{found}, a picture of over {MAX_SIZE} pixels a side", _CURE)
    if info.shape[0] > _MAX_PICTURES:
        raise bad_file(path, f"holds {info.shape[0]} pictures", f"make files of up to {_MAX_PICTURES} each")
    if others := sorted(file.tensors.keys() - {LATENTS, CODES}):
        _log.warning("%s holds more than is decoded: %s", shown(path), printable(", ".join(others)))
    return file, name, info.shape[0]


def read_latents(file: WeightFile, name: str, vae: VAEConfig) -> "Iterator[Tensor]":
    """The latents (channels, height, width) or codes (height, width) of each picture in the file, one in memory at a
    time. Raises BadDataError, for a code that the codebook does not have too."""
    info = file.tensors[name]
    size = (info.end - info.start) // info.shape[0]
    for start in range(info.start, info.end, size):
        one = dataclasses.replace(info, shape=info.shape[1:], start=start, end=start + size)
        ((_, tensor),) = read_tensors(dataclasses.replace(file, tensors={name: one}), [name], "cpu", None)
        if name == LATENTS:
            yield tensor.float()
            continue
        low, high = (int(number) for number in tensor.aminmax())
        if low < 0 or high >= vae.codes:
            raise bad_file(file.path, f"holds codes from {low} to {high}, the codebook 0 to {vae.codes - 1}", _CURE)
        yield tensor.long()


def check_latents(path: Path, latents: "Tensor") -> None:
    """Raise BadDataError where latents (channels, height, width) are no numbers, or far beyond those of any picture."""
    most = float(latents.abs().max())
    if latents.is_floating_point() and not most <= _MOST:
        raise bad_file(path, f"holds latents of up to {most:.2g}, and those of pictures are below 100", _CURE)
