"""An IP-Adapter and its image encoder on disk: looked at without torch, and checked to be for the model and for one
another."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ldmcli.checkpoints.families import CONTEXTS, Shapes
from ldmcli.checkpoints.file_kinds import IP_ADAPTER, describe_single_file, with_article
from ldmcli.checkpoints.files import WeightFile, open_weights
from ldmcli.checkpoints.folder_config import Fields
from ldmcli.checkpoints.single_file import count_of, named_shape_errors
from ldmcli.checkpoints.source import PartSource, list_keys, open_part
from ldmcli.config import ModelConfig
from ldmcli.disk.opening import bad_file, listing, shown
from ldmcli.errors import MissingInputError
from ldmcli.steering_config import ImageEncoderConfig, IPAdapterConfig

ENCODER = "image_encoder"
_CURE = "name an IP-Adapter of Stable Diffusion 1.x or XL"
_OTHER = "use one that was made for it"
_ENCODER_CURE = "name a CLIP vision model with --image-encoder"
_KEY = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight")
_HEAD = 64  # numbers in a head of a resampler
_MAX_TOKENS, _MAX_LAYERS = 4096, 64
# Heads and activation of the towers that are around, by their width: OpenAI's B and L, OpenCLIP's H and bigG.
_TOWERS = {768: (12, "quick_gelu"), 1024: (16, "quick_gelu"), 1280: (16, "gelu"), 1664: (16, "gelu")}
_ACTIVATIONS = ("quick_gelu", "gelu")
# The repository of the authors keeps the encoders of both families in these folders, by the towers' widths.
_HUB, _HUB_FOLDERS = "h94/IP-Adapter", {1664: "sdxl_models", 1280: "models"}
_PROJECTED = {1280: 1664, 1024: 1280}  # the widths of towers by those of the embeddings that they give


@dataclasses.dataclass(frozen=True)
class IPAdapterSource:
    """An adapter, `part`, with the image encoder that it reads."""

    path: Path
    part: PartSource[IPAdapterConfig]
    encoder: PartSource[ImageEncoderConfig]


def ip_adapter_facts(path: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """What can be said of an adapter without its model, as JSON values. Raises as `open_ip_adapter` does."""
    file = _adapter_file(path, allow_pickle)
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    with named_shape_errors(file.path, IP_ADAPTER):
        config = _config(file.path, shapes)
    family = CONTEXTS.get(config.context_dim, f"text of {config.context_dim} numbers a token")
    kind = "resampled patches" if config.resampled else config.reads
    return {
        "is": IP_ADAPTER,
        "family": family,
        "reads": f"an image encoder's {kind} of {config.image_dim} numbers",
        "tokens": config.tokens or None,
        "attentions": sum(bool(_KEY.fullmatch(key)) for key in shapes),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "dtype": ", ".join(sorted({tensor.dtype for tensor in file.tensors.values()})),
        "tensors": len(shapes),
    }


def open_ip_adapter(path: Path, model: ModelConfig, *, allow_pickle: bool = False) -> PartSource[IPAdapterConfig]:
    """Look at an adapter that is to show pictures to `model`: a file, or a folder with one. Raises MissingInputError
    (nothing there) or BadDataError (what it is instead, or why it does not fit)."""
    file = _adapter_file(path, allow_pickle)
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    with named_shape_errors(file.path, IP_ADAPTER):
        config = _config(file.path, shapes)
    own = model.unet.context_dim
    if config.context_dim != own:
        family = CONTEXTS.get(config.context_dim, "a model")
        what = f"is for {family} with text of {config.context_dim} numbers a token, and the model is {model.family} "
        raise bad_file(file.path, f"{what}with {own}", _OTHER)
    places = model.unet.cross_attentions
    wanted = {2 * i + 1: place.channels for i, place in enumerate(places)}
    found = {int(match[1]): shape[0] for key, shape in shapes.items() if (match := _KEY.fullmatch(key)) and shape}
    if found != wanted:
        what = (
            f"is for {len(found)} attentions, and this {model.family} model has {len(wanted)} of other widths or places"
        )
        raise bad_file(file.path, what, _OTHER)
    return PartSource(IP_ADAPTER, file.path, dataclasses.replace(config, places=places), (file,))


def _adapter_file(path: Path, allow_pickle: bool) -> WeightFile:
    if os.path.isdir(path):
        found = listing(path, ".safetensors")
        if len(found) != 1:
            what = f"has several files ({', '.join(found)})" if found else "is a folder without a .safetensors file"
            raise bad_file(path, what, "name the file of the IP-Adapter")
        path = path / found[0]
    return open_weights(path, allow_pickle=allow_pickle)


def _config(path: Path, shapes: Shapes) -> IPAdapterConfig:
    """An adapter's dimensions; its places are the model's."""
    if any("_lora." in key for key in shapes) or "image_proj.perceiver_resampler.proj_in.weight" in shapes:
        raise _face(path)
    kept = {key.removeprefix("image_proj."): shape for key, shape in shapes.items() if key.startswith("image_proj.")}
    context = next((shape[1] for key, shape in shapes.items() if _KEY.fullmatch(key)), None)
    if context is None or not kept:
        kind = describe_single_file(shapes)
        if kind in ("unknown", IP_ADAPTER):
            raise bad_file(path, list_keys("is no IP-Adapter that this version knows", list(shapes)), _CURE)
        raise bad_file(path, f"is {with_article(kind)}, no IP-Adapter", _CURE)
    if "proj.weight" in kept:
        width, image_dim = kept["proj.weight"]
        return _checked(IPAdapterConfig("embedding", image_dim, context, (), width // context))
    if "proj.3.weight" in kept:
        return _checked(IPAdapterConfig("patches", kept["proj.0.weight"][1], context, (), tokens=0))
    if "norm.weight" in kept:
        raise _face(path)
    layers = count_of(kept, r"layers\.(\d+)\.")
    return _checked(
        IPAdapterConfig(
            "patches",
            kept["proj_in.weight"][1],
            context,
            (),
            tokens=kept["latents"][1],
            resampled=True,
            dim=kept["latents"][2],
            layers=layers,
            heads=kept["layers.0.0.to_q.weight"][0] // _HEAD,
            inner=kept["layers.0.1.1.weight"][0],
        )
    )


def _face(path: Path) -> Exception:
    what = "is an IP-Adapter FaceID, which reads what a face recognition network says, and none is here"
    return bad_file(path, what, "use an IP-Adapter, Plus, Plus-face or Full-face")


def _checked(config: IPAdapterConfig) -> IPAdapterConfig:
    """Raises ValueError where the dimensions are those of nothing."""
    least = (1 if config.resampled or config.reads == "embedding" else 0), *[int(config.resampled)] * 4
    found = config.tokens, config.dim, config.layers, config.heads, config.inner
    if min(config.image_dim, config.context_dim) < 1 or any(a < b for a, b in zip(found, least, strict=True)):
        raise ValueError("a dimension is 0")
    if config.tokens > _MAX_TOKENS or config.layers > _MAX_LAYERS:
        raise ValueError(f"{config.tokens} tokens, {config.layers} layers")
    return config


def encoder_names(name: str, adapter: PartSource[IPAdapterConfig]) -> Iterator[str]:
    """What the image encoder of the adapter called `name` may be called: a folder beside it, as repositories have
    them; of the authors' repository the one that it reads."""
    here = adapter.path.absolute().parent
    for folder in (here / ENCODER, here.parent / ENCODER, here.parent / "models" / ENCODER):
        if os.path.isdir(folder):
            yield str(folder)
    if name.startswith(f"{_HUB}/"):
        config = adapter.config
        width = _PROJECTED.get(config.image_dim, 0) if config.reads == "embedding" else config.image_dim
        if width in _HUB_FOLDERS:
            yield f"{_HUB}/{_HUB_FOLDERS[width]}/{ENCODER}/model.safetensors"


def open_image_encoder(path: Path, *, allow_pickle: bool = False) -> PartSource[ImageEncoderConfig]:
    """Look at an image encoder: transformers' folder, one of its weight files, or such a file alone. Raises
    MissingInputError or BadDataError."""
    if os.path.isdir(path):
        files, beside = tuple(open_part(path, ENCODER, allow_pickle=allow_pickle)), path / "config.json"
    else:
        files, beside = (open_weights(path, allow_pickle=allow_pickle),), path.parent / "config.json"
    shapes = {key: tensor.shape for file in files for key, tensor in file.tensors.items()}
    if "vision_model.embeddings.patch_embedding.weight" not in shapes or "visual_projection.weight" not in shapes:
        kind = describe_single_file(shapes)
        what = "is no CLIP vision model with a projection" if kind == "unknown" else f"is {with_article(kind)}"
        raise bad_file(path, what, _ENCODER_CURE)
    fields = Fields(beside) if os.path.lexists(beside) else None
    with named_shape_errors(path, "image encoder"):
        config = _encoder_config(path, shapes, fields)
    return PartSource("image encoder", path, config, files)


def _encoder_config(path: Path, shapes: Shapes, fields: Fields | None) -> ImageEncoderConfig:
    """Dimensions from shapes; what those do not tell from config.json, or as in the towers that are around."""
    hidden, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    positions = shapes["vision_model.embeddings.position_embedding.weight"][0]
    side = math.isqrt(max(positions - 1, 0))
    layers = count_of(shapes, r"vision_model\.encoder\.layers\.(\d+)\.")
    heads, activation, eps = (*_TOWERS.get(hidden, (0, "")), 1e-5)
    if fields:
        said = fields.get("vision_config")
        fields = Fields(path / "config.json", said) if isinstance(said, dict) else fields
        heads = fields.whole("num_attention_heads", 12)
        activation = fields.choice("hidden_act", "quick_gelu", _ACTIVATIONS)
        eps = fields.within("layer_norm_eps", 1e-5, 1e-12, 1e-2)
    if not heads:
        raise bad_file(path, f"is a tower of width {hidden} without config.json, which says its heads", _ENCODER_CURE)
    if side < 1 or side * side != positions - 1 or patch < 1 or hidden < 1 or hidden % heads or layers < 2:
        raise ValueError(f"{positions} positions, width {hidden}, {heads} heads, {layers} layers")
    return ImageEncoderConfig(
        hidden_size=hidden,
        intermediate_size=shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        projection_dim=shapes["visual_projection.weight"][0],
        layers=layers,
        heads=heads,
        image_size=side * patch,
        patch_size=patch,
        activation=activation,
        norm_eps=eps,
    )


def with_encoder(
    adapter: PartSource[IPAdapterConfig], encoders: Iterable[PartSource[ImageEncoderConfig]]
) -> IPAdapterSource:
    """The adapter with the first of these encoders that it reads. Raises MissingInputError where there is none at all,
    BadDataError where it reads another."""
    config, encoder = adapter.config, None
    for encoder in encoders:
        if encoder.config.width(config.reads) == config.image_dim:
            return IPAdapterSource(adapter.path, adapter, encoder)
    if encoder is None:
        raise MissingInputError(
            f"{shown(adapter.path)} has no folder {ENCODER} beside it; name the CLIP vision model whose {config.reads} "
            f"of {config.image_dim} numbers it reads with --image-encoder."
        )
    what = f"gives {config.reads} of {encoder.config.width(config.reads)} numbers, and {shown(adapter.path)} reads "
    raise bad_file(encoder.path, f"{what}{config.image_dim}", "name the encoder it was made for with --image-encoder")
