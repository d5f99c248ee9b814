"""The weights that a ModelSpec names: looked at, not read."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.checkpoints.source import (
    CLASS_NAMES_ENDING,
    EMBEDDED_NAME,
    ModelSource,
    PartSource,
    embedded_model,
    open_model,
    with_prediction_type,
)
from ldmcli.conditioning.chunks import TokenizedPrompt, tokenize
from ldmcli.conditioning.lora_tags import check_negative, split_tags
from ldmcli.conditioning.syntax import parse
from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.conditioning.wordpiece import FOLDERS, VOCABULARY
from ldmcli.conditioning.words import NO_WORDS, Word, Words
from ldmcli.config import TinyVAEConfig, VAEConfig
from ldmcli.disk.hashes import FileHashes
from ldmcli.disk.opening import bad_file, without_home
from ldmcli.errors import BadDataError, LdmError, UsageError, printable
from ldmcli.fitting import FittedRequest, fit_to_model, idle_settings
from ldmcli.frozen import frozen
from ldmcli.hires import EMBEDDED, LANCZOS, LATENT
from ldmcli.named_files import if_there
from ldmcli.remarks import warn_once
from ldmcli.spec import REFINER_START, GenerationRequest, LoRA, ModelSpec
from ldmcli.speed.memory import check_memory, large

if TYPE_CHECKING:
    from ldmcli.adapters.adapter import Adapter, Use
    from ldmcli.adapters.embedding_words import EmbeddingWords
    from ldmcli.adapters.library import Library
    from ldmcli.session.steering_sources import SteeringSources
    from ldmcli.upscaling.upscaler import UpscalerFile

_log = logging.getLogger(__name__)
_SETTINGS = (".yaml", ".yml", ".json", ".vocab.txt", CLASS_NAMES_ENDING)  # endings of files beside weights
_MAX_STAMPED = 1000  # files of a folder
# Beside the model, what a picture depends on.
_OTHER_WEIGHTS = ("vae", "refiner", "prediction_type", "upscaler", "image_encoder")


@frozen
class Opened:
    """What to draw with, as `spec` names it."""

    spec: ModelSpec
    model: ModelSource
    vae: PartSource[VAEConfig | TinyVAEConfig] | None = None
    refiner: ModelSource | None = None
    upscaler: "UpscalerFile | None" = None
    paths: Mapping[str, Path] = dataclasses.field(default_factory=dict)  # where models are, by the names in `spec`
    stamps: tuple[object, ...] = ()  # of the files, as they were when they were opened
    _upscalers: "dict[str, UpscalerFile]" = dataclasses.field(default_factory=dict, compare=False, repr=False)
    _library: "list[Library]" = dataclasses.field(default_factory=list, compare=False, repr=False)  # one, once needed

    @property
    def adapters(self) -> "Library":
        """The adapters that requests name."""
        if not self._library:
            from ldmcli.adapters.library import Library
            from ldmcli.hub.listing import find_adapter

            self._library.append(Library(self.spec.lora_dir, find_adapter, allow_pickle=self.spec.allow_pickle))
        return self._library[0]

    def fit(self, request: GenerationRequest, hashes: FileHashes, *, tiled: bool = False) -> FittedRequest:
        """The request with the model's own settings filled in, and what it names looked at. Raises UsageError where the
        model, or this machine's memory, cannot draw it, and as `Library.found` and `open_control` do; `tiled` pictures
        are decoded in little of that."""
        if self.refiner and request.refiner_start is None:
            request = dataclasses.replace(request, refiner_start=REFINER_START)
        elif not self.refiner and request.refiner_start is not None:
            raise UsageError("--refiner-start is for a model with a --refiner; name one, or leave it out.")
        prompt, request = self._with_loras(self.model.class_names.numbered(request))
        fitted = dataclasses.replace(self._fitted(request, hashes), prompt=prompt)
        if fitted.is_steered:
            fitted = self.steering.checked(fitted, hashes)
        if self.spec.image_encoder and not (request.ip_adapter or "image_encoder" in dict(fitted.inputs)):
            warn_once(_log, "image_encoder is for a request with an ip_adapter, and changes nothing without one")
        if note := self.model.config.schedule.of(fitted.sampler).note:
            warn_once(_log, note)
        check_memory(self.model.config.vae, *fitted.final_size, tiled=tiled)
        if much := large(self.model.config, *fitted.final_size):
            warn_once(_log, much)
        self.words(fitted)
        if request.embeddings:
            shareable = tuple(map(without_home, request.embeddings))
            fitted = dataclasses.replace(fitted, recorded=dataclasses.replace(fitted.recorded, embeddings=shareable))
        return fitted

    def _with_loras(self, request: GenerationRequest) -> tuple[str, GenerationRequest]:
        """The prompt without what names LoRAs, and the request with all its LoRAs found."""
        prompt, named = request.prompt, tuple[LoRA, ...]()
        if request.prompt_syntax == "weighted":
            prompt, named = split_tags(request.prompt)
            check_negative(request.negative_prompt)
        if not named and not request.loras:
            return prompt, request
        known = {lora.name: lora for lora in request.loras if lora.in_prompt}
        lost = known.keys() - {lora.name for lora in named}
        if lost and request.prompt:  # settings are fitted without prompts too
            name = printable(min(lost))
            raise UsageError(f"the LoRA {name} is said to be named by the prompt, and is not; leave in_prompt out.")
        named = tuple(
            dataclasses.replace(lora, path=known[lora.name].path, sha256=known[lora.name].sha256)
            if lora.name in known
            else lora
            for lora in named
        )
        loras = (*(lora for lora in request.loras if not lora.in_prompt or lora.name in lost), *named)
        found = tuple(map(self.adapters.found, loras))
        for lora in found:
            self._check_lora(self.adapters.adapter(lora), request)
        return prompt, dataclasses.replace(request, loras=found)

    def _check_lora(self, adapter: "Adapter", request: GenerationRequest) -> None:
        """Raise BadDataError where the shapes tell that an adapter is for another family; say what it wants."""
        from ldmcli.adapters.facts import base_family, wish

        models = [source.config for source in (self.model, self.refiner) if source]
        width = adapter.context_width
        if width and width not in [config.unet.context_dim for config in models]:
            own = models[0].unet.context_dim
            what = f"is for {base_family(adapter) or 'a model'} with text of {width} numbers a token"
            what += f", and the model is {models[0].family} with {own}"
            raise bad_file(adapter.path, what, "use one that was made for it")
        if wanted := wish(adapter, request):
            warn_once(_log, wanted)

    def uses(self, loras: Sequence[LoRA]) -> "list[Use]":
        """What is to be merged for these LoRAs. Raises as `Library.found` does."""
        if not loras:
            return []
        from ldmcli.adapters.adapter import Use

        return [Use(self.adapters.adapter(lora), lora.weight, lora.text_weight) for lora in loras]

    def words(self, request: GenerationRequest | FittedRequest) -> Words:
        """The words that stand for embeddings in prompts of `request`. Raises LdmError where one that it names is not
        there or not for the model; of the others none is opened."""
        tags = split_tags(request.prompt)[1] if request.prompt_syntax == "weighted" else ()
        named = (self.adapters.adapter(lora) for lora in (*request.loras, *tags))  # which imports nothing without any
        adapters = [adapter for adapter in named if adapter.bundled]
        if "text" not in self.model.config.conditions:
            return NO_WORDS
        if not (request.embeddings or self.spec.embedding_dir or adapters):
            return NO_WORDS
        return self._embedding_words.words(request.embeddings, adapters)

    @functools.cached_property
    def _embedding_words(self) -> "EmbeddingWords":
        from ldmcli.adapters.embedding_words import EmbeddingWords
        from ldmcli.adapters.embeddings import open_embedding
        from ldmcli.hub.listing import find_model

        config, folder = self.model.config, self.spec.embedding_dir
        return EmbeddingWords(
            config.text_encoders,
            config.family,
            lambda name: open_embedding(find_model(name, half=False), allow_pickle=self.spec.allow_pickle),
            folder=None if folder is None else Path(folder).expanduser(),
        )

    def embeddings(
        self, request: GenerationRequest | FittedRequest, hashes: FileHashes, *, named: bool = False
    ) -> list[dict[str, str]]:
        """What a picture says of the embeddings that its prompts use, but for those that come with a LoRA; with `named`
        also of all that the request names. Raises LdmError."""
        if not self.words(request):
            return []
        from ldmcli.adapters.embedding_words import EmbeddingWord

        used: dict[Word, None] = dict.fromkeys(
            self._embedding_words.named(request.embeddings).values() if named else ()
        )
        for text, tokenizer in itertools.product((request.prompt, request.negative_prompt), self.model.tokenizers):
            used |= dict.fromkeys(self._tokenized(tokenizer, text, request).words)
        found = [word for word in used if isinstance(word, EmbeddingWord) and word.name]
        return [
            {
                "name": word.embedding.path.stem,
                "word": word.text,
                "path": without_home(word.name),
                "sha256": word.sha256(hashes),
            }
            for word in found
        ]

    def _tokenized(
        self, tokenizer: ClipTokenizer, text: str, request: GenerationRequest | FittedRequest
    ) -> TokenizedPrompt:
        chunked = request.on_long_prompt == "chunk"
        if request.prompt_syntax == "weighted":
            text = split_tags(text)[0]
        return tokenize(tokenizer, text, syntax=request.prompt_syntax, chunked=chunked, words=self.words(request))

    def _fitted(self, request: GenerationRequest, hashes: FileHashes) -> FittedRequest:
        inputs, size = {}, None
        if request.image is not None:
            from ldmcli.images.canvas import input_facts

            facts = input_facts(request)
            inputs = {name: each.sha256 for name, each in facts.items()}
            size = facts["image"].width, facts["image"].height
        if request.map is not None:
            from ldmcli.images.class_map import map_facts

            facts_of_map = map_facts(request, self.model.config.conditioner)
            inputs["map"], size = facts_of_map.sha256, (facts_of_map.width, facts_of_map.height)
        fitted = fit_to_model(request, self.model.config, size)
        if fitted.image_embedding is not None:
            inputs |= self.steering.embedding(request, hashes)
        for sentence in idle_settings(fitted):
            warn_once(_log, sentence)
        if request.image_guidance_scale not in (None, 1.0) and fitted.guidance_scale == 1:
            warn_once(_log, "image_guidance_scale changes nothing where guidance_scale is 1")
        if fitted.hires and fitted.hires_upscaler not in (LATENT, LANCZOS):
            inputs["hires_upscaler"] = self.hires_upscaler(fitted.hires_upscaler).sha256
        if fitted.encodes or (request.image is not None and fitted.enlarges == 1):
            self.encoder  # noqa: B018  to know that there is one
        return dataclasses.replace(fitted, inputs=tuple(inputs.items()))

    @functools.cached_property
    def steering(self) -> "SteeringSources":
        """The networks that requests name, and what those read."""
        from ldmcli.session.steering_sources import SteeringSources

        return SteeringSources(self.spec, self.model.config, self.model.path)

    def hires_upscaler(self, name: str) -> "UpscalerFile":
        """The network that second passes name; another once its file is. Raises as `open_upscaler` does."""
        if name not in self._upscalers or self._upscalers[name].weights.changed:
            self._upscalers[name] = _opened_upscaler(name, self.spec, self.model)
        return self._upscalers[name]

    @property
    def resolved(self) -> ModelSpec:
        """The same weights, named so that they are found from anywhere."""
        names = {name: getattr(self.spec, name) for name in ("model", "vae", "refiner")}
        found: dict[str, Any] = {name: _real(self.paths[typed]) for name, typed in names.items() if typed}
        if "model" in found and self.model.path.name == EMBEDDED_NAME and self.model.path == embedded_model():
            found["model"] = None
        folders = {
            name: getattr(self.spec, name) for name in ("lora_dir", "embedding_dir", "upscaler", "image_encoder")
        }
        found |= {name: if_there(typed) for name, typed in folders.items() if typed and typed != EMBEDDED}
        return dataclasses.replace(self.spec, **found)

    @property
    def changed(self) -> bool:
        """Whether a file of the weights or their settings is another now, or gone."""
        return self.stamps != _stamps(self)

    def forget_words(self) -> None:
        """Look at embeddings anew when they are next asked for."""
        self.__dict__.pop("_embedding_words", None)

    @property
    def encoder(self) -> PartSource[Any]:
        """The autoencoder that pictures are read with: the model's own where `vae` can only decode. Raises UsageError
        where there is none."""
        own = self.vae is None or not isinstance(self.vae.config, VAEConfig)
        with contextlib.suppress(LdmError, KeyError):
            found: Any = self.model.part("vae") if own else self.vae
            if f"{found.prefix}encoder.conv_in.weight" in found.keys():  # noqa: SIM118  no dictionary
                return found
        raise UsageError("the autoencoder only decodes, and pictures are to be read; name one that can with --vae.")

    @property
    def token_limit(self) -> int:
        """How many tokens of a prompt the model reads, or of each chunk of it; begin and end marks not counted."""
        return max((text.max_length - 2 for text in self.model.config.text_encoders[:1]), default=0)

    def cut_text(self, text: str, request: GenerationRequest | FittedRequest) -> str:
        """What of a prompt of `request` the model does not read: "" if it reads all. Raises UsageError if something is
        cut off and the request says that this is an error."""
        prompts = [self._tokenized(tokenizer, text, request) for tokenizer in self.model.tokenizers]
        cut = max((prompt.cut_text for prompt in prompts), key=len, default="")
        if cut and request.on_long_prompt == "error":
            raise UsageError(
                f"a prompt is longer than the {self.token_limit} tokens the model reads; too much: “{printable(cut)}”."
            )
        return cut

    def unknown_words(self, request: GenerationRequest | FittedRequest) -> list[str]:
        """Words of the prompt that the model does not know, by the list in its folder; none without one, nor where
        LoRAs may have taught it more."""
        if not self.model.word_list.names or request.loras:
            return []
        text = request.prompt
        if request.prompt_syntax == "weighted":
            text = " ".join(piece.text for piece in parse(split_tags(text)[0]))
        return self.model.word_list.unknown(text, (word.text for word in self.words(request).values()))

    def identity(self, sha256: str) -> dict[str, Any]:
        """What a picture says of the weights it was drawn with; `sha256` is the model's."""
        named = {"name": self.model.name, "path": without_home(self.spec.model or ""), "sha256": sha256}
        others = {name: getattr(self.spec, name) for name in _OTHER_WEIGHTS}
        named |= {name: without_home(value) for name, value in others.items() if value}
        return named | ({"upscaler_sha256": self.upscaler.sha256} if self.upscaler else {})


def _real(path: Path) -> str:
    """A path as it is found from any folder, the same one by whatever links; a file's own name stays, which tells its
    kind."""
    return os.path.realpath(path) if os.path.isdir(path) else os.path.join(os.path.realpath(path.parent), path.name)


def open_spec(spec: ModelSpec, *, half: bool, fetched: Mapping[str, str] | None = None) -> Opened:
    """Look at the headers of all that `spec` names, fetching models of the hub, but for those that `fetched` has a path
    of; `half` prefers their fp16 variants. Raises LdmError."""
    paths = {name: Path(path) for name, path in (fetched or {}).items()}

    def located(name: str) -> Path:
        if name not in paths:
            from ldmcli.hub.listing import find_model

            paths[name] = find_model(name, half=half)
        return paths[name]

    path = embedded_model() if spec.model is None else located(spec.model)
    model = open_model(path, allow_pickle=spec.allow_pickle, own_vae=spec.vae is None)
    if spec.prediction_type:
        model = with_prediction_type(model, spec.prediction_type)
    config = model.config
    _log.debug("%s: %s, prediction type %s", model.name, config.family, config.schedule.prediction_type)
    for note in config.notes:
        warn_once(_log, note)
    vae = refiner = None
    if spec.vae is not None:
        from ldmcli.checkpoints.vae_source import open_vae

        vae = open_vae(located(spec.vae), config, allow_pickle=spec.allow_pickle)
    if spec.refiner is not None:
        refiner = open_model(located(spec.refiner), allow_pickle=spec.allow_pickle, own_vae=False)
        _check_refiner(model, refiner)
    upscaler = None if spec.upscaler is None else _opened_upscaler(spec.upscaler, spec, model)
    opened = Opened(spec, model, vae, refiner, upscaler, paths)
    return dataclasses.replace(opened, stamps=_stamps(opened))


def _stamps(opened: Opened) -> tuple[object, ...]:
    """What tells whether the files of the weights, and those beside them that say how to read them, have changed."""
    upscaler = opened.upscaler and opened.upscaler.weights
    paths = [each.path for each in (opened.model, opened.vae, opened.refiner, upscaler) if each]
    found: list[object] = []
    for path in paths:
        files = [path, *(path.parent / name / VOCABULARY for name in ("", *FOLDERS))]
        files += [path.with_suffix(ending) for ending in _SETTINGS]
        if os.path.isdir(path):
            files = sorted([*path.glob("*"), *path.glob("*/*")])[:_MAX_STAMPED]  # through links, unlike os.walk
        for file in files:
            with contextlib.suppress(OSError):
                status = os.stat(file)
                if stat.S_ISDIR(status.st_mode):
                    continue
                stamp = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
                found.append((file, *stamp))
    return tuple(found)


def _opened_upscaler(name: str, spec: ModelSpec, model: ModelSource) -> "UpscalerFile":
    from ldmcli.upscaling.upscaler import EMBEDDED_UPSCALER, open_upscaler

    if name == EMBEDDED_UPSCALER and model.upscaler:
        name = str(model.upscaler)
    return open_upscaler(name, allow_pickle=spec.allow_pickle)


def _check_refiner(model: ModelSource, refiner: ModelSource) -> None:
    """Raises BadDataError where the two do not work on the same latents with the same steps."""
    one, other = model.config, refiner.config
    for source in (model, refiner):
        if "text" not in source.config.conditions:
            raise bad_file(source.path, "reads no prompts, and a refiner goes on with them", "leave --refiner out")
    same = (
        one.unet.out_channels == other.unet.in_channels
        and one.vae.factor == other.vae.factor
        and one.vae.scaling_factor == other.vae.scaling_factor
        and one.schedule.training_steps == other.schedule.training_steps
    )
    if not same:
        raise BadDataError(
            f"{printable(str(refiner.path))} ({other.family}) cannot refine what {printable(str(model.path))} "
            f"({one.family}) begins: their latents differ."
        )
