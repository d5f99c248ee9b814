"""Models of named families with random weights, in their true shapes: speed can be measured without a download.

They are diffusers folders in fp16, written from the same dataclasses that every model is read into. Pictures of them
are noise; their activations stay of order one, as those of trained networks do, so that no number type overflows.

Nothing here imports torch before a model is written or its size asked for.
"""

import dataclasses
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.bench.model_folder import creating, write_description, write_index
from ldmcli.checkpoints.families import SD1, SD2, SDXL
from ldmcli.config import ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from ldmcli.disk.writing import named_errors, prepare_folder
from ldmcli.errors import StorageError, UsageError, printable

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

Shapes = dict[str, tuple[int, ...]]

_BYTES = 2  # of a number in fp16
_PERIOD = (1 << 21) - 9  # numbers that are drawn; a prime, see _Noise
_ROUND = 0.1  # standard deviation of biases, and of norm weights around 1
# The last convolution follows SiLU, which shrinks a standard normal to 0.596: this makes noise predictions of size 1.
_LAST_GAIN = 1 / 0.596
_TABLES = ("token_embedding.weight", "position_embedding.weight")

_VIT_H = TextEncoderConfig(
    hidden_size=1024,
    intermediate_size=4096,
    layers=23,  # of 24: the last is never read, and the published folder lacks it
    heads=16,
    activation="gelu",
)
_BIG_G = dataclasses.replace(
    _VIT_H,
    part="text_encoder_2",
    hidden_size=1280,
    intermediate_size=5120,
    layers=32,
    heads=20,
    projection_dim=1280,
)
_XL_STATES: dict[str, Any] = {"skipped_layers": 1, "final_norm": False}

_CONFIGS = {
    "sd15": ModelConfig(SD1.name, UNetConfig(), VAEConfig(), (TextEncoderConfig(),), ScheduleConfig()),
    # The 768-v model, stable-diffusion-2-1 itself: the base model differs in sample size and prediction type only.
    "sd21": ModelConfig(
        SD2.name,
        UNetConfig(sample_size=96, heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True),
        VAEConfig(),
        (_VIT_H,),
        ScheduleConfig(prediction_type="v_prediction"),
    ),
    "sdxl": ModelConfig(
        SDXL.name,
        UNetConfig(
            sample_size=128,
            block_channels=(320, 640, 1280),
            attention=(0, 2, 10),
            middle_attention=10,
            heads=(5, 10, 20),
            context_dim=2048,
            linear_projection=True,
            pooled_dim=1280,
            added_numbers=6,
        ),
        VAEConfig(scaling_factor=SDXL.scaling_factor, force_upcast=True),
        (dataclasses.replace(TextEncoderConfig(), **_XL_STATES), dataclasses.replace(_BIG_G, **_XL_STATES)),
        ScheduleConfig(),
        zero_empty_negative=True,
        defaults=SDXL.defaults,
    ),
}
FAMILIES = tuple(_CONFIGS)


def family_config(family: str) -> ModelConfig:
    """The configuration of one of FAMILIES, as `open_model` reads it back. Raises UsageError for another name."""
    if family not in _CONFIGS:
        raise UsageError(f"there are no random weights of '{printable(family)}'; choose {', '.join(FAMILIES)}.")
    return _CONFIGS[family]


def size_on_disk(family: str) -> int:
    """Bytes of the weights that `write_random_model` writes; headers, configurations and vocabulary add about 2 MB.

    Raises UsageError for a name that is not one of FAMILIES.
    """
    return _bytes(model_shapes(family_config(family)))


def write_random_model(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a diffusers folder of one of FAMILIES and return it; the same seed gives the same bytes.

    Memory: some 200 MB, whatever the family. Raises UsageError for another name, CannotCreateError where the folder
    cannot be made, StorageError where the disk is too small or writing fails.
    """
    return write_random_config(family_config(family), folder, seed)


def write_random_config(config: ModelConfig, folder: Path, seed: int = 0) -> Path:
    """As `write_random_model`, for a model of any dimensions."""
    prepare_folder(folder)
    shapes = model_shapes(config)
    size, free = _bytes(shapes), shutil.disk_usage(folder).free
    if size > free:
        raise StorageError(
            f"the weights take {size / 1e9:.1f} GB, and the disk of {printable(str(folder))} has {free / 1e9:.1f} GB "
            "free; choose another folder or make room."
        )
    with named_errors(folder, "write a model into the folder"):
        # Without it no folder is a model, so none is taken for one half written.
        (folder / "model_index.json").unlink(missing_ok=True)
    noise = _Noise(seed)
    for part, of_part in shapes.items():
        is_text = part.startswith("text_encoder")
        name = "model.safetensors" if is_text else "diffusion_pytorch_model.safetensors"
        _write_weights(folder / part / name, of_part, noise, part)
    write_description(config, folder)
    write_index(config, folder)
    return folder


def model_shapes(config: ModelConfig) -> dict[str, Shapes]:
    """The shape of every tensor of every part, by the names that diffusers and transformers give them on disk."""
    from ldmcli.checkpoints.load import on_meta
    from ldmcli.networks.clip import TextTransformer
    from ldmcli.networks.unet import UNet
    from ldmcli.networks.vae import AutoencoderKL

    shapes = {
        "unet": _shapes(on_meta(lambda: UNet(config.unet))),
        "vae": _shapes(on_meta(lambda: AutoencoderKL(config.vae))),
    }
    for text in config.text_encoders:
        of_text = _shapes(on_meta(partial(TextTransformer, text)))
        shapes[text.part] = {_on_disk(key): shape for key, shape in of_text.items()}
    return shapes


def _shapes(module: "nn.Module") -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def _on_disk(text_key: str) -> str:
    return text_key if text_key.startswith("text_projection.") else f"text_model.{text_key}"


def _bytes(shapes: Mapping[str, Shapes]) -> int:
    return sum(_BYTES * math.prod(shape) for part in shapes.values() for shape in part.values())


class _Noise:
    """Normal numbers for tensors of any size, faster than they could be drawn: two millions are, and every tensor
    reads them round and round from a place of its own.

    Their count is a prime, so that two rows of a matrix never begin at the same place: row i begins i · fan_in after
    the first, and that is a multiple of a prime above both only for i = 0.
    """

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._seed = seed
        self._drawn = np.random.default_rng(seed).standard_normal(_PERIOD, dtype=np.float32)
        self._scaled: dict[tuple[float, float], np.ndarray] = {}

    def pieces(self, part: str, name: str, shape: tuple[int, ...]) -> "Iterator[np.ndarray]":
        """The numbers of one tensor in fp16, in order, in pieces of at most 4 MB."""
        import numpy as np

        mean, deviation = _distribution(part, name, shape)
        numbers = self._scaled.get((mean, deviation))
        if numbers is None:  # some thirty pairs in a model, 4 MB each
            numbers = self._scaled[mean, deviation] = (mean + deviation * self._drawn).astype(np.float16)
        at = zlib.crc32(f"{self._seed}/{part}/{name}".encode()) % _PERIOD
        left = math.prod(shape)
        while left:
            piece = numbers[at : at + left]
            yield piece
            left -= len(piece)
            at = 0


def _distribution(part: str, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor: those that hand a signal of size one on as such."""
    if len(shape) == 1:
        return (1.0 if name.endswith(".weight") else 0.0), _ROUND
    if name.endswith(_TABLES):
        return 0.0, 1.0
    gain = _LAST_GAIN if (part, name) == ("unet", "conv_out.weight") else 1.0
    return 0.0, gain * math.prod(shape[1:]) ** -0.5


def _write_weights(path: Path, shapes: Shapes, noise: _Noise, part: str) -> None:
    """Write a safetensors file piece by piece, by https://github.com/huggingface/safetensors#format: safetensors itself
    would want all tensors in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in sorted(shapes.items()):
        end = at + _BYTES * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # data begins at a multiple of 8 bytes
    with creating(path) as temporary, open(temporary, "wb", buffering=0) as file:
        _write_all(file.fileno(), len(raw).to_bytes(8, "little") + raw)
        for name, shape in sorted(shapes.items()):
            for piece in noise.pieces(part, name, shape):
                _write_all(file.fileno(), piece.data.cast("B"))
        os.fsync(file.fileno())  # or the disk would be writing while the first clock runs


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
