"""What a model path holds, from headers and config.json alone: no weight is read and torch is not imported."""

import dataclasses
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from ldmcli.checkpoints import folder_config
from ldmcli.checkpoints.buildable import check_buildable
from ldmcli.checkpoints.dimensions import config_from_shapes
from ldmcli.checkpoints.files import WeightFile, open_sharded, open_weights
from ldmcli.checkpoints.key_map import IGNORED_ORIGINAL, TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX
from ldmcli.config import ModelConfig
from ldmcli.errors import BadDataError, MissingInputError, printable
from ldmcli.families import describe_single_file, require_sd1
from ldmcli.opening import read_json
from ldmcli.text.tokenizer import ClipTokenizer, Vocabulary, clip_vocabulary, vocabulary_from_folder

PARTS = ("unet", "vae", "text_encoder")
EMBEDDED_NAME = "tiny-emoji"
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_PREFIXES = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": TEXT_PREFIX}


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model on disk: a diffusers folder, or one file in the original layout. Where a folder has its weights twice,
    `half` takes the fp16 variant of every part."""

    path: Path
    config: ModelConfig
    single_file: WeightFile | None = None
    half: bool = False

    @property
    def name(self) -> str:
        """The model's name: that of its folder, or of its file without the ending."""
        return self.path.stem if self.single_file else self.path.name

    def files(self, part: str) -> list[WeightFile]:
        """The validated files of a part of PARTS."""
        if self.single_file:
            return [self.single_file]
        return _open_part(self.path / part, _STEMS[part], self.half)

    def keys(self, part: str) -> dict[str, WeightFile]:
        """Every tensor key of a part, as it stands on disk, with the file it is in."""
        prefix = _PREFIXES[part] if self.single_file else ""
        return {key: file for file in self.files(part) for key in file.tensors if key.startswith(prefix)}

    @cached_property
    def tokenizer(self) -> ClipTokenizer:
        """The folder's tokenizer; CLIP's own for a single file."""
        vocabulary = clip_vocabulary() if self.single_file else vocabulary_from_folder(self.path / "tokenizer")
        _check_vocabulary(vocabulary, self.config.text_encoder.vocab_size, printable(str(self.path)))
        return ClipTokenizer(vocabulary, self.config.text_encoder.max_length)

    def weight_paths(self) -> list[Path]:
        """All weight files, sorted: what identifies the model."""
        return sorted({file.path for part in PARTS for file in self.files(part)})


def embedded_model() -> Path:
    """The folder of the model that comes with this program: inside the package when installed, beside it in a clone."""
    package = Path(__file__).resolve().parent.parent
    for weights in (package / "weights", package.parent / "weights"):
        if (weights / EMBEDDED_NAME / "model_index.json").is_file():
            return weights / EMBEDDED_NAME
    raise MissingInputError(
        f"the embedded model {EMBEDDED_NAME} was not installed with this copy of ldmcli; name a model with --model, or "
        "take the folder weights/ from ldmcli's repository."
    )


def open_model(path: Path) -> ModelSource:
    """Look at a diffusers folder or a single .safetensors file; every header is validated.

    Raises MissingInputError (nothing there) or BadDataError (what it is instead, and what to do).
    """
    if os.path.isdir(path):  # unlike Path.is_dir, never raises
        return _open_folder(path)
    file = open_weights(path)
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    family = require_sd1(shapes, path)
    known = tuple(_PREFIXES.values())
    strangers = [k for k in shapes if not k.startswith(known) and not IGNORED_ORIGINAL.match(k)]
    if strangers:
        raise BadDataError(f"{printable(str(path))} {list_keys('holds tensors of no known part', strangers)}.")
    config = config_from_shapes(shapes, family, path)
    check_buildable(config, printable(str(path)))
    return ModelSource(path, config, file)


def list_keys(what: str, keys: list[str]) -> str:
    """`what (a, b, c, d, e and 7 more)`: the first five keys, safe to print, and how many there are beside."""
    shown = ", ".join(printable(key, 100) for key in keys[:5])
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{what} ({shown}{more})"


def _open_folder(path: Path) -> ModelSource:
    shown = printable(str(path))
    if not os.access(path, os.R_OK | os.X_OK):
        raise MissingInputError(f"{shown} is not readable; check its permissions.")
    if not (path / "model_index.json").is_file():
        raise BadDataError(f"{shown} is a folder without model_index.json, so not a diffusers model{_inside(path)}.")
    index = read_json(path / "model_index.json", folder_config.MAX_CONFIG_BYTES)
    kind = str(index.get("_class_name", ""))
    if kind.startswith("StableDiffusionXL"):
        raise BadDataError(f"{shown} looks like SDXL ({printable(kind)}); this version reads Stable Diffusion 1.x.")
    text_encoder = index.get("text_encoder")
    if text_encoder not in (None, ["transformers", "CLIPTextModel"]) or "transformer" in index:
        raise BadDataError(
            f"{shown} is a {printable(kind) or 'model'}, not a latent diffusion U-Net with a CLIP text encoder; this "
            "version reads Stable Diffusion 1.x."
        )
    config = ModelConfig(
        family="Stable Diffusion 1.x",
        unet=folder_config.unet_config(path / "unet" / "config.json"),
        vae=folder_config.vae_config(path / "vae" / "config.json"),
        text_encoder=folder_config.text_encoder_config(path / "text_encoder" / "config.json"),
        schedule=folder_config.schedule_config(path / "scheduler" / "scheduler_config.json"),
    )
    check_buildable(config, shown)
    source = ModelSource(path, config)
    for part in PARTS:
        source.files(part)
    return source


def _check_vocabulary(vocabulary: Vocabulary, size: int, shown: str) -> None:
    """Every token must be one the text encoder has, and every merge must join tokens to a token."""
    tokens = vocabulary.ids
    strange = next((token for token, i in tokens.items() if isinstance(i, bool) or not 0 <= i < size), None)
    if strange is not None:
        raise BadDataError(
            f"{shown}: the tokenizer gives token '{printable(strange)}' the number {printable(str(tokens[strange]))}, "
            f"and the text encoder knows 0 to {size - 1}; they are not of one model."
        )
    for left, right in vocabulary.merges:
        texts = isinstance(left, str) and isinstance(right, str)
        if not texts or left not in tokens or right not in tokens or left + right not in tokens:
            raise BadDataError(
                f"{shown}: the tokenizer merges {printable(repr(left))} and {printable(repr(right))}, which its "
                "vocabulary does not have."
            )


def _open_part(folder: Path, stem: str, half: bool) -> list[WeightFile]:
    plain = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    fp16 = (
        f"{stem}.fp16.safetensors",
        f"{stem}.safetensors.index.fp16.json",
        f"{stem}.fp16.safetensors.index.json",
    )
    for name in fp16 + plain if half else plain + fp16:
        if os.path.lexists(folder / name):
            return open_sharded(folder / name) if name.endswith(".json") else [open_weights(folder / name)]
    shown = printable(str(folder))
    pickles = [name for name in (f"{stem}.bin", "pytorch_model.bin") if (folder / name).exists()]
    if pickles:
        raise BadDataError(
            f"{shown} has its weights only as {pickles[0]}, a pickle that could run code when opened; convert it to "
            f"safetensors or fetch {plain[0]}."
        )
    raise MissingInputError(f"{shown} has no {plain[0]}; the model folder is incomplete.")


def _inside(path: Path) -> str:
    """A hint at a model file inside a folder that is none itself."""
    found = sorted(_safetensors(path))
    return f"; did you mean {printable(str(path / found[0]))}?" if found else ""


def _safetensors(path: Path) -> Iterator[str]:
    try:
        with os.scandir(path) as entries:
            yield from (entry.name for entry in entries if entry.name.endswith(".safetensors"))
    except OSError:
        return


def describe(source: ModelSource) -> str:
    """What kind of model it is, in a few words."""
    if source.single_file:
        return describe_single_file({k: t.shape for k, t in source.single_file.tensors.items()})
    return f"{source.config.family}, diffusers folder"
