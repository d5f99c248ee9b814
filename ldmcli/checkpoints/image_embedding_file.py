"""Embeddings of pictures in safetensors files of their own: one tensor (rows, width), or (width) of one alone."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ldmcli.checkpoints.file_kinds import EMBEDS
from ldmcli.checkpoints.files import WeightFile, open_weights, read_tensors
from ldmcli.checkpoints.header import FLOATING, TensorInfo
from ldmcli.condition_config import ImageEmbeddingConfig
from ldmcli.disk.hashes import FileHashes
from ldmcli.disk.opening import bad_file
from ldmcli.errors import UsageError, printable
from ldmcli.fitting import FittedRequest
from ldmcli.spec import MAX_ROWS, GenerationRequest

if TYPE_CHECKING:
    from torch import Tensor

_CURE = "name a safetensors file of CLIP's embeddings of pictures, image_embeds (rows, width)"


def count_rows(path: str, *, allow_pickle: bool = False) -> int:
    """How many embeddings the file has. Raises BadDataError where it is no such file, and as `open_weights` does."""
    return _opened(path, allow_pickle)[1].shape[0]


def check_embedding(
    request: GenerationRequest, config: ImageEmbeddingConfig, hashes: FileHashes, *, allow_pickle: bool = False
) -> str:
    """The SHA-256 of the file of a request's embedding, which is read. Raises BadDataError where it is none for the
    model, UsageError where it is not said which of several is meant, and as `open_weights` does."""
    assert request.image_embedding is not None
    file, info = _opened(request.image_embedding, allow_pickle)
    rows, width = info.shape
    if width != config.hidden_size:
        raise bad_file(file.path, f"has embeddings of {width} numbers, and the model reads {config.hidden_size}",
                       "make them by the image encoder that the model was trained with")  # fmt: skip
    if request.embedding_row is None and rows > 1:
        raise UsageError(f"the file of embeddings has {rows}; say which with embedding_row, 0 to {rows - 1}.")
    if (request.embedding_row or 0) >= rows:
        raise UsageError(f"embedding_row {request.embedding_row} is not in the file, which has rows 0 to {rows - 1}.")
    _row(file, info, request.embedding_row or 0)
    return hashes.sha256(file.path)


def read_embedding(request: FittedRequest, *, allow_pickle: bool = False) -> "Tensor":
    """The embedding (1, width) float32 that a request names. Raises as `check_embedding` does."""
    assert request.image_embedding is not None
    return _row(*_opened(request.image_embedding, allow_pickle), request.embedding_row)


def _opened(path: str, allow_pickle: bool) -> tuple[WeightFile, TensorInfo]:
    """The file with the one tensor that holds embeddings; and what of it is known, as (rows, width)."""
    file = open_weights(Path(path), allow_pickle=allow_pickle, cure=_CURE)
    names = [name for name in EMBEDS if name in file.tensors] or list(file.tensors)
    if len(names) != 1:
        what = f"{len(names)} tensors, and none of them called {EMBEDS[0]}" if names else "no tensor"
        raise bad_file(file.path, f"has {what}", _CURE)
    info = file.tensors[names[0]]
    shape = (1, *info.shape) if len(info.shape) == 1 else info.shape
    if len(shape) != 2 or min(shape) < 1 or info.dtype not in FLOATING:
        raise bad_file(file.path, f"holds {printable(names[0], 100)} as {info.dtype} {list(info.shape)[:8]}", _CURE)
    if shape[0] > MAX_ROWS:
        raise bad_file(file.path, f"has {shape[0]} rows", f"make files of up to {MAX_ROWS} each")
    return dataclasses.replace(file, tensors={names[0]: info}), dataclasses.replace(info, shape=shape)


def _row(file: WeightFile, info: TensorInfo, row: int) -> "Tensor":
    (name,) = file.tensors
    if not file.loader:  # else all of it is in memory anyway
        size = (info.end - info.start) // info.shape[0]
        start = info.start + row * size
        one = dataclasses.replace(info, shape=(1, info.shape[1]), start=start, end=start + size)
        file, row = dataclasses.replace(file, tensors={name: one}), 0
    ((_, tensor),) = read_tensors(file, [name], "cpu", None)
    found = tensor.float().reshape(-1, info.shape[1])[row : row + 1]
    if not found.isfinite().all():
        raise bad_file(file.path, "holds numbers that float32 does not", _CURE)
    return found
