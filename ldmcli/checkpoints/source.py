"""What a model path holds, from headers and config.json alone: no weight is read and torch is not imported."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar

from ldmcli.background import in_background
from ldmcli.checkpoints import folder_config
from ldmcli.checkpoints.buildable import check_buildable
from ldmcli.checkpoints.families import FAMILIES, SD_UPSCALER, SUPER_RESOLUTION, Family, family_of_unet
from ldmcli.checkpoints.file_kinds import READ, require_family
from ldmcli.checkpoints.files import WeightFile, open_sharded, open_weights
from ldmcli.checkpoints.folder_schedule import folder_schedule
from ldmcli.checkpoints.key_map import EMA_PREFIX, IGNORED_ORIGINAL, UNET_PREFIX, VAE_PREFIX, NetworkConfig
from ldmcli.checkpoints.layout import GENERATION, INDEX, OTHER_FOLDERS, UPSCALER, WORD_LIST, stem_of, weight_names
from ldmcli.conditioning.class_names import ClassNames
from ldmcli.conditioning.known_words import WordList
from ldmcli.conditioning.tokenizer import ClipTokenizer, Vocabulary, clip_vocabulary, vocabulary_from_folder
from ldmcli.config import Defaults, ImageEmbeddingConfig, ModelConfig, ScheduleConfig, TextEncoderConfig
from ldmcli.disk.hashes import FileHashes
from ldmcli.disk.opening import listing, read_json, read_text, shown
from ldmcli.errors import BadDataError, MissingInputError, printable
from ldmcli.frozen import frozen

_log = logging.getLogger(__name__)
EMBEDDED_NAME = "tiny-emoji"
CLASS_NAMES = "classes.txt"  # in a model's folder, a class a line
CLASS_NAMES_ENDING = f".{CLASS_NAMES}"  # of a file beside a model's
_MAX_WORD_LIST = 1 << 20  # bytes
# diffusers' pipelines that correct old configurations when they are made.
_MENDING = "StableDiffusion"
_NOT_MENDING = ("StableDiffusionXL", "StableDiffusionControlNet", "StableDiffusionUpscale")
# Those whose U-Nets alone do not tell the family.
_PIPELINES = {"StableDiffusionUpscalePipeline": SD_UPSCALER, "LDMSuperResolutionPipeline": SUPER_RESOLUTION}
_OPENCLIP_PAD = "!"  # whose id, 0, OpenCLIP fills short prompts up with
_SNAPSHOT = re.compile(r"/models--(?:[^/]*--)?([^/]*)/snapshots/[^/]*")

_Config = TypeVar("_Config", bound=NetworkConfig, covariant=True)


@frozen
class PartSource(Generic[_Config]):
    """One network on disk: its keys begin with `prefix` and are, behind it, diffusers' or the `original` ones."""

    name: str
    path: Path
    config: _Config
    files: tuple[WeightFile, ...]
    prefix: str = ""
    original: bool = False
    dotless: bool = False  # the names behind the prefix have lost their dots

    def keys(self) -> dict[str, WeightFile]:
        """Every tensor key of the part, as it stands on disk, with the file it is in."""
        return {key: file for file in self.files for key in file.tensors if key.startswith(self.prefix)}

    def sha256(self, hashes: FileHashes) -> str:
        """The SHA-256 of its file; of several, that of the list of theirs."""
        found = [hashes.sha256(file.path) for file in self.files]
        return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()


@frozen
class ModelSource:
    """A model on disk: a diffusers folder, or one file in the original layout, whose `prefixes` tell a part's keys.
    Where a folder has its weights twice, `half` takes the fp16 variant of every part."""

    path: Path
    config: ModelConfig
    single_file: WeightFile | None = None
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    half: bool = False
    allow_pickle: bool = False
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of parts that a folder calls otherwise
    # What a header or a vocabulary gave, which are read once a run.
    _opened: dict[tuple[str, bool], tuple[WeightFile, ...]] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )
    _tokenizers: dict[TextEncoderConfig, ClipTokenizer] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def name(self) -> str:
        """The model's name: that of its folder or its hub repository, or of its file without the ending."""
        in_cache = _SNAPSHOT.fullmatch(f"/{'/'.join(self.path.parts[-3:])}")  # a folder called by its commit
        return self.path.stem if self.single_file else in_cache[1] if in_cache else self.path.name

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks it is made of, by the names of their folders in a diffusers model."""
        return tuple(self._configs)

    @property
    def _configs(self) -> dict[str, Any]:
        config, more = self.config, (self.config.conditioner,) if self.config.conditioner else ()
        encoders = {each.part: each for each in (*config.text_encoders, *more)}
        return {"unet": config.unet, "vae": config.vae, **encoders}

    def part(self, name: str) -> PartSource[Any]:
        """One of `parts`."""
        config = self._configs[name]
        if self.single_file:
            prefix = self.prefixes[name]
            dotless = prefix == EMA_PREFIX
            return PartSource(name, self.path, config, (self.single_file,), prefix, original=True, dotless=dotless)
        key = name, self.half
        if key not in self._opened:
            folder = self.path / self.folders.get(name, name)
            self._opened[key] = tuple(open_part(folder, name, half=self.half, allow_pickle=self.allow_pickle))
        return PartSource(name, self.path / self.folders.get(name, name), config, self._opened[key])

    @property
    def upscaler(self) -> Path | None:
        """The network that comes in the model's folder to make its pictures larger."""
        path = self.path / UPSCALER
        return path if not self.single_file and os.path.lexists(path) else None

    @functools.cached_property
    def word_list(self) -> WordList:
        """What the model knows, by the list in its folder; empty without one. Raises BadDataError where it is no text,
        StorageError."""
        path = self.path / WORD_LIST
        listed = not self.single_file and os.path.lexists(path)
        return WordList(read_text(path, _MAX_WORD_LIST) if listed else "")

    @functools.cached_property
    def class_names(self) -> ClassNames:
        """What the model's classes are called, by the list beside its file or in its folder; empty without one. Raises
        BadDataError where it is no text, StorageError."""
        path = self.path.with_suffix(CLASS_NAMES_ENDING) if self.single_file else self.path / CLASS_NAMES
        return ClassNames(read_text(path, _MAX_WORD_LIST) if os.path.lexists(path) else "")

    @property
    def tokenizers(self) -> tuple[ClipTokenizer, ...]:
        """One for each text encoder: the folder's, or CLIP's own for a single file."""
        for text in self.config.text_encoders:
            if text not in self._tokenizers:
                self._tokenizers[text] = self._tokenizer(text)
        return tuple(self._tokenizers[text] for text in self.config.text_encoders)

    def _tokenizer(self, text: TextEncoderConfig) -> ClipTokenizer:
        if text.layout == "bert":
            return self._bert_tokenizer(text)
        openclip = text.layout == "openclip"
        if self.single_file:
            vocabulary = clip_vocabulary()
            vocabulary = dataclasses.replace(vocabulary, pad_token=_OPENCLIP_PAD) if openclip else vocabulary
        else:
            vocabulary = vocabulary_from_folder(self.path / text.part.replace("text_encoder", "tokenizer"))
        _check_vocabulary(vocabulary, text.vocab_size, shown(self.path))
        return ClipTokenizer(vocabulary, text.max_length, cleaned=openclip, rows=text.vocab_size)

    def _bert_tokenizer(self, text: TextEncoderConfig) -> ClipTokenizer:
        from ldmcli.conditioning.wordpiece import FOLDERS, VOCABULARY, bert_tokenizer, tokenizer_of_file

        size = text.max_length, text.vocab_size
        if not self.single_file:
            return bert_tokenizer(self.path / "tokenizer", *size)
        own, shared = self.path.with_suffix(f".{VOCABULARY}"), self.path.parent / VOCABULARY
        found = next((path for path in (own, shared) if os.path.lexists(path)), None)
        folder = next((name for name in FOLDERS if os.path.isdir(self.path.parent / name)), None)
        if found is None and folder:
            return bert_tokenizer(self.path.parent / folder, *size)
        if found is None:
            raise MissingInputError(
                f"{shown(self.path)} needs BERT's vocabulary for its prompts; put that of bert-base-uncased beside it, "
                f"as {own.name} or {VOCABULARY}, or in a folder {FOLDERS[0]}."
            )
        return tokenizer_of_file(found, *size)

    def sha256(self, hashes: FileHashes) -> "Future[str]":
        """The model's identity: the SHA-256 of its file; for a folder, that of the list of its weight files' hashes. It
        is found in a thread that takes the processor only where nothing else wants it."""

        def work() -> str:
            with contextlib.suppress(OSError):  # a thread of Linux has a priority of its own; a sandbox may refuse
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            if self.single_file:
                return hashes.sha256(self.path)
            paths = sorted({file.path for part in self.parts for file in self.part(part).files})
            listed = (f"{hashes.sha256(path)}  {path.relative_to(self.path).as_posix()}\n" for path in paths)
            return hashlib.sha256("".join(listed).encode()).hexdigest()

        return in_background(work, "sha256")


def embedded_model() -> Path:
    """The folder of the model that comes with this program."""
    return embedded_folder(EMBEDDED_NAME, INDEX, "--model")


def embedded_folder(name: str, file: str, option: str) -> Path:
    """The folder of a model that comes with this program, which has `file` in it: inside the package when installed,
    beside it in a clone. `option` names another."""
    package = Path(__file__).resolve().parent.parent
    for weights in (package / "weights", package.parent / "weights"):
        if (weights / name / file).is_file():
            return (weights / name).resolve()  # in a clone, what the package links to
    raise MissingInputError(
        f"the embedded model {name} was not installed with this copy of ldmcli; name a model with {option}, or take "
        "the folder weights/ from ldmcli's repository."
    )


def open_model(path: Path, *, allow_pickle: bool = False, own_vae: bool = True) -> ModelSource:
    """Look at a diffusers folder or a single .safetensors file; every header is validated. Without `own_vae`, for what
    will be drawn with another VAE or none, a single file may lack its own.

    Raises MissingInputError (nothing there) or BadDataError (what it is instead, and what to do).
    """
    if os.path.isdir(path):  # unlike Path.is_dir, never raises
        return _open_folder(path, allow_pickle)
    try:
        file = open_weights(path, allow_pickle=allow_pickle)
    except MissingInputError as error:
        hint = "ldm models lists those at hand, ORG/NAME is one of the Hugging Face hub"
        raise MissingInputError(f"{str(error).removesuffix('.')}; {hint}.") from None
    return model_of_file(file, own_vae=own_vae)


def model_of_file(file: WeightFile, *, own_vae: bool = True) -> ModelSource:
    """The model that a single file holds; without `own_vae`, it may lack that, and is taken to be of the usual one's
    latents. Raises BadDataError saying what it is instead."""
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    family = require_family(shapes, file.path, own_vae=own_vae)
    prefixes = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, **{text.part: text.prefix for text in family.texts}}
    if family.conditioner:
        prefixes[family.conditioner.part] = family.conditioner.prefix
    known = tuple(prefixes.values())
    if family.averaged and any(key.startswith(EMA_PREFIX) for key in shapes):
        prefixes["unet"] = EMA_PREFIX
    ignored = [key for key in file.tensors if not key.startswith(known) and not IGNORED_ORIGINAL.match(key)]
    if ignored:
        said = list_keys("has tensors of no known part, which are ignored", ignored)
        _log.warning("%s %s", shown(file.path), said)
    from ldmcli.checkpoints.single_file import config_of_file

    config = config_of_file(file, shapes, family)
    check_buildable(config, shown(file.path))
    return with_prediction_type(ModelSource(file.path, config, file, prefixes), config.schedule.prediction_type)


def with_prediction_type(source: ModelSource, prediction_type: str) -> ModelSource:
    """The source as a model of this prediction type, and of the size that its family has for that."""
    config = source.config
    family = next(family for family in FAMILIES if family.name == config.family)
    size = family.v_sample_size if prediction_type == "v_prediction" and source.single_file else None
    unet = dataclasses.replace(config.unet, sample_size=size) if size else config.unet
    schedule = dataclasses.replace(config.schedule, prediction_type=prediction_type)
    return dataclasses.replace(source, config=dataclasses.replace(config, unet=unet, schedule=schedule))


def open_part(folder: Path, part: str, *, half: bool = False, allow_pickle: bool = False) -> list[WeightFile]:
    """The validated weight files of one part of a diffusers model, its fp16 variant first where `half`."""
    stem = stem_of(part)
    found = next((name for name in weight_names(stem, half=half) if os.path.lexists(folder / name)), None)
    if found is None:
        pickles = [f"{name}{end}" for name in (stem, "pytorch_model") for end in (".bin", ".bin.index.json")]
        found = next((name for name in pickles if (folder / name).exists()), None)
        if found is None:
            raise MissingInputError(f"{shown(folder)} has no {stem}.safetensors; the model folder is incomplete.")
        if not allow_pickle:
            raise BadDataError(
                f"{shown(folder)} has its weights only as {found}, a pickle that could run code when opened; convert "
                f"it to safetensors, fetch {stem}.safetensors, or read it in torch's restricted way with "
                "--allow-pickle."
            )
    allow_pickle = ".bin" in found
    if found.endswith(".json"):
        return open_sharded(folder / found, allow_pickle=allow_pickle)
    return [open_weights(folder / found, allow_pickle=allow_pickle)]


def list_keys(what: str, keys: list[str]) -> str:
    """`what (a, b, c, d, e and 7 more)`: the first five keys, safe to print, and how many there are beside."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{what} ({', '.join(printable(key, 100) for key in keys[:5])}{more})"


def _open_folder(path: Path, allow_pickle: bool) -> ModelSource:
    if not os.access(path, os.R_OK | os.X_OK):
        raise MissingInputError(f"{shown(path)} is not readable; check its permissions.")
    if not (path / INDEX).is_file():
        inside = listing(path, ".safetensors", 1)
        hint = f"; did you mean {shown(path)}/{inside[0]}?" if inside else "."
        raise BadDataError(f"{shown(path)} is a folder without {INDEX}, so not a diffusers model{hint}")
    index = read_json(path / INDEX, folder_config.MAX_CONFIG_BYTES)
    folders = {part: other for part, other in OTHER_FOLDERS.items() if other in index}
    config = _folder_model(path, index, folders)
    check_buildable(config, shown(path))
    source = ModelSource(path, config, allow_pickle=allow_pickle, folders=folders)
    for part in source.parts:
        source.part(part)
    return source


def _folder_texts(path: Path, index: dict[str, Any], folders: Mapping[str, str]) -> list[TextEncoderConfig]:
    """The text encoders that a diffusers folder names, or CLIP's where it names none; none where the U-Net reads no
    text. Raises BadDataError where they are others."""
    kind = printable(str(index.get("_class_name", ""))) or "model"
    if "text_encoder" in folders:
        return [folder_config.bert_config(path / folders["text_encoder"] / "config.json")]
    if index.get("unet") == ["diffusers", folder_config.PLAIN_UNET]:
        return []
    classes = {name: index.get(name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    known = [["transformers", name] for name in ("CLIPTextModel", folder_config.WITH_PROJECTION)]
    named = {name: found for name, found in classes.items() if found not in (None, [None, None])}
    if any(found not in known for found in named.values()) or "transformer" in index:
        raise BadDataError(
            f"{shown(path)} is a {kind}, not a latent diffusion U-Net with a CLIP text encoder; this version reads "
            f"{READ}."
        )
    return [
        folder_config.text_encoder_config(path / part / "config.json", part, found[1])
        for part, found in (named or {"text_encoder": known[0]}).items()
    ]


def _folder_model(path: Path, index: dict[str, Any], folders: Mapping[str, str]) -> ModelConfig:
    """What a diffusers folder describes. Raises BadDataError where it is another kind of model."""
    kind = str(index.get("_class_name", ""))
    texts = _folder_texts(path, index, folders)
    mended = kind.startswith(_MENDING) and not kind.startswith(_NOT_MENDING)
    if texts:
        unet = folder_config.unet_config(path / "unet" / "config.json", texts[-1].projection_dim or 0, mended=mended)
    else:
        unet = folder_config.plain_unet_config(path / "unet" / "config.json")
    vae = folder_config.vae_config(path / folders.get("vae", "vae") / "config.json")
    family = _PIPELINES.get(kind) or family_of_unet(unet, bert=any(text.layout == "bert" for text in texts))
    if family.joins:
        unet = dataclasses.replace(unet, joins=family.joins)
        vae = dataclasses.replace(vae, scaling_factor=family.scaling_factor or 1.0)  # as diffusers' pipelines decode
    if unet.reads_sizes:  # XL reads the states before the last layer, as they are
        texts = [dataclasses.replace(text, skipped_layers=1, final_norm=False) for text in texts]
    elif not family.force_upcast:
        vae = dataclasses.replace(vae, force_upcast=False)
    reads_guidance = unet.guidance_dim is not None
    scheduler = index.get("scheduler")  # [library, class]
    found = folder_schedule(
        path / "scheduler" / "scheduler_config.json",
        scheduler[1] if isinstance(scheduler, list) and len(scheduler) == 2 else None,
        family.defaults,
        reads_guidance=reads_guidance,
        mended=mended,
    )
    return ModelConfig(
        family=family.name,
        unet=unet,
        vae=vae,
        text_encoders=tuple(texts),
        schedule=dataclasses.replace(found.schedule, xl=unet.reads_sizes),
        noising=_noising(path / family.noising.folder) if family.noising else None,
        conditioner=_folder_conditioner(path, family),
        zero_empty_negative=bool(index.get("force_zeros_for_empty_prompt", family.zero_empty_negative)),
        defaults=folder_config.own_defaults(path / GENERATION, found.defaults, reads_guidance=reads_guidance),
        notes=(found.guess, *found.notes) if found.guess and not (path / GENERATION).exists() else found.notes,
    )


def _folder_conditioner(path: Path, family: Family) -> ImageEmbeddingConfig | None:
    """What a folder's conditions other than prompts are: embeddings, for diffusers has no other."""
    if family.conditioner is None:
        return None
    return folder_config.image_embedding_config(path / family.conditioner.part / "config.json")


def _noising(folder: Path) -> ScheduleConfig:
    """How pictures to be enlarged, or their embeddings, are noised. Raises MissingInputError where nothing says so."""
    path = folder / "scheduler_config.json"
    if not os.path.lexists(path):
        raise MissingInputError(f"{shown(path)} is missing; the model folder is incomplete.")
    return folder_schedule(path, None, Defaults()).schedule


def _check_vocabulary(vocabulary: Vocabulary, size: int, where: str) -> None:
    """Every token must be one the text encoder has, and every merge must join tokens to a token."""
    tokens = vocabulary.ids
    for token, number in tokens.items():
        if isinstance(number, bool) or not 0 <= number < size:
            raise BadDataError(
                f"{where}: the tokenizer gives token {printable(repr(token))} the number {printable(str(number))}, and "
                f"the text encoder knows 0 to {size - 1}; they are not of one model."
            )
    for left, right in vocabulary.merges:
        texts = isinstance(left, str) and isinstance(right, str)
        if not texts or left not in tokens or right not in tokens or left + right not in tokens:
            raise BadDataError(
                f"{where}: the tokenizer merges {printable(repr(left))} and {printable(repr(right))}, which its "
                "vocabulary does not have."
            )
