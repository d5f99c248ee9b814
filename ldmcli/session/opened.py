"""The weights that a ModelSpec names: looked at, not read."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.checkpoints.source import ModelSource, PartSource, embedded_model, open_model, with_prediction_type
from ldmcli.checkpoints.vae_source import open_vae
from ldmcli.conditioning.chunks import TokenizedPrompt, tokenize
from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.conditioning.words import NO_WORDS, Word, Words
from ldmcli.config import TinyVAEConfig, VAEConfig
from ldmcli.disk.hashes import FileHashes
from ldmcli.errors import BadDataError, UsageError, printable
from ldmcli.hub.listing import find_model
from ldmcli.spec import REFINER_START, FittedRequest, GenerationRequest, ModelSpec, fit_to_model
from ldmcli.speed.memory import check_memory

if TYPE_CHECKING:
    from ldmcli.adapters.adapter import Use
    from ldmcli.adapters.embedding_words import EmbeddingWords
    from ldmcli.upscaling.upscaler import UpscalerFile

_log = logging.getLogger(__name__)
_OTHER_WEIGHTS = ("vae", "refiner", "prediction_type", "upscaler")  # beside the model, what a picture depends on


@dataclasses.dataclass(frozen=True)
class Opened:
    """What to draw with, as `spec` names it."""

    spec: ModelSpec
    model: ModelSource
    vae: PartSource[VAEConfig | TinyVAEConfig] | None = None
    refiner: ModelSource | None = None
    loras: "tuple[Use, ...]" = ()
    upscaler: "UpscalerFile | None" = None

    def fit(self, request: GenerationRequest, *, tiled: bool = False) -> FittedRequest:
        """The request with the model's own settings filled in. Raises UsageError where the model, or this machine's
        memory, cannot draw it; `tiled` pictures are decoded in little of that."""
        if self.refiner and request.refiner_start is None:
            request = dataclasses.replace(request, refiner_start=REFINER_START)
        elif not self.refiner and request.refiner_start is not None:
            raise UsageError("--refiner-start is for a model with a --refiner; name one, or leave it out.")
        fitted = fit_to_model(request, self.model.config)
        if note := self.model.config.schedule.of(fitted.sampler).note:
            _say_once(note)
        check_memory(self.model.config, fitted.width, fitted.height, tiled=tiled)
        self.words(fitted)
        if request.embeddings:
            shareable = tuple(map(_shareable, request.embeddings))
            fitted = dataclasses.replace(fitted, recorded=dataclasses.replace(fitted.recorded, embeddings=shareable))
        return fitted

    def words(self, request: GenerationRequest | FittedRequest) -> Words:
        """The words that stand for embeddings in prompts of `request`. Raises LdmError where one that it names is not
        there or not for the model; of the others none is opened."""
        adapters = [use.adapter for use in self.loras if use.adapter.bundled]
        if not (request.embeddings or self.spec.embedding_dir or adapters):
            return NO_WORDS
        return self._embedding_words.words(request.embeddings, adapters)

    @functools.cached_property
    def _embedding_words(self) -> "EmbeddingWords":
        from ldmcli.adapters.embedding_words import EmbeddingWords
        from ldmcli.adapters.embeddings import open_embedding

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
                "path": _shareable(word.name),
                "sha256": word.sha256(hashes),
            }
            for word in found
        ]

    def _tokenized(
        self, tokenizer: ClipTokenizer, text: str, request: GenerationRequest | FittedRequest
    ) -> TokenizedPrompt:
        chunked = request.on_long_prompt == "chunk"
        return tokenize(tokenizer, text, syntax=request.prompt_syntax, chunked=chunked, words=self.words(request))

    @property
    def token_limit(self) -> int:
        """How many tokens of a prompt the model reads, or of each chunk of it; begin and end marks not counted."""
        return self.model.config.text_encoders[0].max_length - 2

    def cut_text(self, text: str, request: GenerationRequest | FittedRequest) -> str:
        """What of a prompt of `request` the model does not read: "" if it reads all. Raises UsageError if something is
        cut off and the request says that this is an error."""
        prompts = [self._tokenized(tokenizer, text, request) for tokenizer in self.model.tokenizers]
        cut = max((prompt.cut_text for prompt in prompts), key=len)
        if cut and request.on_long_prompt == "error":
            raise UsageError(
                f"a prompt is longer than the {self.token_limit} tokens the model reads; too much: “{printable(cut)}”."
            )
        return cut

    def identity(self, sha256: str) -> dict[str, Any]:
        """What a picture says of the weights it was drawn with; `sha256` is the model's."""
        named = {"name": self.model.name, "path": _shareable(self.spec.model), "sha256": sha256}
        others = {name: getattr(self.spec, name) for name in _OTHER_WEIGHTS}
        loras = [
            {
                "name": use.adapter.path.stem,
                "path": _shareable(lora.name),
                "sha256": use.adapter.sha256,
                "weight": lora.weight,
                "text_weight": lora.text_weight,
            }
            for lora, use in zip(self.spec.loras, self.loras, strict=True)
        ]
        named |= {name: _shareable(value) for name, value in others.items() if value}
        if self.upscaler:
            named["upscaler_sha256"] = self.upscaler.sha256
        return named | ({"loras": loras} if loras else {})


def open_spec(spec: ModelSpec, *, half: bool) -> Opened:
    """Look at the headers of all that `spec` names, fetching models of the hub; `half` prefers their fp16 variants.
    Raises LdmError."""

    def located(name: str) -> Path:
        return find_model(name, half=half)

    path = embedded_model() if spec.model is None else located(spec.model)
    model = open_model(path, allow_pickle=spec.allow_pickle, own_vae=not spec.vae)
    if spec.prediction_type:
        model = with_prediction_type(model, spec.prediction_type)
    config = model.config
    _log.debug("%s: %s, prediction type %s", model.name, config.family, config.schedule.prediction_type)
    for note in config.notes:
        _say_once(note)
    vae = open_vae(located(spec.vae), config, allow_pickle=spec.allow_pickle) if spec.vae else None
    refiner = None
    if spec.refiner:
        refiner = open_model(located(spec.refiner), allow_pickle=spec.allow_pickle, own_vae=False)
        _check_refiner(model, refiner)
    loras = _opened_loras(spec, located) if spec.loras else ()
    return Opened(spec, model, vae, refiner, loras, _opened_upscaler(spec))


def _opened_loras(spec: ModelSpec, located: Callable[[str], Path]) -> "tuple[Use, ...]":
    from ldmcli.adapters.adapter import Use, open_adapter

    return tuple(
        Use(open_adapter(located(lora.name), allow_pickle=spec.allow_pickle), lora.weight, lora.text_weight)
        for lora in spec.loras
    )


def _opened_upscaler(spec: ModelSpec) -> "UpscalerFile | None":
    if not spec.upscaler:
        return None
    from ldmcli.upscaling.upscaler import open_upscaler

    return open_upscaler(spec.upscaler, allow_pickle=spec.allow_pickle)


@functools.cache
def _say_once(note: str) -> None:
    _log.warning("%s", note)


def _check_refiner(model: ModelSource, refiner: ModelSource) -> None:
    """Raises BadDataError where the two do not work on the same latents with the same steps."""
    one, other = model.config, refiner.config
    same = (
        one.unet.in_channels == other.unet.in_channels
        and one.vae.factor == other.vae.factor
        and one.vae.scaling_factor == other.vae.scaling_factor
        and one.schedule.training_steps == other.schedule.training_steps
    )
    if not same:
        raise BadDataError(
            f"{printable(str(refiner.path))} ({other.family}) cannot refine what {printable(str(model.path))} "
            f"({one.family}) begins: their latents differ."
        )


def _shareable(model: str | None) -> str:
    """A model's path as it may stand in a picture that is given away: without the name of the user's home."""
    if model is None:
        return ""
    path = Path(model)
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry of this user
        return model
    return str(Path("~") / path.relative_to(home)) if home != Path("/") and path.is_relative_to(home) else model
