"""Textual-inversion embeddings (Gal et al. 2022) from the files of every trainer: vectors for each text encoder."""

import base64
import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.adapters.adapter import BUNDLED
from ldmcli.checkpoints.families import SD1, SD2, SDXL
from ldmcli.checkpoints.file_kinds import EMBEDDING, describe_single_file, with_article
from ldmcli.checkpoints.files import WeightFile, open_weights, read_tensors
from ldmcli.checkpoints.header import FLOATING
from ldmcli.checkpoints.layout import LEARNED
from ldmcli.config import TextEncoderConfig
from ldmcli.disk.opening import WEIGHTS, bad_file, open_regular
from ldmcli.images.png_text import EMBEDDING_KEYWORD, iterate_text

if TYPE_CHECKING:
    from torch import Tensor

_PNG = b"\x89PNG\r\n\x1a\n"
_CURE = "name the file of a textual-inversion embedding"
_MAX_VECTORS = 75  # of one embedding: it is never split over two chunks of a prompt
# Which text encoder a tensor is for, by the key it has in a file for several: ComfyUI's, pivotal tuning's, a list's.
_KEYS = {
    "text_encoder": ("clip_l", "text_encoders_0", "0"),
    "text_encoder_2": ("clip_g", "text_encoders_1", "1"),
}
_PASSED_OVER = ("t5xxl",)  # of text encoders that no model here has
_FAMILIES = {(768,): SD1.name, (1024,): SD2.name, (768, 1280): SDXL.name, (1280,): f"{SDXL.name} refiner"}


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A word's vectors, looked at and not yet read. `shapes` are (n, width) by part in a file for several text
    encoders, else under ""; `read` gives the tensors so, and raises BadDataError where they are damaged."""

    path: Path
    word: str
    shapes: Mapping[str, tuple[int, int]]
    read: "Callable[[], Mapping[str, Tensor]]" = dataclasses.field(compare=False, repr=False)

    @property
    def count(self) -> int:
        """How many vectors the word stands for."""
        return next(iter(self.shapes.values()))[0]

    @property
    def family(self) -> str:
        """The family it is for, by its widths."""
        widths = tuple(sorted(width for _, width in self.shapes.values()))
        return _FAMILIES.get(widths, f"a model with text of {' and '.join(map(str, widths))} numbers")

    @functools.cached_property
    def vectors(self) -> "Mapping[str, Tensor]":
        """The vectors (n, width) in float32, by the names that `shapes` has."""
        return {part: tensor.reshape(self.shapes[part]).float() for part, tensor in self.read().items()}

    def of_part(self, part: str) -> "Tensor":
        """The vectors for a text encoder of a model that `check` accepts."""
        return self.vectors["" if "" in self.shapes else part]

    def check(self, encoders: Sequence[TextEncoderConfig], family: str) -> None:
        """Raises BadDataError where it is not for a model with these text encoders, naming both families, or where its
        vectors are more than they read."""
        parts = [encoder.part for encoder in encoders]
        widths = {part or parts[0]: width for part, (_, width) in self.shapes.items()}
        fits = all(widths.get(encoder.part) == encoder.hidden_size for encoder in encoders)
        if not fits or ("text_encoder_2" in widths and "text_encoder_2" not in parts):
            what = f"is an embedding for {self.family}, and the model is {family}"
            raise bad_file(self.path, what, "use one that was made for it")
        room = min(encoder.max_length for encoder in encoders) - 2
        if self.count > room:
            what = f"holds {self.count} vectors, and the model reads {room} tokens at once"
            raise bad_file(self.path, what, "use one that was made for it")


def open_embedding(path: Path, *, allow_pickle: bool = False) -> Embedding:
    """Look at the embedding in a .safetensors file, in a picture of AUTOMATIC1111's or, with `allow_pickle`, in a
    pickle; or in a folder with one of diffusers'. Its word is the file's name without ending, diffusers' own in a file
    of its usual name. Imports no torch but for pickles.

    Raises MissingInputError (nothing there) or BadDataError: none, or a damaged one.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, never raises
        path = next((path / name for name in LEARNED if os.path.lexists(path / name)), path)
    with open_regular(path, (WEIGHTS[0], _CURE)) as file:
        is_picture = file.read(len(_PNG)) == _PNG
    if is_picture:
        return _of_picture(path)
    weights = open_weights(path, allow_pickle=allow_pickle)
    keys = _vector_keys(list(weights.tensors))
    if not keys:
        kind = describe_single_file({key: info.shape for key, info in weights.tensors.items()})
        what = "holds no embedding" if kind in ("unknown", EMBEDDING) else f"is {with_article(kind)}, not an embedding"
        raise bad_file(path, what, _CURE)
    own = keys.get("", "")
    return _of_weights(weights, own if path.name in LEARNED and own.startswith("<") else path.stem, keys)


def bundled_embeddings(weights: WeightFile) -> list[Embedding]:
    """The embeddings that come in an adapter's file, each with the word it has there. Raises BadDataError."""
    words: dict[str, list[str]] = {}
    for key in weights.tensors:
        if key.startswith(BUNDLED):
            words.setdefault(key.split(".")[1], []).append(key)
    found = []
    for word, keys in words.items():
        begin = f"{BUNDLED}{word}."
        by_part = _vector_keys([key.removeprefix(begin) for key in keys])
        if not by_part:
            raise bad_file(weights.path, f"has no vectors in its bundled embedding “{word}”", "get a sound file")
        found.append(_of_weights(weights, word, {part: begin + key for part, key in by_part.items()}))
    return found


def facts(embedding: Embedding) -> dict[str, Any]:
    """An embedding's word, number and widths of vectors, and family, as JSON values."""
    widths = [width for _, width in embedding.shapes.values()]
    return {"word": embedding.word, "vectors": embedding.count, "widths": widths, "family": embedding.family}


def _vector_keys(keys: Sequence[str]) -> dict[str, str]:
    """The keys of vectors by part, or under "" where they are for one text encoder; none where it is no embedding."""
    found: dict[str, str] = {}
    for part, names in _KEYS.items():
        own = [key for key in keys if key.partition(".")[0] in names]
        found |= {part: own[0]} if len(own) == 1 else {}
    if found:
        return found if set(keys) <= {*found.values(), *_PASSED_OVER} else {}
    lone = [key for key in keys if key == "emb_params" or key.startswith("string_to_param.")]
    lone = lone or list(keys)  # diffusers: one tensor of any name
    return {"": lone[0]} if len(lone) == 1 else {}


def _of_weights(weights: WeightFile, word: str, keys: Mapping[str, str]) -> Embedding:
    infos = {part: weights.tensors[key] for part, key in keys.items()}
    for info in infos.values():
        if info.dtype not in FLOATING:
            raise bad_file(
                weights.path, f"holds {info.dtype} {list(info.shape)}, not vectors", "name another embedding"
            )

    def read() -> "Mapping[str, Tensor]":
        tensors = dict(read_tensors(weights, keys.values(), "cpu", None))
        return {part: tensors[key] for part, key in keys.items()}

    return _checked(weights.path, word, {part: info.shape for part, info in infos.items()}, read)


def _checked(
    path: Path, word: str, shapes: Mapping[str, tuple[int, ...]], read: "Callable[[], Mapping[str, Tensor]]"
) -> Embedding:
    """The embedding with its shapes as (n, width). Raises BadDataError where they are none, or not alike in number."""
    found: dict[str, tuple[int, int]] = {}
    for part, shape in shapes.items():
        if len(shape) not in (1, 2) or not math.prod(shape):
            raise bad_file(path, f"holds {list(shape)} numbers, not vectors", "name another embedding")
        found[part] = (1 if len(shape) == 1 else shape[0]), shape[-1]
    counts = {count for count, _ in found.values()}
    if len(counts) > 1 or max(counts) > _MAX_VECTORS:
        told = " and ".join(str(count) for count, _ in found.values())
        raise bad_file(path, f"holds {told} vectors, not 1 to {_MAX_VECTORS} for each text encoder", "name another one")
    return Embedding(path, word, found, read)


def _of_picture(path: Path) -> Embedding:
    """The embedding in a picture's text, which is JSON in base64."""
    text = next((text for keyword, text in iterate_text(path) if keyword == EMBEDDING_KEYWORD), None)
    if text is None:
        what = f"is a picture without the text {EMBEDDING_KEYWORD}"
        raise bad_file(path, what, "name a PNG file that carries an embedding")
    try:
        value: Any = json.loads(base64.b64decode(text, validate=True))
        (inner,) = value["string_to_param"].values()
        rows = [[float(number) for number in row] for row in inner["TORCHTENSOR"]]
        if any(len(row) != len(rows[0]) for row in rows):
            raise ValueError("rows of unlike length")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise bad_file(
            path, f"has a damaged {EMBEDDING_KEYWORD} ({type(error).__name__})", "download it again"
        ) from None
    if not all(map(math.isfinite, itertools.chain.from_iterable(rows))):
        raise bad_file(path, f"has NaN or infinity in its {EMBEDDING_KEYWORD}", "download it again")

    def read() -> "Mapping[str, Tensor]":
        import torch

        return {"": torch.tensor(rows, dtype=torch.float32)}

    return _checked(path, path.stem, {"": (len(rows), len(rows[0]) if rows else 0)}, read)
