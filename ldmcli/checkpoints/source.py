"""What a model path holds, from headers and config.json alone: no weight is read and torch is not imported."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldmcli.checkpoints import folder_config
from ldmcli.checkpoints.buildable import check_buildable
from ldmcli.checkpoints.dimensions import USUAL_VAE, config_from_shapes
from ldmcli.checkpoints.families import (
    FAMILIES,
    READ,
    describe_single_file,
    family_of_unet,
    lacks_only_vae,
    require_family,
)
from ldmcli.checkpoints.files import WeightFile, open_sharded, open_weights
from ldmcli.checkpoints.folder_schedule import folder_schedule
from ldmcli.checkpoints.json_fields import MAX_CONFIG_BYTES
from ldmcli.checkpoints.key_map import IGNORED_ORIGINAL, UNET_PREFIX, VAE_PREFIX
from ldmcli.checkpoints.layout import GENERATION, weight_names
from ldmcli.checkpoints.training import schedule_of_file
from ldmcli.conditioning.tokenizer import ClipTokenizer, Vocabulary, clip_vocabulary, vocabulary_from_folder
from ldmcli.config import ModelConfig, TextEncoderConfig
from ldmcli.disk.opening import read_json
from ldmcli.errors import BadDataError, MissingInputError, printable
from ldmcli.hub.names import snapshot_name

_log = logging.getLogger(__name__)
EMBEDDED_NAME = "tiny-emoji"
# diffusers' pipelines that correct old configurations when they are made.
_MENDING, _NOT_MENDING = "StableDiffusion", ("StableDiffusionXL", "StableDiffusionControlNet")
_DIFFUSERS_STEM, _TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
_OPENCLIP_PAD = "!"  # whose id, 0, OpenCLIP fills short prompts up with


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model on disk: a diffusers folder, or one file in the original layout, whose `prefixes` tell a part's keys.
    Where a folder has its weights twice, `half` takes the fp16 variant of every part."""

    path: Path
    config: ModelConfig
    single_file: WeightFile | None = None
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    half: bool = False
    allow_pickle: bool = False
    # What `files` gave, by part and `half`: a header is read once a run.
    _opened: dict[tuple[str, bool], list[WeightFile]] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )
    _tokenizers: dict[TextEncoderConfig, ClipTokenizer] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def name(self) -> str:
        """The model's name: that of its folder or its hub repository, or of its file without the ending."""
        return self.path.stem if self.single_file else snapshot_name(self.path) or self.path.name

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks it is made of, by the names of their folders in a diffusers model."""
        return ("unet", "vae", *(text.part for text in self.config.text_encoders))

    def files(self, part: str) -> list[WeightFile]:
        """The validated files of one of `parts`."""
        if self.single_file:
            return [self.single_file]
        key = part, self.half
        if key not in self._opened:
            stem = _TRANSFORMERS_STEM if part.startswith("text_encoder") else _DIFFUSERS_STEM
            self._opened[key] = open_part(self.path / part, stem, half=self.half, allow_pickle=self.allow_pickle)
        return self._opened[key]

    def keys(self, part: str) -> dict[str, WeightFile]:
        """Every tensor key of a part, as it stands on disk, with the file it is in."""
        prefix = self.prefixes.get(part, "")
        return {key: file for file in self.files(part) for key in file.tensors if key.startswith(prefix)}

    @property
    def tokenizers(self) -> tuple[ClipTokenizer, ...]:
        """One for each text encoder: the folder's, or CLIP's own for a single file. They are made once a run."""
        for text in self.config.text_encoders:
            if text not in self._tokenizers:
                self._tokenizers[text] = self._tokenizer(text)
        return tuple(self._tokenizers[text] for text in self.config.text_encoders)

    def _tokenizer(self, text: TextEncoderConfig) -> ClipTokenizer:
        openclip = text.layout == "openclip"
        if self.single_file:
            vocabulary = clip_vocabulary()
            vocabulary = dataclasses.replace(vocabulary, pad_token=_OPENCLIP_PAD) if openclip else vocabulary
        else:
            vocabulary = vocabulary_from_folder(self.path / text.part.replace("text_encoder", "tokenizer"))
        _check_vocabulary(vocabulary, text.vocab_size, printable(str(self.path)))
        return ClipTokenizer(vocabulary, text.max_length, cleaned=openclip, rows=text.vocab_size)

    def weight_paths(self) -> list[Path]:
        """All weight files, sorted: what identifies the model."""
        return sorted({file.path for part in self.parts for file in self.files(part)})


def embedded_model() -> Path:
    """The folder of the model that comes with this program: inside the package when installed, beside it in a clone."""
    package = Path(__file__).resolve().parent.parent
    for weights in (package / "weights", package.parent / "weights"):
        if (weights / EMBEDDED_NAME / "model_index.json").is_file():
            return (weights / EMBEDDED_NAME).resolve()  # in a clone, what the package links to
    raise MissingInputError(
        f"the embedded model {EMBEDDED_NAME} was not installed with this copy of ldmcli; name a model with --model, or "
        "take the folder weights/ from ldmcli's repository."
    )


def open_model(path: Path, *, allow_pickle: bool = False, own_vae: bool = True) -> ModelSource:
    """Look at a diffusers folder or a single .safetensors file; every header is validated. Without `own_vae`, for what
    will be drawn with another VAE or none, a single file may lack its own.

    Raises MissingInputError (nothing there) or BadDataError (what it is instead, and what to do).
    """
    if os.path.isdir(path):  # unlike Path.is_dir, never raises
        return _open_folder(path, allow_pickle)
    return model_of_file(open_weights(path, allow_pickle=allow_pickle), own_vae=own_vae)


def model_of_file(file: WeightFile, *, own_vae: bool = True) -> ModelSource:
    """The model that a single file holds; without `own_vae`, it may lack that, and is taken to be of the usual one's
    latents. Raises BadDataError saying what it is instead."""
    path = file.path
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    if not own_vae and lacks_only_vae(shapes):
        shapes.update(USUAL_VAE)
    family = require_family(shapes, path)
    prefixes = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, **{text.part: text.prefix for text in family.texts}}
    known = tuple(prefixes.values())
    strays = [key for key in file.tensors if not key.startswith(known) and not IGNORED_ORIGINAL.match(key)]
    if strays:
        _log.warning(
            "%s %s", printable(str(path)), list_keys("has tensors of no known part, which are ignored", strays)
        )
    schedule = schedule_of_file(file, family)
    config = config_from_shapes(shapes, family, schedule, path)
    check_buildable(config, printable(str(path)))
    return with_prediction_type(ModelSource(path, config, file, prefixes), schedule.prediction_type)


def with_prediction_type(source: ModelSource, prediction_type: str) -> ModelSource:
    """The source as a model of this prediction type, and of the size that its family has for that."""
    config = source.config
    family = next(family for family in FAMILIES if family.name == config.family)
    size = family.v_sample_size if prediction_type == "v_prediction" and source.single_file else None
    unet = dataclasses.replace(config.unet, sample_size=size) if size else config.unet
    schedule = dataclasses.replace(config.schedule, prediction_type=prediction_type)
    return dataclasses.replace(source, config=dataclasses.replace(config, unet=unet, schedule=schedule))


def list_keys(what: str, keys: list[str]) -> str:
    """`what (a, b, c, d, e and 7 more)`: the first five keys, safe to print, and how many there are beside."""
    shown = ", ".join(printable(key, 100) for key in keys[:5])
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{what} ({shown}{more})"


def _open_folder(path: Path, allow_pickle: bool) -> ModelSource:
    shown = printable(str(path))
    if not os.access(path, os.R_OK | os.X_OK):
        raise MissingInputError(f"{shown} is not readable; check its permissions.")
    if not (path / "model_index.json").is_file():
        raise BadDataError(f"{shown} is a folder without model_index.json, so not a diffusers model{_inside(path)}.")
    config = _folder_model(path, read_json(path / "model_index.json", MAX_CONFIG_BYTES))
    check_buildable(config, shown)
    source = ModelSource(path, config, allow_pickle=allow_pickle)
    for part in source.parts:
        source.files(part)
    return source


def _folder_model(path: Path, index: dict[str, Any]) -> ModelConfig:
    """What a diffusers folder describes. Raises BadDataError where it is another kind of model."""
    kind = printable(str(index.get("_class_name", ""))) or "model"
    classes = {name: index.get(name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    known = [["transformers", name] for name in ("CLIPTextModel", folder_config.WITH_PROJECTION)]
    named = {name: found for name, found in classes.items() if found not in (None, [None, None])}
    if any(found not in known for found in named.values()) or "transformer" in index:
        raise BadDataError(
            f"{printable(str(path))} is a {kind}, not a latent diffusion U-Net with a CLIP text encoder; this version "
            f"reads {READ}."
        )
    texts = [
        folder_config.text_encoder_config(path / part / "config.json", part, found[1])
        for part, found in (named or {"text_encoder": known[0]}).items()
    ]
    pooled_dim = texts[-1].projection_dim or 0
    mended = kind.startswith(_MENDING) and not kind.startswith(_NOT_MENDING)
    unet = folder_config.unet_config(path / "unet" / "config.json", pooled_dim, mended=mended)
    vae = folder_config.vae_config(path / "vae" / "config.json")
    family = family_of_unet(unet)
    if unet.added_numbers:  # XL reads the states before the last layer, as they are
        texts = [dataclasses.replace(text, skipped_layers=1, final_norm=False) for text in texts]
    else:
        vae = dataclasses.replace(vae, force_upcast=False)
    reads_guidance = unet.guidance_dim is not None
    found = folder_schedule(
        path / "scheduler" / "scheduler_config.json",
        _class_of(index.get("scheduler")),
        family.defaults,
        reads_guidance=reads_guidance,
        mended=mended,
    )
    defaults = folder_config.own_defaults(path / GENERATION, found.defaults, reads_guidance=reads_guidance)
    return ModelConfig(
        family=family.name,
        unet=unet,
        vae=vae,
        text_encoders=tuple(texts),
        schedule=found.schedule,
        zero_empty_negative=bool(index.get("force_zeros_for_empty_prompt", family.zero_empty_negative)),
        defaults=defaults,
        notes=(found.guess, *found.notes) if found.guess and not (path / GENERATION).exists() else found.notes,
    )


def _class_of(named: object) -> object:
    """The class in an entry of model_index.json: [library, class]."""
    return named[1] if isinstance(named, list) and len(named) == 2 else None


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


def open_part(folder: Path, stem: str, *, half: bool = False, allow_pickle: bool = False) -> list[WeightFile]:
    """The validated weight files of one part of a diffusers model, its fp16 variant first where `half`."""
    for name in weight_names(stem, half=half):
        if os.path.lexists(folder / name):
            return open_sharded(folder / name) if name.endswith(".json") else [open_weights(folder / name)]
    shown = printable(str(folder))
    names = [f"{name}{end}" for name in (stem, "pytorch_model") for end in (".bin", ".bin.index.json")]
    pickles = [name for name in names if (folder / name).exists()]
    if pickles and allow_pickle:
        read = open_sharded if pickles[0].endswith(".json") else open_weights
        found = read(folder / pickles[0], allow_pickle=True)
        return found if isinstance(found, list) else [found]
    if pickles:
        raise BadDataError(
            f"{shown} has its weights only as {pickles[0]}, a pickle that could run code when opened; convert it to "
            f"safetensors, fetch {stem}.safetensors, or read it in torch's restricted way with --allow-pickle."
        )
    raise MissingInputError(f"{shown} has no {stem}.safetensors; the model folder is incomplete.")


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
