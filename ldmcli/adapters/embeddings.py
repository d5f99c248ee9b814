"""Textual-inversion embeddings (Gal et al. 2022) from the files of every trainer: vectors for each text encoder."""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli.adapters.adapter import BUNDLED
from ldmcli.checkpoints.families import SD1, SD2, SDXL, describe_single_file, with_article
from ldmcli.checkpoints.files import WeightFile, open_weights, read_tensors
from ldmcli.config import TextEncoderConfig
from ldmcli.disk.opening import bad_file, open_regular
from ldmcli.images.png_text import iterate_text

_PNG = b"\x89PNG\r\n\x1a\n"
_CHUNK = "sd-ti-embedding"  # A1111's name of the text in a picture that carries an embedding
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
    """A word's vectors, (n, width) in float32: by part in a file for several text encoders, else under ""."""

    path: Path
    word: str
    vectors: Mapping[str, Tensor]

    @property
    def family(self) -> str:
        """The family it is for, by its widths."""
        widths = tuple(sorted(tensor.shape[1] for tensor in self.vectors.values()))
        return _FAMILIES.get(widths, f"a model with text of {' and '.join(map(str, widths))} numbers")

    def vectors_for(self, encoders: Sequence[TextEncoderConfig], family: str) -> dict[str, Tensor]:
        """The vectors by the part of each of a model's text encoders. Raises BadDataError naming both families."""
        parts = [encoder.part for encoder in encoders]
        vectors = {parts[0]: self.vectors[""]} if "" in self.vectors else self.vectors
        widths = {part: tensor.shape[1] for part, tensor in vectors.items()}
        fits = all(widths.get(encoder.part) == encoder.hidden_size for encoder in encoders)
        if not fits or ("text_encoder_2" in vectors and "text_encoder_2" not in parts):
            what = f"is an embedding for {self.family}, and the model is {family}"
            raise bad_file(self.path, what, "use one that was made for it")
        return {part: vectors[part] for part in parts}


def open_embedding(path: Path, *, allow_pickle: bool = False) -> Embedding:
    """The embedding in a .safetensors file, in a picture of AUTOMATIC1111's or, with `allow_pickle`, in a pickle. Its
    word is the file's name without ending.

    Raises MissingInputError (nothing there) or BadDataError: none, or a damaged one.
    """
    with open_regular(path) as file:
        is_picture = file.read(len(_PNG)) == _PNG
    if is_picture:
        return Embedding(path, path.stem, _checked(path, _of_picture(path)))
    weights = open_weights(path, allow_pickle=allow_pickle)
    keys = _vector_keys(list(weights.tensors))
    if not keys:
        kind = describe_single_file({key: info.shape for key, info in weights.tensors.items()})
        what = "holds no embedding" if kind == "unknown" else f"is {with_article(kind)}, not an embedding"
        raise bad_file(path, what, "name the file of a textual-inversion embedding")
    return Embedding(path, path.stem, _read(weights, keys))


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
        found.append(
            Embedding(weights.path, word, _read(weights, {part: begin + key for part, key in by_part.items()}))
        )
    return found


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


def _read(weights: WeightFile, keys: Mapping[str, str]) -> dict[str, Tensor]:
    read = dict(read_tensors(weights, keys.values(), "cpu", None))
    return _checked(weights.path, {part: read[key] for part, key in keys.items()})


def _checked(path: Path, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vectors as (n, width) in float32. Raises BadDataError where they are none, or not alike in number."""
    found = {part: tensor[None] if tensor.ndim == 1 else tensor for part, tensor in vectors.items()}
    for tensor in found.values():
        if tensor.ndim != 2 or not tensor.numel() or not tensor.is_floating_point():
            raise bad_file(path, f"holds {list(tensor.shape)} numbers, not vectors", "name another embedding")
    counts = {len(tensor) for tensor in found.values()}
    if len(counts) > 1 or max(counts) > _MAX_VECTORS:
        told = " and ".join(str(len(tensor)) for tensor in found.values())
        raise bad_file(path, f"holds {told} vectors, not 1 to {_MAX_VECTORS} for each text encoder", "name another one")
    return {part: tensor.float() for part, tensor in found.items()}


def _of_picture(path: Path) -> dict[str, Tensor]:
    """The vectors in a picture's text, which is JSON in base64."""
    text = next((text for keyword, text in iterate_text(path) if keyword == _CHUNK), None)
    if text is None:
        raise bad_file(path, f"is a picture without the text {_CHUNK}", "name a PNG file that carries an embedding")
    try:
        value: Any = json.loads(base64.b64decode(text, validate=True))
        (inner,) = value["string_to_param"].values()
        tensor = torch.tensor(inner["TORCHTENSOR"], dtype=torch.float32)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise bad_file(path, f"has a damaged {_CHUNK} ({type(error).__name__})", "download it again") from None
    if not torch.isfinite(tensor).all():
        raise bad_file(path, f"has NaN or infinity in its {_CHUNK}", "download it again")
    return {"": tensor}
