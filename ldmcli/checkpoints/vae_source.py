"""A VAE given on its own, in place of the model's or without any: looked at without torch.

It may be a diffusers folder (a VAE's, or a whole model's, of which its VAE is taken), a file in either layout (alone
or inside a checkpoint), each with a codebook or not, or TAESD in either layout. https://github.com/madebyollin/taesd
has the original's keys.
"""

import contextlib
import dataclasses
import logging
import math
import os
import re
from pathlib import Path
from typing import Any, cast

from ldmcli.checkpoints.buildable import check_autoencoder, check_buildable
from ldmcli.checkpoints.families import Shapes
from ldmcli.checkpoints.file_kinds import describe_single_file, require_family, with_article
from ldmcli.checkpoints.files import open_weights
from ldmcli.checkpoints.folder_config import MAX_CONFIG_BYTES, VQ_CLASS, vae_config
from ldmcli.checkpoints.key_map import TINY_PREFIX, VAE_PREFIX
from ldmcli.checkpoints.layout import INDEX
from ldmcli.checkpoints.single_file import named_shape_errors, scaling_of_file, vae_from_shapes
from ldmcli.checkpoints.source import PartSource, list_keys, open_part
from ldmcli.config import ModelConfig, TinyVAEConfig, VAEConfig
from ldmcli.disk.opening import bad_file, read_json, shown
from ldmcli.errors import BadDataError, LdmError, MissingInputError

_log = logging.getLogger(__name__)
_CURE = "name a KL or VQ autoencoder or TAESD, as a .safetensors file or a diffusers folder"
_CODEBOOK = "quantize.embedding.weight"
_ALONE = "name an autoencoder with both halves"
_TINY_ORIGINAL = ("", "decoder.", "taesd_decoder.")
_TINY_USUAL = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
_MAX_TINY_BLOCKS = 128  # TAESD has 10


def open_vae(path: Path, model: ModelConfig, *, allow_pickle: bool = False) -> PartSource[VAEConfig | TinyVAEConfig]:
    """Look at a VAE that is to decode what `model` draws; every header is validated.

    What it does not say itself (a file has no config.json) is as in the model's own VAE. Raises MissingInputError
    (nothing there) or BadDataError (what it is instead, or why it does not fit the model).
    """
    source = _open(path, model.vae, allow_pickle)
    vae, own = source.config, model.vae
    _check_channels(source.path, vae.latent_channels, own)
    if vae.factor != own.factor:
        raise _unfit(source.path, f"makes {vae.factor} pixels of a latent's side", own.factor)
    if isinstance(vae, TinyVAEConfig):
        return source
    check_buildable(dataclasses.replace(model, vae=vae), shown(source.path))
    if vae.scaling_factor != own.scaling_factor:
        _log.warning(
            "%s has the scaling factor %g, the model's VAE %g: it may be made for another family of models",
            *(shown(source.path), vae.scaling_factor, own.scaling_factor),
        )
    # Most config.json files ask for 32 bits by default, though only VAEs of some families need them.
    upcast = vae.force_upcast and own.force_upcast
    return dataclasses.replace(source, config=dataclasses.replace(vae, force_upcast=upcast))


def open_autoencoder(path: Path, *, allow_pickle: bool = False) -> PartSource[VAEConfig]:
    """Look at an autoencoder that is to be used without a model; every header is validated. Raises MissingInputError
    (nothing there) or BadDataError (what it is instead)."""
    source = _open(path, None, allow_pickle)
    if isinstance(source.config, TinyVAEConfig):
        raise bad_file(source.path, "is TAESD, which this program only decodes with", _ALONE)
    check_autoencoder(source.config, shown(source.path))
    return cast(PartSource[VAEConfig], source)


def autoencoder_facts(path: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """What `ldm info` says of an autoencoder. Raises as `open_autoencoder` does."""
    source = open_autoencoder(path, allow_pickle=allow_pickle)
    vae = source.config
    tensors = [file.tensors[key] for key, file in source.keys().items()]
    return {
        "autoencoder": f"{'VQ' if vae.codes else 'KL'}, f{vae.factor}",
        "latent_channels": vae.latent_channels,
        "codes": vae.codes or None,
        "parameters": sum(math.prod(info.shape) for info in tensors),
        "dtype": ", ".join(sorted({info.dtype for info in tensors})),
        "config": dataclasses.asdict(vae),
    }


def is_autoencoder_folder(path: Path) -> bool:
    """Whether the folder is an autoencoder's in diffusers' layout."""
    try:
        said = read_json(path / "config.json", MAX_CONFIG_BYTES)
    except LdmError:
        return False
    return not (path / INDEX).exists() and said.get("_class_name") in ("AutoencoderKL", VQ_CLASS)


def _open(path: Path, own: VAEConfig | None, allow_pickle: bool) -> PartSource[VAEConfig | TinyVAEConfig]:
    return _open_folder(path, allow_pickle) if os.path.isdir(path) else _open_file(path, own, allow_pickle)


def _open_folder(path: Path, allow_pickle: bool) -> PartSource[VAEConfig | TinyVAEConfig]:
    if (path / INDEX).is_file():
        path = path / ("vqvae" if os.path.isdir(path / "vqvae") else "vae")
    if not os.path.lexists(path / "config.json"):
        if not os.path.isdir(path):
            raise MissingInputError(f"{shown(path)} does not exist: the model has no VAE; {_CURE}.")
        raise bad_file(path, f"is a folder without config.json or {INDEX}, so no VAE", _CURE)
    said = read_json(path / "config.json", MAX_CONFIG_BYTES)
    kind = said.get("_class_name", "AutoencoderKL")
    if kind not in ("AutoencoderKL", VQ_CLASS, "AutoencoderTiny"):
        raise bad_file(path, f"is a {kind}, not a VAE that can be read", _CURE)
    files = tuple(open_part(path, "vae", allow_pickle=allow_pickle))
    if kind != "AutoencoderTiny":
        return PartSource("vae", path, vae_config(path / "config.json"), files)
    shapes = {key: tensor.shape for file in files for key, tensor in file.tensors.items()}
    tiny = _tiny_config(path, shapes, TINY_PREFIX, original=False)
    tiny = dataclasses.replace(tiny, scaling_factor=_tiny_scaling_factor(path / "config.json", said))
    return PartSource("vae", path, tiny, files, TINY_PREFIX)


def _open_file(path: Path, own: VAEConfig | None, allow_pickle: bool) -> PartSource[VAEConfig | TinyVAEConfig]:
    file = open_weights(path, allow_pickle=allow_pickle)
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    if f"{TINY_PREFIX}0.weight" in shapes:
        return PartSource("vae", path, _tiny_config(path, shapes, TINY_PREFIX, original=False), (file,), TINY_PREFIX)
    for prefix in _TINY_ORIGINAL:
        if f"{prefix}1.weight" in shapes and f"{prefix}3.conv.0.weight" in shapes:
            tiny = _tiny_config(path, shapes, prefix, original=True)
            return PartSource("vae", path, tiny, (file,), prefix, original=True)
    for prefix in (VAE_PREFIX, ""):
        if f"{prefix}decoder.conv_in.weight" in shapes:
            original = not any(key.startswith(f"{prefix}decoder.up_blocks.") for key in shapes)
            usual = own or VAEConfig(scaling_factor=1.0 if f"{prefix}{_CODEBOOK}" in shapes else 0.18215)
            family = None
            with contextlib.suppress(BadDataError):  # raised for all but whole checkpoints
                family = require_family(shapes, path)
            if family:
                usual = dataclasses.replace(usual, scaling_factor=scaling_of_file(file, family))
            config = _config(path, shapes, prefix, usual, own)
            return PartSource("vae", path, config, (file,), prefix, original)
    kind = describe_single_file(shapes)
    if kind == "TAESD":
        raise bad_file(path, "has only TAESD's encoder", "pictures need its decoder: name taesd_decoder.safetensors")
    if kind == "unknown":
        raise bad_file(path, list_keys("is no VAE that this version knows", list(shapes)), _CURE)
    raise bad_file(path, f"is {with_article(kind)}, no VAE", _CURE)


def _config(path: Path, shapes: Shapes, prefix: str, usual: VAEConfig, own: VAEConfig | None) -> VAEConfig:
    """An autoencoder's dimensions from its tensors; what shapes do not tell is as in `usual`. Raises BadDataError where
    it cannot stand in the place of `own`."""
    bare = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    # Of the names that tell dimensions the layouts differ in three; diffusers counts levels from the coarsest.
    blocks = re.compile(r"^decoder\.up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.")
    found = {key: match for key in bare if (match := blocks.match(key))}
    last = max((int(match[1]) for match in found.values()), default=0)
    for key, match in found.items():
        level, number = last - int(match[1]), match[3]
        if match[2] == "resnets":
            bare[f"decoder.up.{level}.block.{number}.{key[match.end() :]}"] = bare[key]
        else:
            bare[f"decoder.up.{level}.attn.{number}.q.weight"] = ()
    if any(key.startswith("decoder.mid_block.attentions.") for key in bare):
        bare["decoder.mid.attn_1.q.weight"] = ()
    with named_shape_errors(path, "VAE"):
        if own:  # said before what else such a VAE has or lacks
            _check_channels(path, bare["decoder.conv_in.weight"][1], own)
        return vae_from_shapes(bare, usual)


def _tiny_config(path: Path, shapes: Shapes, prefix: str, *, original: bool) -> TinyVAEConfig:
    """TAESD's dimensions: layers are numbered, and those without weights (ReLU, upsampling) leave gaps."""
    first = int(original)
    blocks = [0]
    layer = first + 2
    with named_shape_errors(path, "TAESD"):
        while f"{prefix}{layer}.weight" not in shapes:
            if f"{prefix}{layer}.conv.0.weight" in shapes:
                blocks[-1] += 1
                layer += 1
            else:  # upsampling, and a convolution that is not the last
                blocks.append(0)
                layer += 2
                shapes[f"{prefix}{layer - 1}.weight"]
        if sum(blocks) > _MAX_TINY_BLOCKS:
            raise ValueError(f"{sum(blocks)} blocks")
        channels, latent_channels = shapes[f"{prefix}{first}.weight"][:2]
        config = TinyVAEConfig(shapes[f"{prefix}{layer}.weight"][0], latent_channels, channels, tuple(blocks))
    if config.out_channels != 3:
        raise bad_file(path, f"gives pictures of {config.out_channels} channels, not red, green and blue", _CURE)
    return config


def _tiny_scaling_factor(path: Path, said: dict[str, Any]) -> float:
    """The scaling factor that AutoencoderTiny's config.json gives; what else it says must be as in TAESD."""
    for name, value in _TINY_USUAL.items():
        if said.get(name, value) != value:
            raise bad_file(path, f"says {name} {said[name]!r}, which this version cannot run", _CURE)
    factor = said.get("scaling_factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e9:
        raise bad_file(path, f"says scaling_factor {factor!r}, which is no number above 0", _CURE)
    return float(factor)


def _check_channels(path: Path, channels: int, own: VAEConfig) -> None:
    if channels != own.latent_channels:
        raise _unfit(path, f"has {channels} latent channels", own.latent_channels)


def _unfit(path: Path, has: str, needed: int) -> BadDataError:
    return bad_file(path, f"{has}, the model's VAE {needed}", "name a VAE of the model's family")
