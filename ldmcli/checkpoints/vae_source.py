"""A VAE given on its own, in place of the model's: looked at without torch, then loaded.

It may be a diffusers folder (a VAE's, or a whole model's, of which its VAE is taken), a file in either layout (alone
or inside a checkpoint), or TAESD in either layout. https://github.com/madebyollin/taesd has the original's keys.
"""

import contextlib
import dataclasses
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.checkpoints import folder_config
from ldmcli.checkpoints.buildable import check_buildable
from ldmcli.checkpoints.dimensions import vae_from_shapes
from ldmcli.checkpoints.families import describe_single_file, require_family, with_article
from ldmcli.checkpoints.files import WeightFile, open_weights
from ldmcli.checkpoints.json_fields import MAX_CONFIG_BYTES
from ldmcli.checkpoints.key_map import VAE_PREFIX, of_vae_encoder, old_diffusers_vae_key, original_vae_keys
from ldmcli.checkpoints.source import list_keys, open_part
from ldmcli.config import ModelConfig, TinyVAEConfig, VAEConfig
from ldmcli.disk.opening import bad_file, read_json, shown
from ldmcli.errors import BadDataError, MissingInputError

if TYPE_CHECKING:
    import torch

    from ldmcli.networks.taesd import TinyVAE
    from ldmcli.networks.vae import AutoencoderKL

_log = logging.getLogger(__name__)

_STEM = "diffusion_pytorch_model"
_CURE = "name a KL autoencoder or TAESD, as a .safetensors file or a diffusers folder"
_TRAINING_ONLY = re.compile(r"loss\.|model_ema\.")  # what a VAE's file may have beside its weights
_TINY_DIFFUSERS = "decoder.layers."
_TINY_ORIGINAL = ("", "decoder.", "taesd_decoder.")
_TINY_USUAL = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
_MAX_TINY_BLOCKS = 128  # TAESD has 10

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class VAESource:
    """A VAE on disk: its keys begin with `prefix` and are, behind it, diffusers' or the `original` ones."""

    path: Path
    config: VAEConfig | TinyVAEConfig
    files: tuple[WeightFile, ...]
    prefix: str = ""
    original: bool = False

    @property
    def name(self) -> str:
        """The name of its folder, or of its file without the ending."""
        return self.path.name if os.path.isdir(self.path) else self.path.stem

    def weight_paths(self) -> list[Path]:
        """All weight files, sorted: what identifies it."""
        return sorted(file.path for file in self.files)

    def keys(self) -> dict[str, WeightFile]:
        """Every tensor key of the VAE, as it stands on disk, with the file it is in."""
        keys = {key: file for file in self.files for key in file.tensors if key.startswith(self.prefix)}
        return {key: file for key, file in keys.items() if not _TRAINING_ONLY.match(key.removeprefix(self.prefix))}

    def disk_names(self, key: str) -> list[str]:
        """The names that the weight `key` may have on disk, the likeliest first."""
        if isinstance(self.config, TinyVAEConfig):
            number, _, rest = key.removeprefix(_TINY_DIFFUSERS).partition(".")
            # The original's layer 0 is the clamp, which diffusers does not count.
            return [f"{self.prefix}{int(number) + self.original}.{rest}"]
        if self.original:
            return [self.prefix + original_vae_keys([key], self.config)[key].removeprefix(VAE_PREFIX)]
        return [self.prefix + key, self.prefix + old_diffusers_vae_key(key)]


def open_vae(path: Path, model: ModelConfig, *, allow_pickle: bool = False) -> VAESource:
    """Look at a VAE that is to decode what `model` draws; every header is validated.

    What it does not say itself (a file has no config.json) is as in the model's own VAE. Raises MissingInputError
    (nothing there) or BadDataError (what it is instead, or why it does not fit the model).
    """
    source = _open_folder(path, allow_pickle) if os.path.isdir(path) else _open_file(path, model.vae, allow_pickle)
    _check_fit(source, model)
    if not isinstance(source.config, VAEConfig):
        return source
    # Most config.json files ask for 32 bits by default, though only VAEs of some families need them.
    upcast = source.config.force_upcast and model.vae.force_upcast
    return dataclasses.replace(source, config=dataclasses.replace(source.config, force_upcast=upcast))


def load_vae_from(source: VAESource, device: "torch.device", dtype: "torch.dtype") -> "AutoencoderKL | TinyVAE":
    """The source's autoencoder, without its encoder."""
    from ldmcli.checkpoints.load import DiskNames, fill, on_meta
    from ldmcli.networks.taesd import TinyVAE
    from ldmcli.networks.vae import AutoencoderKL

    config = source.config
    vae = on_meta(
        lambda: TinyVAE(config) if isinstance(config, TinyVAEConfig) else AutoencoderKL(config, encoder=False)
    )
    names: DiskNames = {key: source.disk_names(key) for key in vae.state_dict()}
    on_disk = {key: file for key, file in source.keys().items() if not of_vae_encoder(key, source.prefix)}
    fill(vae, names, on_disk, f"{shown(source.path)} is not a VAE that can be read", device, dtype)
    return vae


def _open_folder(path: Path, allow_pickle: bool) -> VAESource:
    if (path / "model_index.json").is_file():
        path = path / "vae"
    if not os.path.lexists(path / "config.json"):
        if not os.path.isdir(path):
            raise MissingInputError(f"{shown(path)} does not exist: the model has no VAE; {_CURE}.")
        raise bad_file(path, "is a folder without config.json or model_index.json, so no VAE", _CURE)
    config = read_json(path / "config.json", MAX_CONFIG_BYTES)
    kind = config.get("_class_name", "AutoencoderKL")
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise bad_file(path, f"is a {kind}, not a VAE that can be read", _CURE)
    files = tuple(open_part(path, _STEM, allow_pickle=allow_pickle))
    if kind == "AutoencoderKL":
        return VAESource(path, folder_config.vae_config(path / "config.json"), files)
    shapes = {key: tensor.shape for file in files for key, tensor in file.tensors.items()}
    tiny = _tiny_config(path, shapes, _TINY_DIFFUSERS, original=False)
    scaling_factor = _tiny_scaling_factor(path / "config.json", config)
    return VAESource(path, dataclasses.replace(tiny, scaling_factor=scaling_factor), files, _TINY_DIFFUSERS)


def _open_file(path: Path, usual: VAEConfig, allow_pickle: bool) -> VAESource:
    file = open_weights(path, allow_pickle=allow_pickle)
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    if f"{_TINY_DIFFUSERS}0.weight" in shapes:
        tiny = _tiny_config(path, shapes, _TINY_DIFFUSERS, original=False)
        return VAESource(path, tiny, (file,), _TINY_DIFFUSERS)
    for prefix in _TINY_ORIGINAL:
        if f"{prefix}1.weight" in shapes and f"{prefix}3.conv.0.weight" in shapes:
            return VAESource(path, _tiny_config(path, shapes, prefix, original=True), (file,), prefix, original=True)
    for prefix in (VAE_PREFIX, ""):
        if f"{prefix}decoder.conv_in.weight" in shapes:
            original = not any(key.startswith(f"{prefix}decoder.up_blocks.") for key in shapes)
            with contextlib.suppress(BadDataError):  # raised for all but whole checkpoints
                usual = dataclasses.replace(usual, scaling_factor=require_family(shapes, path).scaling_factor)
            return VAESource(path, _kl_config(path, shapes, prefix, usual), (file,), prefix, original)
    kind = describe_single_file(shapes)
    if kind == "TAESD":
        raise bad_file(path, "has only TAESD's encoder", "pictures need its decoder: name taesd_decoder.safetensors")
    what = (
        list_keys("is no VAE that this version knows", list(shapes))
        if kind == "unknown"
        else f"is {with_article(kind)}, no VAE"
    )
    raise bad_file(path, what, _CURE)


def _kl_config(path: Path, shapes: Shapes, prefix: str, usual: VAEConfig) -> VAEConfig:
    """A KL autoencoder's dimensions from its tensors; what shapes do not tell is as in `usual`."""
    bare = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    # Of the names that tell dimensions the layouts differ in one, where diffusers counts from the coarsest level.
    resnets = re.compile(r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.")
    found = {key: match for key in bare if (match := resnets.match(key))}
    last = max((int(match[1]) for match in found.values()), default=0)
    for key, match in found.items():
        bare[f"decoder.up.{last - int(match[1])}.block.{match[2]}.{key[match.end() :]}"] = bare[key]
    try:
        channels = bare["decoder.conv_in.weight"][1]
        if channels != usual.latent_channels:  # said before what else such a VAE has or lacks
            raise _unfit(path, f"has {channels} latent channels", f"{usual.latent_channels}")
        return vae_from_shapes(bare, usual.norm_groups, usual.scaling_factor, force_upcast=usual.force_upcast)
    except KeyError as error:
        raise bad_file(path, f"is an incomplete VAE: the tensor {error.args[0]} is missing", _CURE) from None
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise bad_file(path, f"has tensors of shapes that fit no VAE ({error})", _CURE) from None


def _tiny_config(path: Path, shapes: Shapes, prefix: str, *, original: bool) -> TinyVAEConfig:
    """TAESD's dimensions: layers are numbered, and those without weights (ReLU, upsampling) leave gaps."""
    first = int(original)
    blocks = [0]
    layer = first + 2
    try:
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
    except KeyError as error:
        raise bad_file(path, f"is an incomplete TAESD: the tensor {error.args[0]} is missing", _CURE) from None
    except (IndexError, ValueError) as error:
        raise bad_file(path, f"has tensors of shapes that fit no TAESD ({error})", _CURE) from None
    if config.out_channels != 3:
        raise bad_file(path, f"gives pictures of {config.out_channels} channels, not red, green and blue", _CURE)
    return config


def _tiny_scaling_factor(path: Path, config: dict[str, Any]) -> float:
    """The scaling factor that AutoencoderTiny's config.json gives; what else it says must be as in TAESD."""
    for name, value in _TINY_USUAL.items():
        if config.get(name, value) != value:
            raise bad_file(path, f"says {name} {config[name]!r}, which this version cannot run", _CURE)
    factor = config.get("scaling_factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e9:
        raise bad_file(path, f"says scaling_factor {factor!r}, which is no number above 0", _CURE)
    return float(factor)


def _check_fit(source: VAESource, model: ModelConfig) -> None:
    """Raise BadDataError where the VAE cannot be built or reads other latents than the model's."""
    vae, own = source.config, model.vae
    if vae.latent_channels != own.latent_channels:
        raise _unfit(source.path, f"has {vae.latent_channels} latent channels", f"{own.latent_channels}")
    if vae.factor != own.factor:
        raise _unfit(source.path, f"makes {vae.factor} pixels of a latent's side", f"{own.factor}")
    if isinstance(vae, VAEConfig):
        check_buildable(dataclasses.replace(model, vae=vae), shown(source.path))
        if vae.scaling_factor != own.scaling_factor:
            _log.warning(
                "%s has the scaling factor %g, the model's VAE %g: it may be made for another family of models",
                *(shown(source.path), vae.scaling_factor, own.scaling_factor),
            )


def _unfit(path: Path, has: str, needs: str) -> BadDataError:
    return bad_file(path, f"{has}, the model's VAE {needs}", "name a VAE of the model's family")
